"""A guide at some datapoints: sampling and scoring."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import TransformedDistribution

from pyrogaps.density.joint import JointDensity
from pyrogaps.density.layout import Site, leaf
from pyrogaps.density.score import log_jacobian, masked_log_prob
from pyrogaps.density.supports import bijection
from pyrogaps.errors import InputError
from pyrogaps.guard import ProgramError

Draws = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class GuideSite:
    """A guide site that carries density: its name, its layout, and whether its values are unconstrained.

    Autoguides draw an auxiliary site in unconstrained space and pass its image to a Delta at the model's site; the
    auxiliary site is then the term.
    """

    name: str
    site: Site
    unconstrained: bool


class LocalGuide(Protocol):
    """A guide at B datapoints of its joint density."""

    joint: JointDensity
    indices: Tensor

    def sample(self, num_particles: int, antithetic: bool = False) -> Draws:
        """Draws `z` `(S, B, dim)` and log q `(S, B)`; `antithetic` mirrors half of them where q is symmetric."""
        ...

    def log_prob(self, z: Tensor) -> Tensor:
        """log q `(S, B)` of `z` `(S, B, dim)`."""
        ...


class FactorisedGuide:
    """A `LocalGuide` whose site distributions are known before any draw: `distributions` by term name."""

    def __init__(
        self,
        joint: JointDensity,
        indices: Tensor,
        terms: list[GuideSite],
        distributions: dict[str, Any],
        active: Tensor | None,
    ) -> None:
        self.joint, self.indices, self.terms, self.active = joint, indices, terms, active
        self.distributions = distributions

    @property
    def mean_field(self) -> bool:
        """Whether every coordinate is independent of the others."""
        return all(leaf(fn).event_dim == 0 for fn in self.distributions.values())

    @property
    def num_auxiliary(self) -> int:
        """Number of auxiliary elements after the latents in a draw, see `AuxiliaryPosterior`."""
        return sum(getattr(fn, "num_auxiliary", 0) for fn in self.distributions.values())

    def moments(self) -> Draws | None:
        """Mean and standard deviation `(B, dim)` where every site is Normal in unconstrained space; else None."""
        columns = {}
        for term in self.terms:
            fn = self.distributions[term.name]
            if type(leaf(fn)).__name__ != "Normal" or self.joint.plate is None:
                return None
            columns[term.site.start] = [term.site.flatten(part) for part in (fn.mean, fn.stddev)]
        if not columns:  # every latent is summed out
            nothing = self.joint.zeros(len(self.indices))
            return nothing, nothing
        means, scales = ([columns[start][k] for start in sorted(columns)] for k in (0, 1))
        return torch.cat(means, -1), torch.cat(scales, -1)

    def sample(self, num_particles: int, antithetic: bool = False) -> Draws:
        z, log_q = self.sample_extended(num_particles, antithetic)
        return (z[..., : -self.num_auxiliary], log_q) if self.num_auxiliary else (z, log_q)

    def sample_extended(self, num_particles: int, antithetic: bool = False) -> Draws:
        """As `sample`, with the auxiliary elements: draws `(S, B, dim + num_auxiliary)`."""
        parts = []
        for term in self.terms:
            fn = self.distributions[term.name]
            parts.append((term, fn, _draw(fn, num_particles, antithetic)))
        return self._assemble(num_particles, parts)

    def log_prob(self, z: Tensor) -> Tensor:
        """log q `(S, B)` of `z` `(S, B, dim + num_auxiliary)`; for an auxiliary posterior, log q(z, v) - log r(v|z)."""
        if z.shape[-1] != self.joint.dim + self.num_auxiliary:
            raise NotImplementedError(
                "a guide with auxiliary variables can score only its own draws, not latents alone"
            )
        parts = [(t, fn, place(t, fn, z)) for t in self.terms for fn in [self.distributions[t.name]]]
        try:
            return self._assemble(len(z), parts)[1]
        except ProgramError as error:
            for name, fn in self.distributions.items():
                if not scores_all(fn):
                    raise no_inverse(name, fn, "where other points are scored") from error
            raise

    def log_reverse(self, z: Tensor) -> Tensor | None:
        """log r(v|z) `(S, B)` of extended draws; None for a guide without auxiliary variables."""
        if not self.num_auxiliary:
            return None
        (fn,) = self.distributions.values()
        (term,) = self.terms
        return term.site.sum_to_rows(fn.log_reverse(term.site.unflatten(z)), lead=1)

    def _assemble(self, num_particles: int, parts: list[tuple[GuideSite, Any, Tensor]]) -> Draws:
        shape = (num_particles, len(self.indices))
        if not parts:  # every latent is summed out: there is one point, of probability 1
            nothing = self.joint.zeros(num_particles * len(self.indices)).reshape(*shape, 0)
            return nothing, nothing.sum(-1)
        scored = [score_term(t, fn, value, self.active, self.joint.plate is not None, shape) for t, fn, value in parts]
        return join_terms(self.terms, scored, self.active)


def join_terms(terms: list[GuideSite], scored: list[Draws], active: Tensor | None) -> Draws:
    """Put the terms' columns side by side and add their log q."""
    order = sorted(range(len(terms)), key=lambda position: terms[position].site.start)
    z = torch.cat([scored[position][0] for position in order], -1)
    if active is not None:
        keep = torch.nn.functional.pad(active, (0, z.shape[-1] - active.shape[-1]), value=True)
        z = torch.where(keep, z, torch.zeros_like(z))
    return z, sum((log_q for _, log_q in scored[1:]), start=scored[0][1])


