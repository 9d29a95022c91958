"""Completions: draws of what is withheld, given what is shown, under the model."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from pyrogaps.conditioning.partial import ShownElements
from pyrogaps.density import JointDensity
from pyrogaps.density.runs import evaluating
from pyrogaps.density.score import ScoreModel, is_bookkeeping
from pyrogaps.density.simulate import feed_back
from pyrogaps.density.structure import is_factor
from pyrogaps.errors import InputError
from pyrogaps.streams import BLOCK, Chunk, Stream


@dataclass(frozen=True)
class Completions:
    """K draws of (C_n, Cbar_k) for every datapoint of a block: what is shown stays, what is withheld is drawn.

    `args` are the model's arguments for K B rows, completion by completion; `z` `(K, B, dim)` the latents that they
    were drawn with, from p(z | C_n); `ess` `(B,)` the effective number of independent latents among them.
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
    """Whether a model's argument has an entry for each of `number` rows, rather than one for all of them."""
    return isinstance(argument, Tensor) and argument.dim() > 0 and len(argument) == number


class CompleteData(ScoreModel):
    """Draws what is withheld of every observed site, keeps what is shown, and scores both."""

    def __init__(self, joint: JointDensity, flat: Tensor, shown: ShownElements) -> None:
        super().__init__(joint.sites, joint.plate, flat)
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
        sample = fn.sample()
        if sample.shape != value.shape:
            raise InputError(
                f"site '{name}': its observed value {tuple(value.shape)} stands for several draws "
                f"{tuple(sample.shape)}; expand the data, so that each can be drawn"
            )
        drawn = torch.where(self.shown[name], value, sample.to(value.dtype))
        self.drawn[name], self.observed[name] = drawn, value
        message["value"] = drawn


def completed(joint: JointDensity, partial: JointDensity, block: Chunk, z: Tensor, stream: Stream) -> tuple[Any, ...]:
    """The model's arguments with what is withheld drawn given latents `z` `(K, B, dim)` of a block: K B rows.

    Raises `InputError` where the score of what was drawn is not that with which it was drawn.
    """
    flat, rows = z.flatten(0, 1), block.indices.repeat(len(z))
    stream.reseed(block.start // BLOCK)
    with evaluating(joint.model), torch.no_grad():
        fetched = partial.fetch(block.indices, len(z))
        args, shown = fetched[:-1], fetched[-1]
        handler = CompleteData(joint, flat, shown)
        with joint.plates(rows), handler:
            joint.model(*args)
        try:
            fresh = feed_back(handler.drawn, handler.observed, args)
        except InputError as error:
            raise InputError(
                f"{str(error).split(':')[0]}: its observed value is made from the data in a way that cannot be undone, "
                "so that completions cannot be put back; convert the data before they are passed (x.float(), say)"
            ) from error
        _, again = joint.score(flat, fresh, rows)
    tolerance = 1e-7 if again.dtype == torch.float64 else 1e-3
    if not torch.allclose(handler.log_likelihood, again, rtol=tolerance, atol=tolerance):
        raise InputError(
            f"conditions: the withheld part of site '{next(iter(handler.drawn))}' depends on other withheld data, so "
            "that it cannot be drawn at once, or the data's type cannot hold it; condition on parts that are "
            "independent given the latents, and convert integers by x.float() where the likelihood is continuous"
        )
    return fresh
