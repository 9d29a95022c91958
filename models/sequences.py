"""Sequences of several lengths, padded to one: what their models and guides check and mask alike.

It lies with the models because guides may look at models, and models never at guides.
"""

from collections.abc import Iterator
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
    """Which steps of `x` `(N, T, data_dim)` lie within their sequence, `(N, T)`; None where all of them do.

    `lengths` `(N,)` are integers from 1 to T, None for T throughout. Their values, which to look at makes a device
    wait, are checked while Pyro's validation is on.

    Raises `InputError`, on behalf of `program`, for shapes and lengths other than these.
    """
    if x.dim() != 3 or x.shape[-1] != data_dim:
        raise InputError(f"{program}: x must have shape (N, T, {data_dim}), sequences first, got {tuple(x.shape)}")
    number, steps = x.shape[:2]
    if not number or not steps:
        raise InputError(f"{program}: x of shape {tuple(x.shape)} holds no time steps; leave empty sequences out")
    if lengths is None:
        return None
    if not isinstance(lengths, Tensor) or lengths.is_floating_point() or lengths.dtype == torch.bool:
        kind = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
        raise InputError(f"{program}: lengths must be a tensor of integers, got {kind}; convert them by .long()")
    if lengths.shape != (number,):
        raise InputError(f"{program}: lengths must have shape ({number},), one a sequence, got {tuple(lengths.shape)}")
    if is_validation_enabled():
        low, high = int(lengths.min()), int(lengths.max())
        if low < 1 or high > steps:
            remedy = "leave out empty ones" if low < 1 else "pad x further"
            raise InputError(
                f"{program}: lengths must be from 1 to {steps}, the steps of x, got {low} to {high}; {remedy}"
            )
    return torch.arange(steps, device=x.device) < lengths[:, None]


def within(keep: Tensor | None, step: int) -> AbstractContextManager[object]:
    """A context in which sites of time step `step`, from 0, count for the sequences alone that reach so far.

    `keep` is what `sequence_mask` gave.
    """
    return nullcontext() if keep is None else poutine.mask(mask=keep[:, step])  # type: ignore[call-overload]


class SequenceModel(nn.Module):
    r"""A Markov chain of latent states, each seen through its observation: the Pyro program of the models here.

    $$z_1 \sim \mathcal N(m_1, s_1^2), \quad z_t \mid z_{t-1} \sim \mathcal N(m(z_{t-1}), s(z_{t-1})^2), \quad
    x_t \sim p(\cdot \mid g(z_t))$$

    `model(x)` or `model(x, lengths)`: `x` `(N, T, D)`, padded to one T, and `lengths` `(N,)`, integers from 1 to T.
    Sites "z_1" to "z_T", each `(N, d)`, then "x_1" to "x_T", in the plate "data"; steps beyond a sequence's length are
    masked: what stands there counts for nothing, though Pyro's validation wants it in the likelihood's support. A
    subclass has `data_dim` D and the methods `first`, `transition`, `emission` and `likelihood`.

    Raises `InputError` for `x` and `lengths` of other shapes, and for lengths out of range.
    """

    data_dim: int

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Run the model; returns z, shape `(N, T, d)`."""
        keep = sequence_mask(type(self).__name__, x, lengths, self.data_dim)
        x = x.to(next(chain(self.parameters(), self.buffers())).dtype)
        with pyro.plate("data", len(x)):
            z = torch.stack(list(self._states(x, keep)), -2)
            # All steps at once: nothing that is drawn hangs on an observation.
            for t, output in enumerate(self.emission(z).unbind(-2)):
                with within(keep, t):
                    pyro.sample(f"x_{t + 1}", self.likelihood(output), obs=x[:, t])
        return z

    def _states(self, x: Tensor, keep: Tensor | None) -> Iterator[Tensor]:
        z: Tensor | None = None
        for t in range(x.shape[1]):
            loc, scale = self.first(len(x)) if z is None else self.transition(z)
            with within(keep, t):
                z = pyro.sample(f"z_{t + 1}", dist.Normal(loc, scale).to_event(1))
            yield z

    def first(self, number: int) -> tuple[Tensor, Tensor]:
        """Mean and scale of z_1, each `(number, d)`."""
        raise NotImplementedError

    def transition(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and scale of the step after `z`, each of its shape `(..., d)`."""
        raise NotImplementedError

    def emission(self, z: Tensor) -> Tensor:
        """What the likelihood is made of, `(..., D)`, for states `z` `(..., d)`."""
        raise NotImplementedError

    def likelihood(self, output: Tensor) -> dist.TorchDistribution:
        """p(x_t|z_t) for the emission `(..., D)` of z_t, its event `(D,)`."""
        raise NotImplementedError
