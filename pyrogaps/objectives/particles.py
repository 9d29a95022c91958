"""Log-probabilities per datapoint and particle from the traces of a model and a guide."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions.util import is_identically_zero, scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyrogaps.density.layout import leaf, plate_dim
from pyrogaps.density.score import is_bookkeeping
from pyrogaps.density.structure import check_in_plate, find_plate, missing
from pyrogaps.errors import InputError
from pyrogaps.settings import Plate

# The plate in which Pyro runs all particles at once.
PARTICLES = "num_particles_vectorized"

Sites = dict[str, Any]


class SameSubsamples(Messenger):
    """Repeats the first subsample of each plate, so that all particles use the same minibatch."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: dict[str, Tensor] = {}

    def _pyro_sample(self, message: Any) -> None:
        if site_is_subsample(message) and message["value"] is None and message["name"] in self.drawn:
            message["value"], message["done"] = self.drawn[message["name"]], True

    def _pyro_post_sample(self, message: Any) -> None:
        if site_is_subsample(message):
            self.drawn.setdefault(message["name"], message["value"])


@dataclass(frozen=True)
class Particles:
    """Terms of K particles at the minibatch's n datapoints, `(K, n)`, in nats, without the plate's scale.

    `log_score` is the part of `log_guide` from draws without reparametrisation, or None. `scale` is the number of
    datapoints that each row stands for. `sites` are the guide's sites, one dictionary per run.
    """

    log_model: Tensor
    log_guide: Tensor
    log_score: Tensor | None
    scale: float
    sites: list[Sites]

    @property
    def log_weights(self) -> Tensor:
        return self.log_model - self.log_guide


def read_particles(traces: list[tuple[Any, Any]], plate: Plate) -> Particles:
    """The particles in `traces`, pairs of model and guide traces: one particle per pair, or all in a single pair.

    Raises `InputError`, naming the site or the plate, if there is no log-weight per datapoint.
    """
    runs = [_read(_random(model), _random(guide), plate) for model, guide in traces]
    scores = [run.log_score for run in runs if run.log_score is not None]
    return Particles(
        torch.cat([run.log_model for run in runs]),
        torch.cat([run.log_guide for run in runs]),
        torch.cat(scores) if scores else None,
        runs[0].scale,
        [sites for run in runs for sites in run.sites],
    )


def _random(trace: Any) -> Sites:
    return {name: site for name, site in trace.nodes.items() if site["type"] == "sample" and not is_bookkeeping(site)}


def _read(model: Sites, guide: Sites, plate: Plate) -> Particles:
    _check_pair(model, guide)
    name = find_plate({key: _unvectorised(site) for key, site in model.items()}) if plate is None else plate or None
    rows = _Rows(name)
    for sites, program in ((model, "model"), (guide, "guide")):
        for key, site in sites.items():
            check_in_plate(key, site, name, program)
            rows.refuse_subsamples(key, site)
    scale = rows.scale(next(iter(model.values())))
    return Particles(rows.total(model), rows.total(guide), rows.score(guide), scale, [guide])


def _check_pair(model: Sites, guide: Sites) -> None:
    """Raise `InputError` for latents that only one program has, and for guides without a density."""
    for name, site in model.items():
        if not site["is_observed"] and name not in guide:
            raise InputError(missing(name))
    auxiliary = [name for name, site in guide.items() if site["infer"].get("is_auxiliary")]
    for name, site in guide.items():
        if name not in model and name not in auxiliary:
            raise InputError(
                f"site '{name}': in the guide but not in the model. Remove it, or mark it with "
                "infer={'is_auxiliary': True}."
            )
        if type(leaf(site["fn"])).__name__ == "Delta" and not auxiliary:
            raise InputError(
                f"site '{name}': a Delta in the guide has no density, so there is no bound. Use a guide with a "
                "density, such as AutoNormal instead of AutoDelta."
            )


def _unvectorised(site: Any) -> dict[str, Any]:
    return {"cond_indep_stack": [frame for frame in site["cond_indep_stack"] if frame.name != PARTICLES]}


@dataclass(frozen=True)
class _Rows:
    """Reads sites by datapoints of the data plate; `plate` is its name, None where all data are one datapoint."""

    plate: str | None

    def refuse_subsamples(self, name: str, site: Any) -> None:
        for frame in site["cond_indep_stack"]:
            if frame.name != self.plate and frame.full_size not in (None, frame.size):
                raise InputError(
                    f"site '{name}': the plate '{frame.name}' is subsampled within a datapoint, so the bound would be "
                    "biased. Use the whole plate, or set plate= if it is the data plate."
                )

    def scale(self, site: Any) -> float:
        """Number of datapoints of the data set that each row stands for."""
        if self.plate is None:
            return 1.0
        frame = next(frame for frame in site["cond_indep_stack"] if frame.name == self.plate)
        return 1.0 if frame.full_size is None else float(frame.full_size) / float(frame.size)

    def total(self, sites: Sites) -> Tensor:
        """Sum of the sites' masked log-probabilities, per particle and datapoint, `(K, n)`."""
        parts = [self._per_row(site, site["scale"] / self.scale(site)) for site in sites.values()]
        return sum(parts[1:], start=parts[0])

    def score(self, guide: Sites) -> Tensor | None:
        """log q of the draws without reparametrisation, `(K, n)` and without scale; None if there are none."""
        drawn = [site for site in guide.values() if not is_identically_zero(site["score_parts"].score_function)]
        parts = [self._per_row(site, 1.0) for site in drawn]
        return sum(parts[1:], start=parts[0]) if parts else None

    def _per_row(self, site: Any, scale: float) -> Tensor:
        """A site's log-probability `(K, n)`, summed over all dimensions except particles and datapoints.

        K or n is 1 if the site is not in the corresponding plate.
        """
        term: Tensor = scale_and_mask(site["unscaled_log_prob"], scale, site["mask"])
        particle_dim = plate_dim(site, PARTICLES) or 0
        data_dim = (plate_dim(site, self.plate) or 0) if self.plate is not None else 0
        depth = max(term.dim(), -particle_dim, -data_dim)
        padded = term.reshape((1,) * (depth + 2 - term.dim()) + tuple(term.shape))
        moved = padded.movedim((particle_dim or -depth - 1, data_dim or -depth - 2), (0, 1))
        return moved.reshape(*moved.shape[:2], math.prod(moved.shape[2:])).sum(-1)
