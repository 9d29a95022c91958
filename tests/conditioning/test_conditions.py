"""What a guide declares to be shown, and that it is held to it."""

import math
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import pyrogaps as pg
from pyrogaps.conditioning import Lookahead, Shown, check_no_leak, declared
from pyrogaps.conditioning.partial import partially_observed
from pyrogaps.guides.auxiliary_flows import AmortizedAuxiliaryFlow
from pyrogaps.guides.flows import AmortizedFlow
from pyrogaps.guides.local import AutoLocalMultivariateNormal
from pyrogaps.guides.partial import PartialNormal
from pyrogaps.models.linear_gaussian import LinearGaussian
from pyrogaps.problem import Problem

MODEL = LinearGaussian.random(data_dim=6, latent_dim=2)


def density(guide: Any, x: Tensor, model: Any = MODEL) -> pg.GuideDensity:
    return pg.GuideDensity(guide, x, model)


class Peeking(PartialNormal):
    """Declares the first half of x, and looks at all of it."""

    def encode(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.encoder(x)
        return outputs


def test_guide_that_keeps_its_word_passes() -> None:
    guide = PartialNormal(6, 2, (8,), shown=3)
    told = declared(guide)
    assert isinstance(told, Shown)
    check_no_leak(density(guide, torch.randn(20, 6)), told)


@pytest.mark.parametrize("data", [torch.randn(20, 6), torch.randint(0, 2, (20, 6)).float(), torch.zeros(20, 6)])
def test_guide_that_looks_is_refused(data: Tensor) -> None:
    guide = Peeking(6, 2, (8,), shown=3)
    with pytest.raises(pg.InputError, match="site 'z' changes with a part of the data outside its conditions"):
        pg.decompose(MODEL, guide, data, progress=False)


def counts(x: Tensor) -> Tensor:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Poisson(z.exp()[:, None].expand(x.shape)).to_event(1), obs=x)
    return z


def test_integer_data_are_checked_too() -> None:
    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[:, 1].float(), 1.0))

    guide.conditions = torch.tensor([True, False])  # type: ignore[attr-defined]
    x = torch.randint(0, 5, (10, 2))
    told = declared(guide)
    assert told is not None
    with pytest.raises(pg.InputError, match="site 'z' changes"):
        check_no_leak(density(guide, x, counts), told)


class Chain(nn.Module):
    """z_t | z_{t-1} with one observation a step; the guide's factor t looks `sees` steps ahead."""

    def __init__(self, lookahead: float, sees: int) -> None:
        super().__init__()
        self.lookahead, self.sees = lookahead, sees

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z: Any = 0.0
            for t in range(x.shape[1]):
                z = pyro.sample(f"z_{t + 1}", dist.Normal(z, 1.0))
                pyro.sample(f"x_{t + 1}", dist.Normal(z, 1.0), obs=x[:, t])

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z: Any = 0.0
            for t in range(x.shape[1]):
                z = pyro.sample(f"z_{t + 1}", dist.Normal(0.1 * z + x[:, : t + 1 + self.sees].sum(1), 1.0))


@pytest.mark.parametrize("lookahead", [0, 1, 3])
def test_lookahead_that_is_kept(lookahead: int) -> None:
    guide = Chain(lookahead, lookahead)
    told = declared(guide)
    assert told == Lookahead(lookahead)
    check_no_leak(density(guide, torch.randn(8, 6), guide.model), told)


@pytest.mark.parametrize("lookahead", [0, 1, 3])
def test_lookahead_that_is_not_kept(lookahead: int) -> None:
    guide = Chain(lookahead, lookahead + 1)
    with pytest.raises(pg.InputError, match=r"site 'z_\d' changes with data after step"):
        pg.decompose(guide.model, guide, torch.randn(8, 6), progress=False)


def test_infinite_lookahead_is_no_condition() -> None:
    assert declared(Chain(math.inf, 0)) is None


@pytest.mark.parametrize("lookahead", [-1, 0.5, True])
def test_lookahead_that_is_none(lookahead: float) -> None:
    with pytest.raises(pg.InputError, match=r"lookahead must be 0 .filtering., 1, 2"):
        declared(Chain(lookahead, 0))


def test_lookahead_without_steps_in_the_data() -> None:
    guide = Chain(0, 0)

    def model(x: Tensor) -> None:
        guide.model(x.flatten(1))

    def flat(x: Tensor) -> None:
        guide(x.flatten(1))

    with pytest.raises(pg.InputError, match="no observed argument has 6 steps"):
        check_no_leak(density(flat, torch.randn(8, 2, 3), model), Lookahead(0))


def test_both_declarations_are_refused() -> None:
    guide = PartialNormal(6, 2, (8,), shown=3)
    guide.lookahead = 1  # type: ignore[assignment]
    with pytest.raises(pg.InputError, match="both conditions and a lookahead"):
        declared(guide)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(6), "must be boolean"),
        (torch.ones(5, dtype=torch.bool), r"has shape \(5,\), but the argument has shape"),
        ((None, torch.ones(6, dtype=torch.bool)), "2 masks, but the model has 1 argument$"),
    ],
)
def test_masks_that_do_not_fit(mask: Any, message: str) -> None:
    with pytest.raises(pg.InputError, match=message):
        Shown(lambda x: mask).masks((torch.randn(4, 6),))


@pytest.mark.parametrize(
    ("shown", "message"), [(7, "from 0 to data_dim = 6"), ([True] * 5, "with data_dim = 6 elements")]
)
def test_partial_guide_with_another_mask(shown: Any, message: str) -> None:
    with pytest.raises(pg.InputError, match=message):
        PartialNormal(6, 2, shown=shown)


