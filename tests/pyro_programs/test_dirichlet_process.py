"""A Dirichlet process mixture, truncated: sticks and means shared by all points, an assignment each."""

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import config_enumerate
from torch import Tensor

from tests.pyro_programs.pairs import Pair, assert_same, elbo_in_parts, elbo_of

POINTS, COMPONENTS = 24, 3
ROWS = [[-1.5, -1.7], [-1.2, -1.6], [1.6, 1.1], [1.4, 1.7], [0.1, 0.4], [-1.7, -1.3]]
LEFT, RIGHT, MIDDLE = [0.9, 0.02, 0.08], [0.02, 0.9, 0.08], [0.1, 0.1, 0.8]
DATA, PHI = torch.tensor(ROWS).repeat(4, 1), torch.tensor([LEFT, LEFT, RIGHT, RIGHT, MIDDLE, LEFT]).repeat(4, 1)


def stick_lengths(beta: Tensor) -> Tensor:
    """Shares of the components from the shares `beta` broken off what is left of the stick."""
    left = (1 - beta).cumprod(-1)
    one = torch.ones_like(beta[..., :1])
    return torch.cat([beta, one], -1) * torch.cat([one, left], -1)


@config_enumerate
def model(data: Tensor) -> None:
    with pyro.plate("beta_plate", COMPONENTS - 1):
        beta = pyro.sample("beta", dist.Beta(1.0, 1.5))
    with pyro.plate("mu_plate", COMPONENTS):
        mu = pyro.sample("mu", dist.MultivariateNormal(torch.zeros(2), 5.0 * torch.eye(2)))
    with pyro.plate("data", len(data)):
        z = pyro.sample("z", dist.Categorical(stick_lengths(beta)))
        pyro.sample("obs", dist.MultivariateNormal(mu[z], torch.eye(2)), obs=data)


def shared_guide(data: Tensor) -> None:
    kappa = pyro.param("kappa", torch.tensor([[12.0, 12.0], [8.0, 4.0]]), constraint=dist.constraints.positive)
    tau = pyro.param("tau", lambda: torch.tensor([[-1.4, -1.4], [1.4, 1.3], [0.0, 0.3]]))
    with pyro.plate("beta_plate", COMPONENTS - 1):
        pyro.sample("beta", dist.Beta(kappa[:, 0], kappa[:, 1]))
    with pyro.plate("mu_plate", COMPONENTS):
        pyro.sample("mu", dist.MultivariateNormal(tau, 0.05 * torch.eye(2)))


def drawing_guide(data: Tensor) -> None:
    """As in Pyro's tutorial: the guide draws the assignments, with probabilities of each point's own."""
    shared_guide(data)
    with pyro.plate("data", POINTS):
        phi = pyro.param("phi", lambda: PHI.clone(), constraint=dist.constraints.simplex, event_dim=1)
        pyro.sample("z", dist.Categorical(phi))


def test_enumerated_assignments(mode: Any) -> None:
    shared_guide(DATA)
    pair = Pair(model, shared_guide, (DATA,), POINTS, plate="data", nesting=1)
    assert_same(elbo_of(pair.ledger(mode), POINTS), pair.elbo_of_pyro())


def test_assignments_drawn_by_the_guide() -> None:
    drawing_guide(DATA)
    enumerated = config_enumerate(drawing_guide, "parallel")
    pair = Pair(model, drawing_guide, (DATA,), POINTS, plate="data", clean=(model, enumerated), nesting=1)
    assert_same(elbo_in_parts(pair), pair.elbo_of_pyro())
