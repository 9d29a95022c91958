"""Natural gradients against closed forms and quadrature; what they apply to; and Adam where they do not converge."""

from importlib import import_module
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroParam
from torch import Tensor, nn

from pyrogaps import Problem, Refinement, elbo, refine
from pyrogaps.capture.slots import Slots
from pyrogaps.gaussians import Gaussian
from pyrogaps.guides.flows import AutoLocalFlow
from pyrogaps.guides.local import AutoLocal, AutoLocalMultivariateNormal
from pyrogaps.refine import Refiner, own_family
from pyrogaps.refine.gaussian_form import GaussianForm, gaussian_form
from pyrogaps.refine.natural import NaturalGradient, fitted_to
from pyrogaps.refine.unseen import Draws, reaching, unseen
from pyrogaps.run import Run
from pyrogaps.streams import Chunk, seeded
from tests.references import (
    WrongEncoder,
    WrongFullEncoder,
    anisotropic,
    assert_exact,
    counts,
    draws_of,
    gamma_poisson,
    parabola,
)

LINEAR = anisotropic(8, 3)
REFINEMENT = import_module("pyrogaps.refine.natural_refinement")


def form_of(model: Any, guide: Any, x: Tensor) -> GaussianForm | None:
    """The form of a guide's, or a family's, refinable guides."""
    chunk, run = Chunk(0, len(x)), Run()
    family = guide if isinstance(guide, type) else None
    problem = Problem.of(model, None if family else guide, x)
    with seeded(0, "form"):
        if family is None:
            refinable: Any = own_family(problem.guide_density()).start(problem.joint, chunk, run)
        else:
            refinable = import_module("pyrogaps.refine.family_guide").FamilyGuide(family, problem.joint, chunk, run)
        return gaussian_form(refinable, problem.joint, chunk)


class ConstantScale(nn.Module):
    """A guide whose location is learned and whose scale is a constant."""

    def __init__(self, scale: float = 0.3) -> None:
        super().__init__()
        self.encoder, self.scale = nn.Linear(8, 3).double(), scale

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.encoder(x), torch.tensor(self.scale).double()).to_event(1))


class OneScale(AutoLocal):
    """One scale for all coordinates of a datapoint: no Gaussian with other scales can be set."""

    def setup_posterior(self, loc: Tensor) -> None:
        self.shared = PyroParam(torch.full_like(loc[..., :1], 0.1), dist.constraints.softplus_positive, 1)

    def get_posterior(self) -> Any:
        return dist.Normal(self.loc, self.shared.expand(self.loc.shape)).to_event(1)


def split(x: Tensor) -> None:
    """The linear model with its latents as a scalar and a pair."""
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Normal(torch.zeros((), dtype=x.dtype), LINEAR.prior_scale[0]))
        b = pyro.sample("b", dist.Normal(torch.zeros(2, dtype=x.dtype), LINEAR.prior_scale[1:]).to_event(1))
        mean = torch.cat([a[..., None], b], -1) @ LINEAR.weight.T + LINEAR.bias
        pyro.sample("x", dist.Normal(mean, LINEAR.noise_scale).to_event(1), obs=x)


