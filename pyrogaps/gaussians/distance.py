"""How far apart two Gaussians are."""

import torch
from torch import Tensor

from pyrogaps.gaussians.gaussian import Gaussian
from pyrogaps.gaussians.low_rank import LowRank


def bhattacharyya(first: Gaussian, second: Gaussian) -> float:
    r"""The Bhattacharyya distance of two Gaussians, of one datapoint each, with scales of one form.

    $$\tfrac18 \delta^T C^{-1} \delta + \tfrac12 \log\frac{|C|}{\sqrt{|C_1| |C_2|}}, \quad C = \tfrac12 (C_1 + C_2)$$
    """
    shift = (first.loc - second.loc)[0].double()
    if isinstance(one := first.scale, LowRank) and isinstance(other := second.scale, LowRank):
        return _low_rank(one.to(torch.float64), other.to(torch.float64), shift)
    factors = torch.cat([first.factor(), second.factor()]).double()
    middle = torch.linalg.cholesky((factors @ factors.mT).mean(0))
    whitened = torch.linalg.solve_triangular(middle, shift[:, None], upper=False)
    log_scales = factors.diagonal(dim1=-2, dim2=-1).log().sum(-1).mean()
    return float(whitened.square().sum() / 8 + middle.diagonal().log().sum() - log_scales)


def _low_rank(one: LowRank, other: LowRank, shift: Tensor) -> float:
    r"""By $C = E^{1/2} (I + W S W^T) E^{1/2}$, E diagonal and S small (Woodbury)."""
    both = (one, other)
    root = torch.stack([each.diagonal[0].square() for each in both]).mean(0).sqrt()
    axes = torch.cat([each.diagonal[0][:, None] * each.axes[0] for each in both], -1) / (2**0.5 * root[:, None])
    stretch = torch.cat([each.factors[0].square() - 1 for each in both])
    inner = torch.eye(len(stretch), dtype=root.dtype, device=root.device) + stretch[:, None] * (axes.T @ axes)
    whitened = shift / root
    along = axes.T @ whitened
    squared = whitened.square().sum() - along @ torch.linalg.solve(inner, stretch * along)
    log_scales = torch.stack([each.diagonal.log().sum() + each.log_factors[0] for each in both]).mean()
    return float(squared / 8 + root.log().sum() + 0.5 * torch.linalg.slogdet(inner).logabsdet - log_scales)
