"""The pendulum: its motion against an integrator's, its draws against their own law, tiny noise."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor
from torch.distributions import Normal

from pyrogaps import InputError, JointDensity
from pyrogaps.density.simulate import simulate
from pyrogaps.models.pendulum import GRAVITY, Pendulum


def swing(time_step: float) -> Tensor:
    """Where the undisturbed pendulum is after one second."""
    model = Pendulum(time_step=time_step, damping=0.3).double()
    z = torch.tensor([1.2, -0.5], dtype=torch.float64)
    for _ in range(round(1 / time_step)):
        z = model.transition(z)[0]
    return z


def test_motion_is_a_pendulums() -> None:
    """Semi-implicit Euler is of first order: half the step, half the error."""
    exact = solve_ivp(
        lambda t, z: [z[1], -GRAVITY * np.sin(z[0]) - 0.3 * z[1]], (0, 1), [1.2, -0.5], rtol=1e-10, atol=1e-12
    ).y[:, -1]
    errors = [(swing(time_step) - torch.from_numpy(exact)).norm() for time_step in (1e-3, 5e-4)]
    assert float(errors[0]) < 0.02
    assert 1.9 < float(errors[0] / errors[1]) < 2.1


def log_joint(model: Pendulum, x: Tensor, z: Tensor) -> Tensor:
    """By hand, `(N,)`, for the default first state, noise and damping."""
    total = Normal(torch.tensor([0.8, 0.0]), torch.tensor([0.5, 1.0])).log_prob(z[:, 0]).sum(-1)
    for t in range(1, z.shape[1]):
        angle, velocity = z[:, t - 1].unbind(-1)
        velocity = velocity - 0.1 * (GRAVITY * angle.sin() + 0.2 * velocity)
        total = total + Normal(angle + 0.1 * velocity, 0.05).log_prob(z[:, t, 0])
        total = total + Normal(velocity, 0.05).log_prob(z[:, t, 1])
    seen = z if model.full_state else z[..., :1].sin()
    return total + Normal(seen, 0.1).log_prob(x).sum((-2, -1))


@pytest.mark.parametrize("full_state", [False, True])
def test_log_joint(full_state: bool) -> None:
    torch.set_default_dtype(torch.float64)
    model = Pendulum(full_state=full_state)
    x, z = model.simulate(6, 8)
    assert x.shape == (6, 8, model.data_dim) and z.shape == (6, 8, 2)
    joint = JointDensity(model, x)
    torch.testing.assert_close(joint(z.flatten(1)[None])[0], log_joint(model, x, z))


@pytest.mark.parametrize("settings", [{}, {"full_state": True, "known_first_state": True}])
def test_draws_follow_the_model(settings: dict[str, bool]) -> None:
    """E log p(x, z) is minus the entropy of its Normals: the mean of many draws lies within four standard errors."""
    torch.set_default_dtype(torch.float64)
    model = Pendulum(**settings)
    x, z = model.simulate(4000, 5, seed=1)
    scores = JointDensity(model, x)(z.flatten(1)[None])[0]
    scales = [*model.first_spread.tolist(), *[0.05] * 8, *[0.1] * (5 * model.data_dim)]
    expected = -sum(0.5 * math.log(2 * math.pi * math.e * scale**2) for scale in scales)
    assert abs(float(scores.mean()) - expected) < 4 * float(scores.std()) / math.sqrt(len(scores))


def test_a_known_first_state() -> None:
    _, z = Pendulum(known_first_state=True, first_state=(-0.4, 2.0), known_scale=1e-2).simulate(1000, 2)
    deviations = (z[:, 0] - torch.tensor([-0.4, 2.0])) / 1e-2
    assert float(deviations.abs().max()) < 6
    assert abs(float(deviations.square().mean()) - 1) < 4 * math.sqrt(2 / 2000)


def test_tiny_process_noise_in_single_precision() -> None:
    """Rounding is far below a kick of 1e-3: densities and their slopes stay those of double precision."""
    model = Pendulum(process_scale=1e-3, known_first_state=True)
    x, z = model.simulate(5, 40)
    results = []
    for dtype in (torch.float32, torch.float64):
        point = z.flatten(1)[None].to(dtype).requires_grad_()
        density = JointDensity(model.to(dtype), x.to(dtype))(point)
        results.append((density.detach().double(), torch.autograd.grad(density.sum(), point)[0].double()))
    (value, slope), (exact, exact_slope) = results
    # An error of 1e-6 in z_t - f(z_{t-1}) is one of 1e-3 in units of the kick, and of 1 in a slope of about 1000.
    torch.testing.assert_close(value, exact, rtol=0, atol=0.1)
    torch.testing.assert_close(slope, exact_slope, rtol=0, atol=5.0)


def test_ragged_sequences_and_simulation_by_the_joint() -> None:
    model, lengths = Pendulum(), torch.tensor([3, 1, 6])
    x, _ = model.simulate(3, 6)
    joint = JointDensity(model, (x, lengths))
    z = torch.randn(2, 3, 12)
    cut = [
        JointDensity(model, x[n : n + 1, :length])(z[:, n : n + 1, : 2 * length]) for n, length in enumerate(lengths)
    ]
    torch.testing.assert_close(joint(z), torch.cat(cut, 1))
    (drawn, _), _ = simulate(joint)
    assert drawn.shape == x.shape and not torch.equal(drawn, x)


def test_the_seed_says_what_is_drawn() -> None:
    state = torch.random.get_rng_state()
    first, again, other = (Pendulum().simulate(3, 4, seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_nothing_is_learned() -> None:
    assert not list(Pendulum().parameters())


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: Pendulum(process_scale=0.0), r"process_scale must be positive, got 0\.0\. Use a small value"),
        (lambda: Pendulum(observation_scale=-1.0), "observation_scale must be positive"),
        (lambda: Pendulum(first_scale=(1.0, 0.0)), "first_scale must be positive"),
        (lambda: Pendulum(known_scale=math.nan), "known_scale must be positive"),
        (lambda: Pendulum(time_step=0.0), "time_step must be positive"),
        (lambda: Pendulum(damping=-0.1), "damping must be 0 or more"),
        (lambda: Pendulum(first_state=(1.0,)), "first_state must be two numbers"),  # type: ignore[arg-type]
        (lambda: Pendulum().simulate(0, 5), "must be at least 1, got 0 and 5"),
    ],
)
def test_refusals(build: Any, said: str) -> None:
    with pytest.raises(InputError, match=f"^Pendulum.*{said}"):
        build()
