"""Structured guides: what each conditional has seen, padding, and the family with states of each datapoint's own."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal

from pyrogaps import AIS, GuideDensity, InputError, JointDensity, Refinement, decompose, elbo, iwae, refine, train
from pyrogaps.cli.building import build_programs
from pyrogaps.cli.recipe import Recipe
from pyrogaps.cli.typed import Component
from pyrogaps.guides.sequential import LocalStructuredNormal, StructuredNormal
from pyrogaps.models.dmm import DeepMarkovModel
from pyrogaps.models.pendulum import Pendulum
from pyrogaps.models.sequences import SequenceModel
from pyrogaps.problem import Problem
from pyrogaps.refine import own_family
from pyrogaps.run import Run
from pyrogaps.streams import chunks

LOOKAHEADS = [0, 1, 2, math.inf]
LENGTHS = torch.tensor([4, 2, 1, 4, 3])


@pytest.fixture(autouse=True)
def double() -> None:
    torch.set_default_dtype(torch.float64)


def notes(steps: int = 4) -> Tensor:
    return torch.bernoulli(torch.full((5, steps, 3), 0.4), generator=torch.Generator().manual_seed(1))


def small(lookahead: float = math.inf) -> StructuredNormal:
    """Every weight stirred, so that nothing is at its start."""
    guide = StructuredNormal(3, 2, 6, lookahead)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return guide


def tiny_model() -> DeepMarkovModel:
    return DeepMarkovModel(3, 2, 4, 4)


class Chain(SequenceModel):
    """Two latents that turn into each other, mixed by what is seen, every scale another: a linear-Gaussian chain."""

    data_dim = 2
    F, H, P, Q, V = (
        torch.tensor(values, dtype=torch.float64)
        for values in ([[0.9, 0.4], [-0.3, 0.7]], [[1.0, 0.5], [0.2, -0.8]], [1.2, 0.6], [0.7, 0.3], [0.4, 0.9])
    )

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", self.Q)

    def first(self, number: int) -> tuple[Tensor, Tensor]:
        return torch.zeros(number, 2), self.P.expand(number, 2)

    def transition(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return z @ self.F.T, self.Q.expand(z.shape)

    def emission(self, z: Tensor) -> Tensor:
        return z @ self.H.T

    def likelihood(self, output: Tensor) -> dist.TorchDistribution:
        return dist.Normal(output, self.V).to_event(1)

    def exact(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """log p(x) `(N,)`, and the gap sum_t [ln|R_t| + sum_i ln (R_t^-1)_ii] / 2 that the best diagonal guide leaves.

        R_t = Cov(z_t | z_{t-1}, x) is the first block of the inverse of the posterior's precision from t on.
        """
        steps = x.shape[1]
        kicks = torch.eye(2 * steps) - torch.block_diag(torch.zeros(2, 0), *[self.F] * (steps - 1), torch.zeros(0, 2))
        prior = kicks.T @ torch.cat([self.P, self.Q.repeat(steps - 1)]).pow(-2).diag() @ kicks
        seen, noise = torch.block_diag(*[self.H] * steps), self.V.repeat(steps) ** 2
        evidence = MultivariateNormal(torch.zeros(2 * steps), seen @ prior.inverse() @ seen.T + noise.diag())
        precision, gap = prior + seen.T @ noise.reciprocal().diag() @ seen, torch.zeros(())
        for t in range(steps):
            R = precision[2 * t :, 2 * t :].inverse()[:2, :2]
            gap = gap + (R.logdet() + R.inverse().diagonal().log().sum()) / 2
        return evidence.log_prob(x.flatten(1)), gap


@pytest.mark.parametrize("lookahead", LOOKAHEADS)
def test_sees_no_further_than_it_may(lookahead: float) -> None:
    """At fixed z_{t-1}, slopes in x_s are 0 for s > t + k; a smoothing guide's in x_s with s < t as well."""
    guide, x, z = small(lookahead), notes(6)[:1].requires_grad_(), torch.randn(1, 2)
    h = guide.encode(x)
    for t in range(6):
        for output in guide.combiner(z, h[:, t]):
            (slope,) = torch.autograd.grad(output.sum(), x, retain_graph=True)
            seen = (slope[0] != 0).any(-1)
            first, last = (t, 5) if lookahead == math.inf else (0, min(t + int(lookahead), 5))
            assert seen.nonzero().flatten().tolist() == list(range(first, last + 1))


@pytest.mark.parametrize("lookahead", LOOKAHEADS)
def test_ragged_sequences_are_read_as_if_alone(lookahead: float) -> None:
    guide, x = small(lookahead), notes()
    h = guide.encode(x, LENGTHS)
    assert h.shape == (5, 4, 6)
    for n, length in enumerate(LENGTHS):
        torch.testing.assert_close(h[n, :length], guide.encode(x[n : n + 1, :length])[0])


