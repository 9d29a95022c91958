"""What goes wrong outside the program: full disks, shut folders, damaged files, two runs in one folder.

One clear line each; no good result is lost, and the same command goes on from there.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import xarray as xr
import yaml

from pyrogaps.cli.run_folder import PARTS
from pyrogaps.eval import main
from tests.commands import MODULE, RECIPE, RESULTS, command, ledger

# A limit on the size of files fails writes as a full disk does, at a size that the test chooses.
LIMIT = """
import os, resource
if "MOST_BYTES" in os.environ:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(os.environ["MOST_BYTES"]),) * 2)
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "mine.py").write_text(LIMIT + MODULE)
    (tmp_path / "linear.yaml").write_text(yaml.safe_dump(RECIPE))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    return "linear.yaml"


def said(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("pyrogaps: ")]


@pytest.mark.slow
def test_a_disk_that_fills_up(recipe: str) -> None:
    """At the checkpoint, at the first chunk, at the ledger: what was there before stays, and is gone on from."""
    assert command(recipe, "--quiet", "--out", "whole").returncode == 0
    stages = ((1500, "training.pt"), (9000, "parts"), (40_000, "ledger.nc"))
    for most, file in stages:
        told = command(recipe, "--quiet", "--out", "full", MOST_BYTES=str(most))
        assert told.returncode == 2, told.stderr
        (line,) = said(told.stderr)
        assert file in line and "cannot be written: File too large" in line
        assert not Path("full/ledger.nc").exists()
        assert not [path for path in Path("full").rglob("*") if "tmp" in path.name or "unfinished" in path.name]
    assert command(recipe, "--quiet", "--out", "full").returncode == 0
    assert sorted(os.listdir("full")) == RESULTS
    xr.testing.assert_identical(ledger("full"), ledger("whole"))


@pytest.mark.slow
def test_a_disk_too_full_for_the_pictures(recipe: str) -> None:
    told = command(recipe, "--quiet", "--out", "full", MOST_BYTES="70000")
    assert told.returncode == 2
    assert "full/gaps.png: cannot be written: File too large" in said(told.stderr)[0]
    before = Path("full/ledger.nc").read_bytes()
    assert command(recipe, "--quiet", "--out", "full").returncode == 0
    assert Path("full/ledger.nc").read_bytes() == before


def test_a_folder_that_cannot_be_made(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").write_text("mine")
    assert main([recipe, "--quiet", "--out", "file/run"]) == 2
    assert said(capsys.readouterr().err) == [
        "pyrogaps: cannot write to file/run: Not a directory. Choose another --out"
    ]
    assert Path("file").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for root")
def test_a_read_only_folder(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("shut").mkdir(mode=0o555)
    assert main([recipe, "--quiet", "--out", "shut/run"]) == 2
    assert "cannot write to shut/run: Permission denied; choose another --out" in capsys.readouterr().err


@pytest.mark.slow
def test_a_damaged_part_is_measured_anew(recipe: str) -> None:
    assert command(recipe, "--quiet", "--out", "whole").returncode == 0
    told = command(recipe, "--quiet", "--out", "torn", INTERRUPT=f"SIGKILL torn/{PARTS}/*.npz")
    assert told.returncode == -9
    part = min(Path("torn", PARTS).glob("*.npz"))
    part.write_bytes(part.read_bytes()[:-100] + b"x" * 100)
    told = command(recipe, "--quiet", "--out", "torn")
    assert told.returncode == 0
    assert said(told.stderr) == [f"pyrogaps: {part} is damaged, so its datapoints are measured again"]
    xr.testing.assert_identical(ledger("torn"), ledger("whole"))


@pytest.mark.slow
def test_two_runs_into_one_folder(recipe: str) -> None:
    long = [recipe, "--quiet", "--training.num_epochs", "100000", "--out", "shared"]
    first = subprocess.Popen(
        [sys.executable, "-m", "pyrogaps.eval", *long],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        stderr=subprocess.DEVNULL,
    )
    try:
        while not Path("shared/training.pt").exists():
            assert first.poll() is None
            time.sleep(0.1)
        for more in ([], ["--overwrite"]):
            told = command(*long, *more)
            assert told.returncode == 2
            assert said(told.stderr) == [
                "pyrogaps: shared: another run is writing there. Wait for it, or choose another --out"
            ]
        assert Path("shared/training.pt").exists()
        assert first.poll() is None
    finally:
        first.kill()
        first.wait()
    # A lock goes with whoever held it.
    assert command(*long, "--overwrite", "--training.num_epochs", "2").returncode == 0
