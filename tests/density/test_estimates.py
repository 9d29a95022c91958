"""Point estimates: Deltas without a density, against Pyro's `Trace_ELBO` given their values and with their terms."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.contrib.easyguide import EasyGuide
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoGuideList, AutoNormal
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn

import pyrogaps as pg
from pyrogaps.density.given import given

N = 6
X = torch.randn(N, 3, generator=torch.Generator().manual_seed(3))
NUM = 1500


def model(x: Tensor) -> None:
    """Loadings w and a noise level for the data set, a scale s and factors z for each datapoint."""
    w = pyro.sample("w", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))
    noise = pyro.sample("noise", dist.LogNormal(0.5, 0.1))
    with pyro.plate("data", len(x)):
        s = pyro.sample("s", dist.LogNormal(0.0, 0.3))
        z = pyro.sample("z", dist.Normal(torch.zeros(2), s[:, None]).to_event(1))
        pyro.sample("x", dist.Normal(z @ w, noise).to_event(1), obs=x)


W = 0.4 * torch.randn(2, 3, generator=torch.Generator().manual_seed(4))
NOISE = torch.tensor(1.6)
S = torch.linspace(0.6, 1.4, N)


class Amortized(nn.Module):
    """Factors by a network, the rest by Deltas: of parameters, and of a function of x."""

    def __init__(self, *, log_density: float = 0.0, scale: bool = True) -> None:
        super().__init__()
        self.net, self.w, self.noise = nn.Linear(3, 3), nn.Parameter(W.clone()), nn.Parameter(NOISE.clone())
        self.log_density, self.scale = log_density, scale

    def forward(self, x: Tensor) -> None:
        pyro.sample("w", dist.Delta(self.w, torch.tensor(self.log_density), event_dim=2))
        pyro.sample("noise", dist.Delta(self.noise))
        with pyro.plate("data", len(x)):
            out = 0.3 * self.net(x)
            s = out[:, 2].exp()
            if self.scale:
                pyro.sample("s", dist.Delta(s))
            else:
                pyro.sample("s", dist.LogNormal(out[:, 2], 0.3))
            pyro.sample("z", dist.Normal(out[:, :2], 0.8 * s[:, None]).to_event(1))


class Easy(EasyGuide):
    """The same as an `EasyGuide`, with parameters for each datapoint."""

    def init(self, site: Any) -> Tensor:
        values: dict[str, Tensor] = {"w": W, "noise": NOISE, "s": S, "z": torch.zeros(N, 2)}
        return values[site["name"]]

    def guide(self, x: Tensor) -> None:
        self.map_estimate("w")
        self.group(match="noise").map_estimate()
        with self.plate("data", len(x)):
            self.map_estimate("s")
            loc = pyro.param("loc", 0.1 * X[:, :2], event_dim=1)
            pyro.sample("z", dist.Normal(loc, 0.9).to_event(1))


def autoguides() -> AutoGuideList:
    guide = AutoGuideList(model)
    guide.append(AutoNormal(poutine.block(model, expose=["z"]), init_scale=0.8))
    guide.append(AutoDelta(poutine.block(model, hide=["z"]), init_loc_fn=Easy(model).init))
    guide(X)
    return guide


def easy() -> Easy:
    guide = Easy(model)
    guide(X)
    return guide


GUIDES: dict[str, Callable[[], Any]] = {
    "amortized": Amortized,
    "no local estimate": lambda: Amortized(scale=False),
    "EasyGuide": easy,
    "AutoGuideList": autoguides,
}


def elbo_of(model: Callable[..., None], guide: Callable[..., None], *args: Any) -> Tensor:
    """Pyro's own ELBO of the data set, `(NUM,)` draws."""
    torch.manual_seed(5)
    with torch.no_grad():
        return torch.tensor([-Trace_ELBO().loss(model, guide, *args) for _ in range(NUM)], dtype=torch.float64)


def agrees(ours: Any, theirs: Tensor) -> None:
    limit = float((ours.mcse.double().square().sum() + theirs.var() / NUM) ** 0.5)
    assert limit < 0.02 * N
    assert abs(float(ours.value.double().sum() - theirs.mean())) < 4 * limit