class SplitGuide(nn.Module):
    """A Normal for the scalar, a full covariance for the pair."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(8, 3).double()
        self.tril = nn.Parameter(0.5 * torch.eye(2).double())

    def forward(self, x: Tensor) -> None:
        loc = self.encoder(x)
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.Normal(loc[:, 0], self.tril[0, 0].abs().expand(len(x))))
            tril = self.tril.tril().expand(len(x), 2, 2)
            pyro.sample("b", dist.MultivariateNormal(loc[:, 1:], scale_tril=tril))


def test_what_is_gaussian() -> None:
    x, _ = draws_of(LINEAR, 3)
    for guide in (AutoNormal, WrongEncoder(LINEAR), ConstantScale()):
        form = form_of(LINEAR, guide, x)
        assert form is not None and form.blocks is None
    for guide in (AutoLocalMultivariateNormal, WrongFullEncoder(LINEAR)):
        form = form_of(LINEAR, guide, x)
        assert form is not None and form.blocks is not None and bool(form.blocks.all())
    form = form_of(split, SplitGuide(), x)
    assert form is not None and form.blocks is not None
    assert form.blocks.tolist() == [[True, False, False], [False, True, True], [False, True, True]]
    assert form_of(gamma_poisson, AutoNormal, counts().double()) is not None
    assert form_of(LINEAR, AutoLocalFlow, x) is None
    assert form_of(LINEAR, OneScale, x) is None


def test_a_form_leaves_the_guide_as_it_is() -> None:
    x, _ = draws_of(LINEAR, 3)
    form = form_of(LINEAR, WrongFullEncoder(LINEAR), x)
    assert form is not None
    before, parameters = form.read(), [parameter.clone() for parameter in form.refinable.parameters]
    other = Gaussian(before.loc + 1, 2 * before.scale)
    form.write(other, torch.tensor([True, False, True]))
    after = form.read()
    torch.testing.assert_close(after.loc[::2], other.loc[::2])
    torch.testing.assert_close(after.scale[::2], other.scale[::2])
    assert all(torch.equal(new[1], old[1]) for new, old in zip(form.refinable.parameters, parameters, strict=True))


def skewed(z: Tensor) -> Tensor:
    """Gradient of log p = -sum(exp(A z) - A z), and of its Hessian's mean under Normals the closed form below."""
    return -(z @ SLOPES.T).exp().sub(1) @ SLOPES


SLOPES = torch.tensor([[1.0, 0.4, 0.0], [0.0, 0.8, -0.3], [0.5, 0.0, 1.2]], dtype=torch.float64)


def mean_curvature(q: Gaussian) -> Tensor:
    """E_q[A^T diag(exp(A z)) A], `(M, d, d)`: the mean of an exponential of a Normal."""
    factor = q.factor()
    spread = (SLOPES @ factor).square().sum(-1)
    return torch.einsum("ki,bk,kj->bij", SLOPES, (q.loc @ SLOPES.T + 0.5 * spread).exp(), SLOPES)


@pytest.mark.parametrize("kind", ["diagonal", "full"])
def test_a_step_is_unbiased(kind: str) -> None:
    """Whatever the control variate: a step's precision is on average that of E[-Hessian], its mean a Newton step."""
    generator = torch.Generator().manual_seed(0)
    loc = 0.3 * torch.randn(2000, 3, generator=generator, dtype=torch.float64)[:1].expand(2000, 3)
    wrong = torch.tensor([[1.0, 0.0, 0.0], [0.6, 0.8, 0.0], [-0.3, 0.2, 0.5]], dtype=torch.float64).expand(2000, 3, 3)
    free = torch.ones(3, dtype=torch.bool)
    blocks = None if kind == "diagonal" else torch.ones(3, 3, dtype=torch.bool)
    form = GaussianForm(None, None, Chunk(0, 2000), blocks, free, free)  # type: ignore[arg-type]
    anchor = Gaussian(loc, wrong)
    q = fitted_to(form, Gaussian(loc, wrong if blocks is not None else wrong.diagonal(dim1=-2, dim2=-1)), anchor)
    q = Gaussian(q.loc, 0.7 * q.scale)  # the control variate's mean holds for the current q
    natural, rate = NaturalGradient.about(form, q, anchor), torch.full((2000,), 1e-4, dtype=torch.float64)
    noise = torch.randn(8, 2000, 3, generator=generator, dtype=torch.float64)
    after, *_ = natural.step(q, Draws.standard(noise), skewed, rate)
    factor = q.factor()
    change = torch.cholesky_inverse(after.factor()) - torch.cholesky_inverse(factor)
    whitened = (factor.mT @ change @ factor) / 1e-4
    expected = factor.mT @ mean_curvature(q) @ factor - torch.eye(3, dtype=torch.float64)
    if kind == "diagonal":
        whitened, expected = (torch.diag_embed(part.diagonal(dim1=-2, dim2=-1)) for part in (whitened, expected))
    error = whitened.std(0) / 2000**0.5
    assert float(error.max()) < 0.05
    # The step is of first order in the rate: W^2 of a rate of 1e-4 is far below the error.
    assert bool(((whitened.mean(0) - expected[0]).abs() <= 4 * error + 1e-3).all())


