"""A handler that adds residuals to the parameters of a guide's sites, in their order, given earlier draws."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributions import TransformedDistribution

from pyrogaps.density.layout import leaf
from pyrogaps.density.local import GuideSite, PlaceValues
from pyrogaps.density.supports import bijection
from pyrogaps.refine.parameters import (
    DISCRETE_PARAMETERS,
    axis_of,
    build_of,
    free_leaf,
    from_rows,
    names_of,
    rebuilt,
    to_rows,
    transform_of,
    value_of,
)
from pyrogaps.refine.perturbed import Key
from pyrogaps.refine.slopes import Slopes


@dataclass(frozen=True)
class Added:
    """What is added to the K elements of a parameter, as real numbers, in R rows.

    Attributes:
        labels: the place of each element in `residual`, -1 for none; None where they are in order.
        residual: `(R, free elements)`.
        slopes: which slopes there are, if any.
        values: theirs, `(R, E)`.
    """

    labels: Tensor | None
    residual: Tensor
    slopes: Slopes | None
    values: Tensor

    def detached(self) -> "Added":
        """The same, out of the reach of gradients."""
        return replace(self, residual=self.residual.detach(), values=self.values.detach())

    def at(self, drawn: Tensor | None, centre: Tensor) -> Tensor:
        """The sum `(R, K)`, with the earlier draws, `(R, dim)`, and the centres that slopes are about."""
        if self.slopes is not None and self.slopes.basis is not None:
            assert drawn is not None
            coefficients = self.residual @ self.slopes.basis.to(self.residual)
            total, values = coefficients.tensor_split([coefficients.shape[1] - len(self.slopes.elements)], 1)
            features = self.slopes.features(drawn)
            return total.index_add(1, self.slopes.elements, values * features[:, self.slopes.coordinates])
        total = self.residual
        if self.labels is not None:
            total = torch.cat([total, torch.zeros_like(total[:, :1])], 1)[:, self.labels]
        if self.slopes is not None:
            assert drawn is not None
            features = self.slopes.features(drawn) - self.slopes.padded(centre, 0.0)
            terms = self.values * features[:, self.slopes.coordinates]
            total = total.index_add(1, self.slopes.elements, terms)
        return total


class CentralSites(PlaceValues):
    """Puts the middle of its distribution into every site; `columns` holds the values in unconstrained space."""

    def __init__(self, terms: list[GuideSite], flat: Tensor, in_plate: bool) -> None:
        super().__init__(terms, flat, in_plate)
        self.columns: dict[str, Tensor] = {}

    def _pyro_sample(self, message: Any) -> None:
        if message["name"] in self.terms:
            message["value"], message["done"] = _middle(message["fn"]), True

    def _pyro_post_sample(self, message: Any) -> None:
        term = self.terms.get(message["name"])
        if term is not None:
            value = message["value"]
            unconstrained = value if term.unconstrained else bijection(message["fn"], term.name).inv(value)
            columns = term.site.flatten(unconstrained) if self.in_plate else unconstrained.reshape(1, -1)
            self.columns[term.name] = columns

    def drawn(self) -> Tensor:
        """The values so far, `(R, dim)`; those of `flat` in sites that come later."""
        order = sorted(self.terms.values(), key=lambda term: term.site.start)
        return torch.cat([self.columns.get(term.name, self.flat[:, term.site.columns]) for term in order], -1)


class ResidualSites(CentralSites):
    """Adds residuals to the parameters of a guide's sites.

    Draws are placed at the rows `flat` `(R, dim)`; where that is None, they are new, and those of Normals are mirrored
    in the later half of the rows if `mirrored`. After a run `frozen` holds each site's distribution with residuals that
    no gradient reaches: a function of earlier draws alone.
    """

    def __init__(
        self,
        terms: list[GuideSite],
        flat: Tensor | None,
        added: dict[Key, Added],
        centre: Tensor,
        in_plate: bool,
        mirrored: bool,
    ) -> None:
        super().__init__(terms, centre if flat is None else flat, in_plate)
        self.drawing, self.added, self.centre, self.mirrored = flat is None, added, centre, mirrored
        self.frozen: dict[str, Any] = {}

    def _pyro_sample(self, message: Any) -> None:
        term = self.terms.get(message["name"])
        if term is None:
            return
        fn = message["fn"]
        live, frozen = self._moved(term, fn, free_leaf(fn))
        message["fn"] = rebuilt(fn, lambda inner: live, masks=True)
        self.frozen[term.name] = rebuilt(fn, lambda inner: frozen, masks=True)
        self._give(term, message)

    def _give(self, term: GuideSite, message: Any) -> None:
        """Put a value into a site; where it gets none, Pyro draws one."""
        if not self.drawing:
            PlaceValues._pyro_sample(self, message)
        elif self.mirrored and (value := normal_draw(term, message["fn"], mirrored=True)) is not None:
            message["value"], message["done"] = value, True

    def _moved(self, term: GuideSite, fn: Any, inner: Any) -> tuple[Any, Any]:
        """The distribution with residuals, and the same with residuals that no gradient reaches."""
        values, frozen = {}, {}
        for name in names_of(inner):
            value = value_of(inner, name)
            added = self.added.get((term.name, name))
            if added is not None:
                transform, axis = transform_of(inner, name), axis_of(term, fn, inner, name) if self.in_plate else None
                drawn = None if added.slopes is None else self.drawn()
                own = to_rows(transform.inv(value), axis)
                frozen[name], values[name] = (
                    transform(from_rows(own + change.at(drawn, self.centre), value, axis))
                    for change in (added.detached(), added)
                )
            else:
                frozen[name] = values[name] = value
        build = build_of(inner)
        return build(**values, validate_args=False), build(**frozen, validate_args=False)


def _middle(fn: Any) -> Tensor:
    """The mean of the `free_leaf`, or its location or scale where that is infinite, behind the fixed transforms; the
    most probable state of a discrete one.
    """
    outer, inner = leaf(fn), free_leaf(fn)
    if outer is not inner:
        value = _middle(outer.base_dist)
        for transform in outer.transforms:
            value = transform(value)
        return value
    if type(inner).__name__ in DISCRETE_PARAMETERS:
        likely: Tensor = (inner.probs > 0.5).to(inner.probs) if type(inner).__name__ == "Bernoulli" else inner.mode
        return likely
    mean: Tensor = inner.mean
    if bool(torch.isfinite(mean).all()):
        return mean
    return torch.as_tensor(getattr(inner, "loc", inner.scale)).expand(mean.shape)


def normal_draw(term: GuideSite, fn: Any, *, mirrored: bool, copies: int = 1) -> Tensor | None:
    """A draw of a Normal or LogNormal, or of one behind fixed transforms; None for others.

    The rows are `copies` of the same noise one after the other, that of the later half of each mirrored if `mirrored`.
    """
    inner, outer = free_leaf(fn), leaf(fn)
    kind = type(inner).__name__
    if kind not in ("Normal", "LogNormal") or not (outer is inner or leaf(getattr(outer, "base_dist", None)) is inner):
        return None
    axis = axis_of(term, fn, inner, "loc")
    shape = list(inner.loc.shape)
    shape[axis] //= 2 * copies if mirrored else copies
    noise = torch.randn(shape, dtype=inner.loc.dtype, device=inner.loc.device)
    value: Tensor = inner.loc + inner.scale * torch.cat(
        [noise, -noise] * copies if mirrored else [noise] * copies, axis
    )
    value = value.exp() if kind == "LogNormal" else value
    if isinstance(outer, TransformedDistribution) and outer is not inner:
        for transform in outer.transforms:
            value = transform(value)
    return value
