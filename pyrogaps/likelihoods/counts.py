"""Negative binomials by their mean and inverse dispersion, as models of the counts of genes have them."""

from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Gamma, constraints
from torch.nn.functional import softplus


class NegativeBinomial(TorchDistribution):
    r"""A count with mean mu and variance mu + mu^2 / theta.

    $$\log P(x) = x \log \frac{\mu}{\theta} - (x + \theta) \log\Big(1 + \frac{\mu}{\theta}\Big)
      + \log\frac{\Gamma(x + \theta)}{\Gamma(\theta) \, x!}$$

    `mu` > 0 is the mean and `theta` > 0 the inverse dispersion; their shapes broadcast. It is torch's distribution of
    that name with total count theta and logits log mu - log theta, in fewer operations: theta keeps its own shape, such
    as that of genes alone, until it meets x.

    With validation on, raises `ValueError` if mu or theta is not positive, and in `log_prob` for values that are no
    counts.
    """

    arg_constraints = {"mu": constraints.positive, "theta": constraints.positive}  # noqa: RUF012
    support = constraints.nonnegative_integer
    shaped = ("mu",)  # the parameters that take the batch shape

    def __init__(self, mu: Tensor, theta: Tensor, validate_args: bool | None = None) -> None:
        self.mu, self.theta = mu, theta
        super().__init__(torch.broadcast_shapes(mu.shape, theta.shape), validate_args=validate_args)

    @property
    def mean(self) -> Tensor:
        """`mu`, in the batch shape."""
        return self.mu.expand(self.batch_shape)

    @property
    def variance(self) -> Tensor:
        """mu + mu^2 / theta."""
        return self.mu + self.mu**2 / self.theta

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        checked: Any = self._get_checked_instance
        new = checked(type(self), _instance)
        vars(new).update({name: getattr(self, name) for name in self.arg_constraints})
        vars(new).update({name: getattr(self, name).expand(batch_shape) for name in self.shaped})
        TorchDistribution.__init__(new, torch.Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Counts, `sample_shape + batch_shape`: Poisson with a rate from a Gamma."""
        with torch.no_grad():
            gamma = Gamma(self.theta, self.theta / self.mu, validate_args=False).expand(self.batch_shape)
            return torch.poisson(gamma.sample(torch.Size(sample_shape)))

    def log_prob(self, value: Tensor) -> Tensor:
        """log P(`value`), with the broadcast shape of `value` and the distribution."""
        if self._validate_args:
            self._validate_sample(value)
        ratio = self.mu / self.theta
        return self._log_count(value, ratio, ratio.log1p())

    def _log_count(self, value: Tensor, ratio: Tensor, log1p: Tensor) -> Tensor:
        """log P of the negative binomial, given mu / theta and log(1 + mu / theta)."""
        total = value + self.theta
        # Of data and theta alone, so that records of densities compute it once for many means.
        constant = total.lgamma() - (value + 1).lgamma() - self.theta.lgamma()
        log_prob: Tensor = value * ratio.log() - total * log1p + constant
        return log_prob


class ZeroInflatedNegativeBinomial(NegativeBinomial):
    r"""A count that is 0 with probability sigma(g), and else that of `NegativeBinomial(mu, theta)`.

    g is `zero_logits`, whose shape broadcasts with those of mu and theta. `mean` and `variance` are those of the
    mixture, and `mu` the mean of its second part.
    """

    arg_constraints = {**NegativeBinomial.arg_constraints, "zero_logits": constraints.real}  # noqa: RUF012
    shaped = ("zero_logits",)

    def __init__(self, mu: Tensor, theta: Tensor, zero_logits: Tensor, validate_args: bool | None = None) -> None:
        self.mu, self.theta, self.zero_logits = mu, theta, zero_logits
        shape = torch.broadcast_shapes(mu.shape, theta.shape, zero_logits.shape)
        TorchDistribution.__init__(self, shape, validate_args=validate_args)

    @property
    def mean(self) -> Tensor:
        """mu sigma(-g)."""
        return self.mu * torch.sigmoid(-self.zero_logits)

    @property
    def variance(self) -> Tensor:
        """sigma(-g) (mu + mu^2 / theta + sigma(g) mu^2)."""
        zero = torch.sigmoid(self.zero_logits)
        return (1 - zero) * (super().variance + zero * self.mu**2)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Counts, `sample_shape + batch_shape`."""
        counts = super().sample(sample_shape)
        with torch.no_grad():
            return counts * torch.bernoulli(torch.sigmoid(-self.zero_logits).expand(counts.shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """log P(`value`): log sigma(-g) + log NB(x), and for x = 0 also log(1 + e^g / NB(0))."""
        if self._validate_args:
            self._validate_sample(value)
        ratio = self.mu / self.theta
        log1p = ratio.log1p()
        # A product with 0 or 1, which is several times faster than `torch.where`; NB(0) is never 0.
        zero = (value == 0).to(log1p.dtype)
        further = zero * softplus(self.zero_logits + self.theta * log1p)
        log_prob: Tensor = self._log_count(value, ratio, log1p) - softplus(self.zero_logits) + further
        return log_prob
