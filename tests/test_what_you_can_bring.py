"""The README's table of what you can bring, row by row: a small program for each, answered or refused as it says.

A row that changes in the table changes here, and the other way round: `test_every_row_has_its_program` compares them.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as transforms
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pyrogaps as pg
from pyrogaps.guides.auxiliary_flows import AmortizedAuxiliaryFlow
from pyrogaps.models.vae import VAE
from tests.refusals import refuses

README = Path(__file__).parents[1] / "README.md"
X = torch.tensor([0.3, -1.2, 0.8, 2.0, -0.4])
SMALL: dict[str, Any] = {
    "refinement": pg.Refinement(num_steps=20, num_selection=64),
    "evidence": pg.AIS(num_chains=4, num_temperatures=4),
    "num_particles": 64,
    "referee": False,
    "progress": False,
}
Row = Callable[[], None]
ROWS: dict[str, Row] = {}


def row(name: str) -> Callable[[Row], Row]:
    def enter(program: Row) -> Row:
        ROWS[name] = program
        return program

    return enter


def answers(model: Any, guide: Any, data: Any = X, **options: Any) -> pg.GapLedger:
    """A ledger with finite numbers."""
    ledger = pg.decompose(model, guide, data, **{**SMALL, **options})
    assert torch.isfinite(torch.tensor(ledger.per_datapoint["inference_gap"].values)).all()
    return ledger


def model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


class Guide(nn.Module):
    def __init__(self, *sites: str) -> None:
        super().__init__()
        self.sites, self.log_scale = sites or ("z",), nn.Parameter(torch.tensor(-0.2))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            for name in self.sites:
                pyro.sample(name, dist.Normal(x / 2, self.log_scale.exp()))


@row("An encoder and a decoder in plain PyTorch")
def plain_torch() -> None:
    net, decoder, x = nn.Linear(6, 4), nn.Linear(2, 6), (torch.rand(5, 6) < 0.4).float()
    settings = {"likelihood": "bernoulli", "second": "log_variance"}
    answers(*pg.from_torch(lambda x: net(x).chunk(2, -1), decoder, **settings), x)
    labelled = nn.Linear(3, 6)
    conditional = pg.from_torch(
        lambda x, c: net(x).chunk(2, -1),
        lambda z, c: labelled(torch.cat([z, c[:, None]], -1)),
        prior=dist.Normal(torch.zeros(2), 2.0),
        conditions=("c",),
        **settings,
    )
    answers(*conditional, {"x": x, "c": x[:, 0]})
    refuses(lambda: pg.from_torch(net, decoder, data=x, **settings), "encoder", "chunk(2, -1)")
    sigmoid = nn.Sequential(decoder, nn.Sigmoid())
    refuses(lambda: pg.from_torch(lambda x: net(x).chunk(2, -1), sigmoid, data=x, **settings), "output='probabilities'")


@row("A model of scvi-tools (SCVI, LinearSCVI)")
def cells() -> None:
    scvi = pytest.importorskip("scvi")
    adata = scvi.data.synthetic_iid(batch_size=20, n_genes=10)
    for kind, likelihood in ((scvi.model.SCVI, "zinb"), (scvi.model.LinearSCVI, "nb")):
        kind.setup_anndata(adata, batch_key="batch")
        vae = kind(adata, n_latent=2, gene_likelihood=likelihood)
        refuses(lambda vae=vae: pg.from_scvi(vae), "not trained", "model.train()")
        vae.train(max_epochs=1, accelerator="cpu", enable_progress_bar=False, logger=False, enable_checkpointing=False)
        pg.to_obs(answers(*pg.from_scvi(vae, indices=range(5))), adata)
        assert adata.obs["pyrogaps_inference_gap"].notna().sum() == 5
    refuses(lambda: pg.from_scvi(vae, adata[:, ::-1].copy()), "another order")


@row("Continuous latents")
def continuous() -> None:
    def nested(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2):
            rate = pyro.sample("rate", dist.Gamma(torch.full((1,), 2.0), 1.0))
            with pyro.plate("parts", 3, dim=-1):
                share = pyro.sample("share", dist.Dirichlet(torch.ones(2)))
            mean = (rate * share[..., 0]).sum(-1, keepdim=True)
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x[:, None])

    def guide(x: Tensor) -> None:
        scale = pyro.param("scale", torch.tensor(0.5), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("rate", dist.LogNormal(x[:, None] / 4, scale))
            with pyro.plate("parts", 3, dim=-1):
                pyro.sample("share", dist.Dirichlet(torch.ones(2)))

    guide(X)
    problem = pg.Problem.of(nested, guide, X)
    assert (problem.dim, problem.num_datapoints) == (4, 5)
    assert torch.isfinite(pg.iwae(problem, num_particles=64).value).all()


@row("Sequences and masks")
def sequences() -> None:
    steps, lengths = torch.randn(4, 3), torch.tensor([3, 1, 2, 3])

    def chain(x: Tensor, lengths: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = torch.zeros(len(x))
            for t in pyro.markov(range(3)):
                with pyro.poutine.mask(mask=t < lengths):
                    z = pyro.sample(f"z{t}", dist.Normal(0.5 * z, 1.0))
                    pyro.sample(f"x{t}", dist.Normal(z, 1.0), obs=x[:, t])

    def guide(x: Tensor, lengths: Tensor) -> None:
        with pyro.plate("data", len(x)):
            for t in range(3):
                with pyro.poutine.mask(mask=t < lengths):
                    pyro.sample(f"z{t}", dist.Normal(x[:, t] / 2, 0.7))

    bound = pg.elbo(chain, guide, (steps, lengths), num_particles=64).value
    other = steps.masked_fill(torch.arange(3) >= lengths[:, None], 7.0)
    torch.testing.assert_close(pg.elbo(chain, guide, (other, lengths), num_particles=64).value, bound)


@row("Autoguides")
def autoguides() -> None:
    guide = AutoNormal(model)
    guide(X)
    assert torch.isfinite(pg.elbo(model, guide, X).value).all()
    joint = AutoMultivariateNormal(model)
    joint(X)
    assert pg.elbo(model, joint, X, plate=False).value.shape == (1,)
    untrained = AutoNormal(model)
    refuses(lambda: pg.elbo(model, untrained, X), "has never been run")
    pyro.clear_param_store()  # in which guides of one class have one set of parameters
    trained = AutoNormal(model)
    trained(X[:3])
    refuses(lambda: pg.elbo(model, trained, X), "these data")


@row("Flows")
def flows() -> None:
    class Flow(nn.Module):
        def __init__(self, flow: Any) -> None:
            super().__init__()
            self.flow = flow

        def forward(self, x: Tensor) -> None:
            base = dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1)
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.TransformedDistribution(base, [self.flow]))

    def two(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    exact = dist.Normal(0.0, 3**0.5).log_prob(X).double()
    for flow in (transforms.householder(2), transforms.planar(2)):
        estimate = pg.iwae(two, Flow(flow), X, num_particles=4000)
        assert ((estimate.value - exact).abs() < 4.5 * estimate.mcse).all() and (estimate.mcse < 0.1).all()
    no_inverse = pg.Problem.of(two, Flow(transforms.planar(2)), X)
    refuses(lambda: no_inverse.guided().at(torch.arange(5)).log_prob(torch.zeros(1, 5, 2)), "Planar", "no inverse")


@row("Auxiliary variables of the guide")
def auxiliary() -> None:
    x = (torch.rand(5, 8) < 0.4).float()
    answers(VAE(8, 2, [4]), AmortizedAuxiliaryFlow(8, 2, [4], flow_hidden=4), x)

    def without_a_reverse(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            v = pyro.sample("v", dist.Normal(x, 1.0), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Normal(v / 2, 0.8))

    refuses(lambda: pg.elbo(model, without_a_reverse, X), "'v'", "augment(model)")


@row("A model without latents in a data plate (a regression), or `plate=False`")
def one_datapoint() -> None:
    def regression(x: Tensor) -> None:
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(slope * torch.arange(5.0), 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("slope", dist.Normal(0.2, 0.2))

    times = torch.arange(5.0)
    exact = dist.MultivariateNormal(torch.zeros(5), torch.eye(5) + times[:, None] * times).log_prob(X)
    assert abs(float(pg.iwae(regression, guide, X, num_particles=4000).value) - float(exact)) < 0.1
    assert pg.elbo(model, Guide(), X, plate=False).value.shape == (1,)


@row("Scales, dropout and batch statistics")
def carried_along() -> None:
    def scaled(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            with pyro.poutine.scale(scale=4.0):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    assert torch.equal(pg.elbo(scaled, Guide(), X).value, pg.elbo(model, Guide(), X).value)
    assert any("scale" in remark and "'z'" in remark for remark in pg.Problem.of(scaled, Guide(), X).remarks)

    class Random(Guide):
        def forward(self, x: Tensor) -> None:
            super().forward(nn.functional.dropout(x, 0.5))

    refuses(lambda: pg.elbo(model, Random(), X), "random beyond its sample sites")


@row("Forms of data")
def forms() -> None:
    right = pg.elbo(model, Guide(), X).value
    frame = pd.Series(X.numpy())
    loader = DataLoader(TensorDataset(X), batch_size=2)
    items = [(value,) for value in X]
    for data in (X.numpy(), X.tolist(), frame, {"x": X}, (X,), TensorDataset(X), loader, items):
        assert torch.equal(pg.elbo(model, Guide(), data).value, right)
    refuses(lambda: pg.elbo(model, Guide(), iter(items)), "list(data)")


@row("Discrete latents")
def discrete() -> None:
    def mixture(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.ones(2)), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + k, 1.0), obs=x)

    halves = torch.stack([dist.Normal(k, 2**0.5).log_prob(X) for k in (0.0, 1.0)])
    exact = torch.logsumexp(halves, 0).double() - torch.tensor(2.0).log()
    bound = pg.iwae(mixture, Guide(), X, num_particles=4000)
    assert ((bound.value - exact).abs() < 4.5 * bound.mcse).all() and (bound.mcse < 0.1).all()

    def counts(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Poisson(torch.tensor(3.0)))
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + k, 1.0), obs=x)

    refuses(lambda: pg.elbo(counts, Guide(), X), "'k'")


@row("Guides that draw discrete latents")
def discrete_guides() -> None:
    def mixture(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(k, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Bernoulli(torch.sigmoid(x)))

    q, right = torch.sigmoid(X).double(), X.double()
    joint = [dist.Normal(float(k), 1.0).log_prob(right) - torch.tensor(2.0).log() for k in (0, 1)]
    exact = (1 - q) * (joint[0] - (1 - q).log()) + q * (joint[1] - q.log())
    bound = pg.elbo(mixture, guide, X, num_particles=4000)
    assert ((bound.value - exact).abs() < 4.5 * bound.mcse.clamp(min=1e-6)).all()

    def apart(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.5))
            z = pyro.sample("z", dist.Normal(3 * k[..., None], 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=x)

    layer, flow = nn.Linear(1, 3), transforms.spline(1)

    def after(x: Tensor, *further: Any) -> None:
        pyro.module("layer", layer)
        loc, raw, slope = layer(x[:, None]).split(1, -1)
        with pyro.plate("data", len(x)):
            base = dist.Normal(loc, raw.exp()).to_event(1)
            z = pyro.sample("z", dist.TransformedDistribution(base, list(further)) if further else base)
            pyro.sample("k", dist.Bernoulli(logits=(slope * z)[..., 0]))

    answers(apart, after)
    refuses(lambda: answers(apart, lambda x: after(x, flow)), "'k'", "'z'", "Draw the discrete sites first")


def shared(x: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@row("Latents shared by datapoints")
def shared_latents() -> None:
    guide = AutoNormal(shared)
    guide(X)
    refuses(lambda: pg.elbo(shared, guide, X), "outside the data plate 'data'", "plate=False")
    assert pg.elbo(shared, guide, X, plate=False).value.shape == (1,)
    few = {"refinement": pg.Refinement(num_steps=20), "num_particles": 50, "progress": False}
    ledger = pg.decompose(shared, guide, X, shared=pg.Shared(num_draws=2, max_draws=64), **few)
    assert "global gap" in str(ledger)


@row("Guides with several levels, filters, recurrent networks")
def several_levels() -> None:
    def levels(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            top = pyro.sample("top", dist.Normal(0.0, 1.0))
            z = pyro.sample("z", dist.Normal(top, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    class Levels(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = torch.nn.Parameter(torch.tensor([0.5, 0.3, -0.1, -0.1]))

        def forward(self, x: Tensor) -> None:
            location, slope, *log_scales = self.weights
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(location * x, log_scales[0].exp()))
                pyro.sample("top", dist.Normal(slope * z, log_scales[1].exp()))

    refined = pg.refine(levels, Levels(), X, referee=False)
    exact = dist.Normal(0.0, 3**0.5).log_prob(X).double()  # the family holds the posterior
    bound = pg.elbo(levels, refined, X)
    assert ((bound.value - exact).abs() < 4 * bound.mcse + 0.01).all()


@row("Point estimates")
def point_estimates() -> None:
    guide = AutoDelta(model)
    guide(X)
    refuses(lambda: pg.elbo(model, guide, X), "'z'", "Delta")

    def two(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
            z = pyro.sample("z", dist.Normal(mean, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def at_a_value(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            mean = pyro.sample("mean", dist.Delta(x / 4))
            pyro.sample("z", dist.Normal((x + mean) / 2, 0.5**0.5))

    problem = pg.Problem.of(two, at_a_value, X)
    exact = dist.Normal(X / 4, 2**0.5).log_prob(X).double()
    torch.testing.assert_close(pg.elbo(problem).value, exact, rtol=0, atol=1e-4)  # the guide is the posterior
    assert any("'mean'" in remark for remark in problem.remarks)


@row("Refused, in one line")
def refused() -> None:
    def hard_coded(x: Tensor) -> None:
        with pyro.plate("data", 5):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def positive(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def depends_on_the_batch(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x - x.mean(), 0.7))

    refuses(lambda: pg.elbo(hard_coded, Guide(), X), "has size 5")
    refuses(lambda: pg.elbo(positive, Guide(), X), "the real line", "the positive reals")
    refuses(lambda: pg.elbo(model, Guide(), torch.tensor([0.1, torch.nan])), "NaN")
    refuses(lambda: pg.elbo(model, depends_on_the_batch, X), "no batch statistics")


@pytest.mark.filterwarnings("ignore:::(scvi|anndata|lightning|torchmetrics)")
@pytest.mark.parametrize("name", ROWS)
def test_the_row(name: str) -> None:
    ROWS[name]()


def test_every_row_has_its_program() -> None:
    section = README.read_text("utf-8").split("## What you can bring")[1].split("\n## ")[0]
    names = [match.group(1).strip() for match in re.finditer(r"^\| (.+?) \|", section, re.MULTILINE)]
    assert [name for name in names if name not in ("you bring", "---")] == list(ROWS)
