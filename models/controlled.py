"""State-space models with actions: a Markov chain of latent states that known inputs move, linear or neural."""

from typing import TypeAlias

import pyro.distributions as dist
import torch
from pyro.poutine.util import is_validation_enabled
from torch import Tensor, nn
from torch.nn.functional import pad, softplus

from pyrogaps.errors import InputError
from pyrogaps.models.mlp import mlp
from pyrogaps.models.sequences import MarkovChain
from pyrogaps.models.state_space import LinearGaussianStateSpace

Numbers: TypeAlias = Tensor | float | list[float]


class ControlledModel(MarkovChain):
    r"""A Markov chain of latent states that actions move: base class of the state-space models with actions.

    $$z_1 \sim \mathcal N(m_1, s_1^2), \quad z_t \mid z_{t-1}, u_{t-1} \sim
    \mathcal N(m(z_{t-1}, u_{t-1}), s(z_{t-1}, u_{t-1})^2), \quad x_t \sim p(\cdot \mid g(z_t))$$

    Call `model(x, u)` with observations `x` `(N, T, D)` and actions `u` `(N, T, K)`. Action u_t is taken after x_t was
    seen and moves z_t to z_{t+1}, so that the last one has no effect. Actions are given, not modelled. Sites "z_1" to
    "z_T", each `(N, d)`, then "x_1" to "x_T", in the plate "data". A subclass sets `data_dim` D and `action_dim` K and
    implements `first`, `transition`, `emission` and `likelihood`.

    Raises `InputError` for `x` and `u` that are not floating tensors of these shapes, and, while Pyro's validation is
    on, for values that are not finite.
    """

    action_dim: int
    systems: tuple[int, ...] = ()

    def forward(self, x: Tensor, u: Tensor) -> Tensor:
        """Run the model; returns z, shape `(N, T, d)`."""
        check_controlled(type(self).__name__, x, u, self.data_dim, self.action_dim, self.systems)
        u = u.to(self.dtype)
        return self.run(x.to(self.dtype), None, lambda z, t: self.transition(z, u[:, t - 1]))

    def transition(self, z: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and scale of the state after `z` `(..., d)` and action `u` `(..., K)`, each `(..., d)`."""
        raise NotImplementedError


def check_controlled(
    program: str, x: Tensor, u: Tensor, data_dim: int, action_dim: int, systems: tuple[int, ...] = ()
) -> None:
    """Raise `InputError`, naming `program`, unless `x` and `u` are observations and actions of the same steps.

    Their shapes are `(N, T, *systems, data_dim)` and `(N, T, *systems, action_dim)`. Values are checked only while
    Pyro's validation is on, because reading them synchronises the device.
    """
    for name, what, value, size in (("x", "observations", x, data_dim), ("u", "actions", u, action_dim)):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = value.dtype if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise InputError(
                f"{program}: {name} must be a floating-point tensor of {what}, got {kind}. "
                f"Convert it with torch.as_tensor({name}, dtype=torch.get_default_dtype())."
            )
        if value.dim() != 3 + len(systems) or value.shape[2:] != (*systems, size):
            expected = ", ".join(map(str, ("N", "T", *systems, size)))
            raise InputError(f"{program}: {name} must have shape ({expected}), got {tuple(value.shape)}")
    if not x.shape[0] or not x.shape[1]:
        raise InputError(f"{program}: x of shape {tuple(x.shape)} has no time steps. Leave out empty sequences.")
    for axis, unit in enumerate(("sequences", "steps")):
        if x.shape[axis] != u.shape[axis]:
            raise InputError(
                f"{program}: u has {u.shape[axis]} {unit}, but x has {x.shape[axis]}. Pass one action for each "
                "observation; the last one has no effect."
            )
    if is_validation_enabled():
        for name, value in (("x", x), ("u", u)):
            wrong = ~value.isfinite().flatten(2).all(2)
            if bool(wrong.any()):
                n, t = wrong.nonzero()[0].tolist()
                raise InputError(
                    f"{program}: {name} is NaN or infinite at sequence {n}, step {t}, counted from 0. "
                    "Leave out such sequences."
                )


def actions_before(u: Tensor) -> Tensor:
    """The actions before each step, `(N, T, ...)` as `u`: zero, then u_1 to u_{T-1}."""
    return pad(u[:, :-1], (0, 0) * (u.dim() - 2) + (1, 0))


class ControlledLinear(ControlledModel):
    r"""A linear-Gaussian state space with actions:

    $$z_1 \sim \mathcal N(0, \mathrm{diag}\, p^2), \quad z_{t+1} = A z_t + B u_t + \mathcal N(0, \mathrm{diag}\, w^2),
    \quad x_t = C z_t + \mathcal N(0, \mathrm{diag}\, v^2)$$

    Diagonal noise of the states is no restriction: some change of coordinates makes both of their covariances
    diagonal. A Pyro model, called as `ControlledModel` describes. A leading shape `systems` of all matrices makes it
    that many independent systems, learned at once: `x` is then `(N, T, *systems, D)`, "z_t" `(N, *systems, d)`, and a
    datapoint has a trajectory of each.

    Args:
        transition: A, `(*systems, d, d)`.
        action: B, `(*systems, d, K)`.
        emission: C, `(*systems, D, d)`.
        transition_scale: w, `(*systems, d)` or one number.
        emission_scale: v, `(*systems, D)` or one number.
        initial_scale: p, `(*systems, d)` or one number.
        learn: whether all of them are trained; fixed otherwise.
        min_emission_scale: the smallest value of v, which a filter's bound can drive towards 0.

    Raises `InputError` for shapes that do not fit, for scales that are not positive or not above their minimum, and for
    `x` and `u` as `ControlledModel` does.

    Example:
        >>> import torch
        >>> from pyrogaps.models.controlled import ControlledLinear
        >>> model = ControlledLinear([[0.9, 0.1], [0.0, 0.9]], [[0.0], [1.0]], [[1.0, 0.0]], 0.1, 0.5)
        >>> x, z = model.simulate(torch.randn(3, 8, 1))
        >>> model.log_evidence(x, torch.randn(3, 8, 1)).shape
        torch.Size([3])
    """

    A: Tensor
    B: Tensor
    C: Tensor
    log_w: Tensor
    log_v: Tensor
    log_p: Tensor

    def __init__(
        self,
        transition: Tensor | list[list[float]],
        action: Tensor | list[list[float]],
        emission: Tensor | list[list[float]],
        transition_scale: Numbers = 1.0,
        emission_scale: Numbers = 1.0,
        initial_scale: Numbers = 1.0,
        *,
        learn: bool = False,
        min_emission_scale: float = 0.0,
    ) -> None:
        super().__init__()
        A, B, C = (_matrix(*pair) for pair in (("transition", transition), ("action", action), ("emission", emission)))
        self.systems, self.latent_dim = tuple(A.shape[:-2]), A.shape[-1]
        self.data_dim, self.action_dim = C.shape[-2], B.shape[-1]
        self.event_dim = 1 + len(self.systems)
        d, D = self.latent_dim, self.data_dim
        for name, matrix, shape in (
            ("transition", A, (d, d)),
            ("action", B, (d, self.action_dim)),
            ("emission", C, (D, d)),
        ):
            _check_shape(name, matrix, (*self.systems, *shape))
        scales = (
            ("transition_scale", "log_w", transition_scale, d),
            ("emission_scale", "log_v", emission_scale, D),
            ("initial_scale", "log_p", initial_scale, d),
        )
        self.min_emission_scale = min_emission_scale
        logs = {
            key: _log_scale(name, value, (*self.systems, size), A, min_emission_scale if key == "log_v" else 0.0)
            for name, key, value, size in scales
        }
        for key, value in {"A": A, "B": B, "C": C, **logs}.items():
            if learn:
                self.register_parameter(key, nn.Parameter(value))
            else:
                self.register_buffer(key, value)

    @property
    def transition_scale(self) -> Tensor:
        """w, `(*systems, d)`."""
        return self.log_w.exp()

    @property
    def emission_scale(self) -> Tensor:
        """v, `(*systems, D)`."""
        return self.log_v.exp() + self.min_emission_scale

    @property
    def initial_scale(self) -> Tensor:
        """p, `(*systems, d)`."""
        return self.log_p.exp()

    def first(self, number: int) -> tuple[Tensor, Tensor]:
        scale = self.initial_scale.expand(number, *self.log_p.shape)
        return torch.zeros_like(scale), scale

    def transition(self, z: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        loc = times(self.A, z) + times(self.B, u)
        return loc, self.transition_scale.expand(loc.shape)

    def emission(self, z: Tensor) -> Tensor:
        return z @ self.C.mT

    def likelihood(self, output: Tensor) -> dist.TorchDistribution:
        observation: dist.TorchDistribution = dist.Normal(output, self.emission_scale).to_event(self.event_dim)
        return observation

    def simulate(self, u: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Draw `x` `(N, T, *systems, D)` and states `(N, T, *systems, d)` under actions `u` `(N, T, *systems, K)`.

        The draws depend only on `seed`.
        """
        generator = torch.Generator().manual_seed(seed)
        sizes = (*u.shape[:-1], self.latent_dim + self.data_dim)
        noise = torch.randn(sizes, generator=generator, dtype=self.dtype).to(self.A.device)
        kicks, errors = noise.split((self.latent_dim, self.data_dim), -1)
        (loc, scale), states = self.first(len(u)), []
        with torch.no_grad():
            for t in range(u.shape[1]):
                states.append(loc + scale * kicks[:, t])
                loc, scale = self.transition(states[-1], u[:, t].to(self.dtype))
            z = torch.stack(states, 1)
            return times(self.C, z) + self.emission_scale * errors, z

    def system(self, *index: int | slice) -> "ControlledLinear":
        """One of the `systems`, or a slice of them, fixed at the present values."""
        scales = self.transition_scale, self.emission_scale, self.initial_scale
        return ControlledLinear(*(value[index].detach() for value in (self.A, self.B, self.C, *scales)))

    def without_actions(self) -> LinearGaussianStateSpace:
        """This state space where all actions are zero, at the present values. Needs a single system."""
        if self.systems:
            raise InputError(f"ControlledLinear: it holds {self.systems} systems. Take one of them with system(index).")
        scales = self.transition_scale, self.emission_scale, self.initial_scale
        w, v, p = (scale.detach().square().diag() for scale in scales)
        return LinearGaussianStateSpace(self.A.detach(), w, self.C.detach(), v, p)

    def response(self, u: Tensor) -> Tensor:
        """The part of the states that comes from actions `u` `(N, T, K)`, the mean of p(z), `(N, T, d)`."""
        z, states = u.new_zeros(*u.shape[:1], *self.log_p.shape, dtype=self.dtype), []
        for action in u.to(self.dtype).unbind(1):
            states.append(z)
            z, _ = self.transition(z, action)
        return torch.stack(states, 1)

    def log_evidence(self, x: Tensor, u: Tensor) -> Tensor:
        """Exact log p(x|u) of `x` `(N, T, D)` under `u` `(N, T, K)`, by the Kalman filter; shape `(N,)`, nats."""
        check_controlled(type(self).__name__, x, u, self.data_dim, self.action_dim, self.systems)
        with torch.no_grad():
            return self.without_actions().log_evidence(x.to(self.dtype) - times(self.C, self.response(u)))

    def conditioning_gap(self, steps: int, lookahead: float = 0) -> Tensor:
        """Mean of log p(x|u) minus the ELBO of the best guide with this lookahead, nats; see
        `LinearGaussianStateSpace.conditioning_gap`.

        It is the same for all actions that do not depend on the future: known actions move the states by known amounts.
        """
        return self.without_actions().conditioning_gap(steps, lookahead)


class ControlledDeep(ControlledModel):
    r"""A state-space model with actions whose transition and emission are networks.

    $$z_{t+1} \sim \mathcal N(m(z_t, u_t), s(z_t, u_t)^2), \quad x_t \sim \mathcal N(f(z_t), v^2)$$

    m and s come from a network with one tanh layer of `transition_dim` units, m as the change of z; f has one of
    `emission_dim` units. The mean and scale of z_1 and the scales v are parameters. A Pyro model, called as
    `ControlledModel` describes.

    Raises `InputError` for a dimension below 1.
    """

    def __init__(
        self,
        data_dim: int,
        action_dim: int,
        latent_dim: int = 4,
        transition_dim: int = 64,
        emission_dim: int = 64,
        min_scale: float = 1e-3,
    ) -> None:
        super().__init__()
        if min(data_dim, action_dim, latent_dim, transition_dim, emission_dim) < 1:
            given = f"{data_dim}, {action_dim}, {latent_dim}, {transition_dim} and {emission_dim}"
            raise InputError(
                "ControlledDeep: data_dim, action_dim, latent_dim, transition_dim and emission_dim must be at least 1, "
                f"got {given}"
            )
        self.data_dim, self.action_dim, self.latent_dim, self.min_scale = data_dim, action_dim, latent_dim, min_scale
        self.first_loc, self.first_raw = (nn.Parameter(torch.zeros(latent_dim)) for _ in range(2))
        self.mover = mlp([latent_dim + action_dim, transition_dim, 2 * latent_dim], "Tanh")
        self.emitter = mlp([latent_dim, emission_dim, data_dim], "Tanh")
        self.noise_raw = nn.Parameter(torch.zeros(data_dim))

    def first(self, number: int) -> tuple[Tensor, Tensor]:
        return self.first_loc.expand(number, -1), self._positive(self.first_raw).expand(number, -1)

    def transition(self, z: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        change, raw = self.mover(torch.cat([z, u], -1)).chunk(2, -1)
        return z + change, self._positive(raw)

    def emission(self, z: Tensor) -> Tensor:
        outputs: Tensor = self.emitter(z)
        return outputs

    def likelihood(self, output: Tensor) -> dist.TorchDistribution:
        observation: dist.TorchDistribution = dist.Normal(output, self._positive(self.noise_raw)).to_event(1)
        return observation

    def _positive(self, raw: Tensor) -> Tensor:
        return softplus(raw) + self.min_scale


def times(matrix: Tensor, vector: Tensor) -> Tensor:
    """`matrix` `(*systems, i, j)` times `vector` `(..., *systems, j)`."""
    return torch.einsum("...ij,...j->...i", matrix, vector)


def _matrix(name: str, value: Tensor | list[list[float]]) -> Tensor:
    matrix = torch.as_tensor(value).detach().clone()
    matrix = matrix if matrix.is_floating_point() else matrix.to(torch.get_default_dtype())
    if matrix.dim() < 2 or not matrix.numel() or not bool(matrix.isfinite().all()):
        raise InputError(
            f"ControlledLinear: {name} must be a matrix of finite numbers, got shape {tuple(matrix.shape)}"
        )
    return matrix


def _check_shape(name: str, matrix: Tensor, shape: tuple[int, ...]) -> None:
    if matrix.shape != shape:
        raise InputError(f"ControlledLinear: {name} must have shape {shape}, got {tuple(matrix.shape)}")


def _log_scale(name: str, value: Numbers, shape: tuple[int, ...], like: Tensor, least: float) -> Tensor:
    scale = torch.as_tensor(value, dtype=like.dtype).detach()
    if scale.shape not in ((), shape):
        raise InputError(f"ControlledLinear: {name} must be one number or have shape {shape}, got {tuple(scale.shape)}")
    if not bool((scale > least).all()):
        limit = f"above its minimum, {least}" if least else "positive"
        raise InputError(f"ControlledLinear: {name} must be {limit}")
    return (scale - least).expand(shape).log()
