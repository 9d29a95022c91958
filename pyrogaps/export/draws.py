"""Draws from a guide, with the model's site values and pointwise log-likelihoods."""

from dataclasses import dataclass, replace
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from pyrogaps.density import JointDensity
from pyrogaps.density.discrete import refuse_enumerated
from pyrogaps.density.draws import BlockedGuide, Posterior
from pyrogaps.density.rows import same_density
from pyrogaps.density.runs import evaluating
from pyrogaps.export.record import Record, RecordSites
from pyrogaps.run import Run
from pyrogaps.streams import Chunk, particle_blocks

Sites: TypeAlias = dict[str, Tensor]
Records: TypeAlias = dict[str, Record]
NUM_COMPARED = 3


@dataclass(frozen=True)
class Drawn:
    """S draws of N datapoints: `values` and `log_likelihood` by site, each `(S, N, *)`, and `log_p`, `log_q` `(S, N)`.

    Where the whole data set is one datapoint, there is no axis of datapoints: `(S, *)`, in the model's own shapes.
    """

    values: Sites
    log_likelihood: Sites
    log_p: Tensor
    log_q: Tensor

    @classmethod
    def join(cls, parts: list["Drawn"], axis: int) -> "Drawn":
        """Consecutive draws (axis 0) or consecutive datapoints (axis 1) put together."""
        values = {name: torch.cat([part.values[name] for part in parts], axis) for name in parts[0].values}
        names = parts[0].log_likelihood
        log_likelihood = {name: torch.cat([part.log_likelihood[name] for part in parts], axis) for name in names}
        log_p, log_q = (torch.cat([getattr(part, name) for part in parts], axis) for name in ("log_p", "log_q"))
        return cls(values, log_likelihood, log_p, log_q)

    def same_as(self, other: "Drawn") -> bool:
        """Whether two computations agree up to rounding."""
        pairs = [(self.log_p, other.log_p)]
        for mine, theirs in ((self.values, other.values), (self.log_likelihood, other.log_likelihood)):
            pairs += [(mine[name], theirs[name]) for name in mine]
        return all(a.shape == b.shape and same_density(a, b) for a, b in pairs)


def draw_all(joint: JointDensity, posterior: Posterior, num_draws: int, run: Run) -> tuple[Drawn, Records]:
    """`num_draws` draws for every datapoint, and the sites of one run of the model over all data."""
    refuse_enumerated(joint.enumerated, "an export of draws")

    def draw_chunk(chunk: Chunk) -> tuple[Drawn, Records]:
        guide, parts = BlockedGuide(posterior, chunk), []
        with torch.no_grad(), evaluating(joint.model):
            for first, size in enumerate(particle_blocks(num_draws)):
                z, log_q = guide.sample(size, run.stream("posterior"), first)
                if first == 0:
                    read = _reader(joint, z, chunk.indices)
                parts.append(read(z, log_q.double()))
        return Drawn.join(parts, 0), read.records

    chunks = run.map_alone(draw_chunk, joint)
    if joint.plate is None:
        drawn, records = chunks[0]
        return drawn, records
    return Drawn.join([drawn for drawn, _ in chunks], 1), _join_records([records for _, records in chunks], joint.plate)


def _reader(joint: JointDensity, z: Tensor, indices: Tensor) -> "ReadLocal | ReadTogether | ReadOneByOne":
    """A reader of draws like `z` `(S, B, dim)`: all at once where this agrees with one run per draw."""
    if joint.plate is not None:
        return ReadLocal(joint, z, indices)
    alone = ReadOneByOne(joint, z, indices)
    if not joint.structure.vectorized:
        return alone
    subset, log_q = z[:NUM_COMPARED], torch.zeros(min(NUM_COMPARED, len(z)), 1)
    try:
        together = ReadTogether(joint, alone.records, indices)
        safe = together(subset, log_q).same_as(alone(subset, log_q))
    except Exception:
        safe = False
    return together if safe else alone


