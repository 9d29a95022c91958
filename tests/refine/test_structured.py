"""Guides whose sites depend on earlier draws, refined by residuals: closed forms, masks, and what stays tied."""

import math
from collections.abc import Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

from pyrogaps import GuideDensity, JointDensity, Refinement, elbo, refine
from pyrogaps.refine import own_family
from pyrogaps.refine.own import OwnFamily
from tests.references import anisotropic, assert_exact, draws_of

LINEAR = anisotropic(6, 2)
BRIEF = Refinement(num_steps=400)


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    """Double precision by default."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def split(x: Tensor) -> None:
    """The linear model in two dimensions, its latents as two scalar sites."""
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Normal(0.0, LINEAR.prior_scale[0]))
        b = pyro.sample("b", dist.Normal(0.0, LINEAR.prior_scale[1]))
        mean = torch.stack([a, b], -1) @ LINEAR.weight.T + LINEAR.bias
        pyro.sample("x", dist.Normal(mean, LINEAR.noise_scale).to_event(1), obs=x)


class TwoLevels(nn.Module):
    """q(a | x) q(b | a, x) with b's location `slope` * a + c(x); the slope is learned, or a constant."""

    def __init__(self, slope: float, *, learned: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 2), nn.Linear(6, 2)
        self.slope = nn.Parameter(torch.tensor(slope)) if learned else slope
        with torch.no_grad():
            for layer in (self.first, self.second):
                layer.weight.mul_(0.3)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            loc, raw = self.first(x).unbind(-1)
            a = pyro.sample("a", dist.Normal(loc, raw.exp()))
            loc, raw = self.second(x).unbind(-1)
            pyro.sample("b", dist.Normal(loc + self.slope * a, raw.exp()))


def family_of(model: Any, guide: Any, x: Any) -> OwnFamily:
    return own_family(GuideDensity(guide, None, JointDensity(model, x)))


def mean_field_gap(precision: Tensor) -> Tensor:
    """KL of the best factorised Gaussian from a Gaussian with this precision."""
    return 0.5 * (precision.diagonal().log().sum() - torch.logdet(precision)).detach()


def test_a_learned_slope_of_zero_is_no_mean_field() -> None:
    """The second site does not depend on the first yet; its family contains the exact posterior."""
    x, _ = draws_of(LINEAR, 3)
    guide = TwoLevels(0.0, learned=True)
    family = family_of(split, guide, x)
    assert family.kind == "structured" and family.freedom is not None and set(family.freedom.slopes) == {("b", "loc")}
    bound = elbo(split, refine(split, guide, x, settings=BRIEF, referee=False), x)
    assert_exact(bound.value, bound.mcse, LINEAR.log_evidence(x))
    assert float(mean_field_gap(LINEAR.precision)) > 4 * float(bound.mcse.max())


def test_a_constant_slope_stays() -> None:
    """With b = a + d the family is that of independent a and d, whose best is known."""
    x, _ = draws_of(LINEAR, 3)
    guide = TwoLevels(1.0, learned=False)
    family = family_of(split, guide, x)
    assert family.kind == "structured" and family.freedom is not None and not family.freedom.slopes
    bound = elbo(split, refine(split, guide, x, settings=BRIEF, referee=False), x, num_particles=4000)
    mixing = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    gap = mean_field_gap(mixing.T @ LINEAR.precision @ mixing)
    assert_exact(LINEAR.log_evidence(x) - bound.value, bound.mcse, gap)
    assert abs(float(gap - mean_field_gap(LINEAR.precision))) > 8 * float(bound.mcse.max())


class WithoutIntercept(TwoLevels):
    """b's location is a learned number times a, without an intercept; its scale is learned too."""

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            loc, raw = self.first(x).unbind(-1)
            a = pyro.sample("a", dist.Normal(loc, raw.exp()))
            pyro.sample("b", dist.Normal(self.slope * a, self.second(x)[:, 1].exp()))


