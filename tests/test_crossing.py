"""Every guide of the zoo with every feature, and through the command, stopped and started again.

A part of the table runs always: what is quick, and what once failed. `PYROGAPS_CROSSING=all` runs the whole of it, in
about half an hour: `PYROGAPS_CROSSING=all python -m pytest tests/test_crossing.py`. With the same variable,
`python -m tests.crossing` prints it, with the refusals.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xarray as xr
import yaml

from pyrogaps.chunk_cache import ChunkCache
from pyrogaps.eval import main
from pyrogaps.streams import Chunk
from tests.commands import MODULE, RESULTS, command, ledger
from tests.crossing import COMMANDS, DATA, FEATURES, GUIDES, WHOLE, check, expected, recipe

KEPT = {
    ("AmortizedAuxiliaryFlow", "cache"),
    ("AmortizedAuxiliaryFlow", "split"),
    ("StructuredNormal, filter", "split"),
    ("AutoLocalFlow", "certificate"),
    ("AutoMultivariateNormal, one datapoint", "certificate"),
}
ARGUMENTS = ("crossed.yaml", "--quiet", "--out")


def kept(guide: str, feature: str) -> bool:
    """Whether a pair takes no time, or once failed."""
    quick = feature.startswith(("train", "to_datatree")) or expected(guide, feature) is not None
    return quick or (guide, feature) in KEPT


PAIRS = [(guide, feature) for guide in GUIDES for feature in FEATURES if WHOLE or kept(guide, feature)]


@pytest.mark.parametrize(("guide", "feature"), PAIRS)
@pytest.mark.usefixtures("brief_check")
def test_it_answers_or_is_refused_for_a_reason(guide: str, feature: str) -> None:
    said, wanted = check(guide, feature), expected(guide, feature)
    if wanted is None:
        assert said is None
    else:
        assert said is not None and wanted in said


def killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run in a process of its own, killed when the first chunk was kept."""
    run = command(*ARGUMENTS, "stopped", INTERRUPT="SIGKILL stopped/parts/*.npz")
    assert run.returncode == -9, run.stderr


def interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run in this process, which saves the start of another, interrupted in its second chunk."""
    get = ChunkCache.get

    def first_alone(self: ChunkCache, chunk: Chunk, *args: Any) -> Any:
        if chunk.start:
            raise KeyboardInterrupt
        return get(self, chunk, *args)

    with monkeypatch.context() as patch:
        patch.setattr(ChunkCache, "get", first_alone)
        assert main([*ARGUMENTS, "stopped"]) == 130


FEW = [
    pytest.param("AmortizedAuxiliaryFlow", killed, marks=pytest.mark.slow),
    ("AmortizedMixture", interrupted),
    ("StructuredNormal, filter", interrupted),
]
STOPS = [(guide, killed) for guide in COMMANDS] if WHOLE else FEW


@pytest.mark.parametrize(("guide", "stop"), STOPS)
def test_a_stopped_run_continues_to_the_same_ledger(
    guide: str, stop: Callable[[pytest.MonkeyPatch], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The data are those of a module beside the recipe."""
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.delitem(sys.modules, "crossed", raising=False)
    monkeypatch.chdir(tmp_path)
    Path("crossed.py").write_text(MODULE + DATA)
    Path("crossed.yaml").write_text(yaml.safe_dump(recipe(guide)))
    stop(monkeypatch)
    assert list(Path("stopped/parts").glob("*.npz"))
    assert not Path("stopped/ledger.nc").exists()
    for folder in ("stopped", "unbroken"):
        assert main([*ARGUMENTS, folder]) == 0
        assert sorted(os.listdir(folder)) == RESULTS
    xr.testing.assert_identical(ledger("stopped"), ledger("unbroken"))
    sys.modules.pop("crossed", None)
