"""Pyro's toy mixture of Gaussians: weights, means and a scale shared by all points, an enumerated assignment each."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoNormal
from torch import Tensor, nn

from tests.pyro_programs.pairs import Mean, Pair, assert_same, assert_same_draws, elbo_of, fixed

POINTS = torch.tensor([0.0, 1.0, 10.0, 11.0, 12.0]).repeat(4)  # more of them, for precise means
SHARED = ["weights", "locs", "scale"]


@config_enumerate
def model(data: Tensor) -> None:
    weights = pyro.sample("weights", dist.Dirichlet(0.5 * torch.ones(2)))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 2.0))
    with pyro.plate("components", 2):
        locs = pyro.sample("locs", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(data)):
        assignment = pyro.sample("assignment", dist.Categorical(weights))
        pyro.sample("obs", dist.Normal(locs[assignment], scale), obs=data)


@config_enumerate
def shifted(data: Tensor) -> None:
    """The same with a shift of each point, so that something continuous is latent in the data plate."""
    weights = pyro.sample("weights", dist.Dirichlet(0.5 * torch.ones(2)))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 2.0))
    with pyro.plate("components", 2):
        locs = pyro.sample("locs", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(data)):
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
        assignment = pyro.sample("assignment", dist.Categorical(weights))
        pyro.sample("obs", dist.Normal(locs[assignment] + shift, scale), obs=data)


def started(site: Any) -> Tensor:
    """Where a point estimate starts: near the two clusters of `POINTS`."""
    values = {"weights": torch.tensor([0.4, 0.6]), "locs": torch.tensor([1.0, 10.0]), "scale": torch.tensor(1.5)}
    return values[site["name"]]


def estimates() -> dict[str, Tensor]:
    return {name: started({"name": name}) for name in SHARED}


def log_prior() -> float:
    """Of the estimates: in Pyro's ELBO of the program as it is, and not in the ledger's, which is given them."""
    trace = poutine.trace(poutine.condition(model, data=estimates())).get_trace(POINTS)
    trace.compute_log_prob(lambda name, site: name in SHARED)
    return sum(float(trace.nodes[name]["log_prob_sum"]) for name in SHARED)


def shared_guide(kind: Callable[..., Any]) -> Any:
    guide = kind(poutine.block(model, expose=SHARED), init_loc_fn=started)
    guide(POINTS)
    return guide


class Shift(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slope, self.log_scale = nn.Parameter(torch.tensor(0.01)), nn.Parameter(torch.tensor(-0.2))

    def forward(self, data: Tensor) -> None:
        with pyro.plate("data", len(data)):
            pyro.sample("shift", dist.Normal(self.slope * data, self.log_scale.exp()))


def test_assignments_given_point_estimates(mode: Any) -> None:
    """Nothing continuous is latent: the sum over assignments is log p(x), and there is no gap."""
    guide = shared_guide(AutoDelta)
    twin = (fixed(model, estimates()), lambda data: None)
    pair = Pair(model, guide, (POINTS,), len(POINTS), plate="data", clean=twin, nesting=1)
    ledger = pair.ledger(mode)
    assert_same(elbo_of(ledger), pair.elbo_of_pyro())
    assert abs(float(ledger.per_datapoint.inference_gap.mean())) < 1e-4
    assert all(name in str(ledger) for name in SHARED)


def test_assignments_in_the_guide_given_point_estimates(mode: Any) -> None:
    auto, probabilities = shared_guide(AutoDelta), torch.tensor([[0.9, 0.1]] * 2 + [[0.2, 0.8]] * 3).repeat(4, 1)

    @config_enumerate
    def local(data: Tensor) -> None:
        with pyro.plate("data", len(POINTS)):
            rows = pyro.param("assignment_probs", probabilities, constraint=dist.constraints.simplex, event_dim=1)
            pyro.sample("assignment", dist.Categorical(rows))

    def guide(data: Tensor) -> None:
        auto(data)
        local(data)

    pair = Pair(model, guide, (POINTS,), len(POINTS), plate="data", clean=(fixed(model, estimates()), local), nesting=1)
    assert_same(elbo_of(pair.ledger(mode, num_particles=20_000)), pair.elbo_of_pyro())


def test_shift_given_point_estimates(mode: Any) -> None:
    auto, local = shared_guide(AutoDelta), Shift()

    def guide(data: Tensor) -> None:
        auto(data)
        local(data)

    twin = (fixed(shifted, estimates()), local)
    pair = Pair(shifted, guide, (POINTS,), len(POINTS), plate="data", clean=twin, nesting=1, repeats=50)
    clean, raw = pair.elbo_of_pyro(), Pair(shifted, guide, (POINTS,), len(POINTS), nesting=1).elbo_of_pyro()
    assert_same(elbo_of(pair.ledger(mode)), clean)
    assert_same(Mean(clean.value + log_prior() / len(POINTS), clean.error), raw)
    assert_same_draws(pair)


def test_shared_latents_with_distributions(mode: Any) -> None:
    pair = Pair(model, shared_guide(AutoNormal), (POINTS,), len(POINTS), plate="data", nesting=1)
    assert_same(elbo_of(pair.ledger(mode), len(POINTS)), pair.elbo_of_pyro())
