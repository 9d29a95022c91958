"""The multilayer perceptron of decoders and encoders.

It is part of `models` because guides may import models, but models never import guides.
"""

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from pyrogaps.errors import InputError


def mlp(sizes: Sequence[int], activation: str = "ELU") -> nn.Sequential:
    """Linear layers between `sizes`, with a `torch.nn` activation between consecutive layers.

    Maps `(..., sizes[0])` to `(..., sizes[-1])`; two sizes give a single linear map. Raises `InputError` for fewer
    than two sizes, for a size below 1, and for an activation that `torch.nn` does not have.
    """
    kind = activation_kind(activation)
    if len(sizes) < 2 or min(sizes) < 1:
        raise InputError(f"network: layer sizes must be a list of two or more positive integers, got {list(sizes)}")
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), kind()]
    return nn.Sequential(*layers[:-1])


def activation_kind(name: str) -> type[nn.Module]:
    """The `torch.nn` activation called `name`; `InputError` if there is none."""
    kind = getattr(nn, name, None)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise InputError(f"activation: torch.nn has no '{name}'. Use a name such as ELU, ReLU or Tanh.")
    return kind
