"""Draw latents and data from a model."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from pyrogaps.density.data import as_tuple, constant_positions, is_constant
from pyrogaps.density.joint import JointDensity
from pyrogaps.density.layout import distribution_mask, unconstrained_mask
from pyrogaps.density.runs import evaluating
from pyrogaps.density.samplers import exact
from pyrogaps.density.score import ScoreModel, Structure, is_bookkeeping, log_jacobian
from pyrogaps.density.structure import is_factor
from pyrogaps.density.supports import bijection
from pyrogaps.errors import InputError, counted
from pyrogaps.guard import failures_named

ToData = Callable[[dict[str, Tensor]], Any]
CHUNK = 256


class DrawModel(ScoreModel):
    """Draws every site that `fixed` does not hold, observed ones too, and scores the draws as `ScoreModel` does."""

    def __init__(self, flat: Tensor, structure: Structure, fixed: dict[str, Tensor]) -> None:
        super().__init__(flat, structure)
        self.fixed = fixed
        self.drawn: dict[str, Tensor] = {}
        self.observed: dict[str, Tensor] = {}
        self.states: dict[str, Tensor] = {}
        self.scores: dict[str, Tensor] = {}

    def _pyro_sample(self, message: Any) -> None:
        if is_bookkeeping(message):
            return
        name, fn = message["name"], message["fn"]
        if is_factor(fn):
            raise InputError(
                f"site '{name}': a pyro.factor cannot be simulated. Draw the data with pyro.sample(..., obs=)"
            )
        value = self.fixed[name] if name in self.fixed else exact(fn).sample()
        if message["is_observed"]:
            self.observed[name] = message["value"]
            value = value.to(message["value"].dtype)
        elif name in self.enumerated:
            site = self.enumerated[name]
            self.states[name] = site.rows_of(site.number_of(value))
        else:
            value = self._place(name, fn, message, value)
        self.drawn[name] = value
        message["value"], message["done"] = value, True

    def _pyro_post_sample(self, message: Any) -> None:
        before = self.log_prior + self.log_likelihood
        super()._pyro_post_sample(message)
        self.scores[message["name"]] = self.log_prior + self.log_likelihood - before

    def _place(self, name: str, fn: Any, message: Any, value: Tensor) -> Tensor:
        site, transform, mask = self.sites[name], bijection(fn, name), distribution_mask(fn, message["mask"])
        unconstrained = transform.inv(value)
        active = unconstrained_mask(mask, fn, site)
        if active is not None:
            unconstrained = torch.where(active, unconstrained, torch.zeros_like(unconstrained))
            value = transform(unconstrained)
        if self.plate is None:
            self.flat[:, site.columns] = unconstrained.reshape(1, -1)
        else:
            self.flat[:, site.columns] = site.flatten(unconstrained)
        self.masks[name] = active
        jacobian = log_jacobian(transform, unconstrained, value, mask, fn.event_dim)
        self.log_prior = self.log_prior + self._per_row(jacobian, message)
        return value


def simulate(joint: JointDensity, to_data: ToData | None = None) -> tuple[Any, Tensor]:
    """Draw latents and data from the model, N datapoints in the shape of its data.

    Observed sites are drawn in program order and fed back into the model's arguments, so that a likelihood that depends
    on earlier observations is simulated correctly. A drawn value replaces the argument that its observed value is, or
    is a view of; `to_data(values)`, a function from drawn values by site to the model's arguments, overrides this.

    Returns the data, in the form that `joint` was given (an `IndexedData`: the model's arguments), and `z` `(N, dim)`,
    an exact posterior draw for each datapoint. Discrete latents that are summed out are drawn
    too, and not returned.

    Raises `InputError` where re-scoring the simulated data gives a different score than drawing them.
    """
    args, z = simulated_arguments(joint, to_data)
    return joint.passed.restored(args[: len(args) - joint.num_given]), z


def simulated_arguments(joint: JointDensity, to_data: ToData | None = None) -> tuple[tuple[Any, ...], Tensor]:
    """As `simulate`, with the model's arguments for the data."""
    if joint.plate is None:
        return _simulate_rows(joint, torch.zeros(1, dtype=torch.long), to_data)
    parts = [_simulate_rows(joint, batch, to_data) for batch in torch.arange(joint.num_datapoints).split(CHUNK)]
    flat = [tree_flatten(args) for args, _ in parts]
    constant = constant_positions(joint.data)
    columns = zip(*(leaves for leaves, _ in flat), strict=True)
    leaves = [_join(column, constant=position in constant) for position, column in enumerate(columns)]
    return as_tuple(tree_unflatten(leaves, flat[0][1])), torch.cat([z for _, z in parts])


def _join(column: tuple[Any, ...], *, constant: bool) -> Any:
    """One argument from those of consecutive batches."""
    if isinstance(column[0], Tensor) and not constant:
        return torch.cat(column)
    if len(column) > 1 and not isinstance(column[0], Tensor) and not is_constant(column[0]):
        raise InputError(
            f"data: a {type(column[0]).__name__} among the model's arguments cannot be concatenated from several "
            f"chunks. Simulate at most {CHUNK} datapoints, or pass tensors to the model"
        )
    return column[0]


def _simulate_rows(joint: JointDensity, indices: Tensor, to_data: ToData | None) -> tuple[tuple[Any, ...], Tensor]:
    template = as_tuple(tree_map_only(Tensor, Tensor.clone, joint.fetch(indices)))
    read = joint.passed.arguments
    fixed: dict[str, Tensor] = {}
    scores: dict[str, Tensor] = {}
    args = template
    with evaluating(joint.model), torch.no_grad():
        while True:
            draw = _run(joint, args, indices, fixed)
            causal = all(_close(draw, draw.scores[name], score) for name, score in scores.items())
            own = len(args) - joint.num_given
            args = *feed_back(draw.drawn, draw.observed, args[:own], to_data, read), *args[own:]
            if causal and _scores_agree(joint, draw, args, indices):
                return args, draw.flat
            # A later site used data that had not been drawn yet: keep one more observed site and all sites before it.
            pending = [name for name in draw.drawn if name in draw.observed and name not in fixed]
            if not pending or not causal:
                raise InputError(
                    f"model: simulated data of site '{next(iter(draw.observed))}' have one density when drawn and "
                    "another when scored again. Pass to_data= for arguments computed from the data; a likelihood must "
                    "not depend on its own value"
                )
            for name, value in draw.drawn.items():
                fixed[name], scores[name] = value, draw.scores[name]
                if name == pending[0]:
                    break


def _run(joint: JointDensity, args: tuple[Any, ...], indices: Tensor, fixed: dict[str, Tensor]) -> DrawModel:
    handler = DrawModel(joint.zeros(len(indices)), joint.structure, fixed)
    with joint.plates(indices), handler, failures_named("model"):
        joint.model(*args)
    return handler


def _scores_agree(joint: JointDensity, draw: DrawModel, args: tuple[Any, ...], indices: Tensor) -> bool:
    again, _ = joint.run_at(draw.flat, args, indices, draw.states)
    if not draw.states:
        return _close(draw, draw.log_prior, again.log_prior) and _close(draw, draw.log_likelihood, again.log_likelihood)
    return _close(draw, draw.log_joint, again.log_joint)


def _close(draw: DrawModel, left: Tensor, right: Tensor) -> bool:
    """Whether two scores agree up to the rounding of the coarsest dtype drawn."""
    precise = all(value.dtype == torch.float64 for value in draw.drawn.values() if value.is_floating_point())
    tolerance = 1e-7 if precise else 1e-3
    return torch.allclose(left.double(), right.double(), rtol=tolerance, atol=tolerance)


def feed_back(
    drawn: dict[str, Tensor],
    observed: dict[str, Tensor],
    args: tuple[Any, ...],
    to_data: ToData | None = None,
    read: Callable[[Any], tuple[Any, ...]] = as_tuple,
) -> tuple[Any, ...]:
    """The model's arguments with drawn values in the places of the observed ones, by site; `read` makes them of what
    `to_data` returns.

    Raises `InputError` naming a site whose observed value is not found in any argument.
    """
    values = {name: drawn[name] for name in observed}
    if to_data is not None:
        with failures_named("to_data"):
            returned = to_data(values)
            result = as_tuple(None) if returned is None else read(returned)
        if len(result) != len(args):
            raise InputError(
                f"to_data: it returned {counted(len(result), 'argument')}, but the model takes {len(args)}"
            )
        return result
    fresh = as_tuple(tree_map_only(Tensor, Tensor.clone, args))
    places = list(zip(tree_leaves(args), tree_leaves(fresh), strict=True))
    for name, value in observed.items():
        if not any(_write(value, values[name], old, new) for old, new in places):
            if not any(isinstance(old, Tensor) for old, _ in places):
                raise InputError(
                    f"site '{name}': the model holds its data itself, so simulated data cannot replace them. Make the "
                    "data an argument of the model and the guide"
                )
            raise InputError(
                f"site '{name}': its observed value is not one of the model's arguments. Pass to_data=, a function "
                "that converts a dictionary of drawn values by site into the model's arguments"
            )
    return fresh


def _write(observed: Tensor, drawn: Tensor, old: Any, new: Any) -> bool:
    """Write `drawn` to `new` where `observed` is a view or a copy of `old`; False where it is neither."""
    if not isinstance(old, Tensor):
        return False
    if observed.untyped_storage().data_ptr() == old.untyped_storage().data_ptr():
        offset = observed.storage_offset() - old.storage_offset() + new.storage_offset()
        new.as_strided(observed.shape, observed.stride(), offset).copy_(drawn)
        return True
    if observed.numel() == old.numel() and torch.equal(observed.flatten().to(old.dtype), old.flatten()):
        new.copy_(drawn.reshape(old.shape))
        return True
    return False
