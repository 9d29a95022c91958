"""The empiricalized model: a Pyro model whose latents are what an encoder makes of the data set."""

from collections.abc import Mapping
from typing import Any, TypeAlias

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from pyrogaps.density import IndexedData, JointDensity
from pyrogaps.density.layout import leaf
from pyrogaps.density.rows import same_density
from pyrogaps.density.runs import Program, evaluating
from pyrogaps.density.structure import is_factor, is_masked, sample_sites
from pyrogaps.errors import InputError
from pyrogaps.mapa.pairs import pair_log_likelihood
from pyrogaps.streams import seeded

Latents: TypeAlias = Tensor | Mapping[str, Tensor]
CHECK_ROWS = 16


class EmpiricalizedModel:
    r"""$i \sim U\{1..N\}, \; x|i \sim p_\theta(x|z_i), \; z_i = h_\phi(x_i)$.

    Args:
        model: a Pyro model with a data plate, in which the likelihood depends on z alone. Its prior plays no part.
        encoder: h: a Pyro guide whose sites are Deltas, `pyro.sample("z", dist.Delta(h(x), event_dim=1))`; or the
            latents z_i themselves, `(N, *event)`, by the name of their site where there are several.
        data: as for `JointDensity`.
        plate: the data plate's name, where it cannot be found.

    Raises:
        InputError: what `JointDensity` refuses in a model and data; a model without a data plate; an encoder with a
            site that is no Delta, with other sites than the model's latents, or outside their support; a likelihood
            that is masked, or depends on the data other than through z.
    """

    def __init__(self, model: Program, encoder: Program | Latents, data: IndexedData, plate: str | None = None) -> None:
        self.model = model
        programs = [program for program in (model, encoder) if callable(program)]
        # What is run to check must not reach an optimizer that is looking on.
        with poutine.block():
            self.joint = JointDensity(model, data, plate)
            self.plate = self._plate()
            self.encoder = self._named(encoder)
            with seeded(0, "structure"), evaluating(*programs), pyro.validation_enabled(True), torch.no_grad():
                self._check()

    def log_likelihood(self, indices: Tensor, columns: Tensor) -> tuple[Tensor, int]:
        """log p(x_n | z_i), n = `indices` `(B,)` and i = `columns` `(B, C)`: shape `(B, C)`, nats.

        Also the number of datapoints that were encoded and decoded for it, each once.
        """
        unique, positions = torch.cat([indices[:, None], columns], 1).unique(return_inverse=True)
        observed = self._decode(unique, self.joint.fetch(unique))
        rows, columns = positions[:, 0], positions[:, 1:]
        terms = [pair_log_likelihood(site, self.plate, rows, columns) for site in observed.values()]
        return torch.stack(terms).sum(0), len(unique)

    def _decode(self, indices: Tensor, args: tuple[Any, ...], values: dict[str, Tensor] | None = None) -> Any:
        """The observed sites of a run with the latents of `indices`, or with `values`."""
        placed = poutine.condition(self.model, data=self._encode(indices, args) if values is None else values)
        with self.joint.plates(indices):
            sites = sample_sites(placed, args)
        return {name: sites[name] for name in self.joint.observed}

    def _encode(self, indices: Tensor, args: tuple[Any, ...]) -> dict[str, Tensor]:
        if isinstance(self.encoder, dict):
            return {name: value[indices.to(value.device)] for name, value in self.encoder.items()}
        with self.joint.plates(indices):
            sites = sample_sites(self.encoder, args)
        for name, site in sites.items():
            if type(leaf(site["fn"])).__name__ != "Delta":
                raise InputError(
                    f"site '{name}': a {type(leaf(site['fn'])).__name__} in the encoder, which must map x to one z; "
                    f"make it pyro.sample('{name}', dist.Delta(value, event_dim=...))"
                )
        return {name: site["value"] for name, site in sites.items()}

    def _plate(self) -> str:
        if self.joint.plate is None:
            raise InputError("model: it has no data plate; put its sites inside `with pyro.plate('data', len(x))`")
        return self.joint.plate

    def _named(self, encoder: Program | Latents) -> Program | dict[str, Tensor]:
        if isinstance(encoder, AutoGuide):
            raise InputError(
                f"encoder: {type(encoder).__name__} holds latents for the datapoints it was set up with; give a "
                "function of x"
            )
        names = list(self.joint.sites)
        if isinstance(encoder, Tensor):
            if len(names) > 1:
                raise InputError(f"latents: there are several sites ({', '.join(names)}); give a dictionary of them")
            encoder = {names[0]: encoder}
        if not isinstance(encoder, Mapping):
            return encoder
        for name, value in encoder.items():
            if len(value) != self.joint.num_datapoints:
                raise InputError(f"latents '{name}': {len(value)} of them for {self.joint.num_datapoints} datapoints")
        return dict(encoder)

    def _check(self) -> None:
        number = self.joint.num_datapoints
        indices = torch.linspace(0, number - 1, min(number, CHECK_ROWS)).round().long()
        args = self.joint.fetch(indices)
        values = self._encode(indices, args)
        if odd := sorted(values.keys() ^ self.joint.sites.keys()):
            side = "the encoder lacks it" if odd[0] in self.joint.sites else "only the encoder has it"
            raise InputError(f"site '{odd[0]}': {side}; model and encoder must have the same latent sites")
        with self.joint.plates(indices):
            drawn = sample_sites(self.model, args)
        for name, value in values.items():
            if not bool(torch.isfinite(value).all() and drawn[name]["fn"].support.check(value).all()):
                raise InputError(f"site '{name}': encoded to a value outside its support in the model, or to NaN")
        self._check_likelihood(self._decode(indices, args, values), values, indices)

    def _check_likelihood(self, observed: Any, values: dict[str, Tensor], indices: Tensor) -> None:
        """With the data of other datapoints, but the same latents, the likelihood must be the same."""
        others = self._decode(indices, self.joint.fetch(indices.roll(1)), values)
        for name, site in observed.items():
            if is_factor(site["fn"]) or is_masked(site) or is_masked(others[name]):
                raise InputError(f"site '{name}': masked, or a pyro.factor, so not known for other datapoints' z")
            if not same_density(*(part["fn"].log_prob(site["value"]) for part in (site, others[name]))):
                raise InputError(
                    f"site '{name}': its likelihood depends on the data other than through z (on earlier observations, "
                    "say), so that a datapoint decoded once does not serve the others"
                )
