"""The benchmark of MAPA on images: trained, evaluated and written down in a tiny run, and continued from its files."""

import sys
from pathlib import Path

import pandas as pd
import pytest

from benchmarks import reporting
from benchmarks.mapa_images import __main__ as mapa_images
from benchmarks.mapa_images.training import METHODS


@pytest.mark.slow
@pytest.mark.usefixtures("brief_check")
def test_every_method_is_trained_and_taken_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporting, "RESULTS", tmp_path / "results")
    arguments = ["mapa_images", "digits", "--quick", "--latents", "2", "--runs", str(tmp_path / "runs")]
    monkeypatch.setattr(sys, "argv", arguments)
    mapa_images.main()
    table = pd.read_csv(tmp_path / "results" / "mapa_images-quick.csv")
    assert table["method"].tolist() == list(METHODS)
    children = table["approximation gap"] + table["amortization gap"]
    assert children.to_numpy() == pytest.approx(table["inference gap"].to_numpy(), abs=1e-4)
    assert table["log p(x) by quadrature"].notna().all()
    weights = sorted((tmp_path / "runs").rglob("*.pt"))
    written = [path.stat().st_mtime_ns for path in weights]
    mapa_images.main()
    assert [path.stat().st_mtime_ns for path in weights] == written
    again = pd.read_csv(tmp_path / "results" / "mapa_images-quick.csv")
    pd.testing.assert_frame_equal(again, table)


def test_unknown_data_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["mapa_images", "letters"])
    with pytest.raises(SystemExit):
        mapa_images.main()
    assert "no data set letters; there are digits and mnist" in capsys.readouterr().err
