"""A damped pendulum with random kicks and noisy observations: a small non-linear filtering problem."""

import pyro.distributions as dist
import torch
from torch import Tensor

from pyrogaps.errors import InputError
from pyrogaps.models.sequences import SequenceModel

GRAVITY = 9.81  # m/s^2, for a pendulum of length 1 m; small swings have a period of 2 s


class Pendulum(SequenceModel):
    r"""Angle and angular velocity z_t of a pendulum, after a semi-implicit Euler step and a random kick:

    $$\omega' = \omega - (9.81 \sin\alpha + c\, \omega)\, \Delta, \quad \alpha' = \alpha + \omega' \Delta, \quad
    z_t \sim \mathcal N((\alpha', \omega'), \sigma_p^2 I)$$

    The observation is the horizontal position of the bob, $x_t \sim \mathcal N(\sin\alpha_t, \sigma_o^2)$, D = 1. The
    velocity shows only over time, and angles beyond the horizontal are ambiguous. With `full_state`,
    $x_t \sim \mathcal N(z_t, \sigma_o^2 I)$, D = 2. There are no trainable parameters. Call `model(x)` or
    `model(x, lengths)` with `x` `(N, T, D)`; sites and errors are those of `SequenceModel`.

    Args:
        process_scale: $\sigma_p$, in radians and radians per second; a small value, such as 1e-3, gives a nearly
            deterministic motion.
        observation_scale: $\sigma_o$.
        full_state: whether angle and velocity are observed.
        known_first_state: whether $z_1$ is known up to `known_scale`: $z_1 \sim \mathcal N($`first_state`, scale$^2)$.
        first_state: mean angle and velocity of $z_1$.
        first_scale: their standard deviations if the first state is not known.
        known_scale: the standard deviation of both if it is known.
        time_step: $\Delta$, seconds.
        damping: c, per second.

    Raises `InputError` for scales or a time step that are not positive, for negative damping, and for a first state
    that is not two numbers.
    """

    first_loc: Tensor
    first_spread: Tensor
    noise: Tensor
    spread: Tensor

    def __init__(
        self,
        process_scale: float = 0.05,
        observation_scale: float = 0.1,
        full_state: bool = False,
        known_first_state: bool = False,
        first_state: tuple[float, float] = (0.8, 0.0),
        first_scale: tuple[float, float] = (0.5, 1.0),
        known_scale: float = 1e-3,
        time_step: float = 0.1,
        damping: float = 0.2,
    ) -> None:
        super().__init__()
        for name, pair in (("first_state", first_state), ("first_scale", first_scale)):
            if len(pair) != 2:
                raise InputError(f"Pendulum: {name} must be two numbers, angle and velocity, got {len(pair)}")
        positive = {"process_scale": process_scale, "observation_scale": observation_scale, "known_scale": known_scale}
        for name, value in {**positive, "first_scale": min(first_scale), "time_step": time_step}.items():
            if not value > 0:
                raise InputError(f"Pendulum: {name} must be positive, got {value}. Use a small value, such as 1e-3.")
        if not damping >= 0:
            raise InputError(f"Pendulum: damping must be 0 or more, got {damping}")
        self.full_state, self.time_step, self.damping = full_state, time_step, damping
        self.data_dim, self.latent_dim = 2 if full_state else 1, 2
        spread = (known_scale, known_scale) if known_first_state else first_scale
        self.register_buffer("first_loc", torch.tensor([float(value) for value in first_state]))
        self.register_buffer("first_spread", torch.tensor([float(value) for value in spread]))
        self.register_buffer("noise", torch.tensor(float(process_scale)))
        self.register_buffer("spread", torch.tensor(float(observation_scale)))

    def first(self, number: int) -> tuple[Tensor, Tensor]:
        return self.first_loc.expand(number, 2), self.first_spread.expand(number, 2)

    def transition(self, z: Tensor) -> tuple[Tensor, Tensor]:
        angle, velocity = z.unbind(-1)
        velocity = velocity - (GRAVITY * torch.sin(angle) + self.damping * velocity) * self.time_step
        moved = torch.stack([angle + velocity * self.time_step, velocity], -1)
        return moved, self.noise.expand_as(moved)

    def emission(self, z: Tensor) -> Tensor:
        return z if self.full_state else torch.sin(z[..., :1])

    def likelihood(self, output: Tensor) -> dist.TorchDistribution:
        observation: dist.TorchDistribution = dist.Normal(output, self.spread).to_event(1)
        return observation

    def simulate(self, num_sequences: int, num_steps: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Draw `x` `(num_sequences, num_steps, D)` and its latents `z` `(num_sequences, num_steps, 2)`.

        The global random state is unchanged. Raises `InputError` for fewer than one sequence or step.
        """
        if num_sequences < 1 or num_steps < 1:
            raise InputError(
                "Pendulum.simulate: num_sequences and num_steps must be at least 1, "
                f"got {num_sequences} and {num_steps}"
            )
        generator = torch.Generator().manual_seed(seed)
        shape = (num_sequences, num_steps, 2 + self.data_dim)
        draws = torch.randn(shape, generator=generator, dtype=self.noise.dtype).to(self.noise.device)
        (loc, scale), states = self.first(num_sequences), []
        for kick in draws[..., :2].unbind(1):
            states.append(loc + scale * kick)
            loc, scale = self.transition(states[-1])
        z = torch.stack(states, 1)
        return self.emission(z) + self.spread * draws[..., 2:], z