def deltas(guide: Any, names: list[str]) -> tuple[dict[str, Tensor], Tensor]:
    """The values of a guide's Deltas, and the log-density of the model and the guide there, nats for the data set."""
    with torch.no_grad():
        trace = poutine.trace(guide).get_trace(X)
        values = {name: trace.nodes[name]["value"] for name in names}
        at = poutine.trace(poutine.condition(model, values)).get_trace(X)
        at.compute_log_prob()
        trace.compute_log_prob()
        total = sum(at.nodes[name]["log_prob_sum"] - trace.nodes[name]["log_prob_sum"] for name in names)
    return values, torch.as_tensor(total)


@pytest.mark.parametrize("name", GUIDES)
def test_elbo_given_point_estimates(name: str) -> None:
    torch.manual_seed(1)
    guide = GUIDES[name]()
    names = ["w", "noise"] if name == "no local estimate" else ["w", "noise", "s"]
    problem = pg.Problem.of(model, guide, X)
    assert problem.plate == "data"
    assert {*problem.joint.sites} == {"z", "s"} - {*names}
    assert all(f"'{name}'" in problem.remarks[0] for name in names)
    assert problem.remarks[0].startswith("given 'w'")
    values, terms = deltas(guide, names)
    ours = pg.elbo(problem, num_particles=NUM)
    agrees(ours, elbo_of(given(model, values), poutine.block(guide, hide=names), X))
    agrees(ours, elbo_of(model, guide, X) - terms)


def test_the_density_is_that_given_the_values() -> None:
    guide = easy()
    problem = pg.Problem.of(model, guide, X)
    z = torch.randn(4, N, 2)
    right = dist.Normal(0.0, S[:, None]).log_prob(z).sum(-1) + dist.Normal(z @ W, NOISE).log_prob(X).sum(-1)
    torch.testing.assert_close(problem.joint(z), right)
    rows = torch.tensor([4, 1])
    torch.testing.assert_close(problem.joint(z[:, rows], rows), right[:, rows])
    torch.testing.assert_close(problem.at(rows).joint(z[:, rows]), right[:, rows])
    log_q = dist.Normal(0.1 * X[:, :2], 0.9).log_prob(z).sum(-1)
    torch.testing.assert_close(problem.guide_density().log_prob(z), log_q)


@pytest.mark.usefixtures("brief_check")
@pytest.mark.parametrize("name", ["amortized", "EasyGuide"])
def test_a_ledger_given_point_estimates(name: str) -> None:
    """log p(x | w, noise, s) is known: x is Gaussian."""
    torch.manual_seed(1)
    guide = GUIDES[name]()
    values, _ = deltas(guide, ["w", "noise", "s"])
    covariance = values["s"][:, None, None] ** 2 * (values["w"].T @ values["w"]) + values["noise"] ** 2 * torch.eye(3)
    exact = dist.MultivariateNormal(torch.zeros(3), covariance).log_prob(X)
    ledger = pg.decompose(model, guide, X, progress=False, families={"AutoNormal": AutoNormal}, num_particles=200)
    log_evidence, error = (
        torch.as_tensor(ledger.per_datapoint[n].values) for n in ("log_evidence", "log_evidence_mcse")
    )
    assert float(error.max()) < 0.05
    assert bool(((log_evidence - exact).abs() < 4 * error + 1e-3).all())
    assert "Given 'w', 'noise' and 's' at their point estimates" in str(ledger)
    assert ledger.provenance["remarks"] == [*pg.Problem.of(model, guide, X).remarks]


