"""Base classes of sequence models, and checks and masks for sequences padded to a common length.

It is part of `models` because guides may import models, but models never import guides.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import chain

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.util import is_validation_enabled
from torch import Tensor, nn

from pyrogaps.errors import InputError


def sequence_mask(program: str, x: Tensor, lengths: Tensor | None, data_dim: int) -> Tensor | None:
    """Mask `(N, T)` of the steps of `x` `(N, T, data_dim)` within their sequence; None if `lengths` is None.

    `lengths` `(N,)` are integers from 1 to T; None means T for all. Their values are checked only while Pyro's
    validation is on, because reading them synchronises the device.

    Raises `InputError`, naming `program`, for other shapes and lengths.
    """
    if x.dim() != 3 or x.shape[-1] != data_dim:
        raise InputError(f"{program}: x must have shape (N, T, {data_dim}), got {tuple(x.shape)}")
    number, steps = x.shape[:2]
    if not number or not steps:
        raise InputError(f"{program}: x of shape {tuple(x.shape)} has no time steps. Leave out empty sequences.")
    if lengths is None:
        return None
    if not isinstance(lengths, Tensor) or lengths.is_floating_point() or lengths.dtype == torch.bool:
        kind = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
        raise InputError(f"{program}: lengths must be a tensor of integers, got {kind}. Convert them with .long().")
    if lengths.shape != (number,):
        raise InputError(
            f"{program}: lengths must have shape ({number},), one length per sequence, got {tuple(lengths.shape)}"
        )
    if is_validation_enabled():
        low, high = int(lengths.min()), int(lengths.max())
        if low < 1 or high > steps:
            remedy = "Leave out empty sequences." if low < 1 else "Pad x to the longest sequence."
            raise InputError(
                f"{program}: lengths must be from 1 to {steps}, the number of time steps of x, got {low} to {high}. "
                f"{remedy}"
            )
    return torch.arange(steps, device=x.device) < lengths[:, None]


def within(keep: Tensor | None, step: int) -> AbstractContextManager[object]:
    """A context that masks sites of time step `step`, from 0, for shorter sequences; `keep` is a `sequence_mask`."""
    return nullcontext() if keep is None else poutine.mask(mask=keep[:, step])  # type: ignore[call-overload]


class MarkovChain(nn.Module):
    """Latent states with one observation each, drawn step by step: what sequence models share.

    A subclass sets `data_dim` D, implements `first`, `emission` and `likelihood`, and has a `forward` that calls `run`.
    """

    data_dim: int
    event_dim = 1  # of a state

    def run(self, x: Tensor, keep: Tensor | None, step: Callable[[Tensor, int], tuple[Tensor, Tensor]]) -> Tensor:
        """Draw all states and observe `x` `(N, T, D)`; returns z, shape `(N, T, d)`.

        `step(z, t)` is the mean and scale of the state of step t, from 0, given the state before, `z`; `keep` is a
        `sequence_mask`.
        """
        with pyro.plate("data", len(x)):
            z = torch.stack(list(self._states(x, keep, step)), -2)
            # All steps at once, because no draw depends on an observation.
            for t, output in enumerate(self.emission(z).unbind(-2)):
                with within(keep, t):
                    pyro.sample(f"x_{t + 1}", self.likelihood(output), obs=x[:, t])
        return z

    def _states(
        self, x: Tensor, keep: Tensor | None, step: Callable[[Tensor, int], tuple[Tensor, Tensor]]
    ) -> Iterator[Tensor]:
        z: Tensor | None = None
        for t in range(x.shape[1]):
            loc, scale = self.first(len(x)) if z is None else step(z, t)
            with within(keep, t):
                z = pyro.sample(f"z_{t + 1}", dist.Normal(loc, scale).to_event(self.event_dim))
            yield z

    def first(self, number: int) -> tuple[Tensor, Tensor]:
        """Mean and scale of z_1, each `(number, d)`."""
        raise NotImplementedError

    def emission(self, z: Tensor) -> Tensor:
        """The parameter of the likelihood, `(..., D)`, for states `z` `(..., d)`."""
        raise NotImplementedError

    def likelihood(self, output: Tensor) -> dist.TorchDistribution:
        """p(x_t|z_t) for the emission `(..., D)` of z_t, event shape `(D,)`."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its parameters and buffers, in which it computes."""
        return next(chain(self.parameters(), self.buffers())).dtype


class SequenceModel(MarkovChain):
    r"""A Markov chain of latent states with one observation each: base class of the sequence models.

    $$z_1 \sim \mathcal N(m_1, s_1^2), \quad z_t \mid z_{t-1} \sim \mathcal N(m(z_{t-1}), s(z_{t-1})^2), \quad
    x_t \sim p(\cdot \mid g(z_t))$$

    Call `model(x)` or `model(x, lengths)` with `x` `(N, T, D)`, padded to a common T, and `lengths` `(N,)`, integers
    from 1 to T. Sites "z_1" to "z_T", each `(N, d)`, then "x_1" to "x_T", in the plate "data". Steps beyond a
    sequence's length are masked. Their values have no effect, but Pyro's validation requires them to lie in the
    likelihood's support. A subclass sets `data_dim` D and implements `first`, `transition`, `emission` and
    `likelihood`.

    Raises `InputError` for `x` and `lengths` of other shapes, and for lengths out of range.
    """

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Run the model; returns z, shape `(N, T, d)`."""
        keep = sequence_mask(type(self).__name__, x, lengths, self.data_dim)
        return self.run(x.to(self.dtype), keep, lambda z, _: self.transition(z))

    def transition(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and scale of the state after `z`, each `(..., d)` like `z`."""
        raise NotImplementedError
