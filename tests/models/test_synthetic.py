"""The synthetic models: exact evidence against closed forms and brute force, draws, and their place in the library."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import integrate, special
from torch import Tensor

from pyrogaps import AIS, JointDensity, Refinement, decompose, elbo, train
from pyrogaps.density.simulate import simulate
from pyrogaps.errors import InputError
from pyrogaps.guides.amortized import AmortizedNormal
from pyrogaps.models.curves import CURVES
from pyrogaps.models.synthetic import SyntheticData, SyntheticModel, divergence

PAPER = [name for name in CURVES if name != "absolute-value-monotone"]


@pytest.fixture(autouse=True)
def _double() -> None:
    torch.set_default_dtype(torch.float64)


def circle_evidence(x: Tensor, variance: float) -> Tensor:
    """The uniform measure on the unit circle blurred by a Gaussian: a Bessel function of the radius."""
    radius = x.norm(dim=-1)
    bessel = torch.from_numpy(special.ive(0, (radius / variance).numpy())).log()
    return bessel - (radius - 1) ** 2 / (2 * variance) - math.log(2 * math.pi * variance)


def segment_evidence(x: Tensor, variance: float) -> Tensor:
    """The uniform measure on the segment from 0 to (1/2, 1/2), blurred: an error function along it, a Normal across."""
    scale, length = math.sqrt(variance), math.sqrt(0.5)
    along, across = x.sum(-1) / math.sqrt(2), (x[:, 0] - x[:, 1]) / math.sqrt(2)
    share = torch.special.ndtr(along / scale) - torch.special.ndtr((along - length) / scale)
    return (share / length).log() - across**2 / (2 * variance) - math.log(2 * math.pi * variance) / 2


@pytest.mark.parametrize(
    ("curve", "exact"),
    [
        ("circle", circle_evidence),
        ("absolute-value", segment_evidence),
        ("absolute-value-monotone", segment_evidence),
    ],
)
def test_evidence_in_closed_form(curve: str, exact: Callable[[Tensor, float], Tensor]) -> None:
    model = SyntheticModel(curve, "exact")
    x = torch.cat([model.draw(200)[0], torch.tensor([[1.5, -0.5], [0.0, 0.0]])])
    torch.testing.assert_close(model.log_evidence(x), exact(x, float(model.variance)), atol=2e-7, rtol=0)


@pytest.mark.parametrize("curve", PAPER)
def test_evidence_converges_to_brute_force(curve: str) -> None:
    """Panels halved change nothing that matters, and the trapezoidal rule of very many points agrees."""
    model = SyntheticModel(curve, "surrogate")
    x, _ = model.draw(20)
    value = model.log_evidence(x)
    torch.testing.assert_close(model.log_evidence(x, tolerance=1e-9), value, atol=1e-6, rtol=0)
    number = 2 ** (17 if curve in ("clusters", "spiral-dots") else 15)
    z = torch.linspace(-12, 12, number + 1)
    prior = torch.distributions.Normal(0.0, 1.0).log_prob(z)
    f, scale = model.decoder(z[:, None]), model.variance.sqrt()
    for row in range(2):
        log_joint = prior + torch.distributions.Normal(f, scale).log_prob(x[row]).sum(-1)
        brute = torch.logsumexp(log_joint, 0) + math.log(24 / number)
        assert abs(float(value[row] - brute)) < 1e-6


def test_evidence_of_float32_data_and_weights_is_double() -> None:
    torch.set_default_dtype(torch.float32)
    model = SyntheticModel("circle", "exact")
    x, z = model.draw(50)
    assert x.dtype == z.dtype == torch.float32
    value = model.log_evidence(x)
    assert value.dtype == torch.float64
    torch.testing.assert_close(value, circle_evidence(x.double(), float(model.variance)), atol=1e-9, rtol=0)


def test_posterior_is_normalised_and_where_it_should_be() -> None:
    model = SyntheticModel("absolute-value", "exact")
    x = torch.tensor([[0.3, 0.3], [0.05, 0.0]])
    z = torch.linspace(-9, 9, 20_001)
    density = model.log_posterior(x, z).exp()
    torch.testing.assert_close(density.sum(-1) * float(z[1] - z[0]), torch.ones(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(density, density.flip(-1))  # it cannot tell z from -z
    assert abs(abs(float(z[density[0].argmax()])) - float(special.ndtri(0.8))) < 0.05


def test_evidence_that_cannot_be_had_is_refused() -> None:
    model = SyntheticModel("circle")
    with pytest.raises(InputError, match="NaN"):
        model.log_evidence(torch.tensor([[0.0, math.nan]]))
    with pytest.raises(InputError, match="shape"):
        model.log_evidence(torch.zeros(3))
    with torch.no_grad():
        model.decoder[-1].weight.fill_(1e9)  # type: ignore[union-attr, operator]
    with pytest.raises(InputError, match="too steep"):
        model.log_evidence(torch.zeros(1, 2))
    with torch.no_grad():
        model.decoder[-1].weight.fill_(math.nan)  # type: ignore[union-attr, operator]
    with pytest.raises(InputError, match="nan standard deviations"):
        model.log_evidence(torch.zeros(1, 2))


@pytest.mark.parametrize("curve", PAPER)
def test_model_and_density_agree(curve: str) -> None:
    model = SyntheticModel(curve, "surrogate")
    x, z = model.draw(20)
    joint = JointDensity(model, x)
    assert joint.dim == 1 and joint.num_datapoints == 20
    prior = torch.distributions.Normal(0.0, 1.0).log_prob(z)[:, 0]
    likelihood = torch.distributions.Normal(model.decoder(z), model.variance.sqrt()).log_prob(x).sum(-1)
    torch.testing.assert_close(joint(z[None])[0], prior + likelihood)
    simulated, _ = simulate(joint)
    assert simulated.shape == x.shape


def test_draws_begin_alike_and_follow_the_model() -> None:
    model = SyntheticModel("figure-8", "exact")
    x, z = model.draw(4000, seed=3)
    torch.testing.assert_close(model.draw(10, seed=3)[0], x[:10])
    assert not torch.equal(model.draw(10, seed=4)[0], x[:10])
    noise = (x - model.decoder(z)) / model.variance.sqrt()
    whole = torch.cat([noise.flatten(), z.flatten()])
    assert abs(float(whole.mean())) < 4 / math.sqrt(len(whole))
    assert abs(float(whole.square().mean()) - 1) < 4 * math.sqrt(2 / len(whole))


def test_data_sets_are_draws_by_seed() -> None:
    data = SyntheticData("circle", 30, 20, 10, seed=1, decoder="exact")
    sizes = [len(part) for part in (data.train, data.validation, data.test) if part is not None]
    assert sizes == [30, 20, 10]
    other = SyntheticData("circle", 50, 0, 10, seed=1, decoder="exact")
    assert other.validation is None and set(other.latents) == {"train", "test"}
    assert torch.equal(other.train[:30], data.train) and torch.equal(other.test, data.test)
    assert not torch.equal(data.train[:10], data.test)
    assert not torch.equal(SyntheticData("circle", seed=2, decoder="exact").train[:30], data.train)
    spread = (data.train - data.truth.decoder(data.latents["train"])).std()
    assert 0.07 < float(spread) < 0.13
    with pytest.raises(InputError, match="num_test"):
        SyntheticData("circle", num_test=0)


def test_divergence_is_that_of_the_distributions() -> None:
    """Held-out divergence against quadrature over the whole plane; two decoders of one distribution are as good."""
    truth, model = SyntheticModel("circle", "exact"), SyntheticModel("circle", "exact", variance=0.02)
    x, _ = truth.draw(3000)

    def radial(r: float) -> float:
        at = torch.tensor([[r, 0.0]])
        ours, theirs = (float(circle_evidence(at, float(one.variance))) for one in (truth, model))
        return 2 * math.pi * r * math.exp(ours) * (ours - theirs)

    exact = integrate.quad(radial, 1e-6, 2.5, epsabs=1e-10, points=[0.8, 1.0, 1.2])[0]
    value, error = divergence(truth, model, x)
    assert error < 0.02
    assert abs(value - exact) < 4 * error
    twice, monotone = (SyntheticModel(name, "exact") for name in ("absolute-value", "absolute-value-monotone"))
    value, error = divergence(twice, monotone, twice.draw(100)[0])
    assert abs(value) < 1e-6 and error < 1e-6


def test_surrogates_generate_nearly_the_data_of_their_curves() -> None:
    for curve in PAPER:
        truth = SyntheticModel(curve, "surrogate")
        value, error = divergence(truth, SyntheticModel(curve, "exact"), truth.draw(300)[0])
        assert value < 0.02 + 4 * error, curve


def test_learned_decoders_are_learned_and_truths_are_not() -> None:
    torch.manual_seed(0)
    learned, truth = SyntheticModel("clusters"), SyntheticModel("clusters", "surrogate")
    assert all(value.requires_grad for value in learned.parameters())
    assert not any(value.requires_grad for value in truth.parameters())
    assert [p.shape for p in learned.parameters()] == [p.shape for p in truth.parameters()]
    assert float(learned.variance) == 0.2
    assert not list(SyntheticModel("clusters", "exact").parameters())
    x, _ = truth.draw(8)
    before = [value.detach().clone() for value in learned.parameters()]
    train(learned, AmortizedNormal(2, 1, [8]), x, num_epochs=1, progress=False)
    assert not any(torch.equal(old, new) for old, new in zip(before, learned.parameters(), strict=True))


def test_gaps_of_a_ground_truth_add_up() -> None:
    """The ledger's log p(x) is quadrature's, and its gaps are what is missing from it.

    Chains start at the prior: posteriors have modes far apart, of which a refined Gaussian holds one.
    """
    torch.manual_seed(0)
    model, guide = SyntheticModel("figure-8", "exact"), AmortizedNormal(2, 1, [8])
    x, _ = model.draw(8)
    exact = model.log_evidence(x)
    bound = elbo(model, guide, x, num_particles=500)
    assert bool((bound.value < exact + 4 * bound.mcse).all())
    ledger = decompose(
        model,
        guide,
        x,
        evidence=AIS(num_chains=64, num_temperatures=60, num_leapfrog=5, schedule="sigmoid", initial="prior"),
        refinement=Refinement(num_steps=200),
        num_particles=500,
        progress=False,
    )
    data = ledger.per_datapoint.sel(family="own")
    error = np.abs(data["log_evidence"].values - exact.numpy())
    assert data["log_evidence_mcse"].values.max() < 0.2
    assert (error < 4 * data["log_evidence_mcse"].values).all()
    total = data["approximation_gap"].values + data["amortization_gap"].values
    np.testing.assert_allclose(total, data["inference_gap"].values, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"curve": "square"}, "no curve 'square'"),
        ({"decoder": "true"}, "decoder must be one of"),
        ({"variance": 0.0}, "variance must be positive"),
        ({"activation": "Tanhh"}, "Tanhh"),
    ],
)
def test_bad_settings_are_named(arguments: dict[str, object], word: str) -> None:
    with pytest.raises(InputError, match=word):
        SyntheticModel(**arguments)  # type: ignore[arg-type]


def test_data_of_another_shape_are_refused() -> None:
    with pytest.raises(InputError, match=r"x must have shape \(N, 2\), got \(3, 4\)"):
        SyntheticModel("circle", "exact")(torch.zeros(3, 4))
