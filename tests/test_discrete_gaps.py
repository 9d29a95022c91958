"""Ledgers of guides that draw discrete latents, against quadrature, enumeration and closed forms."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

import pyrogaps as pg
from pyrogaps.refine.tables import elbo_of
from tests.discrete_pairs import (
    DTYPE,
    LEVELS,
    ONLY,
    ClassGuide,
    ClassVAE,
    Mixture,
    MixtureGuide,
    Sites,
    SitesGuide,
    best_of_sites,
    only_states,
)

X = torch.tensor([-2.0, -0.5, 0.3, 1.0], dtype=DTYPE)
# What a refinement may fall short of the best by, in nats: where it settles.
SHORT = pg.Refinement().tolerance


def ledger_of(model: Any, guide: Any, x: Tensor, **settings: Any) -> pg.GapLedger:
    problem = pg.Problem.of(model, guide, x, mode="eager")
    return pg.decompose(problem, num_particles=4000, progress=False, **settings)


def column(ledger: pg.GapLedger, name: str) -> tuple[Tensor, Tensor]:
    """A column of a ledger and its Monte Carlo error."""
    value, error = (torch.as_tensor(ledger.per_datapoint[f"{name}{end}"].values) for end in ("", "_mcse"))
    return (value[:, 0], error[:, 0]) if value.dim() > 1 else (value, error)


def check(ledger: pg.GapLedger, elbo: Tensor, refined: Tensor, log_evidence: Tensor) -> None:
    """Every number within four of its standard errors of the truth, and the gaps add up."""
    for name, exact in (("log_evidence", log_evidence), ("elbo_refined", refined), ("elbo", elbo)):
        value, error = column(ledger, name)
        short = SHORT if name == "elbo_refined" else 1e-6
        excess = (value - exact.detach()).abs() - 4 * error - short
        assert float(excess.max()) < 0, (name, (value - exact.detach()) / error)
    names = ("inference_gap", "approximation_gap", "amortization_gap")
    inference, *parts = (ledger.gaps["mean"].sel(gap=name) for name in names)
    assert float(sum(parts)) == pytest.approx(float(inference), abs=1e-9)


def test_semi_supervised_vae() -> None:
    model, guide = ClassVAE(), ClassGuide()
    x = (torch.rand(5, 5, generator=torch.Generator().manual_seed(3)) < 0.5).to(DTYPE)
    ledger = ledger_of(model, guide, x)
    loc, scale = guide.given(x[:, None], torch.eye(3, dtype=DTYPE))
    elbo = elbo_of(model.bounds(x, loc, scale), torch.log_softmax(guide.logits(x), -1))
    check(ledger, elbo, model.best_bounds(x).logsumexp(-1), model.log_evidence(x))
    assert "'y', discrete, drawn by the guide" in str(ledger)
    assert ledger.provenance["own_family"] == "states"


def test_mixture() -> None:
    model, guide = Mixture(), MixtureGuide()
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.mul_(0.3)
    x = model.data(5)
    ledger = ledger_of(model, guide, x)
    h = guide.latents(x)[:, None] + guide.shift
    loc, scale = h[..., :2], (0.3 * h[..., 2:]).exp()
    precision, means = model.precisions(), model.means(x)
    apart = loc - means
    kl = 0.5 * (
        torch.einsum("nki,kij,nkj->nk", apart, precision, apart)
        + torch.einsum("kii,nki->nk", precision, scale**2)
        - 2 * scale.log().sum(-1) - torch.logdet(precision) - 2
    )  # fmt: skip
    elbo = elbo_of(model.log_joint(x) - kl, torch.log_softmax(guide.logits(x), -1))
    check(ledger, elbo, model.best_bounds(x).logsumexp(-1), model.log_joint(x).logsumexp(-1))
    assert bool(ledger.per_datapoint["converged"].values.all())


def test_factorised_states_and_latents() -> None:
    """q(y1) q(y2) q(z): what each part of the family costs is in the approximation gap."""
    model, guide = Sites(), SitesGuide(())
    ledger = ledger_of(model, guide, X)
    y1, y2 = model.states.T
    log_q = torch.log_softmax(torch.stack([torch.zeros_like(X), guide.first[0] + guide.first[1] * X], -1), -1)[:, y1]
    log_q = log_q + torch.log_softmax(guide.second[0] + guide.tilt * X[:, None], -1)[:, y2]
    loc = (guide.loc[0, 0] + 0.3 * X)[:, None].expand(-1, 6)
    elbo = model.elbo(X, log_q, loc, guide.scale.exp().expand_as(loc))
    check(ledger, elbo, best_of_sites(model, (), X), model.log_joint(X).logsumexp(-1))


class OnlyStates(nn.Module):
    """q(a | x) q(b | x, a)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.3, -0.4], dtype=DTYPE))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Categorical(logits=torch.stack([self.weight[0] * x, -x], -1)))
            pyro.sample("b", dist.Categorical(logits=torch.stack([self.weight[1] * x + a, x], -1)))


def test_states_alone() -> None:
    """Nothing but discrete latents: log p(x) and L[q*] are exact, and equal."""
    guide = OnlyStates()
    ledger = ledger_of(only_states, guide, X)
    joint = ONLY.log() + dist.Normal(LEVELS, 0.7).log_prob(X[:, None, None])
    first = torch.log_softmax(torch.stack([guide.weight[0] * X, -X], -1), -1)
    each = torch.stack([guide.weight[1] * X[:, None] + torch.arange(2), X[:, None].expand(-1, 2)], -1)
    log_q = (first[..., None] + torch.log_softmax(each, -1)).reshape(4, 4)
    exact = joint.reshape(4, 4).logsumexp(-1)
    check(ledger, elbo_of(joint.reshape(4, 4), log_q), exact, exact)
    for name in ("log_evidence", "elbo_refined"):
        value, error = column(ledger, name)
        torch.testing.assert_close(value, exact, rtol=0, atol=1e-6)
        assert float(error.max()) < 1e-6


def test_other_families_are_of_the_latents_alone() -> None:
    """Without y, which is summed out: their bounds are at least those of q(y) q(z | y) with q(z | y) = q(z)."""
    model = Mixture(alike=True, noise=4.0)
    x = model.data(4)
    ledger = ledger_of(
        model,
        MixtureGuide(shared=True),
        x,
        families={"Normal": lambda model: AutoNormal(poutine.block(model, hide=["y"]))},
        referee=False,
    )
    refined = torch.as_tensor(ledger.per_datapoint["elbo_refined"].values)
    error = torch.as_tensor(ledger.per_datapoint["elbo_refined_mcse"].values).norm(dim=1)
    assert bool(((refined[:, 0] - model.best_shared(x)).abs() < 4 * error + SHORT).all())
    assert bool((refined[:, 1] > refined[:, 0] - 4 * error).all())
    assert bool((refined[:, 1] < model.log_joint(x).logsumexp(-1) + 4 * error).all())


def test_conditions_are_refused_with_a_remedy() -> None:
    class Blind(MixtureGuide):
        def conditions(self, x: Tensor) -> Tensor:
            return torch.ones_like(x, dtype=torch.bool)

    model = Mixture()
    with pytest.raises(pg.InputError, match="site 'y': the conditioning gap of a guide that draws discrete latents"):
        pg.decompose(model, Blind(), model.data(3), progress=False)
