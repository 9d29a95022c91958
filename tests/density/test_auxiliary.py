"""Guides that pass auxiliary draws to Deltas: the ELBO is Pyro's where the stated density is right, else a refusal."""

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as T
import pytest
import torch
from pyro import poutine
from pyro.contrib.easyguide import EasyGuide
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoGaussian,
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalizingFlow,
    AutoStructured,
)
from torch import Tensor

import pyrogaps as pg
from pyrogaps import GuideDensity, InputError
from pyrogaps.guides.local import AutoLocalMultivariateNormal
from pyrogaps.log_weights import Estimate

pytestmark = pytest.mark.usefixtures("double")

AUXILIARY = {"is_auxiliary": True}
MIX = [[1.0, 0.5], [-0.3, 2.0]]


def model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z * rate[..., None], 1.0).to_event(1), obs=x)


class Guide:
    """rate = exp(v / 2 + 0.1), z an affine image of w; `stated` says by which factor each log-density is wrong."""

    def __init__(self, kind: str = "scaled", rate: float = 1.0, z: float = 1.0) -> None:
        self.kind, self.rate, self.z = kind, rate, z

    def image(self, w: Tensor, x: Tensor) -> tuple[Tensor, float]:
        if self.kind == "permuted":
            return w.flip(-1) + x, 0.0
        if self.kind == "dense":
            matrix = torch.tensor(MIX)
            return w @ matrix.T, -float(torch.linalg.slogdet(matrix)[1])
        return 0.3 * w + x, -2 * math.log(0.3)

    def __call__(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            v = pyro.sample("v", dist.Normal(x.mean(-1), 0.7), infer=AUXILIARY)
            w = pyro.sample("w", dist.Normal(x, 0.7).to_event(1), infer=AUXILIARY)
            log_rate = v / 2 + 0.1
            pyro.sample("rate", dist.Delta(log_rate.exp(), self.rate * (-log_rate + math.log(2.0))))
            z, log_density = self.image(w, x)
            pyro.sample("z", dist.Delta(z, torch.full(z.shape[:-1], self.z * log_density), event_dim=1))


def log_weights(program: Callable[..., None], guide: Callable[..., None], number: int, *args: Tensor) -> Tensor:
    """log p - log q of Pyro's own traces, as `Trace_ELBO` adds them up."""
    terms = []
    for _ in range(number):
        drawn = poutine.trace(guide).get_trace(*args)
        terms.append(
            poutine.trace(poutine.replay(program, drawn)).get_trace(*args).log_prob_sum() - drawn.log_prob_sum()
        )
    return torch.stack(terms).detach()


def agree(estimate: Estimate, weights: Tensor) -> None:
    error = float(estimate.mcse.square().sum() + weights.var() / len(weights)) ** 0.5
    assert abs(float(estimate.value.sum()) - float(weights.mean())) < 4 * error


@pytest.mark.parametrize("kind", ["scaled", "permuted", "dense"])
def test_affine_images(kind: str) -> None:
    x, guide = torch.randn(5, 2), Guide(kind)
    agree(pg.elbo(model, guide, x, num_particles=2000), log_weights(model, guide, 200, x))
    density = GuideDensity(guide, x, model)
    z, log_q = density.sample(4, torch.tensor([3, 0]))
    torch.testing.assert_close(density.log_prob(z, torch.tensor([3, 0])), log_q)
    # By hand: the draws back from the latents, and the Jacobian of the whole map.
    v, mean = 2 * (z[..., 0] - 0.1), x[[3, 0]]
    w, log_density = z[..., 1:], guide.image(x, x)[1]
    back = {"scaled": (w - mean) / 0.3, "permuted": (w - mean).flip(-1), "dense": w @ torch.tensor(MIX).inverse().T}
    by_hand = dist.Normal(mean.mean(-1), 0.7).log_prob(v) + dist.Normal(mean, 0.7).log_prob(back[kind]).sum(-1)
    torch.testing.assert_close(log_q, by_hand + math.log(2.0) + log_density)


@pytest.mark.parametrize("guide", [Guide(rate=0.0, z=0.0), Guide(rate=-1.0), Guide(z=0.0), Guide("permuted", rate=0.0)])
def test_wrong_densities(guide: Guide) -> None:
    with pytest.raises(InputError, match=r"'z': the log_density of the guide's Delta is wrong by .* nats. Pass minus"):
        pg.elbo(model, guide, torch.randn(5, 2))


def test_a_missing_jacobian_of_the_support_alone() -> None:
    """The draw is the latent itself in unconstrained space, and only the Delta's own density is left out."""

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            v = pyro.sample("rate_unconstrained", dist.Normal(x.mean(-1), 0.7), infer=AUXILIARY)
            pyro.sample("rate", dist.Delta(v.exp()))
            pyro.sample("z", dist.Normal(x, 1.0).to_event(1))

    with pytest.raises(InputError, match="site 'rate': the log_density of the guide's Delta is wrong"):
        pg.elbo(model, guide, torch.randn(5, 2))


def test_a_draw_on_the_half_line() -> None:
    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            v = pyro.sample("v", dist.Gamma(2.0 + 0 * x[..., 0], 1.5), infer=AUXILIARY)
            pyro.sample("rate", dist.Delta(2 * v, torch.full(v.shape, -math.log(2.0))))
            pyro.sample("z", dist.Normal(x, 1.0).to_event(1))

    def direct(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("rate", dist.Gamma(2.0 + 0 * x[..., 0], 0.75))
            pyro.sample("z", dist.Normal(x, 1.0).to_event(1))

    x = torch.randn(5, 2)
    z, log_q = GuideDensity(guide, x, model).sample(7)
    torch.testing.assert_close(GuideDensity(direct, x, model).log_prob(z), log_q)


SOFTPLUS = T.SoftplusTransform()


class Curved(torch.nn.Module):
    """Deltas at a softplus of one draw, and at a shear of another two that curves."""

    def __init__(self, kind: str = "curved") -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            v = pyro.sample("v", dist.Normal(x.mean(-1), 0.7), infer=AUXILIARY)
            value = SOFTPLUS(v)
            pyro.sample("rate", dist.Delta(value, -SOFTPLUS.log_abs_det_jacobian(v, value)))
            w = pyro.sample("w", dist.Normal(0.5 * x, 0.7).to_event(1), infer=AUXILIARY)
            first, slope = w[..., 0].sinh(), w[..., 0].cosh()
            if self.kind == "folded":
                first, slope = w[..., 0] ** 2, 2 * w[..., 0].abs()
            z = torch.stack([first, w[..., 1] + v.tanh() * first], -1)
            pyro.sample(
                "z", dist.Delta(z, torch.zeros(len(x)) if self.kind == "missing" else -slope.log(), event_dim=1)
            )


def test_a_curved_map() -> None:
    x = 0.5 * torch.randn(4, 2)
    density = GuideDensity(Curved(), x, model)
    assert density.structure.mapped == "bijective"
    z, log_q = density.sample(3)
    torch.testing.assert_close(density.log_prob(z), log_q)
    # By hand: the draws back from the latents. The unconstrained rate is its logarithm.
    rate = z[..., 0].exp()
    v, w = SOFTPLUS.inv(rate), z[..., 1].asinh()
    by_hand = dist.Normal(x.mean(-1), 0.7).log_prob(v) - SOFTPLUS.log_abs_det_jacobian(v, rate) + z[..., 0]
    u = torch.stack([w, z[..., 2] - v.tanh() * z[..., 1]], -1)
    by_hand = by_hand + dist.Normal(0.5 * x, 0.7).log_prob(u).sum(-1) - w.cosh().log()
    torch.testing.assert_close(log_q, by_hand)
    agree(pg.elbo(model, Curved(), x, num_particles=500), log_weights(model, Curved(), 200, x))


def test_curved_maps_without_a_density() -> None:
    x = 0.5 * torch.randn(4, 2)
    with pytest.raises(InputError, match=r"'z': the log_density of the guide's Delta is wrong by .* nats\. Pass minus"):
        pg.elbo(model, Curved("missing"), x)
    with pytest.raises(InputError, match="site 'rate': the guide's Delta is no invertible function"):
        pg.elbo(model, Curved("folded"), x)


def test_too_few_draws() -> None:
    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            w = pyro.sample("w", dist.Normal(x, 0.7).to_event(1), infer=AUXILIARY)
            pyro.sample("rate", dist.Delta(w[..., 0].exp(), -w[..., 0]))
            pyro.sample("z", dist.Delta(w, event_dim=1))

    with pytest.raises(InputError, match="site 'rate': a Delta in the guide has no density"):
        pg.elbo(model, guide, torch.randn(5, 2))


def hierarchy(y: Tensor) -> None:
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    s = pyro.sample("s", dist.LogNormal(0.0, 0.5))
    with pyro.plate("data", len(y)):
        b = pyro.sample("b", dist.Beta(2.0, 2.0))
        z = pyro.sample("z", dist.Normal(m, s))
        pyro.sample("y", dist.Normal(z + b, 0.5), obs=y)


AUTOGUIDES = {
    "AutoNormal": AutoNormal,
    "AutoGaussian": AutoGaussian,
    "AutoMultivariateNormal": AutoMultivariateNormal,
    "AutoLowRankMultivariateNormal": AutoLowRankMultivariateNormal,
    "AutoDiagonalNormal": AutoDiagonalNormal,
    "AutoIAFNormal": AutoIAFNormal,
    "AutoNormalizingFlow": lambda program: AutoNormalizingFlow(program, T.affine_autoregressive),
    "AutoLaplaceApproximation": AutoLaplaceApproximation,
    "AutoStructured": AutoStructured,
    "AutoStructured of Normals": lambda program: AutoStructured(program, conditionals="normal"),
    "AutoLocalMultivariateNormal": AutoLocalMultivariateNormal,
}


@pytest.mark.parametrize("name", AUTOGUIDES)
def test_autoguides_of_one_data_set(name: str) -> None:
    y = torch.tensor([0.3, -1.2, 0.8])
    program = hierarchy if name != "AutoLocalMultivariateNormal" else poutine.condition(
        hierarchy, {"m": torch.tensor(0.1), "s": torch.tensor(0.9)}
    )  # fmt: skip
    guide = AUTOGUIDES[name](program)
    guide(y)
    if name == "AutoLaplaceApproximation":
        guide = guide.laplace_approximation(y)
    if name == "AutoGaussian":  # its scales are those of the map from its draw to the latents
        for scale in guide.scales.parameters():
            scale.data.add_(0.3 * torch.randn_like(scale))
    if name.startswith("AutoStructured"):
        for weight in guide.deps.parameters():
            weight.data.add_(0.3 * torch.randn_like(weight))
    found = pg.elbo(program, guide, (y,), plate=False, num_particles=2000)
    agree(found, log_weights(program, guide, 300, y))


def test_auto_structured_with_a_point_estimate() -> None:
    """The site without a draw is given; where it depends on others, there is no density."""
    y, conditionals = torch.tensor([0.3, -1.2, 0.8]), {"m": "normal", "s": "delta", "b": "normal", "z": "mvn"}
    guide = AutoStructured(hierarchy, conditionals=conditionals, dependencies={"z": {"m": "linear"}})
    guide(y)
    guide.deps.z.m.weight.data.fill_(0.4)
    problem = pg.Problem.of(hierarchy, guide, (y,), plate=False)
    assert problem.remarks[0].startswith("given 's' at its point estimate")
    assert {*problem.joint.sites} == {"m", "b", "z"}
    s = guide.median()["s"].detach()
    terms = dist.LogNormal(0.0, 0.5).log_prob(s)
    agree(pg.elbo(problem, num_particles=2000), log_weights(hierarchy, guide, 300, y) - terms)
    guide = AutoStructured(hierarchy, conditionals=conditionals, dependencies={"s": {"m": "linear"}})
    guide(y)
    guide.deps.s.m.weight.data.fill_(0.4)
    with pytest.raises(
        InputError, match=r"draws of 7 dimensions for latents of 8\. Give every latent a draw of its own"
    ):
        pg.elbo(hierarchy, guide, (y,), plate=False)


def grouped(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.LogNormal(0.0, 0.5))
        b = pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        c = pyro.sample("c", dist.Beta(2.0, 2.0))
        loc = torch.stack([a, b.sum(-1), c], -1)
        pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)


class Groups(EasyGuide):
    """A group of some sites; the others are drawn themselves, in a group, or set to a value."""

    def __init__(self, rest: str) -> None:
        super().__init__(grouped)
        self.rest = rest

    def guide(self, x: Tensor) -> None:
        with self.plate("data", len(x)):
            tril = 0.7 * torch.eye(3) + 0.3 * torch.ones(3, 3).tril(-1)
            if self.rest == "all in one":
                loc = 0.1 * torch.cat([x, x[:, :1]], -1)
                self.group().sample("all", dist.Normal(loc, 0.7).to_event(1))
                return
            self.group(match="[ab]").sample("ab", dist.MultivariateNormal(0.1 * x, scale_tril=tril))
            if self.rest == "itself":
                pyro.sample("c", dist.Beta(2.0 + x[:, 0].abs(), 2.0))
            elif self.rest == "group":
                self.group(match="c").sample("cc", dist.Normal(0.3 * x[:, :1], 0.7).to_event(1))
            else:
                self.map_estimate("c")


@pytest.mark.parametrize("rest", ["all in one", "itself", "group", "a value"])
def test_groups_of_an_easy_guide(rest: str) -> None:
    x, guide = 0.5 * torch.randn(5, 3), Groups(rest)
    guide(x)
    problem = pg.Problem.of(grouped, guide, x)
    weights = log_weights(grouped, guide, 300, x)
    if rest == "a value":
        assert problem.remarks[0].startswith("given 'c' at its point estimate")
        weights = weights - dist.Beta(2.0, 2.0).log_prob(guide.c.detach()).sum()
    agree(pg.elbo(problem, num_particles=2000), weights)
    z, log_q = problem.guide_density().sample(3)
    torch.testing.assert_close(problem.guide_density().log_prob(z), log_q)


def test_auto_gaussian_over_a_data_plate() -> None:
    guide = AutoGaussian(model)
    x = torch.randn(5, 2)
    guide(x)
    with pytest.raises(InputError, match="AutoGaussianDense is one joint distribution over all datapoints"):
        pg.elbo(model, guide, x)


class Learned(torch.nn.Module):
    """The family of Normals with one scale, drawn as an auxiliary variable."""

    def __init__(self) -> None:
        super().__init__()
        self.loc, self.log_scale = torch.nn.Linear(2, 2), torch.nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1), infer=AUXILIARY)
            log_density = -self.log_scale.sum().expand(len(x))
            pyro.sample("z", dist.Delta(self.loc(x) + u * self.log_scale.exp(), log_density, event_dim=1))


def test_refinement_reaches_the_exact_posterior() -> None:
    def gaussian(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    x = torch.randn(4, 2)
    refined = pg.refine(gaussian, Learned(), x, settings=pg.Refinement(num_steps=300))
    found, exact = pg.elbo(gaussian, refined, x), dist.Normal(0.0, 2**0.5).log_prob(x).sum(-1)
    assert ((found.value - exact).abs() < 4 * found.mcse + 0.01).all()
