"""Structured guides for sequences: each latent depends on the previous one and on the data the guide may see."""

import copy
import math
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import pad, softplus

from pyrogaps.conditioning import checked_lookahead
from pyrogaps.errors import InputError
from pyrogaps.family import AmortizedGuide, LocalFamily
from pyrogaps.models.sequences import SequenceModel, sequence_mask, within


class Combiner(nn.Module):
    r"""Mean and scale of q(z_t | z_{t-1}, h_t), as in arXiv:1609.09869:

    $$c_t = \tfrac12 (\tanh(W z_{t-1} + b) + h_t), \quad m_t = A c_t + a, \quad
    s_t = \mathrm{softplus}(B c_t + e) + \mathrm{min\_scale}$$

    A call with `z` `(..., latent_dim)` and `h` `(..., rnn_dim)` returns m and s, each `(..., latent_dim)`. z_0 is a
    parameter. If `around` is a sequence model whose next state has mean mu and scale sigma, `draw` uses the mean
    mu + sigma m and the scale sigma s. With innovations of dimension `innovations` the mean is
    mu + sigma m + G (x_t - E[x_t | z_t = mu]), where the gain G is a parameter, initially zero.
    """

    gain: nn.Linear | None

    def __init__(
        self, latent_dim: int, rnn_dim: int, min_scale: float, around: SequenceModel | None, innovations: int | None
    ) -> None:
        super().__init__()
        self.min_scale = min_scale
        self._around = (around,)  # the tuple keeps its parameters out of the guide's
        self.z_0 = nn.Parameter(torch.zeros(latent_dim))
        self.inner, self.heads = nn.Linear(latent_dim, rnn_dim), nn.Linear(rnn_dim, 2 * latent_dim)
        self.gain = None if innovations is None else nn.Linear(innovations, latent_dim, bias=False)
        self._start()

    def reset_parameters(self) -> None:
        """Draw fresh weights, as for a new combiner."""
        self.inner.reset_parameters()
        self.heads.reset_parameters()
        self._start()

    def _start(self) -> None:
        nn.init.zeros_(self.z_0)
        if self.gain is not None:
            nn.init.zeros_(self.gain.weight)

    def forward(self, z: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        loc, raw = self.heads((torch.tanh(self.inner(z)) + h) / 2).chunk(2, -1)
        return loc, softplus(raw) + self.min_scale

    def draw(self, h: Tensor, x: Tensor, keep: Tensor | None) -> Tensor:
        """Sample the sites "z_1" to "z_T" given `h` `(N, T, rnn_dim)`, in a plate; returns z `(N, T, latent_dim)`."""
        z, states, (around,) = self.z_0.expand(len(h), -1), [], self._around
        for t, h_t in enumerate(h.unbind(1)):
            loc, scale = self(z, h_t)
            if around is not None:
                centre, unit = around.transition(z) if t else around.first(len(h))
                loc, scale = centre + unit * loc, unit * scale
                if self.gain is not None:
                    loc = loc + self.gain(x[:, t] - around.likelihood(around.emission(centre)).mean)
            with within(keep, t):
                z = pyro.sample(f"z_{t + 1}", dist.Normal(loc, scale).to_event(1))
            states.append(z)
        return torch.stack(states, -2)


class StructuredNormal(AmortizedGuide, nn.Module):
    r"""A Normal for each latent given the previous one and the data up to `lookahead` steps ahead:

    $$q(z_{1:T} \mid x) = \prod_t \mathcal N(z_t;\, m(z_{t-1}, h_t),\, \mathrm{diag}\, s(z_{t-1}, h_t)^2)$$

    m and s are the outputs of the `Combiner`. For `lookahead` k, h_t is the state of a GRU that has read x_1 to
    x_{min(t+k, length)}, with k padding steps at the end; k = 0 is filtering. For infinite lookahead the GRU reads
    backwards, and h_t has read x_t to x_length; this is smoothing given z_{t-1}. An additional input channel marks
    padding, so that guides with any lookahead have the same parameters.

    A Pyro guide: `guide(x)` or `guide(x, lengths)` with `x` `(N, T, data_dim)`, padded to a common T, and `lengths`
    `(N,)`, integers from 1 to T; sites "z_1" to "z_T", each `(N, latent_dim)`, in the plate "data". Steps beyond a
    sequence's length are masked and their values are not read.

    Args:
        data_dim, latent_dim: of one step.
        rnn_dim: of the GRU's state, and of the combiner.
        lookahead: 0 or more; `math.inf` or "inf" for all of the future.
        min_scale: lower bound of s.
        around: the sequence model that the guide is for. The guide then predicts deviations from the model's transition
            mean, in units of its scale. Needed in practice for processes with little noise.
        innovations: whether the mean also moves in proportion to the deviation of x_t from its expectation under the
            model `around`, as in a Kalman filter. Needed in practice for observations with little noise.

    Raises `InputError` for invalid settings, and for `x` and `lengths` that do not fit.
    """

    def __init__(
        self,
        data_dim: int = 88,
        latent_dim: int = 100,
        rnn_dim: int = 600,
        lookahead: int | float | str = math.inf,
        min_scale: float = 1e-4,
        around: SequenceModel | None = None,
        innovations: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("data_dim", data_dim), ("latent_dim", latent_dim), ("rnn_dim", rnn_dim)):
            if value < 1:
                raise InputError(f"StructuredNormal: {name} must be at least 1, got {value}")
        if not min_scale > 0:
            raise InputError(f"StructuredNormal: min_scale must be positive, got {min_scale}")
        if innovations and around is None:
            raise InputError("StructuredNormal: innovations need the sequence model. Pass it with around=.")
        self.data_dim, self.latent_dim, self.rnn_dim = data_dim, latent_dim, rnn_dim
        self.lookahead = checked_lookahead("StructuredNormal", lookahead)
        self.rnn = nn.GRU(data_dim + 1, rnn_dim, batch_first=True)
        self.combiner = Combiner(latent_dim, rnn_dim, min_scale, around, data_dim if innovations else None)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Run the guide; returns z, shape `(N, T, latent_dim)`."""
        keep = self._mask(x, lengths)
        h = self._encode(x, keep)
        with pyro.plate("data", len(x)):
            return self.combiner.draw(h, x, keep)

    def encode(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """All h_t, shape `(N, T, rnn_dim)`."""
        return self._encode(x, self._mask(x, lengths))

    def _mask(self, x: Tensor, lengths: Tensor | None) -> Tensor | None:
        return sequence_mask(type(self).__name__, x, lengths, self.data_dim)

    def _encode(self, x: Tensor, keep: Tensor | None) -> Tensor:
        period = _period(x, keep)
        if period < len(x):
            part = self._encode(x[:period], None if keep is None else keep[:period])
            return part.repeat(len(x) // period, 1, 1)
        x = x.to(self.combiner.z_0.dtype)
        past = torch.zeros_like(x[..., :1]) if keep is None else (~keep)[..., None].to(x.dtype)
        inputs = torch.cat([x if keep is None else torch.where(keep[..., None], x, torch.zeros_like(x)), past], -1)
        if isinstance(self.lookahead, int):
            beyond = pad(inputs.new_zeros(self.lookahead, self.data_dim), (0, 1), value=1.0)
            states: Tensor = self.rnn(torch.cat([inputs, beyond.expand(len(x), -1, -1)], 1))[0]
            return states[:, self.lookahead :]
        order = _backwards(x, keep)
        return _reorder(self.rnn(_reorder(inputs, order))[0], order)

    def local_family(self, model: Any) -> "LocalStructuredNormal":
        """The family of this guide with a separate h for each datapoint and a copy of the present combiner."""
        return LocalStructuredNormal(self.combiner)

    def start_local(self, guide: "LocalStructuredNormal", x: Tensor, lengths: Tensor | None = None) -> None:
        """Initialise `guide`, a `local_family` set up on the same arguments, to this guide's q(z|x)."""
        guide.start_states(self.encode(x, lengths))


class LocalStructuredNormal(LocalFamily, nn.Module):
    """`StructuredNormal` with a free parameter h_t for each datapoint and step, instead of a network.

    It is called like the model; the first call determines the numbers of datapoints N and steps T. The only parameter
    is `h` `(N, T, rnn_dim)`, initially zero; the combiner is a copy that is not trained. In a plate that subsamples the
    N datapoints, only their rows of `h` are used.

    Raises `InputError` if the data do not match the plate, or do not have T steps.
    """

    h: nn.Parameter | None

    def __init__(self, combiner: Combiner) -> None:
        super().__init__()
        self.combiner = _frozen(combiner)
        self.register_parameter("h", None)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Run the guide; returns z, shape `(N, T, latent_dim)`."""
        keep = sequence_mask(type(self).__name__, x, lengths, x.shape[-1])
        if self.h is None:
            self.h = nn.Parameter(self.combiner.z_0.new_zeros(*x.shape[:2], self.combiner.inner.out_features))
        number, steps = self.h.shape[:2]
        with pyro.plate("data", number) as rows:
            assert rows is not None
            if len(rows) != len(x) or x.shape[1] != steps:
                raise InputError(
                    f"LocalStructuredNormal: has parameters for {number} sequences of {steps} steps, but the data have "
                    f"{len(x)} sequences of {x.shape[1]} steps. Create a new guide for other data."
                )
            return self.combiner.draw(self.h[rows], x, keep)

    def start_states(self, h: Tensor) -> None:
        """Set every h_t: `(N, T, rnn_dim)`."""
        assert self.h is not None
        with torch.no_grad():
            self.h.copy_(h)


def _period(x: Tensor, keep: Tensor | None) -> int:
    """Number of rows after which the batch repeats itself, as it does with several particles; N if it does not.

    This check is cheaper than running the recurrent network on repeated rows.
    """
    if len(x) < 2 or x.requires_grad:
        return len(x)
    sequences = [x.flatten(1)] if keep is None else [x.flatten(1), keep]
    like_first = torch.stack([(part == part[0]).all(1) for part in sequences]).all(0)
    period = int(like_first[1:].nonzero()[0]) + 1 if bool(like_first[1:].any()) else len(x)
    tiled = len(x) % period == 0 and all(torch.equal(part[period:], part[:-period]) for part in sequences)
    return period if tiled else len(x)


def _backwards(x: Tensor, keep: Tensor | None) -> Tensor:
    """Step indices `(N, T)` that reverse every sequence within its length and leave the padding in place."""
    steps = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
    return steps.flip(1) if keep is None else torch.where(keep, keep.sum(1, keepdim=True) - 1 - steps, steps)


def _reorder(sequences: Tensor, order: Tensor) -> Tensor:
    """`sequences` `(N, T, D)` with steps in the given `order` `(N, T)`."""
    return sequences.gather(1, order[..., None].expand(sequences.shape))


def _frozen(combiner: Combiner) -> Combiner:
    """A copy whose weights are buffers, because parameters would be shared by datapoints."""
    copied = copy.deepcopy(combiner)
    for part in copied.modules():
        for name, value in list(part.named_parameters(recurse=False)):
            delattr(part, name)
            part.register_buffer(name, value.detach())
    return copied
