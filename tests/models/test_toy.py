"""The toys' gaps against quadrature and against dense algebra of the joint Normal."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence

import pyrogaps
from pyrogaps.errors import InputError
from pyrogaps.models.linear_gaussian import LinearGaussian
from pyrogaps.models.toy import MissingBit, MissingGaussian

GRID = torch.linspace(-12, 12, 4801, dtype=torch.float64)
CELL = float(GRID[1] - GRID[0])
SHOWN = [True, False, True, False]


@pytest.fixture(autouse=True)
def double(clean_state: None) -> None:
    """`clean_state` restores the default dtype."""
    torch.set_default_dtype(torch.float64)


@pytest.fixture
def model(double: None) -> MissingGaussian:
    """Anisotropic in everything, and what is shown comes in two pieces."""
    weight = torch.tensor([[1.5, 0.3], [-0.4, 1.1], [0.8, 0.9], [0.2, -1.3]])
    return MissingGaussian(weight, [0.5, -1.0, 0.2, 0.7], [0.4, 1.3, 0.7, 0.9], [2.0, 0.6], shown=SHOWN)


def condition(model: LinearGaussian, on: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Of z given some elements of x: coefficients, covariance, and the covariance of those elements of x."""
    W, prior = model.weight.detach()[on], model.prior_scale.pow(2).diag()
    seen = W @ prior @ W.T + model.noise_scale.detach()[on].pow(2).diag()
    coefficients = torch.linalg.solve(seen, W @ prior).T
    return coefficients, prior - coefficients @ W @ prior, seen


def mean_divergence(model: MissingGaussian, covariance: Tensor) -> Tensor:
    """E KL(N(E[z|C], covariance) || p(z|x)): the means' difference has the covariance of E[z|x] given C."""
    of_all, smoother, everything = condition(model, [True] * model.data_dim)
    of_shown, _, _ = condition(model, SHOWN)
    apart = of_all.clone()
    apart[:, SHOWN] -= of_shown
    moments = apart @ everything @ apart.T
    zero = torch.zeros(model.latent_dim)
    spread = kl_divergence(MultivariateNormal(zero, covariance), MultivariateNormal(zero, smoother))
    return spread + torch.linalg.solve(smoother, moments).trace() / 2


def test_unit_toy() -> None:
    toy = MissingGaussian.unit()
    assert toy.conditioning_gap().item() == pytest.approx(0.25, abs=1e-12)
    assert toy.mutual_information().item() == pytest.approx(math.log(1.5) / 2, abs=1e-12)
    assert toy.filter_gap().item() == pytest.approx(0.5 - math.log(1.5) / 2, abs=1e-12)


def test_unit_toy_matches_quadrature() -> None:
    """q_C by its definition: exp of the mean of ln p(z|x) over completions, its normaliser the gap."""
    toy, shown = MissingGaussian.unit(), 0.8
    filter_mean, filter_variance = shown / 2, 0.5
    withheld = GRID[::4]
    weights = Normal(filter_mean, math.sqrt(filter_variance + 1)).log_prob(withheld).exp() * 4 * CELL
    x = torch.stack([torch.full_like(withheld, shown), withheld], -1)
    mean, covariance = (part.detach() for part in toy.posterior(x))
    log_posteriors = Normal(mean, covariance.sqrt()).log_prob(GRID)
    log_product = weights @ log_posteriors
    log_normaliser = log_product.logsumexp(0) + math.log(CELL)
    assert toy.conditioning_gap().item() == pytest.approx(-float(log_normaliser), abs=1e-8)
    best_mean, best_covariance = (part.detach() for part in toy.shared_posterior(x[:1]))
    exact = Normal(best_mean[0], best_covariance[0].sqrt()).log_prob(GRID)
    close = (GRID - filter_mean).abs() < 4
    torch.testing.assert_close((log_product - log_normaliser)[close], exact[close], atol=1e-8, rtol=0)
    filter_density = Normal(filter_mean, math.sqrt(filter_variance)).log_prob(GRID)
    divergences = ((filter_density - log_posteriors) * filter_density.exp()).sum(-1) * CELL
    assert toy.filter_gap().item() == pytest.approx(float(weights @ divergences), abs=1e-8)