class ReadLocal:
    """Reads latents per datapoint: all draws of a batch of datapoints are rows of one run.

    `records` are those of the first draw.
    """

    def __init__(self, joint: JointDensity, z: Tensor, indices: Tensor) -> None:
        self.joint, self.indices, self.plate = joint, indices, str(joint.plate)
        sites, _ = sites_of(joint, z[0], joint.fetch(indices), indices)
        # A second number of rows excludes axes that only happen to have as many entries as there are rows.
        more, _ = sites_of(joint, z[:2].flatten(0, 1), joint.fetch(indices, 2), indices.repeat(2))
        axes = {name: site.axis_of(self.plate) for name, site in sites.items()}
        self.axes = {n: axis for n, axis in axes.items() if axis is not None and more[n].axis_of(self.plate) == axis}
        self.records = {name: sites[name] for name in self.axes}

    def __call__(self, z: Tensor, log_q: Tensor) -> Drawn:
        shape = z.shape[:2]
        args, rows = self.joint.fetch(self.indices, len(z)), self.indices.repeat(len(z))
        sites, log_p = sites_of(self.joint, z.flatten(0, 1), args, rows)
        values, log_likelihood = {}, {}
        for name, axis in self.axes.items():
            site, own = sites[name], sites[name].log_likelihood
            if own is None:
                values[name] = site.value.movedim(axis, 0).unflatten(0, shape)
            else:
                log_likelihood[name] = own.movedim(axis + site.event_dim, 0).unflatten(0, shape)
        return Drawn(values, log_likelihood, log_p.reshape(shape), log_q)


class ReadOneByOne:
    """Reads latents of the whole data set, one model run per draw; `records` are those of the first draw."""

    def __init__(self, joint: JointDensity, z: Tensor, indices: Tensor) -> None:
        self.joint, self.indices, self.args = joint.one_by_one(), indices, joint.fetch(indices)
        self.records, _ = sites_of(self.joint, z[0], self.args, indices)

    def __call__(self, z: Tensor, log_q: Tensor) -> Drawn:
        runs = [sites_of(self.joint, flat, self.args, self.indices) for flat in z]
        values, log_likelihood = {}, {}
        for name, record in self.records.items():
            sites = [sites[name] for sites, _ in runs]
            if record.log_likelihood is None:
                values[name] = torch.stack([site.value for site in sites])
            else:
                log_likelihood[name] = torch.stack([cast(Tensor, site.log_likelihood) for site in sites])
        return Drawn(values, log_likelihood, torch.cat([log_p for _, log_p in runs]), log_q[:, 0])


class ReadTogether:
    """Reads latents of the whole data set; draws have their own batch dimension, left of every plate."""

    def __init__(self, joint: JointDensity, records: Records, indices: Tensor) -> None:
        self.joint, self.indices, self.args, self.records = joint, indices, joint.fetch(indices), records

    def __call__(self, z: Tensor, log_q: Tensor) -> Drawn:
        sites, log_p = sites_of(self.joint, z[:, 0], self.args, self.indices.repeat(len(z)))
        values, log_likelihood = {}, {}
        for name, record in self.records.items():
            own = sites[name].log_likelihood
            if own is None or record.log_likelihood is None:
                values[name] = _draws_first(sites[name].value, len(z), record.value.shape)
            else:
                log_likelihood[name] = _draws_first(own, len(z), record.log_likelihood.shape)
        return Drawn(values, log_likelihood, log_p, log_q[:, 0])


def _join_records(parts: list[Records], plate: str) -> Records:
    """The sites over all of the data from those over consecutive datapoints."""
    result = {}
    for name, record in parts[0].items():
        axis = record.axis_of(plate)
        assert axis is not None
        result[name] = replace(record, value=torch.cat([part[name].value for part in parts], axis))
    return result


def _draws_first(tensor: Tensor, number: int, shape: torch.Size) -> Tensor:
    """To `(S, *shape)`; a tensor that does not depend on the draw is repeated."""
    if tensor.numel() == shape.numel():
        return tensor.reshape(shape).expand(number, *shape)
    return tensor.reshape(number, *shape)


def sites_of(joint: JointDensity, flat: Tensor, args: tuple[Any, ...], indices: Tensor) -> tuple[Records, Tensor]:
    """Sites and log p `(R,)` of the model with the rows of `flat` `(R, dim)` in its latents."""
    with RecordSites() as recorder:
        handler = joint.run(flat, args, indices)
    return recorder.sites, handler.log_joint.double()
