"""Negative binomials by mean and inverse dispersion: masses, gradients, draws and shapes."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyrogaps import JointDensity
from pyrogaps.likelihoods.counts import NegativeBinomial, ZeroInflatedNegativeBinomial

MU = torch.tensor([[1e-6, 0.3], [4.0, 60.0], [900.0, 2.5]]).double()
THETA = torch.tensor([0.2, 30.0]).double()  # of genes, as `MU` is of cells and genes
ZERO = torch.tensor([[-3.0, 0.5], [2.0, -40.0], [6.0, -0.2]]).double()
X = torch.tensor([0.0, 1.0, 3.0, 70.0, 1200.0]).double()[:, None, None]
MADE = {
    "NB": (
        lambda mu, theta, zero: NegativeBinomial(mu, theta),
        lambda mu, theta, zero: dist.NegativeBinomial(theta, logits=mu.log() - theta.log()),
    ),
    "ZINB": (
        lambda mu, theta, zero: ZeroInflatedNegativeBinomial(mu, theta, zero),
        lambda mu, theta, zero: dist.ZeroInflatedNegativeBinomial(
            theta, logits=mu.log() - theta.log(), gate_logits=zero
        ),
    ),
}


@pytest.mark.parametrize("name", MADE)
def test_masses_moments_and_gradients_are_those_of_the_other_parametrisation(name: str) -> None:
    ours, theirs = MADE[name]
    parameters = [[value.clone().requires_grad_() for value in (MU, THETA, ZERO)] for _ in range(2)]
    fn, other = ours(*parameters[0]), theirs(*parameters[1])
    torch.testing.assert_close(fn.log_prob(X), other.log_prob(X), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(fn.mean, other.mean, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(fn.variance, other.variance, rtol=1e-9, atol=1e-12)
    used = 2 + (name == "ZINB")
    gradients = [
        torch.autograd.grad(each.log_prob(X).sum(), values[:used])
        for each, values in zip((fn, other), parameters, strict=True)
    ]
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", MADE)
def test_masses_sum_to_one(name: str) -> None:
    fn = MADE[name][0](MU, THETA, ZERO)
    total = fn.log_prob(torch.arange(60_000).double()[:, None, None]).logsumexp(0)
    torch.testing.assert_close(total, torch.zeros_like(total), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", MADE)
def test_draws_have_the_moments(name: str) -> None:
    pyro.set_rng_seed(0)
    fn, number = (
        MADE[name][0](torch.tensor([0.5, 4.0, 80.0]), torch.tensor(1.5), torch.tensor([-1.0, 0.3, 1.0])),
        40_000,
    )
    draws = fn.sample((number,))
    assert draws.shape == (number, 3) and fn.support.check(draws).all()
    for value, expected in ((draws, fn.mean), ((draws - fn.mean) ** 2, fn.variance)):
        error = value.std(0) / number**0.5
        assert ((value.mean(0) - expected).abs() < 4 * error).all()


@pytest.mark.parametrize("name", MADE)
def test_it_expands_and_is_a_likelihood(name: str) -> None:
    fn = MADE[name][0](MU[0], THETA, ZERO[0])
    wide = fn.expand((4, 2))
    assert wide.batch_shape == (4, 2) and wide.sample().shape == (4, 2) and wide.mean.shape == (4, 2)
    torch.testing.assert_close(wide.log_prob(X[:2]), fn.log_prob(X[:2]).expand(2, 4, 2))
    with pytest.raises(ValueError, match="support"):
        MADE[name][0](MU, THETA, ZERO).log_prob(torch.tensor(0.5).double())

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", MADE[name][0](z.exp(), THETA, ZERO[0]).to_event(1), obs=x)

    x, z = torch.tensor([[0.0, 3.0], [2.0, 0.0], [0.0, 0.0]]).double(), torch.randn(1, 3, 2).double()
    prior = dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
    expected = prior + MADE[name][1](z.exp(), THETA, ZERO[0]).log_prob(x).sum(-1)
    torch.testing.assert_close(JointDensity(model, x)(z, torch.arange(3)).double(), expected)
