"""Kalman's recursions and the gaps against a table and against dense algebra of the joint Normal."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

import pyrogaps
from pyrogaps.errors import InputError
from pyrogaps.models.state_space import LinearGaussianStateSpace

SIZES = [(1, 1), (2, 3), (3, 2)]
# By the closed forms, checked apart from this code: F, Q, T, gaps of lookahead 0 to 3, H(x), gap of the local filter.
TABLE = [
    (1.0, 1.0, 2, (0.125, 0.0, 0.0, 0.0), 3.6425960226, 0.1384282243),
    (1.0, 1.0, 10, (1.4199019223, 0.1858746628, 0.0237025665, 0.0029527735), 18.8397500179, 1.7042605297),
    (0.9, 0.5, 5, (0.5456262521, 0.0954755501, 0.0147926842, 0.0017307635), 8.7115450456, 0.6483685469),
]


@pytest.fixture(autouse=True)
def double(clean_state: None) -> None:
    """`clean_state` restores the default dtype."""
    torch.set_default_dtype(torch.float64)


def random_model(latent_dim: int, data_dim: int, seed: int = 0) -> LinearGaussianStateSpace:
    """Nothing in it is symmetric that need not be, nor of unit scale."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def covariance(size: int, scale: float) -> Tensor:
        root = normal(size, size)
        return scale * (root @ root.T + 0.3 * torch.eye(size))

    F, H = 0.7 * normal(latent_dim, latent_dim), normal(data_dim, latent_dim)
    return LinearGaussianStateSpace(
        F, covariance(latent_dim, 0.5), H, covariance(data_dim, 0.8), covariance(latent_dim, 1.5)
    )


@dataclass(frozen=True)
class Dense:
    """The joint Normal of the vector (z_1 .. z_T, x_1 .. x_T), written out."""

    model: LinearGaussianStateSpace
    steps: int

    @property
    def covariance(self) -> Tensor:
        m, steps = self.model, self.steps
        chain = torch.eye(steps * m.latent_dim) - torch.kron(torch.eye(steps).roll(1, 0).tril(-1), m.transition)
        noise = torch.block_diag(m.initial_covariance, *[m.transition_covariance] * (steps - 1))
        z = torch.linalg.inv(chain) @ noise @ torch.linalg.inv(chain).T
        H, V = torch.kron(torch.eye(steps), m.emission), torch.kron(torch.eye(steps), m.emission_covariance)
        return torch.cat([torch.cat([z, z @ H.T], 1), torch.cat([H @ z, H @ z @ H.T + V], 1)])

    def z(self, t: int) -> list[int]:
        """Where z_t lies, t from 0."""
        return list(range(t * self.model.latent_dim, (t + 1) * self.model.latent_dim))

    def x(self, start: int, stop: int) -> list[int]:
        """Where x_start to x_(stop-1) lie, steps from 0."""
        first, D = self.steps * self.model.latent_dim, self.model.data_dim
        return list(range(first + start * D, first + stop * D))

    def regress(self, of: list[int], on: list[int]) -> tuple[Tensor, Tensor]:
        """Coefficients and covariance of some elements given others."""
        joint = self.covariance
        across = joint[of][:, on]
        coefficients = torch.linalg.solve(joint[on][:, on], across.T).T if on else across
        return coefficients, joint[of][:, of] - coefficients @ across.T

    def factor(self, t: int) -> tuple[Tensor, Tensor]:
        """p(z_t | z_{t-1}, x): coefficients of all x, and covariance."""
        before = self.z(t - 1) if t else []
        coefficients, covariance = self.regress(self.z(t), before + self.x(0, self.steps))
        return coefficients[:, len(before) :], covariance

    def gap(self, lookahead: int) -> Tensor:
        """tr(R^-1 B Cov(x_future | x_seen) B') / 2 of every factor, B the coefficients of x_future in its mean."""
        total = torch.zeros(())
        for t in range(self.steps):
            seen = min(t + lookahead + 1, self.steps)
            coefficients, covariance = self.factor(t)
            B = coefficients[:, seen * self.model.data_dim :]
            future = self.regress(self.x(seen, self.steps), self.x(0, seen))[1]
            total = total + torch.linalg.solve(covariance, B @ future @ B.T).trace() / 2
        return total

    def expected_elbo(self, gains: Tensor, offsets: Tensor, roots: Tensor) -> Tensor:
        """E over x of the ELBO of prod_t N(K_t x + G_t z_{t-1}, L_t L_t'): `offsets` K `(T, d, T D)`, G and L."""
        steps, d = self.steps, self.model.latent_dim
        chain = torch.eye(steps * d)
        if steps > 1:
            below = torch.block_diag(*gains[1:])
            chain = chain - torch.nn.functional.pad(below, (0, d, d, 0))
        of_x = torch.linalg.solve(chain, offsets.flatten(0, 1))
        of_noise = torch.linalg.solve(chain, torch.block_diag(*roots))
        joint = self.covariance
        x = joint[steps * d :, steps * d :]
        drawn = torch.cat([of_x, torch.eye(len(x))])
        moments = drawn @ x @ drawn.T + torch.block_diag(of_noise @ of_noise.T, torch.zeros_like(x))
        energy = torch.linalg.solve(joint, moments).trace() + torch.logdet(2 * math.pi * joint)
        log_volume = roots.diagonal(dim1=-2, dim2=-1).abs().log().sum()
        return log_volume + steps * d * (1 + math.log(2 * math.pi)) / 2 - energy / 2