class HalfFlow(AmortizedFlow):
    """A flow of the first half of x."""

    conditions = torch.arange(6) < 3

    def encode(self, x: Tensor) -> Tensor:
        return super().encode(torch.where(self.conditions, x, torch.zeros_like(x)))


def test_guides_with_sites_of_other_names_are_checked() -> None:
    """Auxiliary flows draw one vector, and more than the latents."""
    x = torch.randn(6, 6)
    honest = HalfFlow(6, 2, (4,))
    check_no_leak(density(honest, x), Shown(honest.conditions))
    leaking = AmortizedFlow(6, 2, (4,))
    with pytest.raises(pg.InputError, match="changes with a part of the data"):
        check_no_leak(density(leaking, x), Shown(honest.conditions))
    auxiliary = AmortizedAuxiliaryFlow(6, 2, (4,), flow_hidden=4)
    extended = Problem.of(MODEL, auxiliary, x).guide_density()
    with pytest.raises(pg.InputError, match="changes with a part of the data"):
        check_no_leak(extended, Shown(honest.conditions))


def test_parameters_for_each_datapoint_have_seen_all_of_it() -> None:
    x = torch.randn(6, 6)
    local = AutoLocalMultivariateNormal(MODEL)
    local(x)
    with pytest.raises(pg.InputError, match="encoder takes only the shown part"):
        check_no_leak(density(local, x), Shown(torch.arange(6) < 3))


@pytest.mark.parametrize("value", [0, 1, 2])
def test_labels_that_are_all_alike(value: int) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Categorical(logits=z[:, None].expand(-1, 2, -1)).to_event(1), obs=x)

    x = torch.full((5, 2), value)
    partially_observed(pg.JointDensity(model, x), Shown(torch.tensor([True, False])))


def test_observed_values_that_broadcast() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("three", 3, dim=-2), pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])
            pyro.sample("y", dist.Normal(z, 1.0), obs=x[:, 1])

    x = torch.randn(4, 2)
    found = partially_observed(pg.JointDensity(model, x, plate="data"), Shown(torch.tensor([True, False])))
    z = torch.randn(2, 4, 3)
    prior = dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
    torch.testing.assert_close(found(z), prior + dist.Normal(z, 1.0).log_prob(x[:, :1]).sum(-1))


@pytest.mark.parametrize(
    "look",
    [lambda x: x[:, 1:].std(1), lambda x: x[:, 1] ** 2, lambda x: (x[:, 1] - x[:, 2]).abs()],
    ids=["spread", "square", "distance"],
)
def test_leaks_that_a_reflection_does_not_show(look: Any) -> None:
    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            mean = torch.stack([x[:, 0], 0.3 * look(x)], 1)
            pyro.sample("z", dist.Normal(mean, 1.0).to_event(1))

    x = 2 * torch.rand(20, 6) - 1
    with pytest.raises(pg.InputError, match="site 'z' changes"):
        check_no_leak(density(guide, x), Shown(torch.arange(6) < 1))


def test_small_leak_among_many_latents() -> None:
    model = LinearGaussian.random(data_dim=3, latent_dim=100)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            mean = torch.nn.functional.pad(0.01 * x[:, 1:2], (0, 99))
            pyro.sample("z", dist.Normal(mean, 1.0).to_event(1))

    with pytest.raises(pg.InputError, match="site 'z' changes"):
        check_no_leak(density(guide, torch.randn(20, 3), model), Shown(torch.arange(3) < 1))


def test_every_step_of_a_long_lookahead_is_checked() -> None:
    class Strided(Chain):
        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                for t in range(x.shape[1]):
                    seen = min(t + t % 2, x.shape[1] - 1)
                    pyro.sample(f"z_{t + 1}", dist.Normal(x[:, seen], 1.0))

    guide = Strided(0, 0)
    with pytest.raises(pg.InputError, match="site 'z_2' changes with data after step 2"):
        check_no_leak(density(guide, torch.randn(8, 32), guide.model), Lookahead(0))


def test_covariates_with_as_many_columns_as_steps_are_no_sequence() -> None:
    chain = Chain(0, 0)

    def model(x: Tensor, u: Tensor) -> None:
        chain.model(x)

    def guide(x: Tensor, u: Tensor) -> None:
        chain(x + u.sum(1, keepdim=True))

    data = torch.randn(8, 6), torch.randn(8, 6)
    check_no_leak(pg.GuideDensity(guide, data, model), Lookahead(0))


@pytest.mark.usefixtures("brief_check")
def test_cache_knows_the_conditions(tmp_path: Path) -> None:
    """Another mask is another ledger."""
    x, guide = torch.randn(4, 6), HalfFlow(6, 2, (4,))
    settings = {
        "conditioning": pg.Conditioning(4, 4),
        "evidence": pg.AIS(num_chains=2, num_temperatures=2),
        "refinement": pg.Refinement(num_steps=2, num_selection=16),
        "num_particles": 10,
        "progress": False,
    }
    first = pg.decompose(MODEL, guide, x, cache=tmp_path, **settings)  # type: ignore[arg-type]
    again = pg.decompose(MODEL, guide, x, cache=tmp_path, **settings)  # type: ignore[arg-type]
    guide.conditions = torch.ones(6, dtype=torch.bool)
    other = pg.decompose(MODEL, guide, x, cache=tmp_path, **settings)  # type: ignore[arg-type]
    gaps = [ledger.per_datapoint["conditioning_gap"].values for ledger in (first, again, other)]
    assert (gaps[0] == gaps[1]).all()
    assert (gaps[0] != gaps[2]).any()
