"""Completions: draws of the withheld data given the shown data."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from pyrogaps.conditioning.partial import ShownElements
from pyrogaps.density import JointDensity
from pyrogaps.density.discrete import refuse_enumerated
from pyrogaps.density.runs import evaluating
from pyrogaps.density.samplers import exact
from pyrogaps.density.score import ScoreModel, is_bookkeeping
from pyrogaps.density.simulate import feed_back
from pyrogaps.density.structure import is_factor
from pyrogaps.errors import InputError
from pyrogaps.guard import failures_named
from pyrogaps.streams import BLOCK, Chunk, Stream


@dataclass(frozen=True)
class Completions:
    """K draws of (C_n, Cbar_k) for every datapoint of a block: the shown part is kept, the withheld part drawn.

    `args` are the model's arguments for K B rows, completion by completion; `z` `(K, B, dim)` are the latents
    that they were drawn with, from p(z | C_n); `ess` `(B,)` is the effective sample size of these latents,
    which counts copies.
    """

    args: tuple[Any, ...]
    z: Tensor
    ess: Tensor

    def __len__(self) -> int:
        return len(self.z)

    def rows(self, which: Tensor) -> tuple[Any, ...]:
        """The model's arguments for completions `which` `(S,)` of every datapoint, S B rows."""
        count, number = self.z.shape[:2]
        rows = (which[:, None] * number + torch.arange(number)).flatten()

        def take(leaf: Any) -> Any:
            return leaf[rows.to(leaf.device)] if has_rows(leaf, count * number) else leaf

        taken: tuple[Any, ...] = tree_map(take, self.args)
        return taken


def has_rows(argument: Any, number: int) -> bool:
    """Whether a model's argument has one entry per row, `number` in all, rather than one for all rows."""
    return isinstance(argument, Tensor) and argument.dim() > 0 and len(argument) == number


class CompleteData(ScoreModel):
    """Draws the withheld part of every observed site, keeps the shown part, and scores both."""

    def __init__(self, joint: JointDensity, flat: Tensor, shown: ShownElements) -> None:
        super().__init__(flat, joint.structure)
        self.shown = shown
        self.drawn: dict[str, Tensor] = {}
        self.observed: dict[str, Tensor] = {}

    def _pyro_sample(self, message: Any) -> None:
        if not message["is_observed"] or is_bookkeeping(message):
            super()._pyro_sample(message)
            return
        name, fn, value = message["name"], message["fn"], message["value"]
        if is_factor(fn) or name not in self.shown:
            return
        sample = exact(fn).sample()
        if sample.shape != value.shape:
            raise InputError(
                f"site '{name}': its observed value has shape {tuple(value.shape)}, but a draw has shape "
                f"{tuple(sample.shape)}. Expand the data to the shape of a draw"
            )
        drawn = torch.where(self.shown[name], value, sample.to(value.dtype))
        self.drawn[name], self.observed[name] = drawn, value
        message["value"] = drawn


def completed(joint: JointDensity, partial: JointDensity, block: Chunk, z: Tensor, stream: Stream) -> tuple[Any, ...]:
    """The model's arguments, K B rows, with withheld data drawn given latents `z` `(K, B, dim)` of a block.

    Raises `InputError` where re-scoring the drawn data gives a different score than drawing them.
    """
    refuse_enumerated(joint.enumerated, "a conditioning gap")
    flat, rows = z.flatten(0, 1), block.indices.repeat(len(z))
    stream.reseed(block.start // BLOCK)
    with evaluating(joint.model), torch.no_grad():
        fetched = partial.fetch(block.indices, len(z))
        args, shown = fetched[:-1], fetched[-1]
        handler = CompleteData(joint, flat, shown)
        with joint.plates(rows), handler, failures_named("model"):
            joint.model(*args)
        try:
            fresh = feed_back(handler.drawn, handler.observed, args)
        except InputError as error:
            raise InputError(
                f"{str(error).split(':')[0]}: its observed value is computed from the data, so completions cannot be "
                "mapped back to data. Convert the data before passing them, for example with x.float()"
            ) from error
        _, again = joint.score(flat, fresh, rows)
    tolerance = 1e-7 if again.dtype == torch.float64 else 1e-3
    if not torch.allclose(handler.log_likelihood, again, rtol=tolerance, atol=tolerance):
        raise InputError(
            f"conditions: the withheld part of site '{next(iter(handler.drawn))}' depends on other withheld data, or "
            "does not fit the data's dtype. Withhold only parts that are independent given the latents, or convert "
            "integer data with x.float()"
        )
    return fresh