def linear_guide(model: LinearGaussianStateSpace, steps: int, lookahead: float, diagonal: bool) -> tuple[Tensor, ...]:
    """The optimal guide as `expected_elbo` takes it: its offsets are linear in x, so unit vectors tell them."""
    units = torch.eye(steps * model.data_dim).reshape(-1, steps, model.data_dim)
    offsets, gains, roots = model.optimal_guide(lookahead, diagonal=diagonal).factors(units)
    return gains, offsets.permute(1, 2, 0), roots


@pytest.mark.parametrize(("F", "Q", "steps", "gaps", "entropy", "local"), TABLE)
def test_table(F: float, Q: float, steps: int, gaps: tuple[float, ...], entropy: float, local: float) -> None:
    model = LinearGaussianStateSpace(F, Q, 1, 1, 1)
    for lookahead, gap in enumerate(gaps):
        assert float(model.conditioning_gap(steps, lookahead)) == pytest.approx(gap, abs=1e-8)
    assert float(model.entropy(steps)) == pytest.approx(entropy, abs=1e-8)
    assert float(model.local_filter_gap(steps)) == pytest.approx(local, abs=1e-8)
    assert abs(float(model.diagonal_gap(steps))) < 1e-12


def test_it_takes_more_than_a_steady_state_to_close_the_gap() -> None:
    def gap(Q: float, P: float, V: float = 1) -> float:
        return float(LinearGaussianStateSpace(1, Q, 1, V, P).conditioning_gap(5))

    assert gap(1, 1) == pytest.approx(0.604, abs=5e-4)
    assert gap(1e-9, 1) == pytest.approx(1, abs=1e-6)  # all of the future tells of z_1
    assert gap(1e-9, 1e-9) == pytest.approx(0, abs=1e-6)
    assert gap(1, 1, V=1e-9) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("steps", range(1, 7))
def test_evidence_and_moments_match_the_joint_normal(sizes: tuple[int, int], steps: int) -> None:
    model, d = random_model(*sizes, seed=steps), sizes[0]
    dense = Dense(model, steps)
    x, _ = model.simulate(4, steps, seed=3)
    marginal = MultivariateNormal(torch.zeros(steps * sizes[1]), dense.covariance[steps * d :, steps * d :])
    torch.testing.assert_close(model.log_evidence(x), marginal.log_prob(x.flatten(1)))
    torch.testing.assert_close(model.entropy(steps), marginal.entropy())
    filtered, (means, covariances) = model.filtered(x), model.smoothed(x)
    for t in range(steps):
        for mean, covariance, seen in (
            (filtered.predicted_mean, filtered.predicted_covariance, t),
            (filtered.mean, filtered.covariance, t + 1),
            (means, covariances, steps),
        ):
            coefficients, exact = dense.regress(dense.z(t), dense.x(0, seen))
            torch.testing.assert_close(mean[:, t], x[:, :seen].flatten(1) @ coefficients.T)
            torch.testing.assert_close(covariance[t], exact)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("steps", range(1, 7))
