"""The logistic distribution on the 256 grey values of a byte image."""

from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.utils import broadcast_all
from torch.nn.functional import logsigmoid

HIGHEST = 255

# In grey levels: wide enough for k/255 in single precision, narrow enough to reject values on another scale.
TOLERANCE = 1e-3


class _GreyValues(constraints.Constraint):
    """The values k/255, k = 0 .. 255, up to rounding."""

    is_discrete = True

    def check(self, value: Tensor) -> Tensor:
        level = HIGHEST * value
        nearest = level.round()
        return ((level - nearest).abs() <= TOLERANCE) & (nearest >= 0) & (nearest <= HIGHEST)


grey_values = _GreyValues()


class DiscretisedLogistic(TorchDistribution):
    r"""A logistic distribution rounded to the nearest grey value k/255, k = 0 .. 255.

    $$P(k/255) = \sigma\Big(\frac{(k + 1/2)/255 - m}{s}\Big) - \sigma\Big(\frac{(k - 1/2)/255 - m}{s}\Big)$$

    m is `loc`, any real number, and s > 0 is `scale`, both in units of the grey range from 0 to 1; their shapes
    broadcast. The bins of 0 and 1 extend to minus and plus infinity, so that the masses sum to 1 for any m and s.
    `log_prob` is the log of a probability mass, in nats, and accurate far into the tails. The form is that of Salimans
    et al., arXiv:1701.05517, with one component; arXiv:1606.04934 uses bins [k/256, (k+1)/256) instead.

    With validation on, raises `ValueError` if `scale` is not positive, and in `log_prob` for values that are not grey
    values.
    """

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive}  # noqa: RUF012
    support = grey_values
    has_enumerate_support = True

    def __init__(self, loc: Tensor | float, scale: Tensor | float, validate_args: bool | None = None) -> None:
        self.loc, self.scale = broadcast_all(loc, scale)
        super().__init__(self.loc.shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: "DiscretisedLogistic | None" = None) -> "DiscretisedLogistic":
        checked: Any = self._get_checked_instance
        new: DiscretisedLogistic = checked(DiscretisedLogistic, _instance)
        new.loc, new.scale = self.loc.expand(batch_shape), self.scale.expand(batch_shape)
        super(DiscretisedLogistic, new).__init__(torch.Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Grey values, `sample_shape + batch_shape`."""
        with torch.no_grad():
            uniform = torch.rand(self._extended_shape(sample_shape), dtype=self.loc.dtype, device=self.loc.device)
            # rand may return 0, for which the logistic variable is infinite.
            uniform = uniform.clamp(min=torch.finfo(self.loc.dtype).tiny)
            level: Tensor = HIGHEST * (self.loc + self.scale * torch.logit(uniform))
            return level.round().clamp(0, HIGHEST) / HIGHEST

    def log_prob(self, value: Tensor) -> Tensor:
        """log P(`value`), with the broadcast shape of `value` and the distribution."""
        if self._validate_args:
            self._validate_sample(value)
        level = (HIGHEST * value).round()
        upper = ((level + 0.5) / HIGHEST - self.loc) / self.scale
        lower = ((level - 0.5) / HIGHEST - self.loc) / self.scale
        # sigma(b) - sigma(a) = sigma(b) sigma(-a) (1 - exp(a - b)) avoids differences of close numbers in the tails.
        zero = torch.zeros_like(upper)
        below = torch.where(level == HIGHEST, zero, logsigmoid(upper))
        above = torch.where(level == 0, zero, logsigmoid(-lower))
        width = 1 / (HIGHEST * self.scale)
        inner = torch.where((level == 0) | (level == HIGHEST), zero, torch.log(-torch.expm1(-width)))
        return below + above + inner

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """All 256 grey values, `(256, *batch_shape)`, or `(256, 1, ..., 1)` without `expand`."""
        values = torch.arange(HIGHEST + 1, dtype=self.loc.dtype, device=self.loc.device) / HIGHEST
        values = values.reshape(-1, *(1 for _ in self.batch_shape))
        return values.expand(-1, *self.batch_shape) if expand else values
