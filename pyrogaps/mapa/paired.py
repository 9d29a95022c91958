"""A model and an encoder whose decoded latents score other datapoints too."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from torch import Tensor
from torch.nn.functional import softplus

from pyrogaps.density import IndexedData, JointDensity
from pyrogaps.density.data import evenly_spaced
from pyrogaps.density.discrete import refuse_enumerated
from pyrogaps.density.layout import leaf, plate_dim, rows_first
from pyrogaps.density.rows import same_density
from pyrogaps.density.runs import Program, evaluating
from pyrogaps.density.shared import datapoints_needed
from pyrogaps.density.structure import is_factor, is_masked, sample_sites
from pyrogaps.errors import InputError, counted
from pyrogaps.mapa.continuous_bernoulli import log_normaliser
from pyrogaps.streams import seeded

Latents: TypeAlias = Tensor | Mapping[str, Tensor]
CHECK_ROWS = 16
# Equivalent parameters of a distribution: the first is used.
ALTERNATIVES = (("logits", "probs"), ("scale_tril", "covariance_matrix", "precision_matrix"))
# Exponential families log p = x eta - A(eta) that one matrix product scores without loss of digits.
LOG_NORMALISERS: dict[str, Callable[[Tensor], Tensor]] = {"Bernoulli": softplus, "ContinuousBernoulli": log_normaliser}


class Paired:
    """A model and an encoder, checked: a datapoint that is encoded and decoded once can score the others.

    A subclass refuses encoders in `check_encoded`. Arguments and errors are those of `EmpiricalizedModel`.
    """

    def __init__(self, model: Program, encoder: Program | Latents, data: IndexedData, plate: str | None = None) -> None:
        self.model = model
        programs = [program for program in (model, encoder) if callable(program)]
        # An optimizer that traces the caller must not see the parameters of these runs.
        with poutine.block():
            with datapoints_needed("MAPA explains datapoints by others. Make these latents parameters (pyro.param)"):
                self.joint = JointDensity(model, data, plate)
            refuse_enumerated(self.joint.enumerated, "MAPA")
            self.plate = self._plate()
            self.encoder = self._named(encoder)
            with seeded(0, "structure"), evaluating(*programs), pyro.validation_enabled(True), torch.no_grad():
                self._check()

    def check_encoded(self, sites: dict[str, Any], indices: Tensor, args: tuple[Any, ...]) -> None:
        """Refuse sites of the encoder that cannot serve other datapoints."""
        raise NotImplementedError

    def fetch(self, indices: Tensor) -> tuple[Any, ...]:
        """The arguments of the datapoints `indices`. The joint density has already checked all data."""
        return self.joint.data.fetch(indices)

    def encode(self, indices: Tensor, args: tuple[Any, ...]) -> dict[str, Any]:
        """The encoder's sites for the datapoints `indices`; given latents yield sites with a value alone."""
        if isinstance(self.encoder, dict):
            return {name: {"value": value[indices.to(value.device)]} for name, value in self.encoder.items()}
        with self.joint.plates(indices):
            return sample_sites(self.encoder, args, "encoder")

    def decode(self, indices: Tensor, args: tuple[Any, ...], encoded: dict[str, Any]) -> dict[str, Any]:
        """The model's sites on `args`, its latents fixed to the values of the encoder's sites."""
        conditioned = poutine.condition(self.model, data={name: site["value"] for name, site in encoded.items()})
        with self.joint.plates(indices):
            return sample_sites(conditioned, args)

    def _plate(self) -> str:
        if self.joint.plate is None:
            raise InputError("model: it has no data plate. Put its sites inside `with pyro.plate('data', len(x))`")
        return self.joint.plate

    def _named(self, encoder: Program | Latents) -> Program | dict[str, Tensor]:
        """The encoder as a program, or given latents by the name of their site."""
        if isinstance(encoder, AutoGuide):
            raise InputError(
                f"encoder: {type(encoder).__name__} has separate parameters for each datapoint. Pass a guide that is a "
                "function of x"
            )
        names = list(self.joint.sites)
        if isinstance(encoder, Tensor):
            if len(names) > 1:
                raise InputError(
                    f"latents: there are several sites ({', '.join(names)}). Pass a dictionary with the latents of each"
                )
            encoder = {names[0]: encoder}
        if not isinstance(encoder, Mapping):
            return encoder
        for name, value in encoder.items():
            if len(value) != self.joint.num_datapoints:
                raise InputError(
                    f"latents '{name}': expected one for each of {counted(self.joint.num_datapoints, 'datapoint')}, "
                    f"got {len(value)}"
                )
        return dict(encoder)

    def _check(self) -> None:
        """Check sites, supports and likelihood on a few datapoints."""
        indices = evenly_spaced(self.joint.num_datapoints, CHECK_ROWS)
        args = self.fetch(indices)
        encoded = self.encode(indices, args)
        if unmatched := sorted(encoded.keys() ^ self.joint.sites.keys()):
            side = "the encoder lacks it" if unmatched[0] in self.joint.sites else "only the encoder has it"
            raise InputError(f"site '{unmatched[0]}': {side}. Model and encoder must have the same latent sites")
        if callable(self.encoder):
            self.check_encoded(encoded, indices, args)
        with self.joint.plates(indices):
            drawn = sample_sites(self.model, args)
        for name, site in encoded.items():
            value = site["value"]
            if not bool(torch.isfinite(value).all() and drawn[name]["fn"].support.check(value).all()):
                raise InputError(
                    f"site '{name}': the encoder returns NaN, or a value outside the site's support in the model. Map "
                    "its output into the support"
                )
        self._check_likelihood(indices, args, encoded)

    def _check_likelihood(self, indices: Tensor, args: tuple[Any, ...], encoded: dict[str, Any]) -> None:
        """Refuse a likelihood that changes when other datapoints are passed with the same latents."""
        sites = self.decode(indices, args, encoded)
        sites_of_others = self.decode(indices, self.fetch(indices.roll(1)), encoded)
        for name in self.joint.observed:
            site, other = sites[name], sites_of_others[name]
            if is_factor(site["fn"]) or is_masked(site) or is_masked(other):
                raise InputError(
                    f"site '{name}': it is masked or a pyro.factor, so other datapoints cannot be scored under its "
                    "latents. Use a plain distribution"
                )
            if not same_density(*(part["fn"].log_prob(site["value"]) for part in (site, other))):
                raise InputError(
                    f"site '{name}': its likelihood has parameters that depend on data as well as on z, for example on "
                    "earlier observations. MAPA needs parameters that depend on z alone"
                )