@pytest.mark.parametrize("lookahead", LOOKAHEADS)
def test_what_lies_beyond_a_length_changes_nothing(lookahead: float) -> None:
    guide, x, z = small(lookahead), notes(), torch.randn(3, 5, 7, 2)
    model, inside = tiny_model(), torch.arange(4) < LENGTHS[:, None]
    short = GuideDensity(guide, (x, LENGTHS), model).log_prob(z[:, :, :4].flatten(2))
    longer = torch.cat([torch.where(inside[..., None], x, 1 - x), notes(3)], 1)
    torch.testing.assert_close(GuideDensity(guide, (longer, LENGTHS), model).log_prob(z.flatten(2)), short)


def test_log_density_by_hand() -> None:
    guide, x, z = small(1), notes(), torch.randn(3, 5, 4, 2)
    density, h = GuideDensity(guide, (x, LENGTHS), tiny_model()), guide.encode(x, LENGTHS)
    before = torch.cat([guide.combiner.z_0.expand(3, 5, 1, 2), z[:, :, :-1]], 2)
    loc, raw = guide.combiner.heads((guide.combiner.inner(before).tanh() + h) / 2).chunk(2, -1)
    terms = Normal(loc, raw.exp().log1p() + 1e-4).log_prob(z).sum(-1)
    expected = (terms * (torch.arange(4) < LENGTHS[:, None])).sum(-1)
    torch.testing.assert_close(density.log_prob(z.flatten(2)), expected)


@pytest.mark.parametrize("lookahead", LOOKAHEADS)
def test_draws_score_and_bounds(lookahead: float) -> None:
    model, guide, data = tiny_model(), small(lookahead), (notes(), LENGTHS)
    density = GuideDensity(guide, data, model)
    z, log_q = density.sample(4)
    torch.testing.assert_close(density.log_prob(z), log_q)
    bound, evidence = elbo(model, guide, data, num_particles=500), iwae(model, guide, data, num_particles=500)
    assert bool((evidence.value - bound.value > -4 * (bound.mcse + evidence.mcse)).all())


def test_order_of_sequences_does_not_matter() -> None:
    model, guide, x, z = tiny_model(), small(2), notes(), torch.randn(3, 5, 8)
    rows = torch.tensor([2, 0, 4, 3, 1])
    density = GuideDensity(guide, (x, LENGTHS), model)
    turned = GuideDensity(guide, (x[rows], LENGTHS[rows]), model)
    torch.testing.assert_close(turned.log_prob(z[:, rows]), density.log_prob(z)[:, rows])
    left, right = (iwae(model, guide, data) for data in ((x, LENGTHS), (x[rows], LENGTHS[rows])))
    error = (left.mcse[rows] ** 2 + right.mcse**2).sqrt()
    assert bool(((left.value[rows] - right.value).abs() < 4 * error).all())


def test_particles_of_a_batch_are_encoded_once() -> None:
    """Particles are rows, each a copy of its sequence: the network need not read them again."""
    guide, x, sizes = small(1), notes(), []
    guide.rnn.register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0])))
    whole, ragged = guide.encode(x), guide.encode(x, LENGTHS)
    torch.testing.assert_close(guide.encode(x.repeat(3, 1, 1)), whole.repeat(3, 1, 1))
    torch.testing.assert_close(guide.encode(x.repeat(3, 1, 1), LENGTHS.repeat(3)), ragged.repeat(3, 1, 1))
    assert sizes == [5, 5, 5, 5]
    same = x[:1].repeat(4, 1, 1)  # one sequence, but of different lengths
    lengths = torch.tensor([2, 2, 2, 3])
    torch.testing.assert_close(guide.encode(same, lengths)[3, :3], guide.encode(same[:1, :3])[0])
    guide.encode(x[[0, 1, 0]])
    guide.encode(x[[0, 1, 0, 2]])
    assert sizes[-2:] == [3, 4]


def test_all_lookaheads_have_the_same_parameters() -> None:
    shapes = [{name: p.shape for name, p in small(lookahead).named_parameters()} for lookahead in LOOKAHEADS]
    assert all(shape == shapes[0] for shape in shapes)


@pytest.mark.parametrize(
    ("given", "kept"), [(0, 0), (3, 3), (2.0, 2), ("2", 2), (math.inf, math.inf), ("inf", math.inf)]
)
def test_lookahead_is_kept(given: Any, kept: float) -> None:
    guide = StructuredNormal(3, 2, 4, lookahead=given)
    assert guide.lookahead == kept and isinstance(guide.lookahead, type(kept))
    guide(notes(), LENGTHS)