def test_a_prior_that_depends_on_other_latents_counts() -> None:
    def chain(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            w = pyro.sample("w", dist.Normal(z, 0.5))
            pyro.sample("x", dist.Normal(w, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("w", dist.Delta(x / 2))
            pyro.sample("z", dist.Normal(x / 3, 0.4))

    x = X[:, 0]
    problem = pg.Problem.of(chain, guide, x)
    z = torch.randn(3, N)
    right = (
        dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, 0.5).log_prob(x / 2) + dist.Normal(x / 2, 1.0).log_prob(x)
    )
    torch.testing.assert_close(problem.joint(z[..., None]), right)
    assert problem.remarks == (
        "given 'w' at its point estimate: log p(x) is conditional on the values, with their density, which depends on "
        "other latents",
    )
    agrees(pg.elbo(problem, num_particles=NUM), elbo_of(chain, guide, x))


def test_a_delta_that_states_a_density() -> None:
    torch.manual_seed(1)
    plain, stated = Amortized(), Amortized(log_density=-1.3)
    stated.load_state_dict(plain.state_dict())
    values = [pg.elbo(model, guide, X).value for guide in (plain, stated)]
    torch.testing.assert_close(*values, rtol=0, atol=0)
    _, terms = deltas(stated, ["w", "noise", "s"])
    agrees(pg.elbo(model, stated, X, num_particles=NUM), elbo_of(model, stated, X) - terms)
    remarks = pg.Problem.of(model, stated, X).remarks
    assert any("log_density of the guide's Delta at 'w'" in remark and "-1.3 nats" in remark for remark in remarks)


def test_a_discrete_point_estimate() -> None:
    def mixture(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7])))
            z = pyro.sample("z", dist.Normal(2.0 * k, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Delta((x > 0).long()))
            pyro.sample("z", dist.Normal(x / 2 + k, 0.7))

    x = X[:, 0]
    k = (x > 0).long()
    exact = dist.Normal(2.0 * k, 2**0.5).log_prob(x)
    problem = pg.Problem.of(mixture, guide, x)
    estimate = pg.log_evidence(problem)
    assert bool(((estimate.value - exact).abs() < 4 * estimate.mcse + 1e-3).all())


def test_masked_point_estimates() -> None:
    mask = torch.arange(N) % 2 == 0

    def masked(x: Tensor, kept: Tensor) -> None:
        with pyro.plate("data", len(x)):
            with poutine.mask(mask=kept):
                s = pyro.sample("s", dist.LogNormal(0.0, 0.3))
            z = pyro.sample("z", dist.Normal(0.0, torch.where(kept, s, torch.ones(()))))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor, kept: Tensor) -> None:
        with pyro.plate("data", len(x)):
            with poutine.mask(mask=kept):
                pyro.sample("s", dist.Delta(x.exp()))
            pyro.sample("z", dist.Normal(x / 2, 0.7))

    x = X[:, 0]
    z = torch.randn(2, N, 1)
    scale = torch.where(mask, x.exp(), torch.ones(()))
    right = dist.Normal(0.0, scale).log_prob(z[..., 0]) + dist.Normal(z[..., 0], 1.0).log_prob(x)
    torch.testing.assert_close(pg.Problem.of(masked, guide, (x, mask)).joint(z), right)