# What flows raise that have no inverse, for a value that is not their last draw.
NO_INVERSE = (KeyError, NotImplementedError)


class NoInverseError(InputError):
    """A flow can score only its own draws."""


def no_inverse(name: str, fn: Any, where: str) -> NoInverseError:
    """The error for a flow that can score only its own draws."""
    flow = type(_last_transform(fn)).__name__
    return NoInverseError(
        f"site '{name}': {flow} has no inverse, so the guide cannot be used {where}. Use a flow with an inverse, such "
        "as pyro.distributions.transforms.spline_coupling"
    )


def scores_all(fn: Any) -> bool:
    """Whether `fn` can score values that it has not just drawn."""
    if not isinstance(leaf(fn), TransformedDistribution):
        return True
    try:
        fn.log_prob(fn.sample().clone())
    except NO_INVERSE:
        return False
    return True


def _last_transform(fn: Any) -> Any:
    return inner.transforms[-1] if isinstance(inner := leaf(fn), TransformedDistribution) else inner


SYMMETRIC = ("Normal", "MultivariateNormal", "LowRankMultivariateNormal", "Laplace", "StudentT")


def _draw(fn: Any, num_particles: int, antithetic: bool) -> Tensor:
    """Draws `(S, *)`; `antithetic` mirrors half of them, or, for a flow, half of its noise."""
    inner = leaf(getattr(fn, "joint", fn))
    if antithetic and isinstance(inner, TransformedDistribution):
        value = _draw(inner.base_dist, num_particles, antithetic)
        for transform in inner.transforms:
            value = transform(value)
        return value
    draw = fn.rsample if fn.has_rsample else fn.sample
    if antithetic and num_particles % 2 == 0 and (type(inner).__name__ in SYMMETRIC):
        half = draw(torch.Size([num_particles // 2]))
        return torch.cat([half, 2 * inner.loc - half])
    return draw(torch.Size([num_particles]))  # type: ignore[no-any-return]


class PlaceValues(Messenger):
    """Puts given rows `(R, dim)` into a guide's terms, so that a run scores them instead of drawing."""

    def __init__(self, terms: list[GuideSite], flat: Tensor, in_plate: bool) -> None:
        super().__init__()
        self.terms, self.flat, self.in_plate = {term.name: term for term in terms}, flat, in_plate

    def _pyro_sample(self, message: Any) -> None:
        term = self.terms.get(message["name"])
        if term is not None:
            value = place(term, message["fn"], self.flat[None])[0]
            message["value"], message["done"] = value if self.in_plate else value[0], True


def place(term: GuideSite, fn: Any, z: Tensor) -> Tensor:
    """The values of a term's site at unconstrained `z` `(S, B, dim)`, with S leading."""
    unconstrained = term.site.unflatten(z)
    value: Tensor = unconstrained if term.unconstrained else bijection(fn, term.site.name)(unconstrained)
    return value


def score_term(
    term: GuideSite, fn: Any, value: Tensor, active: Tensor | None, in_plate: bool, shape: tuple[int, int]
) -> Draws:
    """Columns `(S, B, size)` and log q `(S, B)` in unconstrained space of a term's `value`, S leading."""
    site = term.site
    mask = None if active is None else _mask_like(site, active, value.shape[1:], in_plate)
    log_q = masked_log_prob(fn, value, mask, term.name)
    unconstrained = value
    if not term.unconstrained:
        transform = bijection(fn, term.site.name)
        unconstrained = transform.inv(value)
        log_q = log_q + log_jacobian(transform, unconstrained, value, mask, fn.event_dim)
    log_q = site.sum_to_rows(log_q, lead=1) if in_plate else log_q.reshape(len(value), -1).sum(-1, keepdim=True)
    columns = site.flatten(unconstrained) if in_plate else unconstrained.reshape(len(value), 1, -1)
    return columns, log_q.expand(shape)


def _mask_like(site: Site, active: Tensor, value_shape: tuple[int, ...], in_plate: bool) -> Tensor | None:
    if bool(active[:, site.columns].all()):
        return None
    mask = site.unflatten(active)
    if not in_plate:  # one row, which the value has no axis for
        mask = mask[0] if mask.shape != value_shape else mask
    if mask.shape == value_shape:
        return mask
    # A constrained event may have another shape (a simplex, say); such an event is masked as a whole.
    number = site.unconstrained_event_dim  # 0 of one-hot states, which are numbered
    events = mask.flatten(-number).all(-1) if number else mask
    return events.reshape(events.shape + (1,) * site.event_dim).expand(value_shape)
