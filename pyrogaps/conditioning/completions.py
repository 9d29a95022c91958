"""Completions: draws of what is withheld, given what is shown, under the model."""

from dataclasses import dataclass
from typing import Any

import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor
from torch.utils._pytree import tree_map

from pyrogaps.ais import AIS, ais_chunk, anchor, anchored_path
from pyrogaps.capture import GradientEvaluator
from pyrogaps.conditioning.partial import ShownElements
from pyrogaps.density import JointDensity
from pyrogaps.density.runs import evaluating
from pyrogaps.density.score import ScoreModel, is_bookkeeping
from pyrogaps.density.simulate import feed_back
from pyrogaps.density.structure import is_factor
from pyrogaps.errors import InputError
from pyrogaps.log_weights import effective_sample_size
from pyrogaps.refine import Refinement, refine_chunk
from pyrogaps.refine.families import Start
from pyrogaps.streams import BLOCK, Chunk, reseed


@dataclass(frozen=True)
class Completions:
    """K draws of (C_n, Cbar_k) for every datapoint of a chunk: what is shown stays, what is withheld is drawn.

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


def draw_completions(
    evaluator: GradientEvaluator,
    joint: JointDensity,
    chunk: Chunk,
    start: Start,
    number: int,
    settings: AIS,
    refinement: Refinement,
    seed: int,
) -> Completions:
    """Draw `number` completions of every datapoint of `chunk`.

    p(z | C_n) is drawn from by AIS anchored at a refined mean-field Normal that begins at `start`, with resampling;
    `evaluator` is of the partially observed density. Then the likelihood of `joint` draws what is withheld.
    """
    refined, _ = refine_chunk(AutoNormal, evaluator, chunk, refinement, seed, "shown part", start)
    path = anchored_path(
        evaluator, anchor(evaluator.joint, refined, chunk, settings.widen, seed, chunk.start), chunk, seed
    )
    annealed = ais_chunk(path, evaluator, chunk, settings, seed)
    z, columns = annealed.state.position, torch.arange(len(chunk))
    parts = []
    for block in chunk.blocks():
        reseed(seed, "resample", block.start // BLOCK)
        parts.append(systematic(annealed.log_weights[:, block.start - chunk.start : block.stop - chunk.start], number))
    z = z[torch.cat(parts, 1).to(z.device), columns.to(z.device)]
    args = completed(joint, evaluator.joint, chunk, z, seed)
    return Completions(args, z, effective_sample_size(annealed.log_weights))


def systematic(log_weights: Tensor, number: int) -> Tensor:
    """`number` particles of each column of `log_weights` `(S, B)`, systematic resampling in random order: `(K, B)`."""
    weights = (log_weights - log_weights.max(0).values).exp()
    cumulative = (weights / weights.sum(0)).cumsum(0)
    count = log_weights.shape[1]
    points = (torch.arange(number, dtype=torch.float64)[:, None] + torch.rand(1, count, dtype=torch.float64)) / number
    found = torch.searchsorted(cumulative.T.contiguous().cpu(), points.T.contiguous()).clamp(max=len(log_weights) - 1)
    order = torch.rand(count, number).argsort(1)
    return found.gather(1, order).T


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
        drawn = torch.where(self.shown[name], value, fn.sample().to(value.dtype))
        self.drawn[name], self.observed[name] = drawn, value
        message["value"] = drawn


def completed(joint: JointDensity, partial: JointDensity, chunk: Chunk, z: Tensor, seed: int) -> tuple[Any, ...]:
    """The model's arguments with what is withheld drawn given latents `z` `(K, B, dim)`: K B rows.

    Raises `InputError` where the score of what was drawn is not that with which it was drawn.
    """
    parts = []
    for block in chunk.blocks():
        reseed(seed, "complete", block.start // BLOCK)
        parts.append(_completed_block(joint, partial, block, z[:, block.start - chunk.start :][:, : len(block)]))
    if len(parts) == 1:
        return parts[0]
    number, sizes = len(z), [len(block) for block in chunk.blocks()]

    def join(*leaves: Any) -> Any:
        if not has_rows(leaves[0], number * sizes[0]):
            return leaves[0]
        shaped = [leaf.reshape(number, size, *leaf.shape[1:]) for leaf, size in zip(leaves, sizes, strict=True)]
        return torch.cat(shaped, 1).flatten(0, 1)

    joined: tuple[Any, ...] = tree_map(join, *parts)
    return joined


def _completed_block(joint: JointDensity, partial: JointDensity, block: Chunk, z: Tensor) -> tuple[Any, ...]:
    flat, rows = z.flatten(0, 1), block.indices.repeat(len(z))
    with evaluating(joint.model), torch.no_grad():
        fetched = partial.fetch(block.indices, len(z))
        args, shown = fetched[:-1], fetched[-1]
        handler = CompleteData(joint, flat, shown)
        with joint.plates(rows), handler:
            joint.model(*args)
        fresh = feed_back(handler.drawn, handler.observed, args)
        _, again = joint.score(flat, fresh, rows)
    tolerance = 1e-7 if again.dtype == torch.float64 else 1e-3
    if not torch.allclose(handler.log_likelihood, again, rtol=tolerance, atol=tolerance):
        raise InputError(
            f"conditions: the withheld part of site '{next(iter(handler.drawn))}' depends on other withheld data, so "
            "that it cannot be drawn at once; condition on parts that are independent given the latents"
        )
    return fresh
