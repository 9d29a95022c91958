"""Discrete sites as columns of a flat vector: a value is the number of its state."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.transforms import Transform

from pyrogaps.density.contraction import check_countable
from pyrogaps.density.layout import leaf
from pyrogaps.errors import InputError


def states_of(fn: Any, name: str) -> Tensor:
    """The values of one element of the discrete site `name`, `(K, *event_shape)`, in `enumerate_support`'s order.

    Raises `InputError` where these cannot be listed.
    """
    inner = leaf(fn)
    check_countable(inner, name)
    try:
        states: Tensor = inner.enumerate_support(expand=False)
    except NotImplementedError as error:
        raise InputError(
            f"site '{name}': the states of a {type(inner).__name__} cannot be listed, so the site can be neither drawn "
            "by a guide nor summed out. Use a distribution with finitely many states, such as a Categorical up to a "
            "largest value"
        ) from error
    return states.reshape(len(states), *inner.event_shape)


class StateNumber(Transform):
    """From the number of a state, a float in a flat vector, to the value of a discrete element.

    A number between states is that of the nearest. Nothing changes in density: these columns are counted, not measured.
    """

    bijective = True
    domain = constraints.real

    def __init__(self, states: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.states, self.dtype = states, dtype
        self.codomain = constraints.independent(constraints.real, states.dim() - 1) if states.dim() > 1 else self.domain

    def _call(self, x: Tensor) -> Tensor:
        number = x.detach().round().long().clamp(0, len(self.states) - 1)
        value: Tensor = self.states[number]
        return value

    def _inverse(self, y: Tensor) -> Tensor:
        events = self.states.dim() - 1
        same = y.unsqueeze(-1 - events) == self.states
        number = (same.flatten(-events).all(-1) if events else same).long().argmax(-1)
        return number.to(self.dtype)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.zeros_like(x)


def state_number(fn: Any, name: str) -> StateNumber:
    """The map from numbers of states to the values of the discrete site `name`."""
    return StateNumber(states_of(fn, name), _parameter_dtype(fn))


def _parameter_dtype(fn: Any) -> torch.dtype:
    inner = leaf(fn)
    inner = getattr(inner, "_categorical", inner)
    values = [vars(inner)[name] for name in inner.arg_constraints if name in vars(inner)]
    kinds = [value.dtype for value in values if isinstance(value, Tensor) and value.is_floating_point()]
    return kinds[0] if kinds else torch.get_default_dtype()


def all_joint_states(numbers: list[int], largest: int) -> Tensor | None:
    """All states of elements with so many each: numbers `(K, elements)`; None where K is above `largest`."""
    return None if math.prod(numbers) > largest else joint_states(numbers)


def joint_states(numbers: list[int]) -> Tensor:
    """All states of elements with so many each: numbers `(K, elements)`, the last element's changing first."""
    return torch.cartesian_prod(*[torch.arange(number) for number in numbers]).reshape(-1, len(numbers))
