"""What training programs carry along, against Pyro's `Trace_ELBO` with and without it."""

import re
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

import pyrogaps as pg

X = torch.randn(7, 3, generator=torch.Generator().manual_seed(2))
LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 2])
NUM = 1500


class Causal(nn.Module):
    """A treatment t and an outcome y beside proxies x of a hidden confounder z, as in CEVAE."""

    def model(self, x: Tensor, t: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ torch.eye(2, 3), 2.0).to_event(1), obs=x)
            t = pyro.sample("t", dist.Bernoulli(logits=z[:, 0]), obs=t)
            pyro.sample("y", dist.Normal(z[:, 1] + t, 1.5), obs=y)

    def __init__(self) -> None:
        super().__init__()
        self.net, self.t_net, self.y_net = nn.Linear(5, 2), nn.Linear(3, 1), nn.Linear(4, 1)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x)):
            auxiliary = {"is_auxiliary": True}
            t = pyro.sample("t", dist.Bernoulli(logits=self.t_net(x)[:, 0]), obs=t, infer=auxiliary)
            both = torch.cat([x, t[:, None]], -1)
            y = pyro.sample("y", dist.Normal(self.y_net(both)[:, 0], 1.0), obs=y, infer=auxiliary)
            loc = self.net(torch.cat([both, y[:, None]], -1))
            pyro.sample("z", dist.Normal(0.2 * loc, 0.9).to_event(1))


class Annotated(nn.Module):
    """Labels are data; the guide carries their classification loss along, as scANVI does, and a penalty."""

    def __init__(self, *, scale: float = 1.0, rsample: bool = False, mask: bool = False, noisy: bool = False) -> None:
        super().__init__()
        self.net, self.classify = nn.Linear(6, 2), nn.Linear(3, 3)
        self.scale, self.rsample, self.mask, self.noisy = scale, rsample, mask, noisy

    def model(self, x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x)), poutine.scale(scale=self.scale):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            hot = torch.eye(3)[y]
            pyro.sample("x", dist.Normal(z @ torch.eye(2, 3) + hot, 2.0).to_event(1), obs=x)

    def forward(self, x: Tensor, y: Tensor) -> None:
        penalty = sum(weight.square().sum() for weight in self.classify.parameters())
        pyro.factor("penalty", penalty, has_rsample=self.rsample)
        with pyro.plate("data", len(x)), poutine.scale(scale=self.scale):
            z = pyro.sample(
                "z", dist.Normal(self.net(torch.cat([x, nn.functional.one_hot(y, 3)], -1)), 0.8).to_event(1)
            )
            log_prob = dist.Categorical(logits=self.classify(x)).log_prob(y)
            log_prob = log_prob + 0.3 * z.sum(-1) if self.noisy else log_prob
            with poutine.mask(mask=y > 0) if self.mask else poutine.scale(scale=1.0):
                pyro.factor("loss", -50.0 * log_prob, has_rsample=self.rsample)


def elbo_of(model: Callable[..., None], guide: Callable[..., None], args: tuple[Any, ...]) -> Tensor:
    """Pyro's own ELBO of the data set, `(NUM,)` draws."""
    torch.manual_seed(5)
    with torch.no_grad():
        return torch.tensor([-Trace_ELBO().loss(model, guide, *args) for _ in range(NUM)], dtype=torch.float64)


def agrees(ours: Any, theirs: Tensor) -> None:
    total, error = float(ours.value.double().sum()), float(ours.mcse.double().square().sum().sqrt())
    standard_error = float(theirs.std()) / NUM**0.5
    limit = (error**2 + standard_error**2) ** 0.5
    assert limit < 0.02 * len(X)
    assert abs(total - float(theirs.mean())) < 4 * limit


def nats_of(remarks: tuple[str, ...], number: int) -> float:
    """What the remarks say that log q lacks, nats for the data set."""
    total = 0.0
    for remark in remarks:
        if found := re.search(r"adds (\S+)(?: ± \S+)? nats( per datapoint)?( for the data set)?$", remark):
            total += float(found[1]) * (number if found[2] else 1)
    return total


def test_observed_sites_of_a_guide() -> None:
    torch.manual_seed(1)
    pair = Causal()
    data = (X, (X[:, 0] > 0).float(), X[:, 1] * 2)
    problem = pg.Problem.of(pair.model, pair, data)
    assert [re.findall(r"'(.)'", remark) for remark in problem.remarks] == [["t"], ["y"]]
    assert all(remark.startswith("the observed site '") for remark in problem.remarks)
    ours = pg.elbo(problem, num_particles=NUM)
    agrees(ours, elbo_of(pair.model, poutine.block(pair, hide=["t", "y"]), data))
    agrees(ours, elbo_of(pair.model, pair, data) + nats_of(problem.remarks, len(X)))
    # On the same draws: what is left out does not touch those of z.
    guide = pyro.poutine.block(pair, hide=["t", "y"])
    torch.testing.assert_close(pg.elbo(pair.model, guide, data).value, pg.elbo(problem).value, rtol=0, atol=0)


@pytest.mark.parametrize("option", ["plain", "rsample", "mask", "noisy"])
def test_factors_of_a_guide(option: str) -> None:
    torch.manual_seed(1)
    pair = Annotated(**{} if option == "plain" else {option: True})
    problem = pg.Problem.of(pair.model, pair, (X, LABELS))
    assert [remark.split("'")[1] for remark in problem.remarks] == ["penalty", "loss"]
    assert problem.remarks[0].endswith("nats for the data set")
    ours = pg.elbo(problem, num_particles=NUM)
    agrees(ours, elbo_of(pair.model, poutine.block(pair, hide=["penalty", "loss"]), (X, LABELS)))
    left_out = nats_of(problem.remarks, len(X))
    assert abs(left_out) > 100
    if option == "noisy":
        assert "±" in problem.remarks[1]
    else:
        raw = elbo_of(pair.model, pair, (X, LABELS)) + left_out
        assert abs(float(raw.mean() - ours.value.sum())) < 0.02 * len(X) + 1e-3 * abs(left_out)


def test_scales_beside_factors() -> None:
    torch.manual_seed(1)
    pair = Annotated(scale=0.01)
    problem = pg.Problem.of(pair.model, pair, (X, LABELS))
    assert "the scale 0.01 at 'z' and 'loss' in the guide is ignored" in problem.remarks[1]
    plain = Annotated()
    plain.load_state_dict(pair.state_dict())
    agrees(pg.elbo(problem, num_particles=NUM), elbo_of(plain.model, poutine.block(plain, expose=["z"]), (X, LABELS)))
    assert problem.remarks[2:] == pg.Problem.of(plain.model, plain, (X, LABELS)).remarks


@pytest.mark.usefixtures("brief_check")
def test_a_ledger_with_what_a_guide_carries() -> None:
    torch.manual_seed(1)
    pair = Annotated()
    settings: dict[str, Any] = {"refinement": pg.Refinement(num_steps=20), "evidence": pg.AIS(4, 5)}
    ledger = pg.decompose(pair.model, pair, (X, LABELS), num_particles=50, progress=False, **settings)
    assert "The factor 'loss' in the guide is left out of log q, to which it adds" in str(ledger)
