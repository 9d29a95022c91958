"""The HMC transition: invariance on skewed and badly scaled targets, reversibility, order, and rejection."""

import math

import pytest
import torch
from torch import Tensor

from pyrogaps.hmc import HMCState, Leapfrog, transition
from pyrogaps.scales import apply_scale

NUM = 50_000


def normal(position: Tensor) -> HMCState:
    return HMCState(position, (-0.5 * position.square().sum(-1),), (-position,))


def skewed(position: Tensor) -> HMCState:
    """Logs of independent Gamma(2) and Gamma(0.7) variables, the second 1,000 times as wide: exp-linear left tails."""
    shape = torch.tensor([2.0, 0.7], dtype=position.dtype)
    unit = torch.tensor([1.0, 1000.0], dtype=position.dtype)
    y = position / unit
    return HMCState(position, ((shape * y - y.exp()).sum(-1),), ((shape - y.exp()) / unit,))


def skewed_draws(number: int) -> Tensor:
    gamma = torch.distributions.Gamma(torch.tensor([2.0, 0.7]).double(), 1.0).sample(torch.Size([number]))
    return (gamma.log() * torch.tensor([1.0, 1000.0]))[:, None]


def move(state: HMCState, evaluate, step: float | Tensor, num_leapfrog: int, scale: Tensor, dtype=torch.float64):  # type: ignore[no-untyped-def]
    shape = state.position.shape
    velocity, uniform = torch.randn(shape, dtype=dtype), torch.rand(shape[:2], dtype=dtype)
    one = torch.ones((), dtype=dtype)
    return transition(
        Leapfrog(evaluate, scale, num_leapfrog), state, (one,), torch.as_tensor(step, dtype=dtype), velocity, uniform
    )


def z_scores(draws: Tensor, functions: list[Tensor]) -> Tensor:
    """How many standard errors the means of `functions` of independent `draws` lie off their exact values, 0."""
    return torch.stack([f.mean() / (f.std() / math.sqrt(len(draws))) for f in functions])


@pytest.mark.parametrize("triangular", [False, True])
@pytest.mark.parametrize("step", [0.05, 0.7, 1.3])
def test_leaves_a_skewed_badly_scaled_target_invariant(step: float, triangular: bool) -> None:
    """Exact draws stay exact draws: after three transitions the moments of Gamma variables and of their logs hold."""
    torch.manual_seed(0)
    scale = torch.tensor([[0.8, 900.0]]).double()
    if triangular:
        scale = torch.tensor([[[0.8, 0.0], [500.0, 900.0]]]).double()
    state = skewed(skewed_draws(NUM))
    moved = torch.zeros(())
    for _ in range(3):
        state, info = move(state, skewed, step, 4, scale)
        moved = moved + info.accepted.double().mean()
    assert float(moved) > 0.3  # most of them have moved
    y = state.position[:, 0] / torch.tensor([1.0, 1000.0])
    gamma, shape = y.exp(), torch.tensor([2.0, 0.7]).double()
    functions = [gamma - shape, y - torch.digamma(shape), (gamma - shape).square() - shape]
    functions.append((y - torch.digamma(shape)).square() - torch.polygamma(1, shape))
    scores = z_scores(y, [f[:, k] for f in functions for k in (0, 1)] + [(gamma - shape).prod(-1)])
    assert float(scores.abs().max()) < 4


def test_a_wrong_gradient_or_accept_step_would_show() -> None:
    """The invariance test has power: a target flattened by a tenth, or accepting always, is found out."""
    torch.manual_seed(0)
    scale = torch.tensor([[0.8, 900.0]]).double()

    def flatter(position: Tensor) -> HMCState:
        exact = skewed(position)
        return HMCState(position, (0.9 * exact.log_densities[0],), (0.9 * exact.gradients[0],))

    state = flatter(skewed_draws(NUM))
    always = skewed(skewed_draws(NUM))
    for _ in range(3):
        state, _ = move(state, flatter, 0.7, 4, scale)
        always, _ = transition(
            Leapfrog(skewed, scale, 4),
            always,
            (torch.ones(()).double(),),
            torch.tensor(1.3).double(),
            torch.randn(NUM, 1, 2).double(),
            torch.full((NUM, 1), -1.0).double(),
        )
    for chains in (state, always):
        y = chains.position[:, 0] / torch.tensor([1.0, 1000.0])
        gamma = y.exp()
        functions = [(gamma - torch.tensor([2.0, 0.7]))[:, k] for k in (0, 1)]
        functions += [((gamma - torch.tensor([2.0, 0.7])).square() - torch.tensor([2.0, 0.7]))[:, k] for k in (0, 1)]
        assert float(z_scores(y, functions).abs().max()) > 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("triangular", [False, True])
def test_is_reversible(dtype: torch.dtype, triangular: bool) -> None:
    """From where a trajectory ends, with its velocity turned round, one comes back to where it began."""
    torch.manual_seed(0)
    scale = torch.tensor([[0.8, 0.3]], dtype=dtype)
    if triangular:
        scale = torch.tensor([[[0.8, 0.0], [0.4, 0.3]]], dtype=dtype)
    position, velocity = torch.randn(50, 1, 2, dtype=dtype), torch.randn(50, 1, 2, dtype=dtype)
    last: list[Tensor] = []

    def watched(position: Tensor) -> HMCState:
        last.append(position)
        return normal(position)

    one, step, never = (
        torch.ones((), dtype=dtype),
        torch.tensor(0.3, dtype=dtype),
        torch.full((50, 1), -1.0, dtype=dtype),
    )
    end, _ = transition(Leapfrog(watched, scale, 7), normal(position), (one,), step, velocity, never)
    # The last velocity, from the last two positions: v = L^-1 (z_7 - z_6) / step, and half a push more.
    push = torch.einsum("bij,sbi->sbj", scale, end.gradients[0]) if triangular else scale * end.gradients[0]
    drift = (last[-1] - last[-2]) / step
    whitened = (
        torch.linalg.solve_triangular(scale, drift[..., None], upper=False)[..., 0] if triangular else drift / scale
    )
    turned = -(whitened + 0.5 * step * push)
    back, _ = transition(Leapfrog(normal, scale, 7), end, (one,), step, turned, never)
    torch.testing.assert_close(back.position, position, atol=2e-5 if dtype == torch.float32 else 1e-12, rtol=0)


