"""Flows with an auxiliary variable: their bounds stay below exact evidence, their weights are unbiased."""

from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
import xarray as xr
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

from pyrogaps import AIS, InputError, Problem, Refinement, ais, decompose, elbo, iwae, refine, train
from pyrogaps.guides.auxiliary_flows import AmortizedAuxiliaryFlow, AutoLocalAuxiliaryFlow
from pyrogaps.models.vae import VAE
from pyrogaps.refine import own_family
from pyrogaps.run import Run
from pyrogaps.streams import chunks
from tests.references import (
    anisotropic,
    assert_exact,
    assert_mean_one,
    banana,
    banana_evidence,
    draws_of,
    gamma_poisson,
    gamma_poisson_evidence,
    two_wells,
    two_wells_evidence,
)

X = torch.tensor([-2.0, 0.0, 1.0], dtype=torch.float64)
FEW = Refinement(num_steps=100)


def guide_of(data_dim: int, latent_dim: int, dtype: torch.dtype = torch.float64, size: float = 0.2) -> nn.Module:
    guide = AmortizedAuxiliaryFlow(data_dim, latent_dim, (8,), "Tanh", flow_hidden=6, auxiliary_dim=3).to(dtype)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return guide


def test_weights_of_the_extended_model_are_unbiased() -> None:
    """E[p(x, z) r(v|z, x) / q(z, v|x)] = p(x), whatever the weights of flow and reverse model."""
    model = anisotropic(4, 2)
    x, _ = draws_of(model, 3)
    near = guide_of(4, 2)
    train(model, near, x, num_epochs=300, batch_size=3, learning_rate=0.01, freeze_model=True, progress=False)
    log_weights = iwae(model, near, x, num_particles=20_000).log_weights
    assert log_weights is not None
    assert_mean_one((log_weights - model.log_evidence(x).detach()).exp().mean(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ais_from_it_is_exact(dtype: torch.dtype) -> None:
    model = anisotropic(6, 2, dtype=dtype)
    x = draws_of(model, 3)[0].to(dtype)
    estimate = ais(model, guide_of(6, 2, dtype), x, settings=AIS(num_chains=64), refinement=FEW)
    assert_exact(estimate.value, estimate.mcse, model.log_evidence(x), dtype)


@pytest.mark.parametrize(
    ("model", "evidence", "x"),
    [
        (banana, banana_evidence, X),
        (two_wells, two_wells_evidence, torch.tensor([1.0, 3.0], dtype=torch.float64)),
        (gamma_poisson, gamma_poisson_evidence, torch.tensor([[0.0, 1.0], [7.0, 9.0]], dtype=torch.float64)),
    ],
    ids=["banana", "two wells", "gamma-Poisson"],
)
def test_its_bound_stays_below_the_evidence(model: Any, evidence: Any, x: Tensor) -> None:
    """Whatever it has learned; one latent dimension is enough for it."""
    bound = elbo(model, refine(model, AutoLocalAuxiliaryFlow, x, settings=FEW), x)
    assert bool((bound.value < evidence(x) + 4 * bound.mcse).all())


def test_closes_a_good_part_of_a_bananas_gap() -> None:
    settings = Refinement(num_steps=600, num_particles=32)
    ledger = decompose(
        banana,
        guide_of(1, 2),
        X,
        families={"auxiliary": AutoLocalAuxiliaryFlow},
        refinement=settings,
        evidence=AIS(num_chains=2, num_temperatures=2),  # the exact one is used
        referee=False,
        progress=False,
    )
    gaps = banana_evidence(X).numpy()[:, None] - ledger.per_datapoint["elbo_refined"].values
    assert (gaps > -4 * ledger.per_datapoint["elbo_refined_mcse"].values).all()
    assert gaps.mean(0).max() < 0.4  # mean-field leaves 0.67 here
    assert ledger.provenance["own_family"] == "local_family"


def test_the_local_family_starts_at_the_guide() -> None:
    """The bound of the local start is that of the guide."""
    guide = guide_of(1, 2)
    problem = Problem.of(banana, guide, X)
    joint, density = problem.joint, problem.guide_density()
    start = own_family(density).start(joint, chunks(len(X), 64)[0], Run(0))
    with torch.no_grad():
        extended, _ = density.sample(20)
        log_reverse = guide.reverse_posterior(extended[..., :2].flatten(0, 1), X.repeat(20)).log_prob(
            extended[..., 2:].flatten(0, 1)
        )
        expected = density.log_prob(extended) - log_reverse.reshape(20, len(X))
        torch.testing.assert_close(start.at(torch.arange(len(X))).log_prob(extended), expected)


def test_the_reverse_model_learns_beside_a_frozen_decoder() -> None:
    model, guide = VAE(6, 2, (8,)), guide_of(6, 2, torch.float32)
    before = {name: value.clone() for name, value in guide.state_dict().items()}
    frozen = {name: value.clone() for name, value in model.state_dict().items()}
    train(model, guide, torch.rand(20, 6).round(), num_epochs=2, batch_size=10, freeze_model=True, progress=False)
    assert not torch.equal(before["reverse.outer.weight"], guide.state_dict()["reverse.outer.weight"])
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, frozen[name], rtol=0, atol=0)


def test_a_draw_alone_has_no_density() -> None:
    refined = refine(banana, AutoLocalAuxiliaryFlow, X, settings=Refinement(num_steps=10))
    local = refined.at(torch.arange(len(X)))
    with pytest.raises(NotImplementedError, match="only its own draws"):
        local.log_prob(torch.zeros(1, len(X), 2, dtype=X.dtype))


def test_sizes_are_checked() -> None:
    with pytest.raises(InputError, match="must be at least 1, got 0, 200 and 8"):
        AmortizedAuxiliaryFlow(num_steps=0)


def test_pyros_own_svi_trains_the_local_family_on_a_bound() -> None:
    """Without `augment`: its site is scored with the reverse model, so Trace_ELBO is a lower bound as it stands."""
    guide = AutoLocalAuxiliaryFlow(banana, hidden=8)
    svi = SVI(banana, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO(num_particles=20, vectorize_particles=True))
    for _ in range(200):
        svi.step(X)
    bound = elbo(banana, guide, X)
    exact = banana_evidence(X)
    assert bool((bound.value < exact + 4 * bound.mcse).all())
    assert bool((bound.value > exact - 1.0).all())


@pytest.mark.usefixtures("brief_check")
def test_cached_chunks_hold_until_a_parameter_changes(tmp_path: Path) -> None:
    """Those of the reverse model are among them, although its density is no part of q(z, v|x)."""
    model, guide, x = VAE(4, 2, (3,)), guide_of(4, 2, torch.float32), torch.rand(5, 4).round()
    settings: dict[str, Any] = {
        "evidence": AIS(num_chains=2, num_temperatures=3),
        "refinement": Refinement(num_steps=3, num_particles=2, num_selection=4),
        "num_particles": 4,
        "progress": False,
    }
    for part in (guide.encoder, guide.networks, guide.reverse):
        assert isinstance(part, nn.Module)
        with torch.no_grad():
            next(part.parameters()).add_(0.1)
        problem = Problem.of(model, guide, x, mode="eager")
        changed = decompose(problem, cache=tmp_path, **settings).per_datapoint
        xr.testing.assert_identical(changed, decompose(problem, **settings).per_datapoint)
        written = [file.stat().st_mtime_ns for file in tmp_path.iterdir()]
        xr.testing.assert_identical(changed, decompose(problem, cache=tmp_path, **settings).per_datapoint)
        assert [file.stat().st_mtime_ns for file in tmp_path.iterdir()] == written
