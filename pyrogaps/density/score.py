"""Effect handlers that score a program's sites per row."""

import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from pyro.distributions.util import sum_rightmost
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions.transforms import IndependentTransform

from pyrogaps.density.discrete import Discrete
from pyrogaps.density.enumeration import own_log_prob
from pyrogaps.density.factors import Factors
from pyrogaps.density.layout import Site, distribution_mask, plate_dim, rows_first, unconstrained_mask, unmasked
from pyrogaps.density.supports import bijection
from pyrogaps.errors import InputError
from pyrogaps.guard import failures_named


def is_bookkeeping(message: Any) -> bool:
    """Whether a site is not a random variable: plate subsamples and `pyro.deterministic`."""
    return site_is_subsample(message) or bool(message["infer"] and message["infer"].get("_deterministic"))


def log_jacobian(transform: Any, unconstrained: Tensor, value: Tensor, mask: Tensor | None, event_dim: int) -> Tensor:
    """log |d value / d unconstrained|, masked elements left out, summed to the batch shape of a site."""
    while isinstance(transform, IndependentTransform):
        transform = transform.base_transform
    result = transform.log_abs_det_jacobian(unconstrained, value)
    if mask is not None:
        drop = transform.codomain.event_dim
        keep = mask.all(tuple(range(-drop, 0)), keepdim=False) if drop else mask
        result = torch.where(keep, result, torch.zeros_like(result))
    total: Tensor = sum_rightmost(result, result.dim() - (value.dim() - event_dim))
    return total


def log_prob(fn: Any, value: Tensor, name: str) -> Tensor:
    """log-probability of `value` under `fn`, the distribution of the site `name`."""
    with failures_named(f"site '{name}': its log_prob"):
        result: Tensor = fn.log_prob(value)
    return result


def site_log_prob(message: Any) -> Tensor:
    """log-probability of a site's value, not scaled; 0 where `poutine.mask` masks it."""
    term = log_prob(message["fn"], message["value"], message["name"])
    if message["mask"] is None:
        return term
    keep = torch.as_tensor(message["mask"], dtype=torch.bool, device=term.device)
    return torch.where(keep, term, torch.zeros_like(term))


def masked_log_prob(fn: Any, value: Tensor, mask: Tensor | None, name: str) -> Tensor:
    """log-probability of `value` under `fn` without the masked elements, of `fn`'s batch shape.

    A mask that splits an event needs a distribution that factorises over it (`Independent`), or that has
    `masked_log_prob(value, mask)` for its marginals. Raises `InputError` otherwise.
    """
    if mask is None:
        return log_prob(fn, value, name)
    fn = unmasked(fn)
    mask = mask.expand(value.shape)
    sum_dims = 0
    while type(fn).__name__ == "Independent":
        sum_dims += fn.reinterpreted_batch_ndims
        fn = unmasked(fn.base_dist)
    if fn.event_dim == 0:
        result = torch.where(mask, log_prob(fn, value, name), torch.zeros((), dtype=value.dtype, device=value.device))
    elif hasattr(fn, "masked_log_prob"):
        result = fn.masked_log_prob(value, mask)
    else:
        events = mask.flatten(-fn.event_dim)
        if not torch.equal(events.all(-1), events.any(-1)):
            raise InputError(
                f"site '{name}': the model masks part of an event, but the guide's {type(fn).__name__} is not "
                "factorised. Use a factorised distribution in the guide, or mask whole events"
            )
        whole = events.all(-1)
        result = torch.where(whole, log_prob(fn, value, name), torch.zeros((), dtype=value.dtype, device=value.device))
    total: Tensor = sum_rightmost(result, sum_dims)
    return total


class Structure(Protocol):
    """What scoring needs of a model's structure, see `ModelStructure`."""

    @property
    def sites(self) -> Mapping[str, Site]: ...
    @property
    def enumerated(self) -> Mapping[str, Discrete]: ...
    @property
    def plate(self) -> str | None: ...
    @property
    def lead(self) -> int: ...
    @property
    def vectorized(self) -> bool: ...


