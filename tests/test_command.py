"""The command `pyrogaps`: its companions, help in sections, pictures by their endings, and output in a log."""

import re
import subprocess
import sys
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import pyrogaps as pg
from pyrogaps import run as run_module
from pyrogaps.cli import console
from pyrogaps.cli.command import COMMANDS, main
from pyrogaps.cli.documents import shipped
from pyrogaps.cli.help import TRAINING, overview, section_text
from pyrogaps.cli.options import FLAGS, VALUES
from pyrogaps.cli.recipe import KINDS, SECTIONS
from pyrogaps.run import Bar
from pyrogaps.training import Training
from tests.commands import MODULE, RECIPE
from tests.references import WrongEncoder, anisotropic, draws_of

ROOT = Path(__file__).parents[1]
SCREEN, WIDTH = 40, 120
NAMES = ["options", "fields", "processes", "compare", "report", "recipes", "eval", *SECTIONS]


def said(capsys: Any, *arguments: str, code: int = 0) -> str:
    """What the command prints; of a mistake, its one line."""
    assert main([*arguments]) == code
    out, err = capsys.readouterr()
    assert (err if code == 0 else out) == "" and (code == 0 or err.count("\n") == 1)
    return str(out if code == 0 else err)


def test_the_version_is_in_one_place(capsys: Any) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    assert "version" not in project["project"] and project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "pyrogaps.version.__version__"}
    assert said(capsys, "--version") == f"pyrogaps {pg.__version__}\n"
    assert re.fullmatch(r"\d+\.\d+\.\d+", pg.__version__)
    assert project["project"]["scripts"] == {"pyrogaps": "pyrogaps.cli.command:main"}
    found = [path for path in (ROOT / "pyrogaps").rglob("*.py") if f'"{pg.__version__}"' in path.read_text("utf-8")]
    assert found == [ROOT / "pyrogaps" / "version.py"]


# Help


@pytest.mark.parametrize("name", NAMES)
def test_a_section_fits_a_screen(capsys: Any, name: str) -> None:
    text = said(capsys, "--help", name)
    assert len(text.splitlines()) <= SCREEN and max(map(len, text.splitlines())) <= WIDTH


def test_the_overview_names_all_sections_and_commands(capsys: Any) -> None:
    text = said(capsys, "--help")
    assert text == said(capsys, "-h") == overview() + "\n" and len(text.splitlines()) <= SCREEN
    for name in [*NAMES, *COMMANDS, "--version"]:
        assert name in text


def test_help_names_every_option_and_field() -> None:
    texts = {name: section_text(name) for name in NAMES}
    for option in {*FLAGS, *VALUES}:
        assert f"--{option}" in texts["options"]
    for name, section in SECTIONS.items():
        for field in fields(section):
            line = next(line for line in texts[name].splitlines() if line.startswith(f"  --{name}.{field.name} "))
            assert len(line.split()) > 2, line  # with a description
    assert {*TRAINING} == {field.name for field in fields(Training)}
    for name in KINDS:
        assert f"--{name} " in texts["fields"] or name in texts["fields"].rpartition("Sections")[2]


def test_help_is_asked_for_in_several_ways(capsys: Any) -> None:
    assert said(capsys, "digits", "--help", "training") == said(capsys, "--help", "training")
    assert said(capsys, "eval", "--help") == said(capsys, "--help")
    assert said(capsys, "compare", "--help") == said(capsys, "--help", "compare")
    assert "Did you mean 'training'?" in said(capsys, "--help", "trainin", code=2)
    assert "one section at a time" in said(capsys, "--help", "training", "mapa", code=2)


def test_recipes_are_listed_with_a_line_each(capsys: Any) -> None:
    lines = said(capsys, "recipes").splitlines()
    assert [line.split()[0] for line in lines] == shipped()
    assert all(len(line.split()) > 4 and len(line) <= 150 for line in lines)
    assert "unexpected argument 'x'" in said(capsys, "recipes", "x", code=2)


# Runs


def test_what_is_no_other_command_is_a_run(capsys: Any) -> None:
    given = ["--seed", "7", "--print_config"]
    expected = said(capsys, *given)
    assert yaml.safe_load(expected)["seed"] == 7
    for words in (["eval"], ["digits"], ["eval", "digits"]):
        assert said(capsys, *words, *given) == expected
    assert "nosuch" in said(capsys, "nosuch", code=2)
    assert "must end in .png, .svg or .pdf, got 'a.gif'" in said(capsys, "digits", "--picture", "a.gif", code=2)


def test_a_run_in_a_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole lines, one a stage; the verdict after the table; the picture by its ending; the same by both entries."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(MODULE)
    Path("linear.yaml").write_text(yaml.safe_dump({**RECIPE, "referee": False}))
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    runs = {
        name: subprocess.run(
            [sys.executable, "-m", *entry, "linear.yaml", "--picture", f"pictures/{name}.svg", "--out", name],
            env=environment, capture_output=True, text=True, timeout=300, check=True,
        )
        for name, entry in (("a", ["pyrogaps"]), ("b", ["pyrogaps.eval"]))
    }  # fmt: skip
    for name, found in runs.items():
        assert found.stderr == "training\ndecomposing the inference gap\n"
        table, _, rest = found.stdout.partition("\n\nwritten:\n")
        assert table == str(pg.GapLedger.load(Path(name) / "ledger.nc"))
        assert table.startswith("Inference gaps of 70 datapoints") and table.count("Verdict: ") == 1
        assert f"  pictures/{name}.svg" in rest and Path("pictures", f"{name}.svg").read_text().startswith("<?xml")
    assert runs["a"].stdout.replace("a/", "b/").replace("a.svg", "b.svg") == runs["b"].stdout
    assert Path("pictures/a.svg").read_bytes() == Path("pictures/b.svg").read_bytes()


