"""`JointDensity`: a Pyro model as a density over one flat unconstrained vector per datapoint."""

import warnings
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor

from pyrogaps.density.data import Data, IndexedData, as_given, as_indexed, whole
from pyrogaps.density.layout import Site
from pyrogaps.density.particles import Particles, mapped_rows, one_by_one_note, seconds_of
from pyrogaps.density.plates import whole_plates
from pyrogaps.density.reading import ANY_PLATE, ModelStructure, finite_arguments, read_model
from pyrogaps.density.rows import PAD_REMEDY, probe_rows, rows_are_independent, same_density
from pyrogaps.density.runs import Program, check_callable, evaluating
from pyrogaps.density.score import ScoreModel, stack_runs
from pyrogaps.density.structure import check_parameters, sample_sites
from pyrogaps.density.supports import bijection
from pyrogaps.errors import InputError
from pyrogaps.guard import failures_named, guarded
from pyrogaps.settings import Plate, checked
from pyrogaps.streams import seeded

# Ways to evaluate particles together, as they are tried.
TOGETHER: tuple[Particles, ...] = ("broadcast", "mapped", "mapped buffers")


class Probe(NamedTuple):
    """Points `z` `(R, dim)` at datapoints `indices` `(R,)`, the latent sites' values and log p(x, z) `(R,)` there."""

    indices: Tensor
    z: Tensor
    values: dict[str, Tensor]
    log_density: Tensor


