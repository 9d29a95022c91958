"""Check that a guide uses only the data that it declares to be shown."""

from typing import Any

import torch
from torch import Tensor

from pyrogaps.conditioning.conditions import Conditions, Lookahead, Shown, hidden
from pyrogaps.density import GuideDensity, IndexedData, JointDensity
from pyrogaps.density.layout import leaf
from pyrogaps.density.local import FactorisedGuide, GuideSite, PlaceValues
from pyrogaps.density.runs import evaluating
from pyrogaps.density.structure import sample_sites
from pyrogaps.errors import InputError
from pyrogaps.streams import seeded

NUM_CHECKED_ROWS = 8


def check_no_leak(density: GuideDensity, conditions: Conditions) -> None:
    """Raise `InputError`, naming the site, where a guide uses data that its conditions withhold.

    At a few datapoints, and for every step of a lookahead, withheld data are replaced by other values of
    their range: reflected ones, then random ones, so that integer data are checked as well. No factor of the guide may
    change.
    """
    if density.joint.plate is None:
        raise InputError("conditions: they need a data plate, but the model has none")
    if density.bound:
        raise InputError(
            "guide: it has parameters for each datapoint, which are fitted to all of x, also its withheld part. Use an "
            "amortized guide whose encoder takes only the shown part"
        )
    with seeded(0, "leak"), evaluating(density.guide, density.joint.model), torch.no_grad():
        rows = _Rows(density, conditions)
        before = rows.factors(None)
        for at_random in (False, True):
            rows.compare(before, rows.factors(at_random))


class _Rows:
    """A few datapoints, repeated for every step of a lookahead, or once where all factors are shown the same."""

    def __init__(self, density: GuideDensity, conditions: Conditions) -> None:
        self.density, self.conditions = density, conditions
        self.names = [term.name for term in density.terms]
        self.checked = torch.arange(min(NUM_CHECKED_ROWS, density.num_datapoints))
        args = density.joint.data.fetch(self.checked)
        self.steps = torch.zeros(1, dtype=torch.long)
        self.temporal = [False] * len(args)
        if isinstance(conditions, Lookahead):
            if self.names != list(density.joint.sites):
                raise InputError("guide: a lookahead needs one guide site per step, named like the model's sites")
            self.steps = torch.arange(len(self.names))
            self.temporal = _temporal(density.joint, args, self.checked, len(self.names))
        local = density.at(self.checked)
        z, _ = local.sample_extended(1) if isinstance(local, FactorisedGuide) else local.sample(1)
        self.z = z[0].repeat(len(self.steps), 1)

    def factors(self, at_random: bool | None) -> dict[str, Tensor]:
        """Elements of the log-density of every site at fixed z, `(rows, *)`; `at_random` None withholds nothing."""
        fetch, each = self.density.joint.data.fetch, len(self.checked)

        def other(indices: Tensor) -> tuple[Any, ...]:
            args = fetch(self.checked[indices % each])
            if at_random is None:
                return args
            if isinstance(self.conditions, Shown):
                masks = self.conditions.masks(args)
            else:
                masks = self.conditions.masks(args, self.steps[indices // each], self.temporal)
            return hidden(args, masks, at_random=at_random)

        indices = torch.arange(len(self.z))
        blind = self.density.restrict(
            self.density.joint.over(IndexedData(len(indices), other)), self.checked.repeat(len(self.steps))
        )
        messages = blind.messages(indices, 1, PlaceValues(self.density.terms, self.z, in_plate=True))
        return {term.name: _elements(term, messages[term.name]) for term in self.density.terms}

    def compare(self, before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
        """Raise `InputError` for a site that changed where it should not have."""
        each = len(self.checked)
        for position, name in enumerate(self.names):
            # The rows of step t withhold all data that the factors up to t are not shown.
            first = position * each if isinstance(self.conditions, Lookahead) else 0
            left, right = before[name][first:], after[name][first:]
            tolerance = 1e-8 if left.dtype == torch.float64 else 1e-4
            same = (
                torch.isclose(left, right, rtol=tolerance, atol=tolerance, equal_nan=True).reshape(len(left), -1).all(1)
            )
            if not bool(same.all()):
                leak = "a part of the data outside its conditions"
                if isinstance(self.conditions, Lookahead):
                    step = position + int((~same).nonzero()[0]) // each
                    leak = f"data after step {step + 1 + self.conditions.steps}"
                raise InputError(
                    f"guide: site '{name}' changes with {leak}, which the guide declares as not shown. Mask this part "
                    "of the data in the guide, or declare it as shown"
                )


def _elements(term: GuideSite, message: Any) -> Tensor:
    """The log-density of a site, one value per independent element, rows first."""
    fn = message["fn"]
    inner = leaf(fn)
    elements: Tensor = inner.log_prob(message["value"])
    axis = term.site.batch_axis - (fn.event_dim - inner.event_dim)
    return elements.movedim(axis, 0) if elements.dim() >= -axis else elements.expand(1)


def _temporal(joint: JointDensity, args: tuple[Any, ...], indices: Tensor, num_steps: int) -> list[bool]:
    """Which arguments are sequences of observations: observed by the model, with one step per latent site."""
    sized = [isinstance(arg, Tensor) and arg.dim() > 1 and arg.shape[1] == num_steps for arg in args]
    temporal = [sized[k] and _is_observed(joint, args, indices, k) for k in range(len(args))]
    if not any(temporal):
        raise InputError(
            f"lookahead: the model has {num_steps} latent sites, but no observed argument has {num_steps} "
            "steps along its second axis. Pass sequences as (datapoints, steps, ...), with one latent site per step"
        )
    return temporal


def _is_observed(joint: JointDensity, args: tuple[Any, ...], indices: Tensor, position: int) -> bool:
    masks = [None if k != position else torch.zeros_like(arg, dtype=torch.bool) for k, arg in enumerate(args)]
    with joint.plates(indices):
        before, after = (observed(joint, given) for given in (args, hidden(args, tuple(masks))))
    return any(not torch.equal(value, after[name][0]) for name, (value, _) in before.items())


def observed(joint: JointDensity, args: tuple[Any, ...]) -> dict[str, tuple[Tensor, Any]]:
    """Value and distribution of every observed site of a run of the model."""
    sites = sample_sites(joint.model, args)
    return {name: (site["value"], site["fn"]) for name, site in sites.items() if site["is_observed"]}
