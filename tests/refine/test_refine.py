"""Refinement against the exact optimum, from every kind of guide; never worse than its start; honest about its end."""

import math
from typing import Any

import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from pyrogaps import InputError, Refinement, elbo, refine
from pyrogaps.guides.amortized import AmortizedNormal
from pyrogaps.guides.local import AutoLocalMultivariateNormal
from pyrogaps.models.linear_gaussian import LinearGaussian
from pyrogaps.refine import RefinedGuide
from tests.references import (
    WrongEncoder,
    WrongFullEncoder,
    anisotropic,
    assert_exact,
    counts,
    draws_of,
    gamma_poisson,
    gamma_poisson_evidence,
    gamma_poisson_posterior,
    log_normal_gap,
    parabola,
    parabola_best_elbo,
    refined_by_adam,
)


def trained_auto_normal(model: Any, x: Tensor) -> AutoNormal:
    """An AutoNormal that has been set up on these data, and is far from done."""
    guide = AutoNormal(model)
    guide(x)
    return guide


def assert_moments(draws: Tensor, mean: Tensor, covariance: Tensor) -> None:
    """Mean and covariance of `draws` `(S, N, d)` are those of a Gaussian, entry by entry.

    All entries together fail by chance as often as one comparison at four standard errors.
    """
    number = len(draws)
    centred = draws - mean
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    found = torch.einsum("sni,snj->nij", centred, centred) / number
    error = ((variance[..., :, None] * variance[..., None, :] + covariance**2) / number).sqrt()
    scores = torch.cat(
        [(centred.mean(0) / (variance / number).sqrt()).flatten(), ((found - covariance) / error).flatten()]
    )
    threshold = -float(torch.special.ndtri(torch.tensor(3.17e-5 / len(scores), dtype=torch.float64)))
    assert float(scores.abs().max()) < threshold


SIZES = [(8, 3, 0.6), (50, 10, 0.6), (20, 4, 3.0)]


@pytest.mark.parametrize(("data_dim", "latent_dim", "decades"), SIZES)
@pytest.mark.parametrize("kind", ["family", "autoguide", "freed"])
def test_the_best_mean_field_guide(kind: str, data_dim: int, latent_dim: int, decades: float) -> None:
    model = anisotropic(data_dim, latent_dim, decades=decades)
    x, _ = draws_of(model, 4)
    start = {
        "family": lambda: AutoNormal,
        "autoguide": lambda: trained_auto_normal(model, x),
        "freed": lambda: WrongEncoder(model),
    }
    far = kind == "autoguide" and decades > 1  # an AutoNormal begins with scales of 0.1 everywhere
    refined = refine(model, start[kind](), x, settings=Refinement(num_steps=3000 if far else 1000))
    mean, scale = (part.detach() for part in model.mean_field_optimum(x))
    draws, _ = refined.sample(2000)
    assert_moments(draws, mean, torch.diag_embed(scale**2))
    bound = elbo(model, refined, x, num_particles=4000)
    gap = model.log_evidence(x) - bound.value
    assert_exact(gap, bound.mcse, model.approximation_gap())
    assert refined.converged.all()
    assert not refined.kept_start.any()


@pytest.mark.parametrize(("data_dim", "latent_dim", "decades"), SIZES)
def test_a_full_covariance_finds_the_posterior(data_dim: int, latent_dim: int, decades: float) -> None:
    model = anisotropic(data_dim, latent_dim, decades=decades)
    x, _ = draws_of(model, 4)
    mean, covariance = (part.detach() for part in model.posterior(x))
    for start in (AutoLocalMultivariateNormal, WrongFullEncoder(model)):
        refined = refine(model, start, x)
        assert refined.converged.all()
        assert_moments(refined.sample(2000)[0], mean, covariance)
        bound = elbo(model, refined, x)
        assert_exact(bound.value, bound.mcse, model.log_evidence(x))
        assert float(model.approximation_gap().detach()) > 4 * float(bound.mcse.max())  # which mean field would show


