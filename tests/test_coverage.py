"""Intervals of the ledger cover as often as they say, on 2,048 datapoints whose values are known exactly.

Those of log-mean-exps, behind their gate, are held to the same in `test_log_weights.py`.
"""

import pytest
import torch
import xarray as xr
from torch import Tensor

from pyrogaps import AIS, Refinement, decompose
from tests.references import WrongEncoder, anisotropic, draws_of

NUMBER = 2048


@pytest.fixture(scope="module")
def measured() -> tuple[xr.Dataset, dict[str, Tensor]]:
    """A ledger of 2,048 datapoints and the exact value of every quantity in it."""
    with torch.random.fork_rng():
        model = anisotropic(5, 2)
        x, _ = draws_of(model, NUMBER, seed=11)
        guide = WrongEncoder(model, shrink=0.95, shift=0.1, width=0.9)
        ledger = decompose(
            model,
            guide,
            x,
            evidence=AIS(num_chains=64, num_temperatures=10),
            refinement=Refinement(num_steps=500),
            batch_size=512,
            seed=5,
            progress=False,
        )
    mean, scale = (value.detach() for value in guide.parameters_of(x))
    evidence = model.log_evidence(x).detach()
    amortization = model.amortization_gap(x, mean, scale).detach()
    approximation = model.approximation_gap().detach().expand(NUMBER)
    exact = {
        "log_evidence": evidence,
        "elbo_refined": evidence - approximation,
        "elbo": evidence - approximation - amortization,
        "approximation_gap": approximation,
        "amortization_gap": amortization,
        "inference_gap": approximation + amortization,
    }
    return ledger.per_datapoint, exact


@pytest.mark.parametrize("name", ["elbo", "elbo_refined", "approximation_gap", "amortization_gap", "inference_gap"])
def test_ledger_intervals_cover(measured: tuple[xr.Dataset, dict[str, Tensor]], name: str) -> None:
    per_datapoint, exact = measured
    value, mcse = per_datapoint[name], per_datapoint[f"{name}_mcse"]
    if "family" in value.dims:
        value, mcse = value.sel(family="own"), mcse.sel(family="own")
    inside = abs(value.values - exact[name].numpy()) < 1.96 * mcse.values
    assert 0.93 <= inside.mean() <= 0.97


def test_intervals_of_wrong_values_do_not_cover(measured: tuple[xr.Dataset, dict[str, Tensor]]) -> None:
    """The check has teeth: values off by two standard errors leave half of the intervals."""
    per_datapoint, exact = measured
    off = exact["elbo"].numpy() + 2 * per_datapoint["elbo_mcse"].values
    assert (abs(per_datapoint["elbo"].values - off) < 1.96 * per_datapoint["elbo_mcse"].values).mean() < 0.6
