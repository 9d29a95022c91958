"""What must not matter: batch size, chunks of particles, the order of the data, precision."""

import functools
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

from pyrogaps import AIS, GuideDensity, JointDensity, Refinement, decompose, elbo, iwae
from pyrogaps.guides.flows import AutoLocalFlow

N = 150


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 3))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Gamma(2.0, 2.0))
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), rate[..., None]).to_event(1), obs=x)


class Factorised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(3, 5)

    def forward(self, x: Tensor) -> None:
        out = self.encoder(x)
        with pyro.plate("data", len(x)):
            pyro.sample("rate", dist.LogNormal(out[:, 0], 0.4))
            pyro.sample("z", dist.Normal(out[:, 1:3], out[:, 3:].exp()).to_event(1))


class Sequential(Factorised):
    def forward(self, x: Tensor) -> None:
        out = self.encoder(x)
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.LogNormal(out[:, 0], 0.4))
            pyro.sample("z", dist.Normal(out[:, 1:3] + rate[:, None], out[:, 3:].exp()).to_event(1))


def pair(kind: Any, number: int = N) -> tuple[Model, Any, Tensor]:
    torch.manual_seed(0)
    x, model = torch.randn(number, 3), Model()
    guide = kind(model) if kind is AutoNormal else kind()
    guide(x)
    return model, guide, x


QUICK: dict[str, Any] = {
    "num_particles": 10,
    "refinement": Refinement(num_steps=3, num_particles=4, num_selection=8),
    "evidence": AIS(num_chains=4, num_temperatures=2, num_leapfrog=1),
    "families": {"normal": AutoNormal, "flow": AutoLocalFlow},
    "progress": False,
}


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("kind", [Factorised, Sequential, AutoNormal])
@pytest.mark.parametrize("bound", [elbo, iwae])
def test_batch_size_does_not_change_bounds(kind: Any, bound: Any) -> None:
    model, guide, x = pair(kind)
    # 200 particles are two blocks of them.
    small, large = (bound(model, guide, x, num_particles=200, batch_size=size) for size in (64, 192))
    torch.testing.assert_close(small.log_weights, large.log_weights, rtol=0, atol=1e-8)
    torch.testing.assert_close(small.value, large.value, rtol=0, atol=1e-8)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("kind", [Factorised, AutoNormal])
@pytest.mark.usefixtures("brief_check")
def test_batch_size_does_not_change_the_ledger(kind: Any) -> None:
    model, guide, x = pair(kind)
    small, large = (decompose(model, guide, x, batch_size=size, **QUICK) for size in (64, 192))
    for name in small.per_datapoint.data_vars:
        left, right = (torch.from_numpy(ledger.per_datapoint[name].values) for ledger in (small, large))
        torch.testing.assert_close(left, right, rtol=0, atol=1e-8, equal_nan=True, msg=str(name))
    for name in small.traces.data_vars:
        left, right = (torch.from_numpy(ledger.traces[name].values) for ledger in (small, large))
        torch.testing.assert_close(left, right, rtol=0, atol=1e-8, equal_nan=True, msg=str(name))


@pytest.mark.usefixtures("double")
@pytest.mark.usefixtures("brief_check")
def test_batch_size_does_not_change_a_structured_guide() -> None:
    model, guide, x = pair(Sequential, 70)
    settings = {**QUICK, "families": None, "refinement": Refinement(num_steps=2, num_particles=2, num_selection=2)}
    small, large = (decompose(model, guide, x, batch_size=size, **settings) for size in (64, 128))
    assert small.provenance["own_family"] == "structured"
    left, right = (torch.from_numpy(ledger.per_datapoint["elbo_refined"].values) for ledger in (small, large))
    torch.testing.assert_close(left, right, rtol=0, atol=1e-8)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("kind", [Factorised, Sequential, AutoNormal])
def test_rows_and_particles_in_pieces(kind: Any) -> None:
    model, guide, x = pair(kind, 20)
    joint = JointDensity(model, x)
    density = GuideDensity(guide, None, joint)
    z = torch.randn(6, 20, 3)
    for log_prob in (joint, density.log_prob):
        whole = log_prob(z, torch.arange(20))
        particles = torch.cat([log_prob(part, torch.arange(20)) for part in z.split(4)])
        torch.testing.assert_close(whole, particles, rtol=0, atol=1e-10)
        columns = [log_prob(z[:, some], some) for some in torch.arange(20).split(7)]
        torch.testing.assert_close(whole, torch.cat(columns, 1), rtol=0, atol=1e-10)


