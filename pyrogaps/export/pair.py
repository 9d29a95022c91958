"""Model and guide as the densities to export: per datapoint, or of the whole data set."""

from typing import Any

import torch

from pyrogaps.density import Data, GuideDensity, JointDensity
from pyrogaps.density.draws import Posterior, is_posterior
from pyrogaps.density.forms import whole
from pyrogaps.density.plates import steady_plates
from pyrogaps.density.runs import Program, evaluating
from pyrogaps.density.structure import first_sites
from pyrogaps.errors import InputError
from pyrogaps.family import augmented
from pyrogaps.problem import Problem
from pyrogaps.settings import Plate
from pyrogaps.streams import seeded


def pair_of(model: Program, guide: Any, data: Data, plate: Plate) -> tuple[JointDensity, Posterior]:
    """The densities of model and guide.

    They are per datapoint where the data plate encloses every latent, else of the whole data set at once.
    """
    if plate is not False:
        try:
            problem = Problem.of(model, guide, data, plate)
            return problem.scored, problem.guided()
        except InputError:
            if not _latents_outside(model, data, plate):
                raise
    joint = JointDensity(augmented(model, guide), data, False, make_whole=True)
    return joint, guide if is_posterior(guide) else GuideDensity(guide, None, joint)


def _latents_outside(model: Program, data: Data, plate: Plate) -> bool:
    """Whether some latents lie outside the plates of the observed sites."""
    with seeded(0, "structure"), evaluating(model), torch.no_grad(), steady_plates():
        sites, _ = first_sites(model, whole(data, model).fetch(torch.zeros(1, dtype=torch.long)))
    names = {name: {frame.name for frame in site["cond_indep_stack"]} for name, site in sites.items()}
    latent = [names[name] for name, site in sites.items() if not site["is_observed"]]
    if isinstance(plate, str):
        return any(plate in plates for plates in names.values()) and any(plate not in plates for plates in latent)
    return bool(latent) and not set.intersection(*names.values())