def test_precisions_stay_positive() -> None:
    """On a target without a maximum, at the fastest rate: no step takes more than half of a precision."""
    free, loc = torch.ones(3, dtype=torch.bool), torch.ones(5, 3, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for blocks in (None, torch.ones(3, 3, dtype=torch.bool)):
        form = GaussianForm(None, None, Chunk(0, 5), blocks, free, free)  # type: ignore[arg-type]
        q = Gaussian(loc, torch.ones_like(loc) if blocks is None else torch.diag_embed(torch.ones_like(loc)))
        natural = NaturalGradient.about(form, q, q)
        noise = torch.randn(8, 5, 3, generator=generator, dtype=torch.float64)
        after, *_ = natural.step(q, Draws.standard(noise), lambda z: 100 * z, torch.full((5,), 0.5).double())
        values = torch.linalg.eigvalsh(torch.cholesky_inverse(after.factor()))
        assert float(values.min()) > 0.5 - 1e-9


def test_a_gradient_that_is_not_finite_moves_nothing() -> None:
    free, loc = torch.ones(3, dtype=torch.bool), torch.ones(2, 3, dtype=torch.float64)
    form = GaussianForm(None, None, Chunk(0, 2), None, free, free)  # type: ignore[arg-type]
    q = Gaussian(loc, torch.ones_like(loc))
    broken = torch.tensor([1.0, torch.nan], dtype=torch.float64)[:, None]
    after, *_ = NaturalGradient.about(form, q, q).step(
        q,
        Draws.standard(torch.ones(4, 2, 3, dtype=torch.float64)),
        lambda z: -3 * z * broken,
        torch.full((2,), 0.5).double(),
    )
    assert not torch.equal(after.loc[0], q.loc[0])
    assert torch.equal(after.loc[1], q.loc[1]) and torch.equal(after.scale[1], q.scale[1])


def test_a_constant_scale_stays() -> None:
    """Only the mean moves, to that of the posterior: what it is off by costs far less than the tolerance."""
    x, _ = draws_of(LINEAR, 4)
    refined = refine(LINEAR, ConstantScale(), x, referee=False)
    (distribution,) = refined.at(torch.arange(4)).distributions.values()  # type: ignore[attr-defined]
    assert torch.equal(distribution.stddev, torch.full_like(distribution.stddev, 0.3).float().double())
    mean, covariance = (part.detach() for part in LINEAR.posterior(x))
    whitened = torch.linalg.solve(torch.linalg.cholesky(covariance), (distribution.mean - mean)[..., None])
    assert float(0.5 * whitened.square().sum((-1, -2)).max()) < Refinement().tolerance / 4


def test_blocks() -> None:
    """A full covariance for two coordinates of three: the best has the posterior's precision there."""
    x, _ = draws_of(LINEAR, 4)
    refined = refine(split, SplitGuide(), x, referee=False)
    covariance = LINEAR.posterior(x)[1].detach()
    precision = torch.linalg.inv(covariance)
    bound = elbo(split, refined, x, num_particles=4000)
    blocks = precision.clone()
    blocks[..., 0, 1:] = blocks[..., 1:, 0] = 0
    gap = 0.5 * (torch.logdet(blocks) - torch.logdet(precision))
    assert_exact(LINEAR.log_evidence(x) - bound.value, bound.mcse, gap)


def test_gradients_are_few() -> None:
    """Curvature, a first round and its check, and no more, where the posterior is Gaussian."""
    x, _ = draws_of(LINEAR, 64)
    problem, settings = Problem.of(LINEAR, WrongEncoder(LINEAR), x), Refinement()
    refined = refine(problem, settings=settings, referee=False)
    steps = settings.num_natural_steps + settings.num_natural_steps // 3
    further = problem.evaluator.num_gradients - 64 * (3 * 16 + 16 * steps)
    assert 0 <= further <= 64 * 3 * 16  # of the curvature, where three passes had not settled
    assert refined.converged.all()


@pytest.mark.parametrize(("decades", "dtype"), [(3.0, torch.float32), (3.0, torch.float64), (6.0, torch.float64)])
def test_from_the_prior_to_a_narrow_posterior(decades: float, dtype: torch.dtype) -> None:
    """Up to 10,000 times as narrow as the prior and as far from its mean, with no guide to start at."""
    model, double = (anisotropic(12, 3, decades=decades, dtype=each) for each in (dtype, torch.float64))
    simulated = Problem.without_guide(model, None, torch.zeros(128, 12, dtype=dtype), None).simulated(0)
    chunk = Chunk(0, 128)
    refined, progress = Refiner(AutoNormal, Refinement()).fit(simulated.problem, chunk, Run())
    assert progress.converged.all()
    with torch.no_grad():
        z, log_q = refined.at(chunk.indices).sample(500)
        values = (simulated.problem.evaluator(z, chunk.indices) - log_q).double()
    gap = double.log_evidence(simulated.data.double()) - values.mean(0)
    assert_exact(gap, values.std(0) / 500**0.5, double.approximation_gap(), dtype)


def test_adam_where_rounds_do_not_converge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some datapoints of two blocks: they end where the others do, and the others are as they were."""
    x, _ = draws_of(LINEAR, 70)
    guide, settings = WrongEncoder(LINEAR), Refinement(num_steps=400)
    before = refine(LINEAR, guide, x, settings=settings, batch_size=128, referee=False)
    left = torch.tensor([3, 40, 66])
    lasting = REFINEMENT.NaturalRefinement._lasting

    def unconverged(self: Any, *args: Any) -> Any:
        before, ends = lasting(self, *args)
        ends.converged[left] = False
        ends.gaussian.loc[left] += 0.5
        return before, ends

    monkeypatch.setattr(REFINEMENT.NaturalRefinement, "_lasting", unconverged)
    after = refine(LINEAR, guide, x, settings=settings, batch_size=128, referee=False)
    others = torch.ones(70, dtype=torch.bool)
    others[left] = False
    for old, new in zip(before.parts[0].parameters, after.parts[0].parameters, strict=True):
        assert torch.equal(old[others], new[others])
        assert not torch.equal(old[left], new[left])
    bound = elbo(LINEAR, after, x, num_particles=2000)
    assert_exact(LINEAR.log_evidence(x) - bound.value, bound.mcse, LINEAR.approximation_gap())
    assert after.converged.all()


def test_a_refinement_of_simulated_conditions_stays_with_adam() -> None:
    """Without a problem there is no curvature: the refiner itself takes the number of Adam's steps that it is given."""
    x, _ = draws_of(LINEAR, 4)
    problem = Problem.of(LINEAR, WrongEncoder(LINEAR), x)
    with seeded(0, "Adam"):
        Refiner(own_family(problem.guide_density()), Refinement(num_steps=20))(problem.evaluator, Chunk(0, 4), Run())
    assert problem.evaluator.num_gradients == 4 * 8 * (20 + 50)


def test_other_modes_are_left_to_adam_or_other_starts() -> None:
    """A curvature that was cut: never below the guide itself."""
    x = torch.tensor([2.0, 4.0], dtype=torch.float64)

    def guide(x: Tensor) -> None:
        scale = pyro.param("scale", torch.tensor(0.3).double(), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.9 * x.sqrt(), scale.expand(len(x))))

    guide(x)
    refined = refine(parabola, guide, x, referee=False)
    before, after = elbo(parabola, guide, x), elbo(parabola, refined, x, seed=1)
    assert bool((after.value - before.value > -4 * torch.hypot(before.mcse, after.mcse)).all())