@pytest.mark.usefixtures("double")
def test_the_order_of_the_data_does_not_matter() -> None:
    model, guide, x = pair(Factorised, 40)
    order = torch.randperm(40)
    z = torch.randn(3, 40, 3)
    straight, shuffled = JointDensity(model, x), JointDensity(model, x[order])
    torch.testing.assert_close(straight(z)[:, order], shuffled(z[:, order]), rtol=0, atol=1e-12)
    guides = GuideDensity(guide, None, straight), GuideDensity(guide, None, shuffled)
    torch.testing.assert_close(guides[0].log_prob(z)[:, order], guides[1].log_prob(z[:, order]), rtol=0, atol=1e-12)
    results = [elbo(model, guide, data, num_particles=1000) for data in (x, x[order])]
    difference = results[0].value[order] - results[1].value
    error = (results[0].mcse[order].square() + results[1].mcse.square()).sqrt()
    assert (difference.abs() < 5 * error).all()
    assert not torch.equal(results[0].value[order], results[1].value)


def test_precision() -> None:
    model, guide, x = pair(Factorised, 30)
    single = elbo(model, guide, x, num_particles=1000)
    joint, density = JointDensity(model, x), GuideDensity(guide, x, model)
    z = torch.randn(4, 30, 3)
    low = joint(z), density.log_prob(z)
    assert joint.dtype == low[0].dtype == low[1].dtype == torch.float32
    assert single.log_weights.dtype == torch.float64
    torch.set_default_dtype(torch.float64)
    model, guide, x, z = model.double(), guide.double(), x.double(), z.double()
    joint, density = JointDensity(model, x), GuideDensity(guide, x, model)
    high = joint(z), density.log_prob(z)
    assert joint.dtype == high[0].dtype == high[1].dtype == torch.float64
    for left, right in zip(low, high, strict=True):
        torch.testing.assert_close(left.double(), right, rtol=1e-4, atol=1e-4)
    double = elbo(model, guide, x, num_particles=1000)
    error = (single.mcse.square() + double.mcse.square()).sqrt()
    assert ((single.value - double.value).abs() < 5 * error).all()


@pytest.mark.usefixtures("brief_check")
def test_double_data_under_a_single_default() -> None:
    """A model written in double precision throughout works whatever the default is."""
    x = torch.randn(20, 3, dtype=torch.float64)
    model, guide = Model().double(), Factorised().double()

    def typed(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Gamma(x.new_tensor(2.0), x.new_tensor(2.0)))
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(model.decoder(z), rate[..., None]).to_event(1), obs=x)

    def typed_guide(x: Tensor) -> None:
        out = guide.encoder(x)
        with pyro.plate("data", len(x)):
            pyro.sample("rate", dist.LogNormal(out[:, 0], 0.4 * x.new_ones(())))
            pyro.sample("z", dist.Normal(out[:, 1:3], out[:, 3:].exp()).to_event(1))

    joint = JointDensity(typed, x)
    assert joint.dtype == torch.float64
    z, log_q = GuideDensity(typed_guide, None, joint).sample(3)
    assert z.dtype == log_q.dtype == joint(z).dtype == torch.float64
    ledger = decompose(typed, typed_guide, x, **{**QUICK, "families": None})
    assert ledger.provenance["dtype"] == "float64"


@pytest.mark.usefixtures("double")
def test_fetching_by_index_or_by_tensor() -> None:
    from pyrogaps import IndexedData

    model, guide, x = pair(Factorised, 70)
    by_tensor = elbo(model, guide, x, num_particles=20)
    by_index = elbo(model, guide, IndexedData(70, lambda indices: (x[indices],)), num_particles=20)
    by_tuple = elbo(model, guide, (x,), num_particles=20)
    unwrapped = elbo(model, guide, IndexedData(70, functools.partial(torch.index_select, x, 0)), num_particles=20)
    for other in (by_index, by_tuple, unwrapped):
        assert torch.equal(by_tensor.log_weights, other.log_weights)
