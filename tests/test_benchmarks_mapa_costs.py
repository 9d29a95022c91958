"""The benchmark of what MAPA costs, for seconds: its tables, and that its variances are those of all draws."""

import itertools
from pathlib import Path

import pandas as pd
import pytest
import torch
from pyro.infer import RenyiELBO, Trace_ELBO
from torch import Tensor

import pyrogaps as pg
from benchmarks import reporting
from benchmarks.mapa_costs import __main__ as mapa_costs
from benchmarks.mapa_costs import replacement, steps
from benchmarks.mapa_costs.pair import Pair
from pyrogaps.mapa import log_weights_without_replacement


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str, *arguments: str) -> pd.DataFrame:
    monkeypatch.setattr(reporting, "RESULTS", folder / "results")
    monkeypatch.setattr("sys.argv", ["benchmark", name, "--quick", "--runs", str(folder), *arguments])
    mapa_costs.main()
    return pd.read_csv(folder / "results" / f"mapa_{name}-quick.csv")


def test_building_is_measured_anew_beside_its_bars(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "quick" / "distances.npz"
    file.parent.mkdir()
    file.write_text("of another run")
    table = run(monkeypatch, tmp_path, "building").set_index("what")
    built = table.loc["built, and its file written"]
    assert 0 < built["wall seconds"] < built["seconds allowed"] == 300
    # A peak is the process's: what other tests took in it before is not the building's.
    before = table.loc["library and images loaded", "GiB at peak"]
    assert 0 <= built["GiB at peak"] - before < built["GiB allowed"] == 4
    assert table["wall seconds"].iloc[1:].notna().all()
    assert file.stat().st_size > 1000


def test_steps_have_a_row_for_every_loss(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table = run(monkeypatch, tmp_path, "steps")
    assert table["loss"].tolist() == [steps.VAE, steps.IWAE, steps.RENYI, *["MAPA_ELBO"] * 3]
    assert table["decoded per point"].iloc[:3].tolist() == [1, 10, 10]
    wide, narrow, without = table["decoded per point"].iloc[3:]
    assert narrow < wide < without
    assert (table["/ IWAE"].iloc[1:3] == 1).any()


def test_every_loss_trains_both_networks() -> None:
    x = (torch.rand(20, 8, 8) < 0.3).float()
    mapa = pg.MAPA_ELBO(pg.mapa_posterior(x, "bernoulli", bandwidth=0.6), num_top=1, num_samples=2)
    iwae = pg.IWAE_ELBO(2, vectorize_particles=True)
    renyi = RenyiELBO(alpha=0, num_particles=2, vectorize_particles=True)
    for loss in (Trace_ELBO(), iwae, renyi, mapa):
        pair = Pair(loss, x)
        before = [value.clone() for value in pair.parameters()]
        for _ in range(2):
            pair.svi.step(torch.arange(20) if loss is mapa else x)
        assert not any(torch.equal(old, new) for old, new in zip(before, pair.parameters(), strict=True))


def test_replacement_has_a_row_for_every_case(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(replacement, "NUM_SAMPLES", (3,))
    table = run(monkeypatch, tmp_path, "replacement")
    assert table["data"].str.split(",").str[0].tolist() == ["figure-8", "figure-8", "digits"]
    assert (table["L with"] < table["log-likelihood"]).all()


def enumerated(q: Tensor, f: Tensor, number: int) -> tuple[float, float]:
    """Variances of the estimates of sum f with and without replacement, by all draws in turn."""
    total, every = float(f.sum()), range(len(q))
    one = sum(
        float(q[list(drawn)].prod()) * (float((f / q)[list(drawn)].mean()) - total) ** 2
        for drawn in itertools.product(every, repeat=number)
    )
    other = 0.0
    for drawn in itertools.permutations(every, number):
        probability, left = 1.0, 1.0
        for i in drawn:
            probability *= float(q[i]) / left
            left -= float(q[i])
        chosen = torch.tensor(drawn)
        log_weights = log_weights_without_replacement(q[chosen].log()[None], torch.tensor([left]).to(q).log())
        other += probability * (float((log_weights[0].exp() * f[chosen]).sum()) - total) ** 2
    return one, other


@pytest.mark.parametrize("number", [2, 3])
def test_variances_are_those_of_all_draws(number: int) -> None:
    """Of explanations that a narrow q hardly ever draws too."""
    q = torch.tensor([0.6, 0.3, 0.08, 0.0199, 0.0001], dtype=torch.float64)
    f = torch.tensor([0.1, 0.3, 0.05, 0.05, 0.1], dtype=torch.float64)
    one, other = enumerated(q, f, number)
    rows = [value.log().expand(4000, -1) for value in (q, f)]
    assert replacement.variance_with(*rows, number)[0] == pytest.approx(one)
    draws = replacement.variance_without(*rows, number, 1)
    assert abs(float(draws.mean()) - other) < 4 * float(draws.std()) / len(draws) ** 0.5
    assert float(draws.std()) / len(draws) ** 0.5 < 0.1 * other


def test_an_unknown_measurement_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as error:
        run(monkeypatch, tmp_path, "square")
    assert error.value.code == 2