class JointDensity:
    r"""log p(x_n, z) of a Pyro model, one datapoint n of the data plate at a time.

    Latent sites are moved to unconstrained space with `biject_to` (log-Jacobian included), flattened and concatenated
    to a vector of length `dim`:

    $$\log p(x_n, z) = \sum_{\text{sites}} \log p(\cdot) + \log |\partial \text{sites} / \partial z| \;\text{[nats]}$$

    Args:
        model: a Pyro model, called with the positional arguments that `data` gives.
        data: a tensor or array, or a tuple of them, whose first axis is the data plate, or an `IndexedData`.
        plate: the data plate's name. None finds it where exactly one plate encloses every site; False, or a model
            without any plate, makes the whole data set one datapoint (N = 1).
        make_whole: with `plate=False`, use the full size of subsampled plates, which are refused otherwise.
        structure: that of a density of the same model on data of the same form; the model is not read again.

    Raises:
        InputError: naming the site, plate or argument, where the density per datapoint is not defined or not
            supported (a latent outside the data plate, a discrete latent, a hard-coded plate size, data outside the
            likelihood's support, NaN in data or parameters, ...).
    """

    @guarded
    @checked()
    def __init__(
        self,
        model: Program,
        data: Data,
        plate: Plate = None,
        *,
        make_whole: bool = False,
        structure: ModelStructure | None = None,
    ) -> None:
        check_callable(model, "model")
        data = as_given(data)
        self.model, self.caller_data = model, data
        if structure is None:
            check_parameters(model)
            with seeded(0, "structure"), evaluating(model), pyro.validation_enabled(True):
                self.structure = read_model(model, data, plate, make_whole=make_whole)
        else:
            self.structure = structure
        self.data = whole(data) if self.plate is None else as_indexed(data)
        if structure is None:
            with seeded(0, "structure"), evaluating(model), torch.no_grad():
                self._check_rows()

    @property
    def plate(self) -> str | None:
        """The data plate's name; None where the whole data set is one datapoint."""
        return self.structure.plate

    @property
    def sites(self) -> dict[str, Site]:
        """The latent sites with their layout in `z`."""
        return self.structure.sites

    @property
    def dim(self) -> int:
        """The length of `z`."""
        return self.structure.dim

    @property
    def dtype(self) -> torch.dtype:
        return self.structure.dtype

    @property
    def device(self) -> torch.device:
        return self.structure.device

    @property
    def observed(self) -> tuple[str, ...]:
        """Names of the observed sites."""
        return self.structure.observed

    @property
    def unnormalised(self) -> tuple[str, ...]:
        """Observed sites with values outside their support, which the model does not validate."""
        return self.structure.unnormalised

    @property
    def remarks(self) -> tuple[str, ...]:
        """What of the model is left out of the density, in short sentences."""
        return self.structure.remarks

    @property
    def num_datapoints(self) -> int:
        """N, the number of datapoints."""
        return self.data.num_datapoints

    @guarded
    def __call__(self, z: Tensor, indices: Tensor | None = None) -> Tensor:
        """log p(x_n, z_sn) in nats, shape `(S, N)`, for unconstrained `z` `(S, N, dim)` of `indices` (default: all)."""
        log_prior, log_likelihood = self.terms(z, indices)
        return log_prior + log_likelihood

    @guarded
    def terms(self, z: Tensor, indices: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """log p(z_sn) (in unconstrained space) and log p(x_n | z_sn), each `(S, N)`."""
        indices = self._indices(indices)
        if z.dim() != 3 or z.shape[1:] != (len(indices), self.dim):
            raise InputError(
                f"z: expected shape (S, {len(indices)}, {self.dim}), got {tuple(z.shape)}. Pass draws in unconstrained "
                "space, as sample_prior(S, indices) returns them, with the indices of their datapoints"
            )
        with evaluating(self.model):
            args = self.fetch(indices, len(z))
            parts = self.score(z.flatten(0, 1), args, indices.repeat(len(z)))
        return parts[0].reshape(z.shape[:2]), parts[1].reshape(z.shape[:2])

    def fetch(self, indices: Tensor, num_particles: int = 1) -> tuple[Any, ...]:
        """The model's arguments for `indices`, which are repeated as a whole `num_particles` times."""
        return finite_arguments(self.data.fetch(indices.repeat(num_particles) if self.plate is not None else indices))

    def score(self, flat: Tensor, args: tuple[Any, ...], indices: Tensor) -> tuple[Tensor, Tensor]:
        """`terms` for rows: `flat` `(R, dim)` and the arguments of those R rows give two tensors `(R,)`.

        A pure function of `flat` and the tensors in `args`, for use inside `evaluating(model)`.
        """
        handler = self.run(flat, args, indices)
        return handler.log_prior, handler.log_likelihood

    def run(self, flat: Tensor, args: tuple[Any, ...], indices: Tensor) -> ScoreModel:
        """Run the model with `flat` in its latent sites; the handler holds the terms, site values and masks."""
        particles = self.structure.particles
        if self.plate is not None or particles == "broadcast":
            return self._run(flat, args, indices)
        if particles == "one by one" or len(flat) == 1:
            return stack_runs([self._run(row[None], args, indices[:1]) for row in flat])
        return mapped_rows(lambda row: self._run(row, args, indices[:1]), flat, particles)

    def _run(self, flat: Tensor, args: tuple[Any, ...], indices: Tensor) -> ScoreModel:
        handler = ScoreModel(self.sites, self.plate, flat, vectorized=self.structure.vectorized)
        with self.plates(indices), handler, failures_named("model"):
            self.model(*args)
        missing = [name for name in self.sites if name not in handler.values]
        if missing:
            raise InputError(
                f"site '{missing[0]}': the model leaves out this latent site for some inputs. {PAD_REMEDY}"
            )
        return handler

    def plates(self, indices: Tensor) -> AbstractContextManager[None]:
        """A context in which the model's data plate holds the rows of `indices`."""
        plate = ANY_PLATE if self.structure.make_whole else self.plate
        return whole_plates(plate, indices, num_datapoints=self.num_datapoints, bound=self.structure.bound)

    @guarded
    def constrain(self, z: Tensor, indices: Tensor | None = None) -> dict[str, Tensor]:
        """The latent sites' values, each `(S, N, *shape)`, of unconstrained `z` `(S, N, dim)`."""
        indices = self._indices(indices)
        with evaluating(self.model), torch.no_grad():
            handler = self.run(z.flatten(0, 1), self.fetch(indices, len(z)), indices.repeat(len(z)))
        result = {}
        for name, value in handler.values.items():
            site = self.sites[name]
            value = value.movedim(site.batch_axis - site.event_dim, 0)
            padded = 1 if self.plate is not None else value.dim() - site.batch_dims - site.event_dim
            result[name] = value.reshape(*z.shape[:2], *value.shape[padded:])
        return result

    @guarded
    def active(self, indices: Tensor) -> Tensor | None:
        """Which coordinates are not masked out, `(B, dim)`; None if the model masks no latent."""
        if not self.structure.masked:
            return None
        flat = self.zeros(len(indices))
        with evaluating(self.model), torch.no_grad():
            handler = self.run(flat, self.fetch(indices), indices)
        columns = []
        for name, site in self.sites.items():
            mask, shape = handler.masks[name], site.unflatten(flat).shape
            mask = torch.ones((), dtype=torch.bool, device=flat.device) if mask is None else mask
            columns.append(site.flatten(mask.expand(shape)))
        return torch.cat(columns, -1)

    def zeros(self, rows: int) -> Tensor:
        """The origin of unconstrained space, `(rows, dim)`, in the model's dtype and on its device."""
        return torch.zeros(rows, self.dim, dtype=self.dtype, device=self.device)

    @guarded
    def sample_prior(self, num_particles: int, indices: Tensor | None = None) -> Tensor:
        """Draws of z from the model's latent sites (given earlier observed ones), `(S, N, dim)`, unconstrained."""
        indices = self._indices(indices)
        with evaluating(self.model), torch.no_grad():
            if self.plate is None:
                args = self.fetch(indices)
                return torch.stack([self._draw(args, indices) for _ in range(num_particles)])
            flat = self._draw(self.fetch(indices, num_particles), indices.repeat(num_particles))
        return flat.reshape(num_particles, len(indices), self.dim)

    def _draw(self, args: tuple[Any, ...], indices: Tensor) -> Tensor:
        with self.plates(indices):
            messages = sample_sites(self.model, args)
        return self.flatten({name: messages[name] for name in self.sites}, len(indices))

    def flatten(self, messages: dict[str, Any], rows: int) -> Tensor:
        """Unconstrained rows `(R, dim)` of drawn latent sites (`messages` of a trace, in layout order)."""
        columns = []
        for name, message in messages.items():
            unconstrained = bijection(message["fn"], name).inv(message["value"])
            site = self.sites[name]
            if self.plate is None:
                columns.append(unconstrained.reshape(1, -1))
            else:
                columns.append(site.flatten(unconstrained))
        return torch.cat(columns, -1)

    def columns_of(self, z: Tensor, other: "JointDensity") -> Tensor:
        """The columns of `z` `(*, dim)` that belong to the sites of `other`, in its order."""
        return torch.cat([z[..., self.sites[name].columns] for name in other.sites], -1)

    def over(self, data: IndexedData) -> "JointDensity":
        """The same density over other data of the same form; runs no program and repeats no check."""
        return JointDensity(self.model, data, structure=self.structure)

    def one_by_one(self) -> "JointDensity":
        """The same density; without a plate, particles are evaluated one after the other."""
        return JointDensity(self.model, self.caller_data, structure=replace(self.structure, particles="one by one"))

    def _indices(self, indices: Tensor | None) -> Tensor:
        return torch.arange(self.num_datapoints) if indices is None else indices

    @cached_property
    def probe(self) -> "Probe":
        """Points at some datapoints, for checks of the model and of guides; masked coordinates are zero."""
        with evaluating(self.model):
            return self._probed()

    def _probed(self) -> "Probe":
        with seeded(0, "probe"), torch.no_grad():
            indices = torch.zeros(1, dtype=torch.long) if self.plate is None else probe_rows(self.num_datapoints)
            z = 0.5 * torch.randn(len(indices), self.dim, dtype=self.dtype, device=self.device)
            active = self.active(indices)
            z = z if active is None else torch.where(active, z, torch.zeros_like(z))
            handler = self.run(z, self.fetch(indices), indices)
        return Probe(indices, z, handler.values, handler.log_prior + handler.log_likelihood)

    def _check_rows(self) -> None:
        """Check that a row's density does not depend on its position or on other rows."""
        if self.plate is None:
            self._choose_particles()
            return
        # Not in a block of its own: parameters that the model draws at its first run would not be those of the next.
        self.probe = probe = self._probed()
        indices, z, together = probe.indices, probe.z, probe.log_density
        if not rows_are_independent(lambda rows: self._total(z[rows], indices[rows]), together):
            if not torch.equal(self._total(z, indices), together):
                raise InputError(
                    "data: the density of a datapoint changed between two identical calls; fetch(indices) or the model "
                    "is random. Draw the data once (SimulatedData(...).fetch(indices)) and pass the tensors"
                )
            raise InputError(
                "data: the density of a datapoint changes with its position or with other rows of the batch. "
                "fetch(indices) must keep the order, and the model must treat rows independently (no batch statistics)"
            )

    def _total(self, z: Tensor, indices: Tensor) -> Tensor:
        return torch.stack(self.score(z, self.fetch(indices), indices)).sum(0)

    def _choose_particles(self) -> None:
        """Without a data plate, evaluate particles together only if the result equals one run per particle."""
        indices, z = torch.zeros(3, dtype=torch.long), 0.5 * torch.randn(3, self.dim, dtype=self.dtype)
        z, args = z.to(self.device), self.fetch(indices[:1])
        alone, reason = self._evaluating("one by one"), None
        expected = _with_slopes(alone, z, args, indices)
        for particles in TOGETHER:
            try:
                together = _with_slopes(self._evaluating(particles), z, args, indices)
            except Exception as error:
                reason = error
                continue
            if same_density(together, expected):
                self.structure = replace(self.structure, particles=particles)
                return
            reason = None
        self.structure = alone.structure
        seconds = seconds_of(lambda: alone.score(z[:1], args, indices))
        warnings.warn(one_by_one_note(seconds, reason), stacklevel=2)

    def _evaluating(self, particles: Particles) -> "JointDensity":
        return JointDensity(self.model, self.data, structure=replace(self.structure, particles=particles))


def _with_slopes(joint: JointDensity, z: Tensor, args: tuple[Any, ...], indices: Tensor) -> Tensor:
    """log p(x, z) `(R,)` and its gradients, flat; zeros where it cannot be differentiated."""
    slopes = torch.zeros_like(z)
    with torch.enable_grad():
        point = z.detach().requires_grad_()
        values = torch.stack(joint.score(point, args, indices)).sum(0)
        with suppress(RuntimeError):
            (slopes,) = torch.autograd.grad(values.sum(), point)
    return torch.cat([values.detach(), slopes.flatten()])
