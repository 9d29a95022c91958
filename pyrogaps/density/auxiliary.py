"""Posteriors over the latents and an auxiliary variable."""

from collections.abc import Callable
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor


class AuxiliaryPosterior(dist.TorchDistribution):
    r"""q(z, v) over latents z and an auxiliary variable v, scored with a reverse model r(v|z):

    $$\log \tilde q(z, v) = \log q(z, v) - \log r(v|z), \quad
      \mathbb E_q [\log p(x, z) - \log \tilde q(z, v)] \le \mathcal L[q(z)] \le \log p(x)$$

    A value is z and v in one vector `(*batch, dim + auxiliary)`, z its first `dim` elements. `exp(log_prob)` is not
    a density; it takes the place of q(z) in a lower bound (Ranganath et al., arXiv:1511.02386; Maaloe et al.,
    arXiv:1602.05473). `reverse(z)` gives r(v|z).
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_rsample = True

    def __init__(self, joint: Any, reverse: Callable[[Tensor], Any], dim: int) -> None:
        self.joint, self.reverse, self.dim = joint, reverse, dim
        super().__init__(joint.batch_shape, joint.event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        return self.joint.support

    @property
    def num_auxiliary(self) -> int:
        """Number of elements of a value that belong to v."""
        return int(self.event_shape[0]) - self.dim

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        draw: Tensor = self.joint.rsample(sample_shape)
        return draw

    def log_prob(self, value: Tensor) -> Tensor:
        log_q: Tensor = self.joint.log_prob(value)
        return log_q - self.log_reverse(value)

    def log_reverse(self, value: Tensor) -> Tensor:
        """log r(v|z)."""
        log_r: Tensor = self.reverse(value[..., : self.dim]).log_prob(value[..., self.dim :])
        return log_r

    def expand(self, batch_shape: Any, _instance: Any = None) -> "AuxiliaryPosterior":
        return AuxiliaryPosterior(self.joint.expand(batch_shape), self.reverse, self.dim)
