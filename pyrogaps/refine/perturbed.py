"""The parameters of a guide's site distributions at given draws, and under small changes of the guide's weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from pyrogaps.density import GuideDensity
from pyrogaps.density.local import PlaceValues
from pyrogaps.refine.finetune import Weight, substituted
from pyrogaps.refine.parameters import rows_of

NUM_ROWS = 64
# Of float32 numbers, two changes are within rounding by chance in about one of a thousand pairs.
NUM_PERTURBED = 3
# Weights move by this share of their size. Rounding is told apart by a multiple of the machine's precision.
RELATIVE, ROUNDING = 0.01, 100.0

Key = tuple[str, str]  # a term and a parameter of its distribution


def read_parameters(density: GuideDensity, z: Tensor, indices: Tensor) -> dict[Key, Tensor]:
    """Each parameter as real numbers, by rows, `(R, K)`, with the draws `z` `(R, dim)` in the guide's sites."""
    in_plate = density.joint.plate is not None
    runs = [(z, indices)] if in_plate else [(row[None], indices[:1]) for row in z]
    read: dict[Key, list[Tensor]] = {}
    for points, rows in runs:
        messages = density.messages(rows, 1, PlaceValues(density.terms, points, in_plate))
        distributions = {term.name: messages[term.name]["fn"] for term in density.terms}
        for key, value in rows_of(density.terms, distributions, in_plate).items():
            read.setdefault(key, []).append(value)
    return {key: torch.cat(parts) for key, parts in read.items()}


@contextmanager
def perturbed(weights: list[Weight], sign: float = 1.0) -> Iterator[None]:
    """Run a guide with slightly different weights, drawn anew each time."""
    values = []
    for weight in weights:
        value = weight.value.detach()
        size = value.square().mean().sqrt()
        typical = torch.where(size > 0, 0.1 * size, torch.ones_like(size))
        values.append(value + sign * RELATIVE * torch.maximum(value.abs(), typical) * torch.randn_like(value))
    with substituted(weights, values):
        yield


def rounding_of(values: Tensor) -> float:
    size = torch.nan_to_num(values, posinf=0.0, neginf=0.0).abs().max()
    return float(ROUNDING * torch.finfo(values.dtype).eps * (1 + size))