def test_single_precision() -> None:
    model, exact = (anisotropic(20, 4, dtype=dtype) for dtype in (torch.float32, torch.float64))
    x, _ = draws_of(model, 4)
    refined = refine(model, WrongEncoder(model), x)
    bound = elbo(model, refined, x, num_particles=4000)
    best = exact.log_evidence(x.double()) - exact.approximation_gap()
    assert_exact(bound.value, bound.mcse, best, torch.float32)


def test_amortization_gap_of_a_wrong_encoder() -> None:
    model = anisotropic(8, 3)
    x, _ = draws_of(model, 6)
    guide = WrongEncoder(model, shrink=0.9, shift=0.2, width=1.2)
    refined = elbo(model, refine(model, guide, x), x, num_particles=6000)
    amortized = elbo(model, guide, x, num_particles=6000, seed=1)
    exact = model.amortization_gap(x, *guide.parameters_of(x))
    assert_exact(refined.value - amortized.value, torch.hypot(refined.mcse, amortized.mcse), exact)
    assert float(exact.detach().min()) > 4 * float(refined.mcse.max())


def test_a_positive_latent() -> None:
    """The best LogNormal of a Gamma posterior, found from AutoNormal: the gap is Stirling's remainder."""
    x = counts().double()
    refined = refine(gamma_poisson, AutoNormal, x)
    bound = elbo(gamma_poisson, refined, x, num_particles=4000)
    gap = log_normal_gap(gamma_poisson_posterior(x).concentration)
    assert_exact(gamma_poisson_evidence(x) - bound.value, bound.mcse, gap)


def test_two_modes() -> None:
    """The best Normal takes one mode of two, or covers both where they run together. Its ELBO has a closed form."""
    x = torch.tensor([-1.0, 0.5, 2.0, 4.0], dtype=torch.float64)
    refined = refine(parabola, AutoNormal, x)
    bound = elbo(parabola, refined, x, num_particles=8000)
    assert_exact(bound.value, bound.mcse, parabola_best_elbo(x))


@pytest.mark.parametrize("learning_rate", [None, 0.05, 20.0])
@pytest.mark.parametrize("kind", ["good", "optimal"])
def test_never_below_its_start(kind: str, learning_rate: float | None) -> None:
    """By natural gradients (None), and by Adam, even with steps so long that it diverges; the start is kept where it
    was better.
    """
    model = anisotropic(8, 3)
    x, _ = draws_of(model, 64)
    guide = WrongEncoder(model, **({} if kind == "good" else {"shrink": 1.0, "shift": 0.0, "width": 1.0}))
    if learning_rate is None:
        refined = refine(model, guide, x, settings=Refinement(num_steps=50))
    else:
        refined = refined_by_adam(model, guide, x, Refinement(num_steps=50, learning_rate=learning_rate))
    before, after = elbo(model, guide, x), elbo(model, refined, x, seed=1)
    fall = before.value - after.value
    assert float((fall / torch.hypot(before.mcse, after.mcse)).max()) < 4
    if learning_rate == 20.0 and kind == "optimal":
        assert float(refined.kept_start.double().mean()) > 0.9
        torch.testing.assert_close(
            refined.at(torch.arange(64)[refined.kept_start]).sample(4)[0].shape,
            torch.Size([4, int(refined.kept_start.sum()), 3]),
        )


def test_converged_means_converged() -> None:
    """Short runs of Adam from a useless encoder: what is called converged is, and much is not."""
    torch.manual_seed(0)
    model = LinearGaussian.random(20, 6, noise_scale=0.3, seed=1).double()
    x, _ = draws_of(model, 64)
    guide = AmortizedNormal(20, 6, (10,)).double()
    tolerance, shares = Refinement().tolerance, []
    for num_steps in (20, 100, 1000):
        refined = refined_by_adam(model, guide, x, Refinement(num_steps=num_steps))
        remaining = model.amortization_gap(x, *parameters_of(refined)).detach()
        shares.append(float(refined.converged.double().mean()))
        assert (remaining[refined.converged] < 5 * tolerance).all()
        if num_steps == 20:
            assert float(remaining.max()) > 500 * tolerance
    assert shares[0] == 0 < shares[1] < shares[2] == 1