def pair_log_likelihood(site: Any, plate: str, rows: Tensor, columns: Tensor) -> Tensor:
    r"""log p(x_n | z_i) of an observed site, n = `rows` `(B,)` and i = `columns` `(B, C)`: shape `(B, C)`, nats.

    Rows and columns count rows of the data plate in the run that `site` comes from. The site's distribution must depend
    on z alone. A single matrix product scores Bernoulli data. Other distributions are built again with the parameters
    of each pair. Distributions that cannot be built again score all rows against all.
    """
    fn, value = site["fn"], site["value"]
    dim = plate_dim(site, plate)
    assert dim is not None
    value, inner = value.expand(fn.batch_shape + fn.event_shape), leaf(fn)
    rows, columns = rows.to(value.device), columns.to(value.device)
    axis = dim - (fn.event_dim - inner.event_dim)
    if type(inner).__name__ in LOG_NORMALISERS:
        return _by_product(inner, value, axis, rows).gather(1, columns)
    names = _parameters(inner)
    if names is None:
        return _against_all(inner, value, axis, rows).gather(1, columns)
    pairs = columns.flatten()
    rebuilt = type(inner)(**{name: _selected(inner, name, axis, pairs) for name in names}, validate_args=False)
    value = value.index_select(axis - inner.event_dim, rows.repeat_interleave(columns.shape[1]))
    return rows_first(rebuilt.log_prob(value), axis, len(pairs)).reshape(columns.shape)


def _by_product(inner: Any, value: Tensor, axis: int, rows: Tensor) -> Tensor:
    """Scores of `rows` under all decoded datapoints, by the exponential family's matrix product."""
    eta = inner.logits.expand(inner.batch_shape).movedim(axis, 0).flatten(1)
    x = value.movedim(axis, 0)[rows].flatten(1)
    normaliser = LOG_NORMALISERS[type(inner).__name__](eta)
    products: Tensor = x.to(eta.dtype) @ eta.T
    return products - normaliser.sum(1)


def _against_all(inner: Any, value: Tensor, axis: int, rows: Tensor) -> Tensor:
    """Scores of `rows` under all decoded datapoints, by the distribution itself."""
    value_axis = axis - inner.event_dim
    x = value.movedim(value_axis, 0)[rows].unsqueeze(value_axis)
    terms: Tensor = inner.log_prob(x).movedim(axis, 1)
    return terms.flatten(2).sum(-1) if terms.dim() > 2 else terms


def _parameters(inner: Any) -> list[str] | None:
    """Names of the parameters that a distribution can be built from; None where its constructor takes more."""
    names = set(inspect.signature(type(inner).__init__).parameters) - {"self", "validate_args"}
    if not names or not names <= set(inner.arg_constraints):
        return None
    for first, *equivalent in ALTERNATIVES:
        names -= set(equivalent) if first in names else set()
    return sorted(names)


def _selected(inner: Any, name: str, axis: int, rows: Tensor) -> Tensor:
    """A parameter at `rows` of its data plate; unchanged where all rows share it."""
    event_dim = getattr(inner.arg_constraints[name], "event_dim", 0)
    value: Tensor = getattr(inner, name)
    axis = axis - event_dim
    value = value.expand(inner.batch_shape + value.shape[value.dim() - event_dim :])
    if value.stride(axis) == 0:
        return value.narrow(axis, 0, 1)
    return value.index_select(axis, rows)