def test_moments_match_the_joint_normal(model: MissingGaussian) -> None:
    x = torch.randn(5, 4)
    coefficients, covariance, _ = condition(model, SHOWN)
    mean, found = model.conditional(x)
    torch.testing.assert_close(mean, (x - model.bias)[:, SHOWN] @ coefficients.T)
    torch.testing.assert_close(found, covariance)
    mean, found = model.shared_posterior(x)
    torch.testing.assert_close(mean, (x - model.bias)[:, SHOWN] @ coefficients.T)
    torch.testing.assert_close(found, condition(model, [True] * 4)[1])
    changed = torch.where(model.conditions(x), x, x + 1)
    assert torch.equal(model.conditional(changed)[0], model.conditional(x)[0])


def test_gaps_match_the_joint_normal(model: MissingGaussian) -> None:
    smoother, given_shown = condition(model, [True] * 4)[1], condition(model, SHOWN)[1]
    torch.testing.assert_close(model.conditioning_gap(), mean_divergence(model, smoother))
    torch.testing.assert_close(model.filter_gap(), mean_divergence(model, given_shown))
    information = (torch.logdet(given_shown) - torch.logdet(smoother)) / 2
    torch.testing.assert_close(model.mutual_information(), information)
    for factor in (0.95, 1.05):
        assert mean_divergence(model, smoother * factor) > model.conditioning_gap()


def test_shown_and_its_masks(model: MissingGaussian) -> None:
    x = torch.zeros(3, 4)
    assert torch.equal(model.conditions(x), torch.tensor(SHOWN).expand(3, 4))
    leading = MissingGaussian(model.weight, shown=3)
    assert leading.shown.tolist() == [True, True, True, False]
    nothing, everything = MissingGaussian(model.weight, shown=0), MissingGaussian(model.weight, shown=4)
    assert everything.conditioning_gap().item() == pytest.approx(0, abs=1e-12)
    assert everything.filter_gap().item() == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(nothing.conditional(x), (torch.zeros(3, 2), torch.eye(2)))
    assert nothing.conditioning_gap().item() > leading.conditioning_gap().item() > 0
    random = MissingGaussian.random(5, 2, seed=3, shown=2)
    assert torch.equal(random.weight, LinearGaussian.random(5, 2, seed=3).weight)
    assert int(random.shown.sum()) == 2


@pytest.mark.parametrize("shown", [-1, 5, True, [True, False], torch.ones(4)])
def test_bad_shown_is_refused(shown: int | list[bool] | Tensor) -> None:
    with pytest.raises(InputError, match="shown"):
        MissingGaussian(torch.ones(4, 1), shown=shown)


BITS = {"default": (), "skewed": ((0.2, 0.8), (1.0, -0.5), (3.0, 0.7))}


@pytest.fixture(params=BITS)
def toy(request: pytest.FixtureRequest, double: None) -> MissingBit:
    return MissingBit(*BITS[request.param])


def test_default_bit() -> None:
    toy = MissingBit()
    mean, variance = toy.shared_posterior()
    assert float(mean) == pytest.approx(1.2, abs=1e-12)
    assert float(variance) == pytest.approx(0.4, abs=1e-12)
    assert float(toy.conditioning_gap()) == pytest.approx(3.311571776, abs=1e-9)