class ScoreModel(Messenger):
    """Sets the model's latent sites to unconstrained rows `(R, dim)` and sums log-probabilities per row.

    Scales (plate subsampling, `poutine.scale`) are ignored, masks are applied. After the run `log_prior` holds the
    latent sites' terms with their log-Jacobians (also alone in `log_jacobian`), `log_likelihood` the observed
    sites', all `(R,)`; `values`, `masks` and `frames` (of plates) are the latent sites'. Without a plate and not
    `vectorized`, the model gets the one row's values in exactly the shapes that it draws.

    Terms that depend on discrete latents, to which a handler inside gives all their values, are held in `factors`
    instead: `log_joint` and `terms` sum over these latents.
    """

    def __init__(self, flat: Tensor, structure: Structure) -> None:
        super().__init__()
        self.sites, self.plate, self.lead, self.flat = structure.sites, structure.plate, structure.lead, flat
        self.enumerated = structure.enumerated
        self.factors = Factors(self.plate, len(flat), first_dim(self.plate, self.lead)) if self.enumerated else None
        self.drop_rows = self.plate is None and not structure.vectorized
        self.rows = len(flat)
        self.log_prior: Tensor = flat.new_zeros(self.rows)
        self.log_likelihood: Tensor = flat.new_zeros(self.rows)
        self.log_jacobian: Tensor = flat.new_zeros(self.rows)
        self.values: dict[str, Tensor] = {}
        self.masks: dict[str, Tensor | None] = {}
        self.frames: dict[str, list[Any]] = {}

    def _pyro_sample(self, message: Any) -> None:
        if is_bookkeeping(message) or message["is_observed"]:
            return
        name, fn = message["name"], message["fn"]
        if name in self.enumerated:
            return
        if name not in self.sites:
            raise InputError(
                f"site '{name}': the model has this latent site only for some inputs. Keep it for all inputs, and mask "
                "it where it is not used"
            )
        site = self.sites[name]
        mask = distribution_mask(fn, message["mask"])
        unconstrained = site.unflatten(self.flat)
        lead = unconstrained.shape[: 1 + site.num_padded]
        if self.drop_rows:
            unconstrained = unconstrained.reshape(site.shape[site.num_padded :])
        active = unconstrained_mask(mask, fn, site)
        if active is not None and self.factors is not None and self.factors.holds(active, fn.event_dim):
            raise InputError(
                f"site '{name}': its mask depends on a discrete latent, so it has a density in some states only. "
                "Remove this mask in model and guide: a latent that is not used integrates to 1, and log p(x) stays "
                "the same"
            )
        if active is not None:
            unconstrained = torch.where(active, unconstrained, torch.zeros_like(unconstrained))
        transform = bijection(fn, name)
        value = transform(unconstrained)
        message["value"], message["done"] = value, True
        self.values[name], self.masks[name] = value.reshape(*lead, *value.shape) if self.drop_rows else value, active
        self.frames[name] = [frame for frame in message["cond_indep_stack"] if frame.vectorized]
        if self.factors is not None and self.factors.holds(value, fn.event_dim):
            raise InputError(
                f"site '{name}': its support depends on a discrete latent. Use a distribution with a fixed support, "
                "and transform its draws"
            )
        jacobian = self._per_row(log_jacobian(transform, unconstrained, value, mask, fn.event_dim), message)
        self.log_jacobian = self.log_jacobian + jacobian
        self.log_prior = self.log_prior + jacobian

    def _pyro_post_sample(self, message: Any) -> None:
        if is_bookkeeping(message):
            return
        term = own_log_prob(message) if message["name"] in self.enumerated else site_log_prob(message)
        if self.factors is not None and self.factors.holds(term):
            self.factors.add(term, message, is_prior=not message["is_observed"])
        elif message["is_observed"]:
            self.log_likelihood = self.log_likelihood + self._per_row(term, message)
        else:
            self.log_prior = self.log_prior + self._per_row(term, message)

    def _per_row(self, term: Tensor, message: Any) -> Tensor:
        axis = plate_dim(message, self.plate) if self.plate is not None else self._lead_axis
        assert axis is not None
        return rows_first(term, axis, self.rows)

    @property
    def log_joint(self) -> Tensor:
        """log p(x, z) `(R,)`, enumerated latents summed out."""
        total = self.log_prior + self.log_likelihood
        return total + self.factors.total() if self.factors else total

    def log_joint_at(self, positions: Mapping[str, Tensor]) -> Tensor:
        """log p(x, y, z) `(R,)` at one state y of the enumerated latents, see `Factors.at`."""
        total = self.log_prior + self.log_likelihood
        for term, message in self.factors.at(positions) if self.factors else ():
            total = total + self._per_row(term, message)
        return total

    @property
    def terms(self) -> tuple[Tensor, Tensor]:
        """log p(z) and log p(x | z) `(R,)`. Enumerated latents y are summed out of both: of p(y, z), and of p(x, y, z),
        which is divided by the first.
        """
        if not self.factors:
            return self.log_prior, self.log_likelihood
        prior, rest = self.factors.total(prior=True), self.factors.total()
        return self.log_prior + prior, self.log_likelihood + ratio(rest, prior)

    def append_rows(self, others: "list[ScoreModel]") -> None:
        """Take over the rows of other runs."""
        runs = [self, *others]
        terms = [run.terms for run in runs]
        self.log_prior, self.log_likelihood = (torch.cat([pair[k] for pair in terms]) for k in (0, 1))
        self.factors = None
        self.log_jacobian = torch.cat([run.log_jacobian for run in runs])
        for name, site in self.sites.items():
            self.values[name] = torch.cat([run.values[name] for run in runs], site.batch_axis - site.event_dim)

    def take_rows(self, terms: dict[str, Tensor], values: dict[str, Tensor], masks: dict[str, Tensor]) -> None:
        """Take over the results of `torch.func.vmap` over runs with one row each: they have an axis of rows first."""
        self.rows, self.factors = len(terms["log_prior"]), None
        self.log_prior, self.log_likelihood, self.log_jacobian = (
            terms[name][:, 0] for name in ("log_prior", "log_likelihood", "log_jacobian")
        )
        for name, site in self.sites.items():
            axis = site.batch_axis - site.event_dim
            if name in values:
                self.values[name] = values[name].squeeze(axis).movedim(0, axis)
        self.masks = {name: masks[name][0] if name in masks else None for name in self.masks}

    @property
    def _lead_axis(self) -> int:
        return self.lead


def ratio(log_joint: Tensor, log_prior: Tensor) -> Tensor:
    """log p(x | z) from log p(x, z) and log p(z): -infinity where the first is, also if the second is too."""
    nowhere = log_joint == -math.inf
    return torch.where(nowhere, log_joint, log_joint - torch.where(nowhere, torch.zeros_like(log_prior), log_prior))


def first_dim(plate: str | None, lead: int) -> int:
    """The first tensor dimension that enumerated latents may have."""
    return lead if plate is not None else lead - 1


def stack_runs(runs: list[ScoreModel]) -> ScoreModel:
    """One handler with the rows of several runs."""
    runs[0].append_rows(runs[1:])
    return runs[0]
