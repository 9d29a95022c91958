"""log p(x) and ledgers of models whose discrete latents are summed out, against exact references."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import pyrogaps as pg
from pyrogaps.log_weights import Estimate
from tests.discrete_pairs import MOVE, STEPS, ragged_chain

WEIGHTS, NOISE = (0.3, 0.7), 0.2
SMALL: dict[str, Any] = {
    "refinement": pg.Refinement(num_steps=20),
    "num_particles": 200,
    "referee": False,
    "progress": False,
}


@pytest.fixture(autouse=True)
def _double() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def mixture(means: Tensor) -> Any:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            k = pyro.sample("k", dist.Categorical(torch.tensor(WEIGHTS)))
            pyro.sample("x", dist.Normal(means[k] + z, NOISE), obs=x)

    return model


def of_mixture(x: Tensor, means: Tensor) -> Tensor:
    scale = math.hypot(1.0, NOISE)
    parts = [math.log(w) + dist.Normal(m, scale).log_prob(x) for w, m in zip(WEIGHTS, means, strict=True)]
    return torch.stack(parts).logsumexp(0)


class OneNormal(nn.Module):
    """q(z|x) of one latent, far from its optimum."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor, *rest: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.slope * x.reshape(len(x), -1).mean(-1), 0.7))


def right(estimate: Estimate, exact: Tensor) -> None:
    """Within 4 standard errors at all datapoints, all reliable, and the errors small."""
    assert estimate.reliable.all()
    assert (estimate.mcse < 0.05).all()
    assert ((estimate.value - exact).abs() < 4 * estimate.mcse + 1e-5).all()


@pytest.mark.parametrize("distance", [4.0, 0.3], ids=["far apart", "overlapping"])
def test_mixture_of_two_at_every_datapoint(distance: float) -> None:
    """More datapoints than a block, none of them examined from other starts; modes 20 standard deviations apart."""
    x, means = 2 * torch.randn(70), torch.tensor([-0.5, 0.5]) * distance
    right(pg.log_evidence(mixture(means), OneNormal(), x, referee=False), of_mixture(x, means))


def test_other_starts_agree() -> None:
    x, means = torch.randn(6), torch.tensor([-2.0, 2.0])
    right(pg.log_evidence(mixture(means), None, x), of_mixture(x, means))


def test_ledger_of_a_mixture() -> None:
    x, means = torch.randn(5), torch.tensor([-2.0, 2.0])
    ledger = pg.decompose(mixture(means), OneNormal(), x, **SMALL)
    values, errors = (
        torch.as_tensor(ledger.per_datapoint[name].values) for name in ("log_evidence", "log_evidence_mcse")
    )
    assert ((values - of_mixture(x, means)).abs() < 4 * errors).all()
    assert (ledger.per_datapoint.inference_gap.values > 0.3).all()  # one Normal cannot hold both modes


def of_chain(y: Tensor, lengths: Tensor) -> Tensor:
    """The forward algorithm at every point of a grid of the continuous latent."""
    grid = torch.linspace(-10, 10, 4001)
    emitted = [dist.Normal(STEPS + grid[:, None, None], 1.0).log_prob(y[:, t, None]) for t in range(y.shape[1])]
    messages = MOVE[0].log() + emitted[0]
    for t in range(1, y.shape[1]):
        step = (messages[..., None] + MOVE.log()).logsumexp(-2) + emitted[t]
        messages = torch.where((t < lengths)[:, None], step, messages)
    log_joint = messages.logsumexp(-1) + dist.Normal(0.0, 1.0).log_prob(grid)[:, None]
    return log_joint.logsumexp(0) + math.log(20 / 4000)


@pytest.mark.parametrize("steps", [4, 7], ids=["16 states", "128 states"])
def test_ragged_chain(steps: int) -> None:
    """Few joint states, each with a Gaussian, and many, whose modes chains from the prior find."""
    y, lengths = torch.randn(4, steps), torch.tensor([steps, 3, 2, 1])
    right(pg.log_evidence(ragged_chain, OneNormal(), (y, lengths), referee=False), of_chain(y, lengths))


# All latents discrete.


def discrete(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(torch.tensor(WEIGHTS)))
        pyro.sample("x", dist.Normal(torch.tensor([-1.0, 2.0])[k], 0.5), obs=x)


def nothing(x: Tensor) -> None:
    pass


def test_all_latents_discrete_is_exact() -> None:
    x = torch.randn(7)
    parts = [math.log(w) + dist.Normal(m, 0.5).log_prob(x) for w, m in zip(WEIGHTS, (-1.0, 2.0), strict=True)]
    exact = torch.stack(parts).logsumexp(0)
    problem = pg.Problem.of(discrete, nothing, x)
    assert problem.dim == 0
    for estimate in (pg.elbo(problem), pg.iwae(problem), pg.log_evidence(problem)):
        torch.testing.assert_close(estimate.value, exact)
        assert (estimate.mcse < 1e-12).all()
        assert estimate.reliable.all()
    ledger = pg.decompose(problem, **SMALL)
    assert abs(ledger.per_datapoint.inference_gap.values).max() < 1e-9
    assert str(ledger)