def test_bit_matches_quadrature(toy: MissingBit) -> None:
    """The program's own density on a grid gives evidence and posteriors; their product, the shared one and the gap."""
    log_product = torch.zeros_like(GRID)
    for bit in (0.0, 1.0):
        x = torch.full_like(GRID, bit)
        trace = poutine.trace(poutine.condition(toy, data={"z": GRID[:, None]})).get_trace(x)
        trace.compute_log_prob()
        log_joint = trace.nodes["z"]["log_prob"] + trace.nodes["x"]["log_prob"]
        log_evidence = log_joint.logsumexp(0) + math.log(CELL)
        torch.testing.assert_close(log_evidence, toy.log_evidence(x)[0], atol=1e-8, rtol=0)
        mean, variance = toy.posterior(x[:1])
        torch.testing.assert_close(
            log_joint - log_evidence, Normal(mean, variance.sqrt()).log_prob(GRID)[0], atol=1e-7, rtol=1e-7
        )
        log_product = log_product + log_evidence.exp() * (log_joint - log_evidence)
    log_normaliser = log_product.logsumexp(0) + math.log(CELL)
    torch.testing.assert_close(toy.conditioning_gap(), -log_normaliser, atol=1e-8, rtol=0)
    density = (log_product - log_normaliser).exp() * CELL
    mean, variance = toy.shared_posterior()
    torch.testing.assert_close(density @ GRID, mean, atol=1e-8, rtol=0)
    torch.testing.assert_close(density @ (GRID - mean) ** 2, variance, atol=1e-8, rtol=0)


class BlindGuide(nn.Module):
    """The best q(z) of a `MissingBit`."""

    def __init__(self, toy: MissingBit) -> None:
        super().__init__()
        self.conditions = toy.conditions
        mean, variance = toy.shared_posterior()
        self.q = dist.Normal(mean.reshape(1), variance.sqrt())

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.q.to_event(1))


@pytest.mark.parametrize("columns", [0, 1])
def test_monte_carlo_gap_of_the_blind_guide(toy: MissingBit, columns: int) -> None:
    x = torch.tensor([0.0, 1.0, 0.0]).reshape(3, *[1] * columns)
    assert pyrogaps.JointDensity(toy, x).dim == 1
    elbo = pyrogaps.elbo(toy, BlindGuide(toy), x, num_particles=4000)
    gaps, weights = toy.log_evidence(x) - elbo.value, toy.log_evidence(x).exp()
    mcse = float((weights * elbo.mcse)[:2].norm())
    assert mcse < 0.1
    assert abs(float((weights * gaps)[:2].sum() - toy.conditioning_gap())) < 4 * mcse


def test_bit_withholds_all() -> None:
    for x in (torch.tensor([0.0, 1.0]), torch.tensor([[0], [1]])):
        conditions = MissingBit().conditions(x)
        assert conditions.dtype == torch.bool
        assert conditions.shape == x.shape
        assert not conditions.any()


def test_bits_may_be_integers_and_dtypes_are_promoted() -> None:
    toy = MissingBit(means=torch.tensor([-2.0, 2.0], dtype=torch.float32))
    assert {buffer.dtype for buffer in toy.buffers()} == {torch.float32}
    x = torch.tensor([[0], [1]])
    assert toy(x).shape == toy(x[:, 0]).shape == (2, 1)
    assert toy.log_evidence(x).shape == (2,)
    assert toy.posterior(x)[0].tolist() == [[-2.0], [2.0]]
    assert toy.posterior(x)[1].tolist() == [[1.0], [0.25]]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"weights": (0.5, 0.6)}, "weights"),
        ({"weights": (1.5, -0.5)}, "weights"),
        ({"weights": (0.2, 0.3, 0.5)}, "weights must be two numbers"),
        ({"means": 1.0}, "means must be two numbers"),
        ({"precisions": (1.0, 0.0)}, "precisions"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], word: str) -> None:
    with pytest.raises(InputError, match=word):
        MissingBit(**arguments)  # type: ignore[arg-type]


def test_bad_bits_are_refused() -> None:
    toy = MissingBit()
    for x in (torch.zeros(2, 2), torch.zeros(2, 1, 1), torch.tensor(0.0)):
        with pytest.raises(InputError, match="x must have shape"):
            toy(x)
        with pytest.raises(InputError, match="x must have shape"):
            toy.log_evidence(x)
    with pytest.raises(InputError, match="zeros and ones"):
        toy.posterior(torch.tensor([0.5]))