def cliff(x: Tensor) -> None:
    """One rate of a Gamma of shape 0.1 for a count: in its logarithm, log p(x, z) is flat, then falls exponentially."""
    concentration = torch.tensor(0.1, dtype=torch.float64)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Gamma(concentration, concentration))
        pyro.sample("x", dist.Poisson(z), obs=x)


class Narrow(nn.Module):
    """A LogNormal that is far too narrow."""

    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.tensor(-2.4, dtype=torch.float64))
        self.log_scale = nn.Parameter(torch.tensor(0.5, dtype=torch.float64).log())

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.LogNormal(self.loc.expand(len(x)), self.log_scale.exp().expand(len(x))))


A, B = 0.1, 1.1  # of the posterior of `cliff` after a count of 0, a Gamma


def cliff_elbo(loc: Tensor, scale: Tensor) -> Tensor:
    """The ELBO of LogNormals for a count of 0, in closed form."""
    mass = (loc + 0.5 * scale.square()).exp()
    constant = A * torch.tensor(A).double().log() - torch.lgamma(torch.tensor(A).double())
    return constant + A * loc - B * mass + scale.log() + 0.5 * (1 + torch.tensor(2 * torch.pi).double().log())


def test_refinement_at_a_cliff() -> None:
    """Ends are near the best LogNormal, which plain draws do not see; and they are not called converged for nothing."""
    x = torch.zeros(16, dtype=torch.float64)
    refined = refine(cliff, Narrow(), x, referee=False)
    (distribution,) = refined.at(torch.arange(16)).distributions.values()  # type: ignore[attr-defined]
    ends = cliff_elbo(distribution.loc.detach(), distribution.scale.detach())
    scale = torch.tensor(A).double().rsqrt()
    best = cliff_elbo((torch.tensor(A / B).double()).log() - 0.5 * scale.square(), scale)
    assert float((best - ends).max()) < 0.2
    assert float((best - ends).mean()) < 0.08
    assert (refined.converged <= (best - ends < 0.1)).all()


