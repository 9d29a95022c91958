r"""log p(x) where a posterior has several modes: the sum of one integral for each.

With Gaussians $g_k$ of masses $m_k$ at the modes of a datapoint, the shares
$r_k(z) = m_k g_k(z) / \sum_j m_j g_j(z)$ add up to 1 everywhere, so that
$p(x) = \sum_k \int p(x, z)\, r_k(z)\, dz$ exactly. Each integrand has one mode, near $g_k$, and is measured from there
as any other density.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from pyrogaps.capture import GradientEvaluator
from pyrogaps.capture.slots import PointDensity, Slots
from pyrogaps.evidence.climb import Climb, Climbed
from pyrogaps.evidence.ladder_settings import LadderSettings
from pyrogaps.gaussians import Curvature, Gaussian
from pyrogaps.log_weights import log_mean_exp
from pyrogaps.modes import Modes
from pyrogaps.run import Run
from pyrogaps.streams import Chunk


@dataclass(frozen=True)
class Parts(Chunk):
    """A block whose datapoints repeat: one entry for each part of each."""

    owners: Tensor = field(compare=False)

    @property
    def indices(self) -> Tensor:
        return self.owners


class PartSlots(Slots):
    """As `Slots`, of p(x, z) r_k(z): a slot is a part of a datapoint, of the M in `modes`."""

    def __init__(self, evaluator: GradientEvaluator, modes: Modes) -> None:
        owners = modes.owners
        super().__init__(evaluator, Parts(0, len(owners), owners))
        self._gaussian, self._log_masses = modes.curvature.gaussian, modes.log_masses
        same = owners[:, None] == owners
        # The parts of the same datapoint, itself among them, padded with none.
        most = int(same.sum(1).max())
        self._siblings = torch.stack([pad(row.nonzero()[:, 0], (0, most - int(row.sum())), value=-1) for row in same])

    def at(self, slots: Tensor) -> PointDensity:
        siblings = self._siblings[slots]
        log_masses = torch.where(siblings >= 0, self._log_masses[siblings], -torch.inf)
        gaussians = [self._gaussian.at(column.clamp(min=0)) for column in siblings.T]
        own = (siblings == slots[:, None]).long().argmax(1)
        return PartDensity(super().at(slots), gaussians, log_masses, own)


@dataclass(frozen=True)
class PartDensity:
    """log p(x, z) + log r_k(z) of B parts: `gaussians` of all K parts of the same datapoint, the logarithms of their
    masses `(B, K)`, and the index of each part among them, `own` `(B,)`.
    """

    whole: PointDensity
    gaussians: list[Gaussian]
    log_masses: Tensor
    own: Tensor

    @property
    def dim(self) -> int:
        return self.whole.dim

    def __call__(self, z: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        (value,), (gradient,) = self.whole(z)
        share, slope = self._log_share(z)
        return (value + share,), (gradient + slope,)

    def gradients(self, z: Tensor) -> tuple[Tensor, ...]:
        return (self.whole.gradients(z)[0] + self._log_share(z)[1],)

    def values(self, z: Tensor) -> tuple[Tensor, ...]:
        return (self.whole.values(z)[0] + self._log_share(z)[0],)

    def _log_share(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """log r_k `(S, B)` and its gradient `(S, B, dim)`."""
        pairs = [gaussian.log_density(z) for gaussian in self.gaussians]
        masses = self.log_masses.to(z)
        joint = torch.stack([value for value, _ in pairs], -1) + masses  # (S, B, K)
        # Beyond the reach of all Gaussians in this precision, the parts that there are share alike.
        beyond = (joint == -torch.inf).all(-1, keepdim=True)
        joint = torch.where(beyond, torch.where(masses > -torch.inf, 0.0, masses), joint)
        slopes = torch.stack([slope for _, slope in pairs], -1)  # (S, B, dim, K)
        own = self.own[None, :, None].expand(*joint.shape[:2], 1)
        share = joint.gather(-1, own)[..., 0] - joint.logsumexp(-1)
        mean = (slopes * joint.softmax(-1)[:, :, None]).sum(-1)
        return share, slopes.gather(-1, own[:, :, None].expand(*slopes.shape[:3], 1))[..., 0] - mean


def climbed_by_parts(
    evaluator: GradientEvaluator, modes: Modes, settings: LadderSettings, run: Run, anchor: Curvature | None = None
) -> Climbed:
    """The ladder for every part of each datapoint, from `anchor` or the Gaussians of `modes`, and what they add up
    to.
    """
    parts = Climb(PartSlots(evaluator, modes), anchor or modes.curvature, settings, run).climbed()
    places = [(modes.owners == owner).nonzero()[:, 0] for owner in range(len(modes.num_evaluations))]
    columns = {name: torch.stack([_whole(name, parts, place) for place in places]) for name in parts.columns}
    columns["evaluations"] = columns["evaluations"] + modes.num_evaluations
    columns["vouched"] = columns["vouched"] * modes.complete  # weights say nothing of modes that were not found
    return Climbed([_summed([parts.log_weights[k] for k in place.tolist()]) for place in places], columns)


def _whole(name: str, parts: Climbed, place: Tensor) -> Tensor:
    """A column of a datapoint, from those of its parts."""
    column, upper = parts.columns[name][place], parts.columns["upper"][place]
    if name == "upper":  # at least as large as log p(x) in expectation, because log-sum-exp is convex and increasing
        return upper.logsumexp(0)
    if name == "upper_mcse":
        return (column * upper.softmax(0)).norm() if torch.isfinite(upper).all() else column.max()
    if name == "vouched":
        return column.min()
    if name == "acceptance":
        return column.nanmean()
    return column.sum() if name == "evaluations" else column.max()


def _summed(log_weights: list[Tensor]) -> Tensor:
    """Log-weights of the sum of the integrals, as many as the smallest part has; the others are averaged in groups."""
    number = min(map(len, log_weights))
    parts = [column[: len(column) // number * number].unflatten(0, (-1, number)) for column in log_weights]
    return torch.stack([log_mean_exp(part) for part in parts]).logsumexp(0)
