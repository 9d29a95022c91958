"""The benchmark of MAPA, for seconds: a row for every method, nothing trained again, failures said."""

from pathlib import Path

import pandas as pd
import pytest
import torch

from benchmarks import reporting
from benchmarks.mapa import __main__ as mapa
from benchmarks.mapa import runs, training
from benchmarks.mapa.findings import findings
from pyrogaps.models.synthetic import SyntheticData


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder in the place of `benchmarks/results`, and runs with the least S alone."""
    for module in (mapa, reporting):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(runs, "SAMPLES", (3,))
    return tmp_path / "results"


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> pd.DataFrame:
    monkeypatch.setattr("sys.argv", ["benchmark", "--quick", "--runs", str(folder), *arguments])
    mapa.main()
    return pd.read_csv(folder / "results" / "mapa-quick.csv").set_index(["data set", "method"])


def test_every_method_has_a_row_and_none_is_trained_again(
    monkeypatch: pytest.MonkeyPatch, results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = run(monkeypatch, tmp_path, "circle")
    assert set(table.index) == {("circle", name) for name in (runs.VAE, *runs.METHODS)}
    assert table["KL"].notna().all()
    assert (table["draws"] == 2).all()
    passes = table["decoder passes per point"]["circle"]
    assert passes[[runs.VAE, runs.IWAE]].round(1).tolist() == [1, 3]
    assert (tmp_path / "quick" / "mapa.png").stat().st_size > 0
    assert "IWAE with the same S:\n  circle, S = 3: decoder" in capsys.readouterr().out

    def again(*_: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(runs, "trained", again)
    pd.testing.assert_frame_equal(run(monkeypatch, tmp_path, "circle"), table)


@pytest.mark.parametrize(("method", "number"), [(runs.VAE, 1), *((method, 3) for method in runs.METHODS)])
def test_every_loss_trains_both_networks(method: str, number: int) -> None:
    data = SyntheticData("circle", 60, 1, 1)
    model, guide = training.untrained(method, data)
    before = [value.clone() for value in (*model.parameters(), *guide.parameters())]
    training.fit(model, guide, training.loss_of(method, number, data, 0), data.train, 2)
    after = [*model.parameters(), *guide.parameters()]
    assert not any(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_training_that_diverged_is_counted(monkeypatch: pytest.MonkeyPatch, results: Path, tmp_path: Path) -> None:
    def diverged(*_: object) -> None:
        raise FloatingPointError("the loss is nan")

    monkeypatch.setattr(runs, "trained", diverged)
    table = run(monkeypatch, tmp_path, "circle", "--draws", "1")
    assert (table["failed restarts"] == 1).all()
    assert table["KL"].isna().all()


def test_findings_are_judged_by_two_standard_errors() -> None:
    kl = {"VAE": (1, (0.5, 0.6, 0.7)), "IWAE": (3, (0.5, 0.1, 0.3)), "MAPA": (3, (0.1, 0.1, 0.1))}
    rows = [["circle", method, s, draw, value] for method, (s, draws) in kl.items() for draw, value in enumerate(draws)]
    best = pd.DataFrame(rows, columns=[*runs.KEY, "draw", "divergence"])
    table = pd.DataFrame(columns=list(runs.COLUMNS))
    lines = [line for line in findings(best, table) if "circle" in line]
    assert lines == ["  circle, S = 3: VAE +0.500 ± 0.058, IWAE +0.200 ± 0.115: undecided"]
    best.loc[best["method"] == "IWAE", "divergence"] = 0.4
    assert "MAPA is better" in "".join(findings(best, table))
    best.loc[best["method"] == "VAE", "divergence"] = [0.0, 0.01, 0.0]
    assert "MAPA is worse" in "".join(findings(best, table))


def test_unknown_data_set_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as error:
        run(monkeypatch, tmp_path, "square")
    assert error.value.code == 2
