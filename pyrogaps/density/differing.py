"""The errors for a guide's site that does not fit the model's: of another support, or of another shape."""

from typing import Any

import torch

from pyrogaps.density.joint import JointDensity
from pyrogaps.density.runs import evaluating
from pyrogaps.density.structure import sample_sites
from pyrogaps.density.support_words import support_words
from pyrogaps.errors import InputError

# By the support in words: a distribution that has it, and the constraint that leads to it.
USUAL = {
    "the real line": ("Normal", ""),
    "the positive reals": ("LogNormal", "constraints.positive"),
    "the nonnegative reals": ("LogNormal", "constraints.positive"),
    "(0, 1)": ("Beta", "constraints.unit_interval"),
    "angles from -pi to pi": ("VonMises", "constraints.interval(-math.pi, math.pi)"),
    "lower triangular matrices with a positive diagonal": ("", "constraints.lower_cholesky"),
    "Cholesky factors of correlation matrices": ("", "constraints.corr_cholesky"),
    "positive definite matrices": ("", "constraints.positive_definite"),
}


def does_not_fit(name: str, message: Any, joint: JointDensity) -> InputError:
    """The error for the site of a guide's run whose values are not the model's: its support, or else its shape."""
    theirs, model = message["fn"], _in_the_model(name, joint)
    if support_words(theirs) != support_words(model):
        return other_support(name, theirs, model)
    shape = tuple(message["value"].shape)
    expected = joint.constrain(joint.zeros(1)[None], torch.zeros(1, dtype=torch.long))[name].shape[2:]
    return InputError(
        f"site '{name}': the guide's value has shape {shape}, but the model's value has shape {tuple(expected)} per "
        "datapoint. Give its distribution in the guide the model's batch shape, plates and to_event"
    )


def differs(name: str, message: Any, joint: JointDensity) -> InputError:
    """The error for a site whose values differ where its coordinates are the same."""
    return other_support(name, message["fn"], _in_the_model(name, joint))


def other_support(name: str, fn: Any, model: Any) -> InputError:
    own, right = support_words(fn), support_words(model)
    usual, constraint = _reached(right)
    advice = f", such as {usual}" if usual else ""
    if constraint:
        advice += f", or transform one to it: TransformedDistribution(Normal(loc, scale), [biject_to({constraint})])"
    return InputError(
        f"site '{name}': the guide's support, {own}, differs from the model's, {right}. Use a distribution with the "
        f"model's support{advice}"
    )


def _reached(support: str) -> tuple[str, str]:
    """A distribution with the support `support`, and the constraint that leads to it; each may be empty."""
    if support.startswith("the simplex"):
        return "Dirichlet", "constraints.simplex"
    if support in USUAL or "..." in support:
        return USUAL.get(support, ("", ""))
    for words, constraint in (("the reals above ", "greater_than"), ("the reals below ", "less_than")):
        if support.startswith(words):
            return "", f"constraints.{constraint}({support.removeprefix(words)})"
    return ("", f"constraints.interval{support}") if support.startswith("(") else ("", "")


def _in_the_model(name: str, joint: JointDensity) -> Any:
    """The distribution of a latent site in the model."""
    indices = joint.probe.indices
    with evaluating(joint.model), torch.no_grad(), joint.plates(indices):
        return sample_sites(joint.model, joint.fetch(indices))[name]["fn"]
