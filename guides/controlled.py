"""Guides for state-space models with actions: what a filter, a lookahead and a smoother are shown."""

import math

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyrogaps.conditioning import checked_lookahead
from pyrogaps.errors import InputError
from pyrogaps.family import AmortizedGuide
from pyrogaps.guides.sequential import StructuredNormal
from pyrogaps.models.controlled import ControlledLinear, actions_before, check_controlled, times

MIN_SCALE = 1e-6  # of a diagonal of L


class LinearStructuredNormal(AmortizedGuide, nn.Module):
    r"""A linear-Gaussian factor for each step, given the state before and the data up to `lookahead` steps ahead:

    $$q(z_{1:T} \mid x, u) = \prod_t \mathcal N(z_t;\, G_t z_{t-1} + \sum_s M_{ts} (x_s, u_{s-1}),\, L_t L_t'), \quad
    s \le \min(t+k, T)$$

    All of G, M and L are parameters, so that the best guide with this lookahead for any `ControlledLinear` is in the
    family. Lookahead 0 is filtering. Infinite lookahead is smoothing given z_{t-1}; then s >= t, because the past tells
    no more. Guides of all lookaheads differ only in which M_ts are zero. Data should have mean zero: no factor has an
    offset.

    A Pyro guide: `guide(x, u)` with `x` `(N, T, *systems, D)` and `u` `(N, T, *systems, K)`, T = `steps`; sites "z_1"
    to "z_T", each `(N, *systems, latent_dim)`, in the plate "data".

    Args:
        data_dim, action_dim, latent_dim: of one step.
        steps: T.
        lookahead: 0 or more; `math.inf` or "inf" for all of the future.
        systems: of the model, see `ControlledLinear`.

    Raises `InputError` for invalid settings, and for `x` and `u` that do not fit.
    """

    mask: Tensor

    def __init__(
        self,
        data_dim: int,
        action_dim: int,
        latent_dim: int,
        steps: int,
        lookahead: int | float | str = math.inf,
        systems: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        for name, value in (
            ("data_dim", data_dim),
            ("action_dim", action_dim),
            ("latent_dim", latent_dim),
            ("steps", steps),
        ):
            if value < 1:
                raise InputError(f"LinearStructuredNormal: {name} must be at least 1, got {value}")
        self.data_dim, self.action_dim, self.latent_dim, self.steps = data_dim, action_dim, latent_dim, steps
        self.systems, self.lookahead = tuple(systems), checked_lookahead("LinearStructuredNormal", lookahead)
        step = torch.arange(steps)
        ahead = step - step[:, None]
        seen = ahead >= 0 if self.lookahead == math.inf else ahead <= self.lookahead
        self.register_buffer("mask", seen[:, None, :, None].to(torch.get_default_dtype()))
        d = latent_dim
        self.weight = nn.Parameter(torch.zeros(*self.systems, steps, d, steps, data_dim + action_dim))
        self.gain = nn.Parameter(torch.zeros(*self.systems, steps, d, d))
        self.root = nn.Parameter(torch.zeros(*self.systems, steps, d, d))

    @classmethod
    def best(
        cls, model: ControlledLinear, steps: int, lookahead: int | float | str = math.inf
    ) -> "LinearStructuredNormal":
        """The guide with the highest mean ELBO of this lookahead, on data from `model`, a single system.

        Its mean ELBO is that of log p(x|u) less `model.conditioning_gap`.
        """
        guide = cls(model.data_dim, model.action_dim, model.latent_dim, steps, lookahead).to(model.dtype)
        chain, size = model.without_actions(), model.data_dim + model.action_dim
        backward = chain.backward_information(steps)
        # The means are linear in the inputs, so that unit vectors show them.
        units = torch.eye(steps * size, dtype=model.dtype).reshape(-1, steps, size)
        x, before = units.split((model.data_dim, model.action_dim), -1)
        u = torch.cat([before[:, 1:], torch.zeros_like(before[:, :1])], 1)
        shift, R = model.response(u), backward.covariance
        information = chain.expected_information(x - times(model.C, shift), guide.lookahead)
        pushed = times(model.B, actions_before(u))
        moved = pushed - times(R @ backward.information, pushed)
        loc = times(R, information + times(backward.information, shift)) + moved
        roots = torch.linalg.cholesky(R)
        with torch.no_grad():
            # What a smoother is not shown has a weight of 0 but for rounding.
            guide.weight.copy_(loc.reshape(steps, size, steps, -1).permute(2, 3, 0, 1) * guide.mask)
            guide.gain.copy_(backward.gain)
            raw = (roots.diagonal(dim1=-2, dim2=-1) - MIN_SCALE).expm1().log()
            guide.root.copy_(roots.tril(-1) + torch.diag_embed(raw))
        return guide

    def forward(self, x: Tensor, u: Tensor) -> Tensor:
        """Run the guide; returns z, shape `(N, T, *systems, latent_dim)`."""
        offsets, roots = self._offsets(x, u), self.roots()
        z, states = torch.zeros_like(offsets[:, 0]), []
        with pyro.plate("data", len(x)):
            for t in range(self.steps):
                loc = offsets[:, t] + times(self.gain[..., t, :, :], z)
                factor = dist.MultivariateNormal(loc, scale_tril=roots[..., t, :, :])
                z = pyro.sample(f"z_{t + 1}", factor.to_event(len(self.systems)))
                states.append(z)
        return torch.stack(states, 1)

    def roots(self) -> Tensor:
        """L, lower triangular, `(*systems, T, d, d)`."""
        return self.root.tril(-1) + torch.diag_embed(softplus(self.root.diagonal(dim1=-2, dim2=-1)) + MIN_SCALE)

    def _offsets(self, x: Tensor, u: Tensor) -> Tensor:
        check_controlled("LinearStructuredNormal", x, u, self.data_dim, self.action_dim, self.systems)
        if x.shape[1] != self.steps:
            raise InputError(
                f"LinearStructuredNormal: x has {x.shape[1]} steps, but the guide is for {self.steps}. "
                "Create a guide for sequences of this length."
            )
        inputs = torch.cat([x, actions_before(u)], -1).to(self.weight.dtype)
        inputs = inputs.movedim(1, -2).movedim(0, -3).flatten(-2)
        weight = (self.weight * self.mask).flatten(-4, -3).flatten(-2)
        offsets = inputs @ weight.mT
        return offsets.unflatten(-1, (self.steps, self.latent_dim)).movedim(-3, 0).movedim(-2, 1)


class ControlledNormal(AmortizedGuide, nn.Module):
    """`StructuredNormal` that reads an observation and the action before it at every step.

    A Pyro guide: `guide(x, u)` with `x` `(N, T, data_dim)` and `u` `(N, T, action_dim)`. Lookahead k sees x up to step
    t + k, and the actions that moved the state there. Arguments are those of `StructuredNormal`.

    Raises `InputError` for invalid settings, and for `x` and `u` that do not fit.
    """

    def __init__(
        self,
        data_dim: int,
        action_dim: int,
        latent_dim: int = 4,
        rnn_dim: int = 64,
        lookahead: int | float | str = math.inf,
        min_scale: float = 1e-4,
    ) -> None:
        super().__init__()
        self.data_dim, self.action_dim = data_dim, action_dim
        self.structured = StructuredNormal(data_dim + action_dim, latent_dim, rnn_dim, lookahead, min_scale)
        self.lookahead = self.structured.lookahead

    def forward(self, x: Tensor, u: Tensor) -> Tensor:
        """Run the guide; returns z, shape `(N, T, latent_dim)`."""
        check_controlled("ControlledNormal", x, u, self.data_dim, self.action_dim)
        z: Tensor = self.structured(torch.cat([x, actions_before(u).to(x.dtype)], -1))
        return z
