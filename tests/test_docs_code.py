"""The code of the README and the documentation's pages runs; commands have options that there are."""

import inspect
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.run import get_args_parser

import pyrogaps as pg
from pyrogaps.cli.command import main as command
from pyrogaps.guides.amortized import AmortizedNormal
from pyrogaps.models.vae import VAE
from tests.pages import PAGES, ROOT, SOURCES, blocks, files, name_of

# Pages whose programs take more than a few seconds, also with small budgets.
SLOW = {"docs/howto/partial.md", "docs/howto/shared.md", "docs/howto/split.md"}
SMALL: dict[str, Any] = {
    "refinement": pg.Refinement(num_steps=4, num_selection=8),
    "evidence": pg.Ladder(tolerance=1.0, max_evaluations=100),
    "conditioning": pg.Conditioning(num_completions=4, max_completions=4),
    "num_particles": 30,
    "referee": False,
    "progress": False,
}
# Pages whose programs need an optional library, whose own warnings do not count.
NEEDED = {"docs/howto/cells.md": "scvi"}
# Numbers of epochs and steps, and what takes their place.
BUDGETS = {
    r"range\(\d\d+\)": "range(2)",
    r"num_(epochs|steps)=\d+": r"num_\1=2",
    r"num_simulated=\d+": "num_simulated=4",
    r"digits\[:1500\], digits\[1500:\]": "digits[:40], digits[40:44]",
    r"max_rounds=\d+": "max_rounds=1",
    r"num_completions=\d+": "num_completions=4, max_completions=4",
}


def small(function: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    """`function` with small budgets where a page does not set its own."""

    def call(*args: Any, **kwargs: Any) -> Any:
        taken = [*inspect.signature(function).parameters][: len(args)]
        return function(*args, **{**{k: v for k, v in options.items() if k not in taken}, **kwargs})

    return call


class Half(AmortizedNormal):
    """A guide that is shown the first half of x."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x * MASK)


MASK = torch.arange(16) < 8


def given() -> dict[str, Any]:
    """What pages speak of without saying how it was made: a trained model, a guide and data."""
    x = (torch.rand(24, 16) < 0.4).float()
    guide = Half(16, 2, [8])
    return {
        "__name__": "page",
        "pg": pg,
        "model": VAE(16, 2, [8]),
        "guide": guide,
        "x": x[:4],
        "x_train": x,
        "x_test": x[:4],
        "mask": MASK,
    }


def with_code() -> list[Any]:
    pages = [page for page in (ROOT / "README.md", *PAGES) if blocks(page, "python")]
    return [pytest.param(page, id=name_of(page), marks=marks_of(name_of(page))) for page in pages]


def marks_of(page: str) -> list[Any]:
    if page not in NEEDED:
        return [pytest.mark.slow] * (page in SLOW)
    missing = find_spec(NEEDED[page]) is None
    without = pytest.mark.skipif(missing, reason=f"{NEEDED[page]} is not installed")
    return [without, pytest.mark.filterwarnings("ignore:::(?!pyrogaps)")]


@pytest.fixture
def no_modules_left() -> Iterator[None]:
    """A page's own modules and their folder are gone afterwards: other tests import modules of these names."""
    own = [name.removesuffix(".py") for page in PAGES for name in files(page) if name.endswith(".py")]
    path = [*sys.path]
    yield
    sys.path[:] = path
    for name in own:
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("brief_check", "no_modules_left")
@pytest.mark.parametrize("page", with_code())
def test_the_code_of_a_page_runs(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All its blocks, in order, in one namespace, with small budgets."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pg, "decompose", small(pg.decompose, SMALL))
    quick = {name: SMALL[name] for name in ("evidence", "refinement", "referee")}
    monkeypatch.setattr(pg, "log_evidence", small(pg.log_evidence, quick))
    monkeypatch.setattr(pg, "calibrate", small(pg.calibrate, {"num_simulated": 40, "num_draws": 100}))
    shared = {"evidence": pg.AIS(4, 4), "refinement": SMALL["refinement"], "settings": SMALL["conditioning"]}
    monkeypatch.setattr(pg, "shared_posterior", small(pg.shared_posterior, {**shared, "num_particles": 30}))
    retraining = pg.Retraining(pg.Training(num_epochs=1), num_restarts=0, max_rounds=1, num_datapoints=4)
    monkeypatch.setattr(pg, "Split", small(pg.Split, {"retraining": retraining}))
    monkeypatch.setattr(pg, "train", small(pg.train, {"num_epochs": 2, "progress": False}))
    names = given()
    for number, block in enumerate(blocks(page, "python"), 1):
        for pattern, budget in BUDGETS.items():
            block = re.sub(pattern, budget, block)
        exec(compile(block, f"{name_of(page)}, block {number}", "exec"), names)


def commands() -> Iterator[Any]:
    for page in SOURCES:
        for text in [*blocks(page, "bash"), *blocks(page, "sh")]:
            lines = text.replace("\\\n", " ").splitlines()
            yield from (pytest.param(page, line, id=f"{name_of(page)}: {line[:60]}") for line in lines if line.strip())


def write_files(page: Path, folder: Path, *changes: tuple[str, str]) -> None:
    """Write the files that a page shows to `folder`, with small budgets."""
    for name, text in files(page).items():
        for before, after in changes:
            text = text.replace(before, after)
        (folder / name).write_text(text, "utf-8")


@pytest.mark.usefixtures("no_modules_left")
@pytest.mark.parametrize(("page", "line"), [*commands()])
def test_a_command_is_one(
    page: Path, line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its options and the recipe or script are known, or it is one of those that .ci/run runs."""
    monkeypatch.chdir(tmp_path)
    write_files(page, tmp_path)
    program = line.split(" # ")[0].strip().replace("[RECIPE] [options]", "")
    before, found, arguments = program.partition("-m pyrogaps.eval")
    if before.startswith("torchrun"):
        options = get_args_parser().parse_args([*before.split()[1:], *["script.py"] * bool(found)])
        assert found or (tmp_path / options.training_script).exists()
    elif not found and not program.startswith("pyrogaps"):
        assert any(known in program for known in ("-m pytest", "sphinx-build", "git clone")), program
    if program.startswith("pyrogaps") or found:
        given = shlex.split(arguments if found else program.removeprefix("pyrogaps"))
        if given[:1] in (["compare"], ["report"]):  # of runs that are not there
            assert command(given) == 2
            assert f"{given[1]}" in capsys.readouterr().err
        else:
            assert command([*given, *["--print_config"] * (given[:1] != ["recipes"])]) == 0, capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1], ids=["script", "recipe"])
def test_ones_own_model_runs_in_two_processes(number: int, tmp_path: Path) -> None:
    """The commands of the page on large data, from the files that it shows."""
    page = ROOT / "docs/howto/large.md"
    write_files(page, tmp_path, ("[:1500], digits[1500:]", "[:100], digits[100:108]"), ("50", "2"))
    line = [text.strip() for text in blocks(page, "bash") if "gaps.py" in text or "mine.yaml" in text][number]
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", *line.split()[1:]]
    ended = subprocess.run(
        program, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=240
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("├─") == 1  # one process prints the tree
    saved = tmp_path / ("gaps.nc", "runs/mine/ledger.nc")[number]
    assert pg.GapLedger.load(saved).provenance["num_datapoints"] == 8
