"""`GuideDensity`: what it draws it scores, and both agree with formulas by hand, for every style of guide."""

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, config_enumerate
from pyro.infer.autoguide import (
    AutoGuideList,
    AutoHierarchicalNormalMessenger,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalMessenger,
)
from pyro.nn import PyroModule, PyroParam
from pyro.optim import Adam
from torch import Tensor, nn
from torch.distributions import biject_to, constraints
from torch.nn.functional import softplus

from pyrogaps import GuideDensity, JointDensity, elbo
from pyrogaps.guides.local import AutoLocalMultivariateNormal

pytestmark = pytest.mark.usefixtures("double")

ORDER = torch.tensor([4, 0, 0, 2])


def normal(value: Tensor, loc: Tensor | float, scale: Tensor | float) -> Tensor:
    return dist.Normal(loc, scale).log_prob(value)


def consistent(density: GuideDensity, log_q_of: Callable[[Tensor, Tensor], Tensor], number: int = 5) -> None:
    """`sample`, `log_prob` and `log_q_of(z, indices)` say the same, for all datapoints and for some, out of order."""
    for indices in (torch.arange(number), ORDER[number > ORDER], torch.tensor([number - 1])):
        z, log_q = density.sample(6, indices)
        assert z.shape == (6, len(indices), density.joint.dim) and log_q.shape == z.shape[:2]
        expected = log_q_of(z, indices)
        torch.testing.assert_close(log_q, expected)
        torch.testing.assert_close(density.log_prob(z, indices), expected)
        assert (z.std(0) > 0).all()


def two_sites(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), rate[..., None]).expand(x.shape).to_event(1), obs=x)