@pytest.mark.parametrize(("written", "read"), [(2, 2), ("inf", math.inf), (math.inf, math.inf)])
def test_lookahead_in_a_recipe(written: Any, read: float) -> None:
    recipe = Recipe(
        data=Component("pyrogaps.datasets.Chorales"),
        model=Component("pyrogaps.models.dmm.DeepMarkovModel", {"latent_dim": 2}),
        guide=Component(
            "pyrogaps.guides.sequential.StructuredNormal", {"latent_dim": 2, "rnn_dim": 4, "lookahead": written}
        ),
    )
    guide: Any = build_programs(recipe)[1]
    assert guide.lookahead == read


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"lookahead": -1}, "lookahead must be 0 .*, got -1"),
        ({"lookahead": 1.5}, "lookahead must be 0 .*, got 1.5"),
        ({"lookahead": math.nan}, "lookahead must be 0 .*, got nan"),
        ({"lookahead": -math.inf}, "lookahead must be 0 .*, got -inf"),
        ({"lookahead": "all"}, "lookahead must be 0 .*, got 'all'"),
        ({"lookahead": True}, "lookahead must be 0 .*, got True"),
        ({"lookahead": None}, "lookahead must be 0 .*, got None"),
        ({"rnn_dim": 0}, "rnn_dim must be at least 1"),
        ({"min_scale": 0.0}, "min_scale must be positive"),
        ({"innovations": True}, "innovations need the sequence model"),
    ],
)
def test_refusals(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=f"^StructuredNormal: {said}"):
        StructuredNormal(**arguments)


@pytest.mark.parametrize("vectorize", [False, True])
def test_trains_by_pyros_own_svi(vectorize: bool) -> None:
    model, guide, data = Chain(), StructuredNormal(2, 2, 6, 1), (torch.randn(5, 4, 2), LENGTHS)
    before = [parameter.clone() for parameter in guide.parameters()]

    def registered(*args: Any) -> Tensor:
        return pyro.module("guide", guide)(*args)  # type: ignore[no-any-return]

    losses = Trace_ELBO(num_particles=8, vectorize_particles=vectorize, max_plate_nesting=1)
    svi = SVI(model, registered, Adam({"lr": 0.05}), losses)
    trace = [svi.step(*data) for _ in range(40)]
    assert sum(trace[-10:]) < sum(trace[:10])
    assert all(not torch.equal(old, new) for old, new in zip(before, guide.parameters(), strict=True))


def test_the_local_family_starts_at_the_guide() -> None:
    model, guide, data = tiny_model(), small(1), (notes(), LENGTHS)
    problem = Problem.of(model, guide, data)
    joint, density = problem.joint, problem.guide_density()
    family = own_family(density)
    assert family.kind == "local_family"
    start: Any = family.start(joint, chunks(5, 64)[0], Run(0))
    assert [tuple(parameter.shape) for parameter in start.parameters] == [(5, 4, 6)]
    assert start.axes == [0]
    z = torch.randn(20, 5, 8)
    torch.testing.assert_close(start.at(torch.arange(5)).log_prob(z), density.log_prob(z))
    few = torch.tensor([3, 1, 1])
    torch.testing.assert_close(start.at(few).log_prob(z[:, few]), density.log_prob(z[:, few], few))


def test_the_local_familys_combiner_stays_as_it_was() -> None:
    guide, data = small(), (notes(), LENGTHS)
    local = guide.local_family(tiny_model())
    local(*data)
    guide.start_local(local, *data)
    assert [name for name, _ in local.named_parameters()] == ["h"]
    z, h = torch.randn(5, 2), guide.encode(*data)[:, 0]
    before = local.combiner(z, h)
    torch.testing.assert_close(before, guide.combiner(z, h))
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(1.0)
    torch.testing.assert_close(local.combiner(z, h), before)


def test_a_local_guide_is_one_for_its_own_data() -> None:
    model, guide, x = tiny_model(), small(), notes()
    local = guide.local_family(model)
    local(x, LENGTHS)
    guide.start_local(local, x, LENGTHS)
    joint = JointDensity(model, (x, LENGTHS))
    whole, local_density = GuideDensity(guide, None, joint), GuideDensity(local, None, joint)
    z, rows = torch.randn(3, 5, 8), torch.tensor([4, 0, 0, 2])
    torch.testing.assert_close(local_density.log_prob(z), whole.log_prob(z))
    torch.testing.assert_close(local_density.log_prob(z[:, rows], rows), whole.log_prob(z[:, rows], rows))
    for other, lengths in ((x[:3], LENGTHS[:3]), (notes(5), LENGTHS)):
        with pytest.raises(InputError, match="LocalStructuredNormal: has parameters for 5 sequences of 4 steps"):
            local(other, lengths)
    with pytest.raises(InputError, match="LocalStructuredNormal: lengths must be from 1 to 4"):
        LocalStructuredNormal(guide.combiner)(x, LENGTHS + 1)