@pytest.mark.parametrize("triangular", [False, True])
def test_energy_error_is_of_second_order(triangular: bool) -> None:
    """Over a path of fixed length, halving the step divides the error of the energy by four."""
    torch.manual_seed(0)
    scale = torch.tensor([[0.9, 0.6]]).double()
    if triangular:
        scale = torch.tensor([[[0.9, 0.0], [0.3, 0.6]]]).double()
    position, velocity = torch.randn(400, 1, 2).double(), torch.randn(400, 1, 2).double()

    def banana(position: Tensor) -> HMCState:
        x, y = position.unbind(-1)
        residual = y - x.square()
        log_density = -0.5 * x.square() - 0.5 * residual.square()
        return HMCState(position, (log_density,), (torch.stack([-x + 2 * x * residual, -residual], -1),))

    errors = []
    for step, number in ((0.02, 20), (0.01, 40), (0.005, 80)):
        one = torch.ones(()).double()
        _, info = transition(
            Leapfrog(banana, scale, number),
            banana(position),
            (one,),
            torch.tensor(step).double(),
            velocity,
            torch.ones(400, 1).double(),
        )
        errors.append(float(info.acceptance.log().abs().max()))
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.05)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.05)


def test_proposals_that_are_not_finite_are_rejected_and_poison_nothing() -> None:
    torch.manual_seed(0)

    def cliff(position: Tensor) -> HMCState:
        """NaN beyond 1, in value and gradient."""
        beyond = position.abs().amax(-1) > 1
        nan = torch.full_like(position, math.nan)
        state = normal(position)
        log_density = torch.where(beyond, nan[..., 0], state.log_densities[0])
        return HMCState(position, (log_density,), (torch.where(beyond[..., None], nan, state.gradients[0]),))

    state = cliff(torch.zeros(500, 2, 2).double())
    rejected = 0.0
    for _ in range(5):
        state, info = move(state, cliff, 0.6, 3, torch.ones(2, 2).double())
        rejected += float((~info.accepted).double().mean())
        assert torch.isfinite(info.acceptance).all()
    assert rejected > 1.0
    for tensor in (state.position, *state.log_densities, *state.gradients):
        assert torch.isfinite(tensor).all()
    assert (state.position.abs() <= 1).all()


def test_a_rejected_chain_stays_exactly_where_it_was() -> None:
    torch.manual_seed(0)
    start = normal(torch.randn(30, 2, 3).double())
    never = torch.full((30, 2), 2.0).double()
    one = torch.ones(()).double()
    state, info = transition(
        Leapfrog(normal, torch.ones(2, 3).double(), 2),
        start,
        (one,),
        torch.tensor(0.5).double(),
        torch.randn(30, 2, 3).double(),
        never,
    )
    assert not info.accepted.any()
    assert torch.equal(state.position, start.position)
    assert torch.equal(state.log_densities[0], start.log_densities[0])


def test_mixes_two_densities_by_their_weights() -> None:
    """Between N(-1, 1) and N(3, 1/4) at weight b the target is Normal with the mixed precision and mean."""
    torch.manual_seed(0)

    def both(position: Tensor) -> HMCState:
        left, right = position + 1, position - 3
        return HMCState(position, (-0.5 * left.square().sum(-1), -2 * right.square().sum(-1)), (-left, -4 * right))

    b = 0.4
    precision = (1 - b) + 4 * b
    mean = (-(1 - b) + 12 * b) / precision
    state = both(mean + torch.randn(NUM, 1, 1).double() / math.sqrt(precision))
    for _ in range(2):
        shape = state.position.shape
        weights = (torch.tensor(1 - b).double(), torch.tensor(b).double())
        state, _ = transition(
            Leapfrog(both, torch.ones(1, 1).double(), 4),
            state,
            weights,
            torch.tensor(0.6).double(),
            torch.randn(shape).double(),
            torch.rand(shape[:2]).double(),
        )
    centred = state.position.flatten() - mean
    assert float(z_scores(centred, [centred, centred.square() - 1 / precision]).abs().max()) < 4


def test_step_sizes_differ_from_chain_to_chain() -> None:
    """A step size of zero leaves a chain in place; its neighbour moves."""
    torch.manual_seed(0)
    steps = torch.tensor([[0.0, 0.5], [0.5, 0.0]]).double()
    start = normal(torch.randn(2, 2, 3).double())
    state, _ = move(start, normal, steps, 3, torch.ones(2, 3).double())
    still = (state.position == start.position).all(-1)
    assert torch.equal(still, steps == 0)


def test_apply_scale_is_the_matrix_product() -> None:
    torch.manual_seed(0)
    factor, vector = torch.randn(2, 3, 3).tril(), torch.randn(5, 2, 3)
    torch.testing.assert_close(apply_scale(factor, vector), (factor @ vector[..., None])[..., 0])
    torch.testing.assert_close(apply_scale(factor[:, 0], vector), factor[:, 0] * vector)