def test_gaps_match_the_joint_normal(sizes: tuple[int, int], steps: int) -> None:
    model = random_model(*sizes, seed=10 + steps)
    dense, entropy = Dense(model, steps), model.entropy(steps)
    covariances = torch.stack([dense.factor(t)[1] for t in range(steps)])
    precisions = torch.linalg.inv(covariances).diagonal(dim1=-2, dim2=-1)
    diagonal_gap = (torch.logdet(covariances).sum() + precisions.log().sum()) / 2
    torch.testing.assert_close(model.diagonal_gap(steps), diagonal_gap)
    for lookahead in (*range(steps + 1), math.inf):
        gap = model.conditioning_gap(steps, lookahead)
        torch.testing.assert_close(gap, dense.gap(min(steps, lookahead)))
        assert float(gap) == 0 if lookahead >= steps - 1 else float(gap) > 0
        elbo = dense.expected_elbo(*linear_guide(model, steps, lookahead, diagonal=False))
        torch.testing.assert_close(elbo, -entropy - gap)
        elbo = dense.expected_elbo(*linear_guide(model, steps, lookahead, diagonal=True))
        torch.testing.assert_close(elbo, -entropy - gap - diagonal_gap)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("steps", range(1, 7))
def test_local_filter_matches_the_joint_normal(sizes: tuple[int, int], steps: int) -> None:
    model, (d, D) = random_model(*sizes, seed=20 + steps), sizes
    dense = Dense(model, steps)
    gains, offsets, roots = torch.zeros(steps, d, d), torch.zeros(steps, d, steps * D), torch.zeros(steps, d, d)
    for t in range(steps):
        before = dense.z(t - 1) if t else []
        coefficients, covariance = dense.regress(dense.z(t), before + dense.x(t, t + 1))
        if t:
            gains[t] = coefficients[:, :d]
        offsets[t, :, t * D : (t + 1) * D] = coefficients[:, len(before) :]
        roots[t] = torch.linalg.cholesky(covariance)
    gap = -model.entropy(steps) - dense.expected_elbo(gains, offsets, roots)
    torch.testing.assert_close(model.local_filter_gap(steps), gap)
    if steps > 1:
        assert gap > model.conditioning_gap(steps)


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("lookahead", [0, 1, math.inf])
def test_no_other_parameters_do_better(lookahead: float, diagonal: bool) -> None:
    model, steps = random_model(2, 3, seed=5), 4
    dense = Dense(model, steps)
    best = [part.clone().requires_grad_() for part in linear_guide(model, steps, lookahead, diagonal)]
    seen = torch.tensor([[step <= t + lookahead for step in range(steps)] for t in range(steps)])
    of_first = torch.arange(steps) > 0
    free = (
        of_first[:, None, None].expand(-1, 2, 2),
        seen.repeat_interleave(3, 1)[:, None].expand(-1, 2, -1),
        (torch.eye(2) if diagonal else torch.ones(2, 2).tril()).bool().expand(steps, 2, 2),
    )
    assert not best[1][~free[1]].any()  # what lies beyond the lookahead is not looked at, to the last bit
    elbo = dense.expected_elbo(*best)
    for gradient, mask in zip(torch.autograd.grad(elbo, best), free, strict=True):
        torch.testing.assert_close(gradient * mask, torch.zeros_like(gradient), atol=1e-9, rtol=0)
    generator = torch.Generator().manual_seed(0)
    for size in (1e-3, 1e-2, 0.1):
        for _ in range(20):
            other = [
                part + size * mask * torch.randn(part.shape, generator=generator)
                for part, mask in zip(best, free, strict=True)
            ]
            assert dense.expected_elbo(*other) < elbo


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("lookahead", [0, 1, 2, math.inf])
def test_monte_carlo_elbo_of_the_optimal_guide(lookahead: float, diagonal: bool) -> None:
    model, number, steps = random_model(2, 2, seed=4), 500, 4
    x, _ = model.simulate(number, steps, seed=7)
    elbo = pyrogaps.elbo(model, model.optimal_guide(lookahead, diagonal=diagonal), x, num_particles=50)
    gap = model.conditioning_gap(steps, lookahead) + (model.diagonal_gap(steps) if diagonal else 0)
    # E over x by simulation as well; the error of a mean over datapoints holds that of their draws.
    evidence = model.log_evidence(x)
    for values, exact in ((elbo.value, -model.entropy(steps) - gap), (evidence - elbo.value, gap)):
        error = float(values.std()) / math.sqrt(number)
        assert abs(float(values.mean() - exact)) < 4 * error + 1e-9
    assert diagonal or lookahead < steps - 1 or torch.allclose(elbo.log_weights, evidence)


def test_joint_density_is_that_of_the_joint_normal() -> None:
    model, steps = random_model(2, 3), 3
    x, z = model.simulate(5, steps)
    joint = pyrogaps.JointDensity(model, x)
    assert joint.dim == steps * 2
    dense = MultivariateNormal(torch.zeros(15), Dense(model, steps).covariance)
    torch.testing.assert_close(joint(z.flatten(1)[None])[0], dense.log_prob(stacked(z, x)))
    guide = pyrogaps.GuideDensity(model.optimal_guide(math.inf), None, joint)
    torch.testing.assert_close(
        joint(z.flatten(1)[None]) - guide.log_prob(z.flatten(1)[None]), model.log_evidence(x)[None]
    )