class Network(PyroModule):
    """A decoder whose weights have priors."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = PyroModule[nn.Linear](2, 3)
        self.layer.weight = PyroSample(dist.Normal(0.0, 1.0).expand([3, 2]).to_event(2))
        self.layer.bias = PyroSample(dist.Normal(0.0, 1.0).expand([3]).to_event(1))

    def forward(self, x: Tensor) -> None:
        weight, bias = self.layer.weight, self.layer.bias
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ weight.T + bias, 1.0).to_event(1), obs=x)


def test_a_network_with_weights_at_their_point_estimates() -> None:
    torch.manual_seed(0)
    decoder = Network()
    guide = AutoGuideList(decoder)
    guide.append(AutoDelta(poutine.block(decoder, hide=["z"])))
    guide.append(AutoNormal(poutine.block(decoder, expose=["z"])))
    guide(X)
    values = {name: guide[0].median()[name] for name in ("layer.weight", "layer.bias")}
    problem = pg.Problem.of(decoder, guide, X)
    z = torch.randn(3, N, 2)
    right = dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
    right = right + dist.Normal(z @ values["layer.weight"].T + values["layer.bias"], 1.0).log_prob(X).sum(-1)
    torch.testing.assert_close(problem.joint(z), right)


def test_without_a_plate() -> None:
    """A regression whose noise is a point estimate."""
    y = X[:, 1]

    def regression(x: Tensor, y: Tensor) -> None:
        noise = pyro.sample("noise", dist.LogNormal(0.0, 1.0))
        slope = pyro.sample("slope", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ slope, noise), obs=y)

    def guide(x: Tensor, y: Tensor) -> None:
        pyro.sample("noise", dist.Delta(pyro.param("level", torch.tensor(0.8))))
        pyro.sample("slope", dist.Normal(torch.zeros(3), 0.5).to_event(1))

    exact = dist.MultivariateNormal(torch.zeros(N), X @ X.T + 0.64 * torch.eye(N)).log_prob(y)
    estimate = pg.log_evidence(regression, guide, (X, y), plate=False)
    assert abs(float(estimate.value - exact)) < 4 * float(estimate.mcse) + 1e-3


def test_other_functions_given_point_estimates() -> None:
    torch.manual_seed(1)
    guide = Amortized()
    problem = pg.Problem.of(model, guide, X)
    simulated, data, z = problem.simulated(0)
    assert data.shape == X.shape
    right = dist.Normal(0.0, problem.joint.structure.estimates.values["s"][:, None]).log_prob(z).sum(-1)
    right = right + dist.Normal(z @ W, NOISE).log_prob(data).sum(-1)
    torch.testing.assert_close(simulated.joint(z[None])[0], right.detach())
    plain = problem.with_guide(None)
    assert plain.joint is problem.joint
    again = plain.with_guide(guide)
    torch.testing.assert_close(pg.elbo(again).value, pg.elbo(problem).value, rtol=0, atol=0)
    settings = pg.AIS(num_chains=4, num_temperatures=5)
    sandwich = pg.bdmc(model, X, guide_or_family=guide, settings=settings, initial="prior")
    assert bool((sandwich.lower <= sandwich.upper + 1).all())
    found = pg.ais(model, guide, X, settings=settings, initial="prior").value
    assert found.shape == (N,)
    assert pg.calibrate(model, guide, X, num_simulated=8, num_draws=100).ranks is not None
    refined = pg.refine(model, guide, X, settings=pg.Refinement(num_steps=20))
    for fitted in (guide, refined):
        tree = pg.to_datatree(model, fitted, X, num_draws=5)
        assert set(tree["posterior"].data_vars) == {"z"}
    assert pg.Problem.of(model, refined, X).joint.remarks == problem.joint.remarks
    with pytest.raises(pg.InputError, match="point estimates for 6 datapoints, but the data have 4"):
        pg.elbo(model, refined, X[:4])


# Refusals.


def refused(guide: Callable[..., Any], *words: str, model: Callable[..., Any] = model) -> None:
    with pytest.raises(pg.InputError) as caught:
        pg.Problem.of(model, guide, X)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_nothing_else_is_latent() -> None:
    guide = AutoDelta(model)
    guide(X)
    refused(guide, "site 'w'", "Delta", "no density", "AutoNormal instead of AutoDelta")


def guide_with(w: Callable[[Tensor], Any]) -> Callable[[Tensor], None]:
    def guide(x: Tensor) -> None:
        pyro.sample("noise", dist.Delta(NOISE))
        with pyro.plate("data", len(x)):
            s = pyro.sample("s", dist.LogNormal(0.0, 0.3))
            pyro.sample("z", dist.Normal(x[:, :2], 1.0).to_event(1))
        pyro.sample("w", dist.Delta(w(x if len(x) == 0 else torch.cat([x[:, :2], s[:, None]], -1)), event_dim=2))

    return guide


def test_deltas_that_are_no_point_estimates() -> None:
    refused(guide_with(lambda u: W + u[:, 2].mean()), "site 'w'", "function of its other draws", "pyro.deterministic")
    refused(guide_with(lambda u: W + torch.rand(())), "site 'w'", "random beyond", "pyro.sample")
    refused(guide_with(lambda u: W + u[:, 0].mean()), "site 'w'", "changes with the datapoints", "pyro.param")
    refused(guide_with(lambda u: W[:, :2]), "site 'w'", "shape (2, 2)", "(2, 3)")


def test_a_point_estimate_outside_the_support() -> None:
    guide = Amortized()
    with torch.no_grad():
        guide.noise.neg_()
    refused(guide, "site 'noise'", "outside the support", "constraint=")


def test_a_split_would_move_them() -> None:
    with pytest.raises(pg.InputError, match="split: the guide has point estimates of 'w', 'noise' and 's'"):
        pg.decompose(model, Amortized(), X, split=pg.Split(X), progress=False)


def test_an_easy_guide_that_never_ran() -> None:
    refused(Easy(model), "this Easy has never been run")