def test_bars_need_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream:
        def __init__(self, terminal: bool) -> None:
            self.terminal = terminal

        def isatty(self) -> bool:
            return self.terminal

    for out, err in ((True, True), (True, False), (False, True), (False, False)):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", Stream(out))
            patch.setattr(sys, "stderr", Stream(err))
            shown = console.shows_bars()
        assert shown == (out and err)


class Shown:
    """What a progress bar is told."""

    n, text = 0.0, ""

    def update(self, amount: float) -> None:
        self.n += amount

    def set_postfix_str(self, text: str, refresh: bool) -> None:
        self.text = text

    def set_description_str(self, name: str) -> None:
        pass


def test_the_time_left_is_that_of_the_chunks_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """A first stage that is quick, or slow, says nothing of the others; a finished chunk does."""
    clock = [100.0]
    monkeypatch.setattr(run_module.time, "monotonic", lambda: clock[0])
    shown, value = Shown(), torch.zeros(2)
    bar = Bar(shown, num_stages=3, num_chunks=4)
    for stage, seconds in (("quick", 1.0), ("slow", 50.0), ("last", 9.0)):
        bar.stage(stage)
        clock[0] += seconds
        bar.advance(0.5, value)
        assert "left" not in shown.text
    bar.finish_chunk({"L[q]": np.zeros(2)})
    assert shown.text.startswith("about 03:00 left, ")  # three chunks of a minute
    bar.stage("quick")
    clock[0] += 20.0
    bar.advance(0.5, value)
    assert shown.text.startswith("about 02:40 left, ")
    for _ in range(3):
        bar.finish_chunk({"L[q]": np.zeros(2)})
    assert "left" not in shown.text


# compare


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two finished runs, as far as their ledgers go."""
    folder, model = tmp_path_factory.mktemp("runs"), anisotropic(6, 2)
    data = draws_of(model, 8)[0]
    for seed, (name, shift) in enumerate({"first": 0.3, "second": 0.1}.items()):
        settings: dict[str, Any] = {"num_particles": 100, "progress": False, "seed": seed}
        ledger = pg.decompose(model, WrongEncoder(model, shift=shift), data, **settings)
        ledger.save(folder / name / "ledger.nc")
    return [str(folder / name) for name in ("first", "second")]


def test_runs_are_compared(capsys: Any, runs: list[str], tmp_path: Path) -> None:
    comparison = pg.compare(*runs)
    assert said(capsys, "compare", *runs) == f"{comparison}\n"
    assert said(capsys, "compare", *runs, "--format", "latex") == f"{comparison.to_latex()}\n"
    other = said(capsys, "compare", *runs, "--format=markdown", "--reference", "second")
    assert other == pg.compare(*runs, reference="second").to_markdown() + "\n"
    for ending, start in ((".png", b"\x89PNG"), (".svg", b"<?xml"), (".PDF", b"%PDF")):
        path = tmp_path / "new" / f"picture{ending}"
        said(capsys, "compare", *runs, "--picture", str(path))
        assert path.read_bytes().startswith(start)


def test_the_page_of_a_run(capsys: Any, runs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert said(capsys, "report", runs[0]) == "first.html\n"
    text = Path("first.html").read_text("utf-8")
    assert "Inference gaps of first" in text and "pyrogaps report" in text
    assert pg.GapLedger.load(f"{runs[0]}/ledger.nc").diagnose().verdict in text
    assert said(capsys, "report", f"{runs[1]}/ledger.nc", "--out", "new/a.html", "--title", "Mine") == "new/a.html\n"
    assert "Mine" in Path("new/a.html").read_text("utf-8")
    assert "report: name one run" in said(capsys, "report", *runs, code=2)
    assert "ledger nowhere: no such file" in said(capsys, "report", "nowhere", code=2)
    assert "report: unknown option --format. Known are --out, --title" in said(capsys, "report", "--format", code=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "compare: name two or more runs"),
        (["nowhere", "nowhere/else"], "ledger nowhere: no such file"),
        (["a", "b", "--colour", "red"], "compare: unknown option --colour. Known are --reference, --format, --picture"),
        (["a", "b", "--format", "html"], "--format: must be one of text, markdown, latex, got 'html'"),
        (["a", "b", "--reference"], "--reference needs a value"),
        (["a", "b", "--picture", "a.jpg"], "--picture: must end in .png, .svg or .pdf, got 'a.jpg'"),
    ],
)
def test_mistakes_are_one_line(capsys: Any, arguments: list[str], message: str) -> None:
    assert message in said(capsys, "compare", *arguments, code=2)
    assert "--out: must end in .html or .htm, got 'a.pdf'" in said(capsys, "report", "a", "--out", "a.pdf", code=2)
