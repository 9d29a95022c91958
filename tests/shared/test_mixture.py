"""A mixture of two Gaussians with shared means, against a sum over all assignments.

Given the means no gap is left, because the assignments are summed out: the gap of the data set is that of the means. In
either order they explain the data equally well, so that a guide of one order alone is log 2 further from the posterior.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import pyrogaps as pg

X = torch.tensor([-2.1, -1.7, -2.4, 1.8, 2.2, 2.0, -1.9, 1.6])
WIDTH = 2.0  # of the means' prior
AXIS = torch.linspace(-8, 14, 881, dtype=torch.float64)


def assigned(x: Tensor, first: Tensor, second: Tensor) -> None:
    with pyro.plate("d", len(x)):
        a = pyro.sample("a", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(first + a * (second - first), 1.0), obs=x)


def unordered(x: Tensor) -> None:
    first = pyro.sample("first", dist.Normal(0.0, WIDTH))
    second = pyro.sample("second", dist.Normal(0.0, WIDTH))
    assigned(x, first, second)


def ordered(x: Tensor) -> None:
    """The same means, sorted: centre and distance of two Normals are independent."""
    centre = pyro.sample("centre", dist.Normal(0.0, WIDTH / math.sqrt(2)))
    distance = pyro.sample("distance", dist.HalfNormal(WIDTH * math.sqrt(2)))
    assigned(x, centre - distance / 2, centre + distance / 2)


class Guide(nn.Module):
    """Independent distributions of the two shared latents."""

    def __init__(self, names: tuple[str, str], kinds: tuple[Any, Any], locs: list[float], scales: list[float]) -> None:
        super().__init__()
        self.names, self.kinds = names, kinds
        self.loc, self.scale = nn.Parameter(torch.tensor(locs)), nn.Parameter(torch.tensor(scales))

    def forward(self, x: Tensor) -> None:
        for place, (name, kind) in enumerate(zip(self.names, self.kinds, strict=True)):
            pyro.sample(name, kind(self.loc[place], self.scale[place]))


def in_one_order() -> Guide:
    return Guide(("first", "second"), (dist.Normal, dist.Normal), [-1.9, 1.8], [0.5, 0.5])


def sorted_means() -> Guide:
    names = ("centre", "distance")
    return Guide(names, (dist.Normal, dist.LogNormal), [0.0, math.log(3.7)], [0.35, 0.2])


def log_evidence() -> float:
    """By the sum over all 2^8 assignments: given one, each component is jointly Gaussian."""
    totals = []
    for chosen in itertools.product((False, True), repeat=len(X)):
        mask = torch.tensor(chosen)
        total = len(X) * math.log(0.5)
        for part in (X[mask].double(), X[~mask].double()):
            if size := len(part):
                covariance = torch.eye(size, dtype=torch.float64) + WIDTH**2
                total += float(dist.MultivariateNormal(torch.zeros(size).double(), covariance).log_prob(part))
        totals.append(total)
    return float(torch.tensor(totals).logsumexp(0))


def exact_elbo(model: Callable[..., Any]) -> float:
    """E_q [log p(x, theta) - log q(theta)] by the trapezoidal rule over both shared latents."""
    if model is unordered:
        first, second = torch.meshgrid(AXIS, AXIS, indexing="ij")
        log_p = dist.Normal(0.0, WIDTH).log_prob(first) + dist.Normal(0.0, WIDTH).log_prob(second)
        log_q = dist.Normal(-1.9, 0.5).log_prob(first) + dist.Normal(1.8, 0.5).log_prob(second)
    else:
        centre, distance = torch.meshgrid(AXIS, AXIS[AXIS > 0], indexing="ij")
        log_p = dist.Normal(0.0, WIDTH / math.sqrt(2)).log_prob(centre)
        log_p = log_p + dist.HalfNormal(WIDTH * math.sqrt(2)).log_prob(distance)
        log_q = dist.Normal(0.0, 0.35).log_prob(centre) + dist.LogNormal(math.log(3.7), 0.2).log_prob(distance)
        first, second = centre - distance / 2, centre + distance / 2
    for x in X.double():
        either = torch.stack([dist.Normal(mean, 1.0).log_prob(x) for mean in (first, second)])
        log_p = log_p + either.logsumexp(0) + math.log(0.5)
    weight = log_q.exp() * float(AXIS[1] - AXIS[0]) ** 2
    assert abs(float(weight.sum()) - 1) < 1e-6
    return float((weight * (log_p - log_q)).sum())


@pytest.mark.parametrize(("model", "guide"), [(ordered, sorted_means), (unordered, in_one_order)])
def test_the_gap_is_between_its_bounds(model: Callable[..., Any], guide: Callable[[], Guide]) -> None:
    problem = pg.Problem.of(model, guide(), X)
    assert (problem.num_datapoints, problem.dim) == (1, 2)
    (remark,) = problem.remarks
    assert "because all latents in the plate 'd' are discrete and summed out" in remark
    elbo = pg.elbo(problem, num_particles=4000)
    assert abs(float(elbo.value) - exact_elbo(model)) < 4 * float(elbo.mcse)
    evidence = pg.log_evidence(problem, evidence=pg.Ladder(tolerance=0.02))
    truth, upper = log_evidence() - exact_elbo(model), evidence.upper
    assert bool(evidence.reliable)
    assert upper is not None
    error = math.hypot(float(evidence.mcse), float(elbo.mcse))
    assert error < 0.05
    low, high = float(evidence.value - elbo.value), float(upper - elbo.value)
    assert high - low <= 0.1
    assert low - 4 * error <= truth <= high + 4 * error
    # By so much more that the other order is missed.
    assert (truth > math.log(2)) == (model is unordered)
    assert (low > math.log(2) - 4 * error) == (model is unordered)