def test_refining_ragged_sequences_raises_the_bound() -> None:
    model, guide, data = tiny_model(), small(0), (notes(), LENGTHS)
    refined = refine(model, guide, data, settings=Refinement(num_steps=100))
    before, after = (elbo(model, q, data, num_particles=2000) for q in (guide, refined))
    error = (before.mcse**2 + after.mcse**2).sqrt()
    assert bool((after.value - before.value > -4 * error).all())
    assert float((after.value - before.value).mean()) > 0.1  # it was never trained


def test_refined_smoothing_nears_the_best_diagonal_guide() -> None:
    """Of what a trained network leaves between its bound and the best one, refinement closes four fifths."""
    model, guide = Chain(), StructuredNormal(2, 2, 16)
    x = 1.3 * torch.randn(300, 4, 2, generator=torch.Generator().manual_seed(1))
    train(model, guide, x, num_epochs=50, batch_size=100, learning_rate=0.01, progress=False)
    evidence, gap = model.exact(x[:5])
    best = evidence - gap
    assert float(gap) > 0.1  # the diagonal costs something
    refined = refine(model, guide, x[:5], settings=Refinement(num_steps=200))
    before, after = (elbo(model, q, x[:5], num_particles=4000) for q in (guide, refined))
    assert bool((after.value - best < 4 * after.mcse).all())
    left, right = best - before.value, best - after.value
    assert float(left.sum()) > 0.3  # there is something to close
    assert float(right.sum()) < 0.2 * float(left.sum())


@pytest.mark.usefixtures("brief_check")
def test_decompose_takes_the_guides_own_family() -> None:
    ledger = decompose(
        tiny_model(), small(), (notes(), LENGTHS), num_particles=50, progress=False,
        refinement=Refinement(num_steps=2, num_particles=2, num_selection=4),
        evidence=AIS(num_chains=2, num_temperatures=2, num_leapfrog=1),
    )  # fmt: skip
    assert ledger.provenance["own_family"] == "local_family"
    assert torch.isfinite(torch.from_numpy(ledger.per_datapoint["elbo_refined"].values)).all()


def test_guide_around_its_model_starts_at_the_prior_and_keeps_its_parameters_apart() -> None:
    """With heads at zero, the mean is the model's own next state, whatever the data; and the scale is in its units."""
    model = Pendulum(process_scale=1e-3, known_first_state=True)
    guide = StructuredNormal(1, 2, 4, lookahead=0, around=model)
    assert all(not name.startswith("combiner._around") for name, _ in guide.named_parameters())
    torch.nn.init.zeros_(guide.combiner.heads.weight)
    torch.nn.init.zeros_(guide.combiner.heads.bias)
    x, _ = model.simulate(3, 4)
    trace = pyro.poutine.trace(guide).get_trace(x)
    for t in range(1, 5):
        fn = trace.nodes[f"z_{t}"]["fn"].base_dist
        loc, scale = model.transition(trace.nodes[f"z_{t - 1}"]["value"]) if t > 1 else model.first(3)
        torch.testing.assert_close(fn.loc, loc)
        torch.testing.assert_close(fn.scale, scale * (torch.nn.functional.softplus(torch.zeros(())) + 1e-4))
    density = GuideDensity(guide, x, model)
    assert density.num_datapoints == 3
    local = guide.local_family(model)
    local(x)
    assert [name for name, _ in local.named_parameters()] == ["h"]


def test_innovations_move_the_mean_as_a_kalman_filter_does() -> None:
    """With the gain of a state that is seen, q(z_t | z_{t-1}, x_t) is exact."""
    model = Pendulum(process_scale=0.05, observation_scale=0.02, full_state=True)
    guide = StructuredNormal(2, 2, 4, lookahead=0, around=model, innovations=True)
    x, z = model.simulate(3, 2, seed=1)
    variance, noise = 0.05**2, 0.02**2
    share = variance / (variance + noise)
    assert guide.combiner.gain is not None
    with torch.no_grad():
        guide.combiner.heads.weight.zero_()
        guide.combiner.heads.bias.copy_(
            torch.tensor([0.0, 0.0, *2 * [math.log(math.expm1((1 - share) ** 0.5 - 1e-4))]])
        )
        guide.combiner.gain.weight.copy_(torch.eye(2) * share)
    first = z[:, 0]
    with pyro.condition(data={"z_1": first}):
        drawn = pyro.poutine.trace(guide).get_trace(x).nodes["z_2"]["fn"].base_dist
    centre = model.transition(first)[0]
    torch.testing.assert_close(drawn.mean, centre + share * (x[:, 1] - centre))
    torch.testing.assert_close(drawn.stddev, torch.full((3, 2), (share * noise) ** 0.5))