def stacked(z: Tensor, x: Tensor) -> Tensor:
    return torch.cat([z.flatten(1), x.flatten(1)], 1)


def test_simulation_follows_the_model_and_its_seed() -> None:
    model, steps, number = random_model(2, 3, seed=1), 3, 20000
    x, z = model.simulate(number, steps, seed=1)
    draws, exact = stacked(z, x), Dense(model, steps).covariance
    # The standard error of an element of the sample covariance of Normals.
    variances = exact.diagonal()
    error = ((exact**2 + variances[:, None] * variances) / number).sqrt()
    assert float(((torch.cov(draws.T) - exact) / error).abs().max()) < 5  # of 120 elements
    assert float((draws.mean(0) / (variances / number).sqrt()).abs().max()) < 4.5
    state = torch.get_rng_state()
    assert torch.equal(model.simulate(number, steps, seed=1)[0], x)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(model.simulate(number, steps, seed=2)[0], x)


def test_dtype_follows_the_arguments_and_data_follow_the_model() -> None:
    single = LinearGaussianStateSpace(torch.ones(1, 1, dtype=torch.float32), 1, 1, 1, 1)
    assert {buffer.dtype for buffer in single.buffers()} == {torch.float32}
    x, _ = single.simulate(3, 4)
    assert x.dtype == torch.float32
    double = LinearGaussianStateSpace(1, 1, 1, 1, 1)
    assert {buffer.dtype for buffer in double.buffers()} == {torch.float64}
    assert double.log_evidence(x).dtype == torch.float64
    torch.testing.assert_close(double.log_evidence(x).float(), single.log_evidence(x))
    assert double(x).shape == double.optimal_guide(1)(x).shape == (3, 4, 1)


ONES: dict[str, object] = dict.fromkeys(
    ["transition", "transition_covariance", "emission", "emission_covariance", "initial_covariance"], 1.0
)
EYE = torch.eye(2).tolist()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"transition": [[1.0, 0.0]]}, "transition must have shape"),
        ({"transition": [1.0, 0.0]}, "transition must be a number or a matrix"),
        ({"transition": [[1.0], [1.0, 2.0]]}, "transition must be a number or a matrix"),
        ({"transition": math.nan}, "transition must be finite"),
        ({"emission": [[1.0, 0.0]]}, "emission must have shape"),
        ({"transition": EYE, "emission": EYE, "transition_covariance": 1.0}, "transition_covariance must have shape"),
        ({"emission_covariance": -1.0}, "emission_covariance must be positive definite"),
        ({"transition_covariance": 0.0}, "transition_covariance must be positive definite"),
        ({"emission": [[1.0], [1.0]], "emission_covariance": [[1.0, 0.5], [0.0, 1.0]]}, "must be symmetric"),
        ({"emission": [[1.0], [1.0]], "emission_covariance": [[1.0, 2.0], [2.0, 1.0]]}, "must be positive definite"),
        ({"initial_covariance": EYE}, "initial_covariance must have shape"),
    ],
)
def test_bad_matrices_are_named(changed: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        LinearGaussianStateSpace(**{**ONES, **changed})  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 2), (3, 0, 1), (3, 4, 1, 1)])
def test_data_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    model, x = LinearGaussianStateSpace(1, 1, 1, 1, 1), torch.zeros(shape)
    for program in (model, model.optimal_guide(), model.log_evidence, model.smoothed):
        with pytest.raises(InputError, match="x must have shape"):
            program(x)


def test_lookahead_and_steps_are_checked() -> None:
    model = LinearGaussianStateSpace(1, 1, 1, 1, 1)
    for lookahead in (-1, 0.5, math.nan, -math.inf, True):
        with pytest.raises(InputError, match="lookahead"):
            model.conditioning_gap(3, lookahead)
        with pytest.raises(InputError, match="lookahead"):
            model.optimal_guide(lookahead)
    for method in (model.conditioning_gap, model.entropy, model.diagonal_gap, model.local_filter_gap):
        with pytest.raises(InputError, match="steps"):
            method(0)
    with pytest.raises(InputError, match="steps"):
        model.simulate(3, 0)
    assert model.optimal_guide(2).lookahead == 2