def parameters_of(refined: RefinedGuide) -> tuple[Tensor, Tensor]:
    """Locations and scales of a refined diagonal Normal, `(N, d)` each."""
    (distribution,) = refined.at(torch.arange(64)).distributions.values()  # type: ignore[attr-defined]
    return distribution.base_dist.loc, distribution.base_dist.scale


@pytest.mark.parametrize("start", ["family", "freed"])
def test_batches_and_neighbours_change_nothing(start: str) -> None:
    model = anisotropic(8, 3)
    x, _ = draws_of(model, 128)
    settings = Refinement(num_steps=30)
    guide = AutoLocalMultivariateNormal if start == "family" else WrongEncoder(model)
    options: dict[str, Any] = {"settings": settings, "referee": False}  # the sample examined depends on their number
    values = [
        elbo(model, refine(model, guide, data, batch_size=size, **options), data, num_particles=100).value
        for data, size in ((x, 128), (x, 64), (x[:64], 64))
    ]
    torch.testing.assert_close(values[0], values[1], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(values[0][:64], values[2], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("number", [5, 70])  # one block of datapoints, and two
def test_a_caller_without_gradients_gets_the_same(number: int) -> None:
    model = anisotropic(6, 2)
    x, _ = draws_of(model, number)
    few = Refinement(num_steps=20)
    with torch.no_grad():
        without = refine(model, WrongEncoder(model), x, settings=few, batch_size=128)
    usual = refine(model, WrongEncoder(model), x, settings=few, batch_size=128)
    for left, right in zip(without.parts, usual.parts, strict=True):
        torch.testing.assert_close(left.parameters, right.parameters, rtol=0, atol=0)


def test_the_guide_it_came_from_is_left_alone() -> None:
    model = anisotropic(8, 3)
    x, _ = draws_of(model, 5)
    guide = WrongEncoder(model)
    before = {name: value.clone() for name, value in guide.state_dict().items()}
    state = torch.get_rng_state()
    refine(model, guide, x, settings=Refinement(num_steps=10))
    assert all(torch.equal(before[name], value) for name, value in guide.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in guide.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_trace_rises_to_the_bound() -> None:
    model = anisotropic(8, 3)
    x, _ = draws_of(model, 64)
    refined = refine(model, WrongEncoder(model), x)
    bound = elbo(model, refined, x)
    assert refined.traces.shape == (1, 50)
    assert float(refined.traces[0, -1]) == pytest.approx(
        float(bound.value.mean()), abs=4 * math.sqrt(64 * 6 / (8 * 20)) / 8
    )
    assert float(refined.traces[0, 0]) < float(refined.traces[0, -1])


def test_indices_of_several_chunks_are_refused() -> None:
    model = anisotropic(8, 3)
    x, _ = draws_of(model, 100)
    refined = refine(model, WrongEncoder(model), x, settings=Refinement(num_steps=2))
    with pytest.raises(InputError, match="span several chunks"):
        refined.at(torch.tensor([3, 90]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_steps": 0}, "refinement.num_steps: must be a whole number of at least 1"),
        ({"num_particles": 0}, "refinement.num_particles"),
        ({"num_selection": 0}, "refinement.num_selection"),
        ({"learning_rate": 0.0}, "refinement.learning_rate: must be a number above 0"),
    ],
)
def test_bad_settings_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Refinement(**arguments)


def test_a_refined_guide_at_any_of_its_datapoints() -> None:
    """In any order, from several blocks: each is what it is alone."""
    model = anisotropic(8, 3)
    x, _ = draws_of(model, 130)
    refined = refine(model, AutoNormal, x, settings=Refinement(num_steps=30), batch_size=192)
    some = torch.tensor([127, 3, 70, 129, 64])
    z = torch.randn(6, len(some), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    together = refined.at(some).log_prob(z)
    for place, index in enumerate(some):
        torch.testing.assert_close(together[:, [place]], refined.at(index[None]).log_prob(z[:, [place]]))
    draws, log_q = refined.at(some).sample(5000)
    assert draws.shape == (5000, 5, 3)
    torch.testing.assert_close(refined.at(some).log_prob(draws), log_q)
