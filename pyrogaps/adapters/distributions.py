"""Distributions of torch as those of Pyro, which `pyro.sample` takes."""

import functools
from typing import Any

import pyro.distributions as dist
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor
from torch.distributions import Distribution

# Where a distribution holds others.
HELD = ("base_dist", "_component_distribution", "_mixture_distribution")


def as_pyro(fn: Distribution) -> Any:
    """`fn`, and the distributions that it is made of, as Pyro's of the same name and parameters.

    A class that Pyro does not have gets Pyro's methods beside its own.
    """
    inner = {name: held for name in HELD if isinstance(held := vars(fn).get(name), Distribution)}
    converted = {name: as_pyro(held) for name, held in inner.items()}
    if isinstance(fn, TorchDistributionMixin) and all(converted[name] is held for name, held in inner.items()):
        return fn
    kind: Any = type(fn)
    kind = kind if isinstance(fn, TorchDistributionMixin) else _with_methods_of_pyro(kind)
    if kind.__init__ is not type(fn).__init__:  # it holds more than torch's
        given = {name: getattr(fn, name) for name in fn.arg_constraints}
        return kind(**given, validate_args=vars(fn).get("_validate_args"))
    other = kind.__new__(kind)
    vars(other).update({**vars(fn), **converted})
    return other


@functools.cache
def _with_methods_of_pyro(kind: Any) -> Any:
    own = getattr(dist, kind.__name__, None)
    if isinstance(own, type) and issubclass(own, kind) and kind.__module__.startswith("torch."):
        return own
    return type(kind.__name__, (kind, TorchDistributionMixin), {})


def per_datapoint(fn: Distribution) -> Any:
    """`fn` with all its batch dimensions but the first, that of datapoints, as event."""
    converted = as_pyro(fn)
    return converted.to_event(len(converted.batch_shape) - 1) if len(converted.batch_shape) > 1 else converted


def described(output: Any) -> str:
    """What a program returned, in words: types and shapes."""
    if isinstance(output, Tensor):
        return f"a tensor of shape {tuple(output.shape)}"
    if isinstance(output, Distribution):
        shapes = f"batch shape {tuple(output.batch_shape)} and event shape {tuple(output.event_shape)}"
        return f"a {type(output).__name__} of {shapes}"
    if isinstance(output, tuple | list):
        return f"a {type(output).__name__} of {len(output)} ({', '.join(map(described, output[:4]))})"
    if isinstance(output, dict):
        return f"a {type(output).__name__} with {', '.join(map(str, list(output)[:6]))}"
    held = [name for name in getattr(output, "__dict__", {}) if not name.startswith("_")]
    return f"a {type(output).__name__}" + (f" with {', '.join(held[:6])}" if held else "")


def entry(output: Any, name: str) -> Any:
    """The attribute or key of this name; None where there is none, or for tensors and tuples."""
    if isinstance(output, dict):
        return output.get(name)
    if isinstance(output, Tensor) or (isinstance(output, tuple | list) and not hasattr(output, "_fields")):
        return None
    return getattr(output, name, None)