def test_what_draws_do_not_see() -> None:
    """At a cliff it is the tail of an exponential moment, to a factor of 2; of a Gaussian it is nothing."""
    x = torch.zeros(3, dtype=torch.float64)
    problem, chunk = Problem.of(cliff, Narrow(), x), Chunk(0, 3)
    slots = Slots(problem.evaluator, chunk)
    loc, scale = torch.tensor([-12.0, -20.0, -5.0]).double(), torch.tensor([4.0, 2.0, 4.0]).double()
    found = unseen(slots, Gaussian(loc[:, None], scale[:, None]), torch.arange(3))
    # E[exp(m + s e); e > 3.5] = exp(m + s^2 / 2) P(e > 3.5 - s).
    tail = B * (loc + 0.5 * scale.square()).exp() * torch.special.ndtr(scale - 3.5)
    assert found.steep[:, 0].tolist() == [True, False, True]
    assert 0.5 < float(found.nats[0] / tail[0]) < 2
    assert float(found.nats[1]) == 0 and float(tail[1]) < 1e-6
    assert float(found.nats[2]) > 0.5 * float(tail[2])
    observed, _ = draws_of(LINEAR, 3)
    linear = Problem.of(LINEAR, WrongEncoder(LINEAR), observed)
    mean, scale = (part.detach() for part in LINEAR.mean_field_optimum(observed))
    posterior = Gaussian(mean, scale.expand(3, -1))
    assert not unseen(Slots(linear.evaluator, chunk), posterior, torch.arange(3)).nats.any()


def test_draws_that_reach_have_the_moments_of_standard_noise() -> None:
    """Weighted, in every coordinate, also beyond three standard deviations; the others are as they were."""
    steep = torch.tensor([[True, False, True], [False, False, False]])
    streams = [Run().stream(name).noise(Chunk(0, 2), dtype=torch.float64, device=torch.device("cpu")) for name in "ab"]
    noise, weights, _ = reaching(*streams, 100_000, torch.arange(2), steep)
    assert float(weights.max()) <= 2 and (weights[:, 1] == 1).all()
    for values, exact in (
        (torch.ones_like(noise), 1.0),
        (noise, 0.0),
        (noise.square(), 1.0),
        (noise.pow(4), 3.0),
        ((noise > 3.5).double(), 2.3263e-4),
    ):
        products = values * weights[..., None]
        error = products.std(0) / 100_000**0.5
        assert ((products.mean(0) - exact).abs() <= 4 * error + 1e-12).all()
    assert int((noise[:, 0, 0] > 3.5).sum()) > 1000  # of a standard normal 23
