"""What a model observes of every datapoint: a fingerprint of the values, and the base measure of their density.

Two densities of the same data can be compared only where they are densities of the same values with respect to the same
measure: log p(x) of counts and that of the same pixels divided by 255 differ by a constant, log p(x) of a probability
and that of a density by anything.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyrogaps.density.joint import JointDensity
from pyrogaps.density.layout import distribution_mask, leaf, plate_dim
from pyrogaps.density.runs import evaluating
from pyrogaps.density.score import is_bookkeeping
from pyrogaps.density.structure import is_factor
from pyrogaps.density.support_words import support_words
from pyrogaps.density.supports import support_of

DISCRETE, CONTINUOUS, FACTOR = "discrete", "continuous", "factor"
# Supports of fewer dimensions than their values have: a density is with respect to the volume of the surface.
SURFACES = {
    "_Simplex", "_Sphere", "_CorrCholesky", "_CorrMatrix", "_PositiveDefinite", "_PositiveSemidefinite", "_Symmetric",
    "_LowerCholesky", "_SoftplusLowerCholesky", "_LowerTriangular", "_UnitLowerCholesky",
}  # fmt: skip


@dataclass(frozen=True)
class Observed:
    """The values that an observed site has over some datapoints, masked elements left out.

    Attributes:
        site: its name.
        distribution: the likelihood's class.
        measure: "discrete" (probabilities), "continuous" (densities by volume), a surface by name, or "factor", whose
            measure is not known.
        support: in words.
        low, high, mean, deviation: range, mean and standard deviation of the values.
        whole: whether all are whole numbers.
        count: the number of values.
    """

    site: str
    distribution: str
    measure: str
    support: str
    low: float
    high: float
    mean: float
    deviation: float
    whole: bool
    count: int

    def joined(self, other: "Observed") -> "Observed":
        """The same site over the datapoints of both."""
        if not self.count or not other.count:
            return self if self.count else other
        count = self.count + other.count
        mean = (self.count * self.mean + other.count * other.mean) / count
        squares = (part.count * (part.deviation**2 + (part.mean - mean) ** 2) for part in (self, other))
        low, high, deviation = min(self.low, other.low), max(self.high, other.high), math.sqrt(sum(squares) / count)
        whole = self.whole and other.whole
        return replace(self, low=low, high=high, mean=mean, deviation=deviation, whole=whole, count=count)


class Observation(NamedTuple):
    """What one run of a model shows of R datapoints.

    `fingerprints` `(R,)` are of the observed values alone, in single precision, whatever the names and the number of
    sites; they do not depend on the other datapoints. `probe` `(R,)` is log p(x_n, z) at a fixed point of each, with
    discrete latents in their first states: the same for the same model and data.
    """

    fingerprints: NDArray[np.int64]
    sites: list[Observed]
    probe: NDArray[np.float64]


def observe(joint: JointDensity, indices: Tensor) -> Observation:
    """What the model observes of the datapoints `indices` `(R,)`, by one run."""
    rows = 1 if joint.plate is None else len(indices)
    states = {
        name: torch.zeros(rows, *site.shape, dtype=torch.long, device=site.values.device)
        for name, site in joint.enumerated.items()
    }
    given = () if joint.structure.estimates is None else joint.structure.estimates.names
    recorder = _Recorder(joint.plate, {*joint.enumerated, *given})
    # Points that differ from datapoint to datapoint, and need no random numbers.
    z = 0.5 * torch.sin(indices[:rows, None].double() * joint.dim + torch.arange(1, joint.dim + 1))
    with evaluating(joint.model), torch.no_grad(), recorder:
        handler, _ = joint.run_at(z.to(joint.zeros(rows)), joint.fetch(indices), indices, states)
    prints = np.zeros(rows, dtype=np.uint64)
    for values, masks in recorder.rows:
        with np.errstate(over="ignore"):  # sums modulo 2^64 do not depend on the order of the sites
            prints += np.array([_digest(row[mask]) for row, mask in zip(values, masks, strict=True)], dtype=np.uint64)
    return Observation(prints.view(np.int64), recorder.sites, handler.log_joint.double().cpu().numpy())


def merged(parts: Sequence[Sequence[Observed]]) -> list[Observed]:
    """The sites over all datapoints, from those over parts of them."""
    result: dict[str, Observed] = {}
    for site in (site for part in parts for site in part):
        result[site.site] = result[site.site].joined(site) if site.site in result else site
    return list(result.values())


class _Recorder(Messenger):
    """Keeps the observed sites of a run, but those `left_out`: their values and which of these count, by row."""

    def __init__(self, plate: str | None, left_out: set[str]) -> None:
        super().__init__()
        self.plate, self.left_out = plate, left_out
        self.sites: list[Observed] = []
        self.rows: list[tuple[NDArray[np.float32], NDArray[np.bool_]]] = []

    def _pyro_post_sample(self, message: Any) -> None:
        name = message["name"]
        if is_bookkeeping(message) or not message["is_observed"] or name in self.left_out:
            return
        fn = message["fn"]
        if is_factor(fn):
            self.sites.append(Observed(name, "factor", FACTOR, "", 0.0, 0.0, 0.0, 0.0, whole=True, count=0))
            return
        value = torch.as_tensor(message["value"])
        mask = distribution_mask(fn, message["mask"])
        mask = torch.ones((), dtype=torch.bool, device=value.device) if mask is None else mask
        shape = torch.broadcast_shapes(value.shape, mask.shape, fn.batch_shape + fn.event_shape)
        value, mask = value.expand(shape), mask.expand(shape)
        values, kept = (self._by_row(tensor, message).cpu().numpy() for tensor in (value, mask))
        seen = values[kept].astype(np.float64)
        words = name, type(leaf(fn)).__name__, _measure(fn), support_words(fn)
        known = seen if seen.size else np.zeros(1)
        low, high, mean, deviation = (float(number(known)) for number in (np.min, np.max, np.mean, np.std))
        whole = bool((seen == np.round(seen)).all())
        self.sites.append(Observed(*words, low, high, mean, deviation, whole=whole, count=seen.size))
        self.rows.append((values.astype(np.float32), kept))

    def _by_row(self, tensor: Tensor, message: Any) -> Tensor:
        axis = None if self.plate is None else plate_dim(message, self.plate)
        if axis is None:
            return tensor.reshape(1, -1)
        return tensor.movedim(axis - message["fn"].event_dim, 0).flatten(1) if tensor.dim() > 1 else tensor[:, None]


def _measure(fn: Any) -> str:
    """What a likelihood is a density with respect to."""
    support: Any = support_of(fn)
    if support.is_discrete:
        return DISCRETE
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support_words(fn) if type(support).__name__ in SURFACES else CONTINUOUS


def _digest(values: NDArray[np.float32]) -> int:
    content = (values + np.float32(0)).astype("<f4").tobytes()  # without negative zeros
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def described(site: Mapping[str, Any]) -> str:
    """A site of a saved ledger in words."""
    if site["measure"] == FACTOR:
        return f"a factor '{site['site']}'"
    kind = "whole numbers" if site["whole"] else "real numbers"
    return (
        f"{site['measure']} '{site['site']}' ({site['distribution']}; {kind} from {site['low']:g} to {site['high']:g})"
    )
