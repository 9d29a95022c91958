"""The multilayer perceptron that decoders and encoders share.

It lives with the models because guides may look at models, and models never at guides.
"""

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from pyrogaps.errors import InputError


def mlp(sizes: Sequence[int], activation: str = "ELU") -> nn.Sequential:
    """Linear maps between layers of `sizes`, with the `torch.nn` activation of that name between two of them.

    Maps `(..., sizes[0])` to `(..., sizes[-1])`; two sizes make a single linear map. Raises `InputError` for fewer
    than two sizes, for a size below 1, and for an activation that `torch.nn` does not have.
    """
    kind = activation_kind(activation)
    if len(sizes) < 2 or min(sizes) < 1:
        raise InputError(f"network: layer sizes must be at least two positive integers, got {list(sizes)}")
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), kind()]
    return nn.Sequential(*layers[:-1])


def activation_kind(name: str) -> type[nn.Module]:
    """The `torch.nn` activation called `name`; `InputError` where there is none."""
    kind = getattr(nn, name, None)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise InputError(f"activation: torch.nn has none called '{name}'; use a name such as ELU, ReLU or Tanh")
    return kind
