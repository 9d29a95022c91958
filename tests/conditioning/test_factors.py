"""Per-step conditions refined factor by factor: factor t over completions of x after t + k, later factors exact.

With the later latents integrated out, factor t of a linear-Gaussian chain is the shared posterior of a model with one
latent, z_t given z_{t-1}, whose completions are drawn given x_1 to x_{t+k}. The KL divergences of all factors must add
up to the conditioning gap of lookahead k in closed form.
"""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

import pyrogaps as pg
from pyrogaps.bounds import chunk_log_weights
from pyrogaps.capture import GradientEvaluator
from pyrogaps.conditioning.completions import Completions
from pyrogaps.conditioning.shared import OnCompletions
from pyrogaps.models.state_space import LinearGaussianStateSpace
from pyrogaps.refine import Refiner
from pyrogaps.run import Run
from pyrogaps.streams import Chunk, Stream, seeded

T, N, K = 3, 64, 64
CHAIN = LinearGaussianStateSpace(0.9, 0.5, 1.0, 1.0, 1.0)
F, Q, V, P1 = 0.9, 0.5, 1.0, 1.0


def marginal(steps: int, variance: Tensor | float) -> Tensor:
    """Cov(x_t .. x_T) where z_t has that `variance`: what it adds, process noise after t, and the observations' own."""
    powers = F ** torch.arange(steps)
    later = [
        [sum(F ** (i + j - 2 * s) * Q for s in range(1, min(i, j) + 1)) for j in range(steps)] for i in range(steps)
    ]
    return torch.tensor(later) + V * torch.eye(steps) + variance * powers[:, None] * powers


def factor(x: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """p(z_t | z_{t-1}) p(x_t .. x_T | z_t) for `x` `(N, T - t + 1)`; `loc` and `scale` `(N, 1)` are z_t's."""
    steps = x.shape[1]
    with pyro.plate("data", len(x)):
        z: Tensor = pyro.sample("z", dist.Normal(loc, scale).to_event(1))
        pyro.sample("x", dist.MultivariateNormal(z * F ** torch.arange(steps), marginal(steps, 0.0)), obs=x)
    return z


def completions(x: Tensor, seen: int) -> Tensor:
    """K completions of `x` `(N, T)` after its first `seen` steps, `(K, N, T)`."""
    found = CHAIN.filtered(x[:, :seen, None])
    mean, spread = found.mean[:, -1, 0], found.covariance[-1, 0, 0].sqrt()
    z = mean + spread * torch.randn(K, len(x))
    drawn = x.expand(K, -1, -1).clone()
    for t in range(seen, T):
        z = F * z + Q**0.5 * torch.randn(K, len(x))
        drawn[..., t] = z + V**0.5 * torch.randn(K, len(x))
    return drawn


@pytest.mark.parametrize("lookahead", [0, 1])
def test_factors_add_up_to_the_gap(lookahead: int) -> None:
    sequences, z = CHAIN.simulate(N, T, seed=5)
    x, total, variance = sequences[..., 0], torch.zeros(N, dtype=torch.float64), torch.zeros(N, dtype=torch.float64)
    for t in range(T):
        loc = F * z[:, t - 1] if t else torch.zeros(N, 1)
        given = loc, torch.full((N, 1), Q**0.5 if t else P1**0.5)
        data = x[:, t:], *given
        joint = pg.JointDensity(factor, data)
        evaluator, chunk = GradientEvaluator(joint), Chunk(0, N)
        with seeded(lookahead, "factor", t):
            drawn = completions(x, min(t + lookahead + 1, T))[..., t:]
            rows = drawn.flatten(0, 1), *(value.repeat(K, 1) for value in given)
            held = Completions(rows, torch.zeros(K, N, 1), torch.ones(N))
            on = OnCompletions(evaluator, held, torch.arange(K))
            shared, _ = Refiner(AutoNormal, pg.Refinement(num_steps=150))(on, chunk, Run(0))
            weights = chunk_log_weights(joint, shared, chunk, 1000, Stream(0, "factor"))
        steps = T - t
        exact = dist.MultivariateNormal(loc * F ** torch.arange(steps), marginal(steps, given[1][0, 0] ** 2)).log_prob(
            x[:, t:]
        )
        total = total + exact - weights.mean(0)
        variance = variance + weights.var(0) / len(weights)
    gap = float(CHAIN.conditioning_gap(T, lookahead))
    # K completions make it a K-th larger, see test_shared.
    error = float((total.var() / N).sqrt())
    assert abs(float(total.mean()) / (1 + 1 / K) - gap) < 4 * error
    assert error < 0.35 * gap
