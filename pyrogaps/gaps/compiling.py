"""Whether `torch.compile` is worth its time: what it is predicted to save of a whole run."""

import logging
from typing import Literal, get_args

from pyrogaps.ais import AIS
from pyrogaps.capture import Mode, elementwise_elements
from pyrogaps.density import JointDensity
from pyrogaps.errors import InputError
from pyrogaps.escalation import Escalation
from pyrogaps.refine import Refinement

Compile = Literal["auto", "on", "off"]
log = logging.getLogger("pyrogaps")

# Seconds that fusing elementwise operations saves for every element that they make, and that compiling takes. Measured
# on CPUs with wide vectors; what matters is that the choice is the same on every machine and for any number of
# processes, because compiled results differ in their last digits.
SAVED, COMPILING, WORTH = 1.5e-10, 20.0, 2.0
# Of an escalation, an estimate: evaluations of a datapoint at a tolerance of 0.1.
ESCALATION = 3000


def chosen_mode(
    choice: Compile,
    evidence: AIS | Escalation,
    refinement: Refinement,
    num_families: int,
    num_particles: int,
    joint: JointDensity,
) -> Mode:
    """How densities are evaluated: compiled where that is asked for, or saves at least twice what it costs.

    Raises `InputError` for a choice that is none.
    """
    if choice not in get_args(Compile):
        raise InputError(f"compile: must be one of auto, on, off, got {choice!r}")
    if evidence.mode != "captured" or choice == "off":
        return evidence.mode
    if choice == "on":
        return "compiled"
    points = joint.num_datapoints * _evaluations(evidence, refinement, num_families, num_particles)
    # The record is made only where it could matter: no model writes so many elements a point.
    saved = SAVED * points * (elementwise_elements(joint) if points * SAVED * 1e6 > COMPILING else 0)
    worth = saved > WORTH * COMPILING
    if saved > COMPILING / 2:
        what = "compiling the model's density" if worth else "the model's density is not compiled"
        log.info("%s: that is predicted to save %.0f s, and to take %.0f s", what, saved, COMPILING)
    return "compiled" if worth else "captured"


def _evaluations(evidence: AIS | Escalation, refinement: Refinement, num_families: int, num_particles: int) -> int:
    """Of a datapoint, about how many points a ledger evaluates."""
    refining = num_families * (1.1 * refinement.num_steps * refinement.num_particles + 3 * refinement.num_selection)
    scoring = (1 + num_families) * num_particles
    path = ESCALATION
    if isinstance(evidence, AIS):
        temperatures = evidence.num_chains * evidence.num_temperatures
        pilot = evidence.num_pilot_chains * (evidence.num_pilot_temperatures + 8)
        path = evidence.num_leapfrog * (temperatures + pilot)
    return int(refining) + scoring + path