def test_a_location_without_an_intercept_gets_none() -> None:
    """The best of the family by its closed-form ELBO: q = N(m, v) N(b; s a, w) against the exact posterior."""
    x, _ = draws_of(LINEAR, 3)
    guide = WithoutIntercept(0.4, learned=True)
    freedom = family_of(split, guide, x).freedom
    assert freedom is not None
    basis = freedom.slopes["b", "loc"].basis
    assert basis is not None and basis.shape == (1, 2) and float(basis[0, 0]) == 0.0
    bound = elbo(split, refine(split, guide, x, referee=False), x, num_particles=4000)
    mean, precision = LINEAR.posterior(x)[0].detach(), LINEAR.precision.detach()
    free = torch.tensor([[0.0, 0.0, 0.4, 0.0]] * 3, requires_grad=True)

    def divergence() -> Tensor:
        m, log_v, s, log_w = free.unbind(1)
        v, w = log_v.exp(), log_w.exp()
        off = torch.stack([m, s * m], 1) - mean
        covariance = torch.stack([torch.stack([v, s * v], 1), torch.stack([s * v, s**2 * v + w], 1)], 1)
        trace = torch.einsum("ij,nji->n", precision, covariance)
        square = torch.einsum("ni,ij,nj->n", off, precision, off)
        return 0.5 * (trace + square - 2 - torch.logdet(precision) - log_v - log_w)

    search = torch.optim.LBFGS([free], max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        search.zero_grad()
        loss = divergence().sum()
        loss.backward()
        return loss

    search.step(closure)
    assert_exact(LINEAR.log_evidence(x) - bound.value, bound.mcse, divergence())


NUM_STEPS, DRIFT, STATE, NOISE = 3, 0.9, 0.6, 0.5


def chain(x: Tensor, lengths: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = torch.zeros(len(x))
        for t in range(NUM_STEPS):
            with poutine.mask(mask=t < lengths):
                z = pyro.sample(f"z_{t}", dist.Normal(DRIFT * z + 0.2, STATE if t else 1.0))
                pyro.sample(f"x_{t}", dist.Normal(z, NOISE), obs=x[:, t])


class PackedGuide(nn.Module):
    """An LSTM over packed sequences, whose states and the previous draw give the next Normal."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.rnn, self.heads = nn.LSTM(1, 3, batch_first=True), nn.Linear(3, 2)
        self.slopes = nn.Parameter(torch.full((NUM_STEPS,), 0.1))

    def forward(self, x: Tensor, lengths: Tensor) -> None:
        packed = nn.utils.rnn.pack_padded_sequence(x[..., None], lengths, batch_first=True, enforce_sorted=False)
        states, _ = nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True, total_length=NUM_STEPS)
        loc, raw = self.heads(states).unbind(-1)
        with pyro.plate("data", len(x)):
            z = torch.zeros(len(x))
            for t in range(NUM_STEPS):
                with poutine.mask(mask=t < lengths):
                    z = pyro.sample(f"z_{t}", dist.Normal(loc[:, t] + self.slopes[t] * z, raw[:, t].exp()))


def exact_chain(x: Tensor, lengths: Tensor) -> Tensor:
    """log p of the first steps of each row, whose joint distribution is Gaussian."""
    values = []
    for row, length in zip(x, lengths.tolist(), strict=True):
        mean, covariance = torch.zeros(length), torch.zeros(length, length)
        for t in range(length):
            mean[t] = DRIFT * (mean[t - 1] if t else 0.0) + 0.2
            covariance[t, :t] = covariance[:t, t] = DRIFT * covariance[t - 1, :t] if t else 0.0
            covariance[t, t] = DRIFT**2 * covariance[t - 1, t - 1] + STATE**2 if t else 1.0
        noisy = dist.MultivariateNormal(mean, covariance + NOISE**2 * torch.eye(length))
        values.append(noisy.log_prob(row[:length]))
    return torch.stack(values)


def test_a_ragged_chain_with_a_packed_lstm_holds_the_posterior() -> None:
    """A chain of Normals with free slopes contains the smoothing posterior: L[q*] = log p(x), for every length."""
    torch.manual_seed(0)
    x, lengths = torch.randn(4, NUM_STEPS), torch.tensor([3, 1, 2, 3])
    guide = PackedGuide()
    family = family_of(chain, guide, (x, lengths))
    assert family.kind == "structured" and family.freedom is not None
    assert set(family.freedom.slopes) == {(f"z_{t}", "loc") for t in range(1, NUM_STEPS)}
    refined = refine(chain, guide, (x, lengths), settings=BRIEF, referee=False)
    bound = elbo(chain, refined, (x, lengths))
    assert_exact(bound.value, bound.mcse, exact_chain(x, lengths))
    assert bool(refined.converged.all())


@pytest.mark.usefixtures("brief_check")
def test_batches_change_nothing() -> None:
    x, _ = draws_of(LINEAR, 70)
    settings = Refinement(num_steps=5, num_selection=16)
    values = []
    for size in (64, 128):
        refined = refine(split, TwoLevels(0.3, learned=True), x, settings=settings, batch_size=size, referee=False)
        values.append(elbo(split, refined, x, num_particles=10).value)
    torch.testing.assert_close(values[0], values[1], rtol=1e-9, atol=1e-9)


def test_a_start_elsewhere() -> None:
    """At a Gaussian, locations and scales are those where earlier draws are at its means."""
    from pyrogaps.refine.families import Start
    from pyrogaps.run import Run
    from pyrogaps.streams import Chunk

    x, _ = draws_of(LINEAR, 3)
    family, chunk = family_of(split, TwoLevels(0.4, learned=True), x), Chunk(0, 3)
    start = Start(torch.tensor([[1.0, -2.0]]).expand(3, 2), torch.tensor([[0.3, 0.2]]).expand(3, 2), fitted=False)
    started = family.start_at(start, family.density.joint, chunk, Run(0, 64))
    assert started is not None
    points = torch.tensor([[1.0, -2.0], [1.3, -2.0], [1.0, -1.8]])[:, None].expand(3, 3, 2)
    log_q = started.at(chunk.indices).log_prob(points)
    a = dist.Normal(1.0, 0.3).log_prob(points[..., 0])
    expected = a + dist.Normal(-2.0 + 0.4 * (points[..., 0] - 1.0), 0.2).log_prob(points[..., 1])
    torch.testing.assert_close(log_q, expected)


def test_gradients_from_one_run_are_those_of_the_path() -> None:
    """Of log q as a function of the draws alone: the same as with a second run at fixed draws."""
    from pyrogaps.run import Run
    from pyrogaps.streams import Chunk

    x, _ = draws_of(LINEAR, 3)
    family, chunk = family_of(split, TwoLevels(0.4, learned=True), x), Chunk(0, 3)
    guide = family.start(family.density.joint, chunk, Run(0, 64))
    with torch.no_grad():
        for parameter in guide.parameters:
            parameter.add_(0.2 * torch.randn_like(parameter))
    local = guide.at(chunk.indices)
    torch.manual_seed(3)
    z, log_q = local.sample_path(6, antithetic=True)  # type: ignore[attr-defined]
    middle = 0.5 * (z[:3] + z[3:])[..., 0]  # the first site's draws are mirrored at its mean
    torch.testing.assert_close(middle, middle[:1].expand_as(middle))
    one = torch.autograd.grad(log_q.sum(), guide.parameters)
    torch.manual_seed(3)
    z, own = local.sample(6, antithetic=True)
    torch.testing.assert_close(own, log_q)
    point = z.detach().requires_grad_()
    (score,) = torch.autograd.grad(local.log_prob(point).sum(), point)
    two = torch.autograd.grad((score * z).sum(), guide.parameters)
    torch.testing.assert_close(one, two)


class Vectors(nn.Module):
    """Two vector sites; the second's location is `coupled` with the first."""

    def __init__(self, coupling: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 4), nn.Linear(6, 3)
        self.full = nn.Linear(2, 2, bias=False)
        self.down, self.up = nn.Linear(2, 1, bias=False), nn.Linear(1, 2, bias=False)
        self.diagonal, self.number = nn.Parameter(torch.tensor([0.3, 0.2])), nn.Parameter(torch.tensor(0.3))
        self.coupling = coupling

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            loc, raw = self.first(x).chunk(2, -1)
            a = pyro.sample("a", dist.Normal(loc, raw.exp()).to_event(1))
            both = self.second(x)
            coupled = {
                "full": lambda: self.full(a),
                "bottleneck": lambda: self.up(self.down(a)),
                "diagonal": lambda: self.diagonal * a,
                "number": lambda: self.number * a,
            }[self.coupling]()
            scale = both[:, 2:].exp() * torch.tensor([1.0, 2.0])
            pyro.sample("b", dist.Normal(both[:, :2] + coupled, scale).to_event(1))


def vectors(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        b = pyro.sample("b", dist.Normal(a, 1.0).to_event(1))
        pyro.sample("x", dist.Normal(torch.cat([a, b, a * b], -1), 1.0).to_event(1), obs=x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("coupling", "number", "rank"),
    [("full", 4, None), ("diagonal", 2, None), ("bottleneck", 4, 2 + 3), ("number", 2, 2 + 1)],
)
def test_slopes_are_free_as_far_as_the_weights_choose_them(
    coupling: str, number: int, rank: int | None, dtype: torch.dtype
) -> None:
    torch.set_default_dtype(dtype)
    x = torch.randn(9, 6)
    freedom = family_of(vectors, Vectors(coupling), x).freedom
    assert freedom is not None
    slopes = freedom.slopes["b", "loc"]
    assert len(slopes.elements) == number
    if number == 2:
        assert torch.equal(slopes.elements, slopes.coordinates)
    assert (None if slopes.basis is None else len(slopes.basis)) == rank
    if coupling == "number":  # both slopes are one number
        assert slopes.basis is not None
        torch.testing.assert_close(slopes.basis[:, 2], slopes.basis[:, 3], rtol=1e-3, atol=1e-4)
    # One number for both scales of b, in a fixed ratio; each scale of a has its own.
    assert freedom.labels["b", "scale"].tolist() == [0, 0] and freedom.labels["a", "scale"].tolist() == [0, 1]


class Isotropic(nn.Module):
    """One scale per datapoint for all latent dimensions."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.kind = nn.Linear(6, 3), kind
        self.scale = nn.Parameter(torch.tensor(-1.0))

    def forward(self, x: Tensor) -> None:
        out = self.net(x)
        scale = out[:, 2:].exp() if self.kind == "network" else self.scale.exp()
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(out[:, :2], scale).to_event(1))


@pytest.mark.parametrize("kind", ["network", "number"])
def test_a_tied_scale_stays_tied(kind: str) -> None:
    """The best isotropic Gaussian has the variance d / tr(H), with H the posterior's precision."""
    x, _ = draws_of(LINEAR, 3)
    guide = Isotropic(kind)
    family = family_of(LINEAR, guide, x)
    assert family.kind == "freed"
    bound = elbo(LINEAR, refine(LINEAR, guide, x, settings=BRIEF, referee=False), x, num_particles=4000)
    precision = LINEAR.precision.detach()
    gap = 0.5 * (2 * math.log(float(precision.trace()) / 2) - torch.logdet(precision))
    assert_exact(LINEAR.log_evidence(x) - bound.value, bound.mcse, gap)
    assert float(gap - mean_field_gap(precision)) > 8 * float(bound.mcse.max())


def test_equal_scales_of_their_own_are_not_tied() -> None:
    """A vector of learned scales that starts at equal values."""
    x, _ = draws_of(LINEAR, 3)

    class Equal(Isotropic):
        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(self.net(x)[:, :2], self.scales.exp()).to_event(1))

    guide = Equal("number")
    guide.scales = nn.Parameter(torch.zeros(2))
    freedom = family_of(LINEAR, guide, x).freedom
    assert freedom is not None and freedom.tied(("z", "scale")) is None


class Runs(poutine.messenger.Messenger):
    """Counts how often a guide draws `z`."""

    number = 0

    def _pyro_sample(self, message: Any) -> None:
        self.number += message["name"] == "z"


def test_a_guide_is_run_again_only_where_ties_may_be() -> None:
    """Of a network's own outputs one run tells all apart; a tie takes a few runs with other weights."""
    x, _ = draws_of(LINEAR, 3)

    class Whole(Isotropic):
        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(self.net(x)[:, :2], self.net(x)[:, 1:].exp()).to_event(1))

    numbers = []
    for guide in (Whole("network"), Isotropic("network")):
        density = GuideDensity(guide, None, JointDensity(LINEAR, x))
        with Runs() as runs:
            freedom = own_family(density).freedom
        assert freedom is not None
        numbers.append(runs.number)
        assert (freedom.tied(("z", "scale")) is None) == isinstance(guide, Whole)
    assert numbers == [1, 6]


@pytest.mark.parametrize("levels", [False, True])
def test_reading_what_is_free_leaves_the_generator_alone(levels: bool) -> None:
    x, _ = draws_of(LINEAR, 3)
    guide = TwoLevels(0.4, learned=True) if levels else Isotropic("number")
    density = GuideDensity(guide, None, JointDensity(split if levels else LINEAR, x))
    before = torch.get_rng_state()
    assert own_family(density).freedom is not None
    assert torch.equal(torch.get_rng_state(), before)


class FullCovariance(nn.Module):
    """A multivariate Normal whose factor is diagonal, one number that is learned or a constant."""

    def __init__(self, *, learned: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, scale = nn.Linear(6, 2), torch.tensor(-1.0)
        self.scale = nn.Parameter(scale) if learned else scale

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(self.net(x), scale_tril=self.scale.exp() * torch.eye(2)))


@pytest.mark.parametrize("learned", [True, False])
def test_the_family_of_a_full_covariance_is_the_distributions(learned: bool) -> None:
    """Correlations are free though the guide holds them at 0, unless the whole factor is a constant."""
    x, _ = draws_of(LINEAR, 3)
    guide = FullCovariance(learned=learned)
    bound = elbo(LINEAR, refine(LINEAR, guide, x, settings=BRIEF, referee=False), x, num_particles=4000)
    precision, variance = LINEAR.precision.detach(), math.exp(-2.0)
    held = 0.5 * (variance * float(precision.trace()) - 2 - 2 * math.log(variance) - torch.logdet(precision))
    gap, other = (torch.zeros(()), mean_field_gap(precision)) if learned else (held, torch.zeros(()))
    assert_exact(LINEAR.log_evidence(x) - bound.value, bound.mcse, gap)
    assert abs(float(gap - other)) > 4 * float(bound.mcse.max())


def test_normals_behind_a_sigmoid_are_those_of_auto_normal() -> None:
    weight = torch.randn(3, 8)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            p = pyro.sample("p", dist.Beta(torch.full((3,), 2.0), 3.0).to_event(1))
            pyro.sample("x", dist.Normal(p @ weight, 0.5).to_event(1), obs=x)

    class Guide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(8, 6)

        def forward(self, x: Tensor) -> None:
            loc, raw = self.net(x).chunk(2, -1)
            sigmoid = [dist.transforms.SigmoidTransform()]
            with pyro.plate("data", len(x)):
                pyro.sample("p", dist.TransformedDistribution(dist.Normal(loc, raw.exp()), sigmoid).to_event(1))

    x = torch.rand(4, 3) @ weight + 0.5 * torch.randn(4, 8)
    guide = Guide()
    assert family_of(model, guide, x).kind == "freed"
    own, theirs = (
        elbo(model, refine(model, family, x, referee=False), x, num_particles=4000) for family in (guide, AutoNormal)
    )
    difference, error = own.value - theirs.value, torch.hypot(own.mcse, theirs.mcse)
    assert float(error.max()) < 0.02 and float((difference.abs() / error).max()) < 4