class Encoder(nn.Module):
    """An amortized guide for `two_sites`; its sites do not depend on each other."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 6))

    def parameters_of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out = self.net(x)
        return out[..., :2], softplus(out[..., 2:4]), softplus(out[..., 4:]) + 0.5

    def forward(self, x: Tensor) -> None:
        loc, scale, gamma = self.parameters_of(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))  # not in the model's order
            pyro.sample("rate", dist.Gamma(gamma[..., 0], gamma[..., 1]))


def test_amortized_module() -> None:
    x, guide = torch.randn(5, 3), Encoder()
    density = GuideDensity(guide, x, two_sites)
    assert density.factorised and not density.bound

    def log_q(z: Tensor, indices: Tensor) -> Tensor:
        loc, scale, gamma = guide.parameters_of(x[indices])
        rate = dist.Gamma(gamma[:, 0], gamma[:, 1]).log_prob(z[..., 0].exp()) + z[..., 0]
        return rate + normal(z[..., 1:], loc, scale).sum(-1)

    consistent(density, log_q)


def test_module_method_as_guide() -> None:
    x, guide = torch.randn(5, 3), Encoder()
    density = GuideDensity(guide.forward, x, two_sites)
    z, log_q = GuideDensity(guide, x, two_sites).sample(3)
    torch.testing.assert_close(density.log_prob(z), log_q)


def test_function_with_params_and_module() -> None:
    encoder, x = nn.Linear(3, 2), torch.randn(5, 3)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        scale = pyro.param("scale", lambda: torch.tensor([0.3, 0.7]), constraint=constraints.positive)
        shape = pyro.param("shape", torch.tensor(2.0), constraint=constraints.greater_than(1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("rate", dist.Gamma(shape, 1.0))
            pyro.sample("z", dist.Normal(encoder(x), scale).to_event(1))

    svi = SVI(two_sites, guide, Adam({"lr": 0.1}), Trace_ELBO())
    for _ in range(3):
        svi.step(x)
    scale, shape = pyro.param("scale").detach(), pyro.param("shape").detach()
    assert (scale - torch.tensor([0.3, 0.7])).abs().min() > 0.01

    def log_q(z: Tensor, indices: Tensor) -> Tensor:
        rate = dist.Gamma(shape, 1.0).log_prob(z[..., 0].exp()) + z[..., 0]
        return rate + normal(z[..., 1:], encoder(x[indices]), scale).sum(-1)

    consistent(GuideDensity(guide, x, two_sites), log_q)


def test_module_that_takes_its_values_from_the_store() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = nn.Linear(2, 3)

        def forward(self, x: Tensor) -> None:
            decoder = pyro.module("decoder", self.decoder, update_module_params=True)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def prior(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    x, model = torch.randn(5, 3), Model()
    SVI(model, prior, Adam({"lr": 0.1}), Trace_ELBO()).step(x)
    weight, bias = pyro.param("decoder$$$weight").detach(), pyro.param("decoder$$$bias").detach()
    fresh = Model()  # as after loading the store from a file
    z = torch.randn(2, 5, 2)
    expected = normal(z, 0.0, 1.0).sum(-1) + normal(x, z @ weight.T + bias, 1.0).sum(-1)
    torch.testing.assert_close(JointDensity(fresh, x)(z), expected)


def test_sites_that_depend_on_earlier_ones() -> None:
    x = torch.randn(5, 3)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x[:, :2], 0.5).to_event(1))
            pyro.sample("rate", dist.LogNormal(z.sum(-1), 0.3))

    density = GuideDensity(guide, x, two_sites)
    assert not density.factorised

    def log_q(z: Tensor, indices: Tensor) -> Tensor:
        return normal(z[..., 1:], x[indices, :2], 0.5).sum(-1) + normal(z[..., 0], z[..., 1:].sum(-1), 0.3)

    consistent(density, log_q)


def test_autoregressive_guide_through_a_recurrent_network() -> None:
    cell, x = nn.GRUCell(1, 4), torch.randn(5, 3)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = torch.zeros(len(x))
            for t in range(3):
                z = pyro.sample(f"z{t}", dist.Normal(0.9 * z, 1.0))
                pyro.sample(f"x{t}", dist.Normal(z, 1.0), obs=x[:, t])

    def steps(x: Tensor, draw: Callable[[int, Tensor], Tensor]) -> None:
        state, z = torch.zeros(len(x), 4), torch.zeros(len(x))
        for t in range(3):
            state = cell(x[:, t : t + 1] + z[:, None], state)
            z = draw(t, state)

    def guide(x: Tensor) -> None:
        pyro.module("cell", cell)
        with pyro.plate("data", len(x)):
            steps(x, lambda t, state: pyro.sample(f"z{t}", dist.Normal(state[:, 0], softplus(state[:, 1]))))

    def log_q(z: Tensor, indices: Tensor) -> Tensor:
        terms = []

        def score(t: int, state: Tensor) -> Tensor:
            terms.append(normal(z[..., t].flatten(), state[:, 0], softplus(state[:, 1])))
            return z[..., t].flatten()

        steps(x[indices].repeat(len(z), 1), score)
        return torch.stack(terms).sum(0).reshape(z.shape[:2])

    consistent(GuideDensity(guide, x, model), log_q)


def test_batch_shapes_that_broadcast() -> None:
    x = torch.randn(5, 3)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2), pyro.plate("features", 3, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2), pyro.plate("features", 3, dim=-1):
            pyro.sample("z", dist.Normal(x.mean(-1, keepdim=True), torch.tensor([0.1, 0.2, 0.3])))

    def log_q(z: Tensor, indices: Tensor) -> Tensor:
        return normal(z, x[indices].mean(-1, keepdim=True), torch.tensor([0.1, 0.2, 0.3])).sum(-1)

    consistent(GuideDensity(guide, x, model, plate="data"), log_q)


def test_events_of_several_dimensions() -> None:
    x = torch.randn(5, 2, 3)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.LogNormal(torch.zeros(2, 3), 1.0).to_event(2))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(2), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.LogNormal(x, 0.3).to_event(2))

    def log_q(z: Tensor, indices: Tensor) -> Tensor:
        return normal(z, x[indices].flatten(1), 0.3).sum(-1)

    consistent(GuideDensity(guide, x, model), log_q)


def test_another_distribution_on_the_same_support() -> None:
    x = torch.rand(5)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Dirichlet(torch.ones(3)))
            pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            base = dist.Normal(x[:, None].expand(-1, 2), 0.5).to_event(1)
            pyro.sample("z", dist.TransformedDistribution(base, [biject_to(constraints.simplex)]))

    consistent(GuideDensity(guide, x, model), lambda z, n: normal(z, x[n, None], 0.5).sum(-1))


def test_hints_and_scales_do_not_enter() -> None:
    x = torch.randn(5, 3)

    @config_enumerate
    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=2), poutine.scale(scale=0.3):
            pyro.sample(
                "z", dist.Normal(x[:, :2], 0.5).to_event(1), infer={"baseline": {"use_decaying_avg_baseline": True}}
            )
            pyro.sample("rate", dist.LogNormal(0.0, 0.3))

    def log_q(z: Tensor, indices: Tensor) -> Tensor:
        return normal(z[..., 0], 0.0, 0.3) + normal(z[..., 1:], x[indices, :2], 0.5).sum(-1)

    consistent(GuideDensity(guide, x, two_sites), log_q)


# Guides with parameters for each datapoint.


def own_parameters_by_index(x: Tensor, rows: Tensor) -> None:
    loc = pyro.param("loc", lambda: torch.linspace(-1.0, 1.0, 5))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc[rows], 0.5))


def own_parameters_by_plate(x: Tensor, rows: Tensor) -> None:
    loc = pyro.param("loc", lambda: torch.linspace(-1.0, 1.0, 5))
    with pyro.plate("data", 5, subsample=rows) as chosen:
        pyro.sample("z", dist.Normal(loc[chosen], 0.5))


def own_parameters_of_a_full_plate(x: Tensor, rows: Tensor) -> None:
    loc = pyro.param("loc", lambda: torch.linspace(-1.0, 1.0, 5))
    with pyro.plate("data", 5) as chosen:
        pyro.sample("z", dist.Normal(loc[chosen], 0.5))


def own_parameters_subsampled_by_pyro(x: Tensor, rows: Tensor) -> None:
    with pyro.plate("data", 5, dim=-1):
        loc = pyro.param("loc", lambda: torch.linspace(-1.0, 1.0, 5), event_dim=0)
        pyro.sample("z", dist.Normal(loc, 0.5))


class OwnParameters(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.loc = PyroParam(torch.linspace(-1.0, 1.0, 5), event_dim=0)
        self.scale = PyroParam(torch.tensor(0.5), constraints.positive)

    def forward(self, x: Tensor, rows: Tensor) -> None:
        with pyro.plate("data", 5, subsample_size=len(x)):
            pyro.sample("z", dist.Normal(self.loc, self.scale))


@pytest.mark.parametrize(
    "guide",
    [
        own_parameters_by_index,
        own_parameters_by_plate,
        own_parameters_of_a_full_plate,
        own_parameters_subsampled_by_pyro,
        OwnParameters(),
    ],
    ids=["index", "plate", "full plate", "event_dim", "PyroParam"],
)
def test_parameters_for_each_datapoint(guide: Any) -> None:
    def model(x: Tensor, rows: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    if isinstance(guide, PyroModule):
        guide = OwnParameters()
    density = GuideDensity(guide, (torch.randn(5), torch.arange(5)), model)
    loc = torch.linspace(-1.0, 1.0, 5)
    consistent(density, lambda z, indices: normal(z[..., 0], loc[indices], 0.5))
    shuffled = torch.tensor([3, 1, 4, 0, 2])  # as many rows as the plate has, out of order
    many = torch.tensor([3, 1, 4, 0, 2, 2, 0])
    for indices in (shuffled, many):
        z, log_q = density.sample(2, indices)
        torch.testing.assert_close(log_q, normal(z[..., 0], loc[indices], 0.5))


def test_own_parameters_in_a_guide_with_dependent_sites() -> None:
    def guide(x: Tensor) -> None:
        with pyro.plate("data", 5, dim=-1):
            loc = pyro.param("loc", lambda: torch.arange(5.0), event_dim=0)
            rate = pyro.sample("rate", dist.LogNormal(loc, 0.5))
            pyro.sample("z", dist.Normal(rate[..., None].expand(*rate.shape, 2), 0.5).to_event(1))

    def log_q(z: Tensor, indices: Tensor) -> Tensor:
        rate = normal(z[..., 0], torch.arange(5.0)[indices], 0.5)
        return rate + normal(z[..., 1:], z[..., :1].exp(), 0.5).sum(-1)

    density = GuideDensity(guide, torch.randn(5, 3), two_sites)
    assert density.bound and not density.factorised
    consistent(density, log_q)


# Autoguides.


def jitter(guide: nn.Module) -> None:
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))


@pytest.mark.parametrize("number", [1, 2, 5])
def test_auto_normal(number: int) -> None:
    x = torch.randn(number, 3)
    guide = AutoNormal(two_sites)
    guide(x)
    jitter(guide)
    loc = torch.cat([guide.locs.rate[:, None], guide.locs.z], -1)
    scale = torch.cat([guide.scales.rate[:, None], guide.scales.z], -1)
    density = GuideDensity(guide, x, two_sites)
    consistent(density, lambda z, indices: normal(z, loc[indices], scale[indices]).sum(-1), number)


def test_auto_normal_trained_on_minibatches() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=2, dim=-1):
            batch = pyro.subsample(x, event_dim=0)
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=batch)

    x = torch.randn(5)
    guide = AutoNormal(model)
    svi = SVI(model, guide, Adam({"lr": 0.2}), Trace_ELBO())
    for _ in range(5):
        svi.step(x)
    density = GuideDensity(guide, x, model)
    loc, scale = guide.locs.z, guide.scales.z
    consistent(density, lambda z, indices: normal(z[..., 0], loc[indices], scale[indices]))


def test_auto_normal_with_create_plates() -> None:
    def create_plates(x: Tensor) -> Any:
        return pyro.plate("data", len(x), dim=-1)

    x = torch.randn(5, 3)
    guide = AutoNormal(two_sites, create_plates=create_plates)
    guide(x)
    jitter(guide)
    loc = torch.cat([guide.locs.rate[:, None], guide.locs.z], -1)
    scale = torch.cat([guide.scales.rate[:, None], guide.scales.z], -1)
    consistent(GuideDensity(guide, x, two_sites), lambda z, n: normal(z, loc[n], scale[n]).sum(-1))


def test_auto_guide_list() -> None:
    x = torch.randn(5, 3)
    guide = AutoGuideList(two_sites)
    guide.append(AutoNormal(poutine.block(two_sites, expose=["rate"])))
    guide.append(AutoNormal(poutine.block(two_sites, expose=["z"]), init_scale=0.4))
    guide(x)
    jitter(guide)
    loc = torch.cat([guide[0].locs.rate[:, None], guide[1].locs.z], -1)
    scale = torch.cat([guide[0].scales.rate[:, None], guide[1].scales.z], -1)
    consistent(GuideDensity(guide, x, two_sites), lambda z, n: normal(z, loc[n], scale[n]).sum(-1))


@pytest.mark.parametrize("kind", [AutoNormalMessenger, AutoHierarchicalNormalMessenger])
def test_messenger_autoguides(kind: Any) -> None:
    x = torch.randn(5, 3)
    guide = kind(two_sites)
    guide(x)
    density = GuideDensity(guide, x, two_sites)
    z, log_q = density.sample(3)
    torch.testing.assert_close(density.log_prob(z), log_q)
    trace = poutine.trace(guide).get_trace(x)
    trace.compute_log_prob()
    values = {name: trace.nodes[name]["value"] for name in ("rate", "z")}
    flat = torch.cat([values["rate"].log()[:, None], values["z"]], -1)
    theirs = trace.nodes["rate"]["log_prob"] + values["rate"].log() + trace.nodes["z"]["log_prob"]
    torch.testing.assert_close(density.log_prob(flat[None])[0], theirs)


def nested_inside(x: Tensor) -> None:
    with pyro.plate("data", len(x), dim=-2):
        m = pyro.sample("m", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("features", 3, dim=-1):
            z = pyro.sample("z", dist.Gamma(2.0, 1.0))
            pyro.sample("x", dist.Normal(m.sum(-1), z), obs=x)


def nested_outside(x: Tensor) -> None:
    data = pyro.plate("data", len(x), dim=-1)
    with data:
        m = pyro.sample("m", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("features", 3, dim=-2), data:
        z = pyro.sample("z", dist.Gamma(2.0, 1.0))
        pyro.sample("x", dist.Normal(m.sum(-1), z), obs=x.T)


@pytest.mark.parametrize("model", [two_sites, nested_inside, nested_outside], ids=lambda model: model.__name__)
def test_local_multivariate_normal(model: Any) -> None:
    x = torch.randn(5, 3)
    guide = AutoLocalMultivariateNormal(model)
    guide(x)
    jitter(guide)
    density = GuideDensity(guide, x, model)
    dim = density.joint.dim
    assert density.factorised and density.bound
    loc = guide.loc.reshape(5, dim)
    scale_tril = (guide.scale[..., None] * guide.unit_scale_tril).reshape(5, dim, dim)
    consistent(density, lambda z, n: dist.MultivariateNormal(loc[n], scale_tril=scale_tril[n]).log_prob(z))


@pytest.mark.parametrize("model", [nested_inside, nested_outside], ids=lambda model: model.__name__)
def test_auto_normal_under_nested_plates(model: Any) -> None:
    x = torch.randn(5, 3)
    guide = AutoNormal(model)
    guide(x)
    jitter(guide)
    data_last = model is nested_outside
    site = [guide.locs.z, guide.scales.z]
    site = [value.T if data_last else value for value in site]
    loc = torch.cat([guide.locs.m.reshape(5, 2), site[0]], -1)
    scale = torch.cat([guide.scales.m.reshape(5, 2), site[1]], -1)
    consistent(GuideDensity(guide, x, model), lambda z, n: normal(z, loc[n], scale[n]).sum(-1))


def test_joint_autoguide_where_the_data_set_is_one_datapoint() -> None:
    def model(x: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        s = pyro.sample("s", dist.HalfNormal(1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(m, s), obs=x)

    x = torch.randn(7)
    guide = AutoMultivariateNormal(model)
    guide(x)
    jitter(guide)
    density = GuideDensity(guide, x, model, plate=False)
    z, log_q = density.sample(6)
    assert z.shape == (6, 1, 2)
    expected = guide.get_posterior().log_prob(z[:, 0])[:, None]
    torch.testing.assert_close(log_q, expected)
    torch.testing.assert_close(density.log_prob(z), expected)


def test_draws_have_the_guide_s_moments() -> None:
    x, guide = torch.randn(5, 3), Encoder()
    z, _ = GuideDensity(guide, x, two_sites).sample(4000)
    loc, scale, gamma = guide.parameters_of(x)
    rate = z[..., 0].exp()
    error = rate.std(0) / math.sqrt(4000)
    assert ((rate.mean(0) - gamma[:, 0] / gamma[:, 1]).abs() < 4.5 * error).all()
    assert ((z[..., 1:].mean(0) - loc).abs() < 4.5 * scale / math.sqrt(4000)).all()


def test_elbo_agrees_with_pyro() -> None:
    x, guide = torch.randn(5, 3), Encoder()
    theirs = torch.tensor([-Trace_ELBO().loss(two_sites, guide, x) for _ in range(400)])
    ours = elbo(two_sites, guide, x, num_particles=2000)
    error = (theirs.var() / 400 + ours.mcse.square().sum()).sqrt()
    assert (ours.value.sum() - theirs.mean()).abs() < 4 * error


def test_transformed_distributions_that_end_in_an_affine_map() -> None:
    """torch takes their support for the real line."""
    affine = torch.distributions.transforms.AffineTransform
    x = torch.randn(5)
    cases = [
        (dist.Gamma(2.0, 1.0), dist.LogNormal(0.0, 0.5), affine(0.0, 3.0)),
        (dist.Uniform(-1.0, 4.0), dist.Beta(2.0, 3.0), affine(4.0, -5.0)),
        (dist.Pareto(torch.tensor(2.0), torch.tensor(3.0)), dist.Gamma(2.0, 1.0), affine(2.0, 1.0)),
    ]
    for prior, base, step in cases:

        def model(x: Tensor, prior: Any = prior) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", prior)
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        def guide(x: Tensor, base: Any = base, step: Any = step) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.TransformedDistribution(base, [step]))

        def log_q(z: Tensor, indices: Tensor, prior: Any = prior, base: Any = base, step: Any = step) -> Tensor:
            transform = biject_to(prior.support)
            value = transform(z[..., 0])
            log_density = base.log_prob((value - step.loc) / step.scale) - math.log(abs(step.scale))
            return log_density + transform.log_abs_det_jacobian(z[..., 0], value)

        consistent(GuideDensity(guide, x, model), log_q)
