"""Which discrete latents a guide draws, and the density in which these have columns."""

from dataclasses import replace

import torch

from pyrogaps.density.autoguides import check_autoguide
from pyrogaps.density.guide import GuideDensity
from pyrogaps.density.joint import JointDensity
from pyrogaps.density.runs import Program, check_callable, evaluating
from pyrogaps.streams import seeded


def drawn_by(guide: Program, joint: JointDensity) -> tuple[str, ...]:
    """The discrete latents of the model, summed out of `joint`, that `guide` draws; others stay summed out.

    The guide is run only where there are any.
    """
    if not joint.structure.enumerated:
        return ()
    check_callable(guide, "guide")
    check_autoguide(guide, joint)
    with seeded(0, "guide structure"), evaluating(guide, joint.model), torch.no_grad():
        messages = GuideDensity.unread(guide, joint).first_run(joint.probe.indices)
    return tuple(name for name in joint.structure.enumerated if name in messages and not messages[name]["is_observed"])


def with_drawn(joint: JointDensity, drawn: tuple[str, ...]) -> JointDensity:
    """The density of the same model and data in which the discrete latents `drawn` have columns in `z`."""
    if not drawn:
        return joint
    own, structure = JointDensity(joint.model, joint.data, joint.plate or False, drawn=drawn), joint.structure
    return JointDensity(own.model, own.data, structure=replace(own.structure, estimates=structure.estimates))
