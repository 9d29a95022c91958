"""The parts that pairs are made of: callables with the modules that they reach, and torch's distributions as Pyro's."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import pyro.distributions as pyro_dist
import pytest
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn
from torch import distributions as dist
from torch.distributions import constraints

from pyrogaps.adapters.distributions import as_pyro, described, per_datapoint
from pyrogaps.density.parts import Part

SHARED = nn.Linear(3, 2)


def of_a_global(x: Tensor) -> Tensor:
    return SHARED(x)


def calls_another(x: Tensor) -> Tensor:
    return of_a_global(x)


class Holder:
    """No module, but holds one."""

    def __init__(self) -> None:
        self.net = nn.Linear(3, 2)

    def __call__(self, x: Tensor) -> Tensor:
        return self.net(x)

    def method(self, x: Tensor) -> Tensor:
        return self.net(x)


class Module(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 2)

    def encode(self, x: Tensor) -> Tensor:
        return self.net(x)


def in_a_closure() -> Callable[[Tensor], Tensor]:
    net = nn.Linear(3, 2)
    return lambda x: net(x)


def that_calls_itself() -> Callable[..., Tensor]:
    net = nn.Linear(3, 2)

    def call(x: Tensor, depth: int = 0, *, most: int = 2) -> Tensor:
        return net(x) if depth == most else call(x, depth + 1)

    return call


def in_a_list() -> Callable[[Tensor], Tensor]:
    nets = {"all": [nn.Linear(3, 2)]}
    return lambda x: nets["all"][0](x)


def with_a_default() -> Callable[[Tensor], Tensor]:
    def call(x: Tensor, net: nn.Module = nn.Linear(3, 2)) -> Tensor:  # noqa: B008
        return net(x)

    return call


def in_an_inner_function(x: Tensor) -> Tensor:
    return (lambda y: SHARED(y))(x)


def with_an_option(x: Tensor, net: nn.Module) -> Tensor:
    return net(x)


CALLABLES: dict[str, Callable[[], Any]] = {
    "module": lambda: nn.Linear(3, 2),
    "method": lambda: Module().encode,
    "closure": in_a_closure,
    "recursion": that_calls_itself,
    "global": lambda: of_a_global,
    "further function": lambda: calls_another,
    "object": Holder,
    "method of an object": lambda: Holder().method,
    "partial": lambda: functools.partial(in_a_closure()),
    "argument of a partial": lambda: functools.partial(with_an_option, net=nn.Linear(3, 2)),
    "list in a closure": in_a_list,
    "default value": with_a_default,
    "inner function": lambda: in_an_inner_function,
    "handler": lambda: poutine.scale(in_a_closure(), scale=2.0),
}


@pytest.mark.parametrize("name", CALLABLES)
def test_a_copy_has_its_own_modules(name: str) -> None:
    """It gives the same, and stays as it was when the original is trained."""
    x, part = torch.randn(4, 3), Part("encoder", CALLABLES[name]())
    assert len([*part.parameters()]) == 2
    other = copy.deepcopy(part)
    before = part(x).detach()
    assert torch.equal(other(x), before)
    assert not {id(value) for value in part.parameters()} & {id(value) for value in other.parameters()}
    saved = [value.detach().clone() for value in part.parameters()]
    with torch.no_grad():
        for value in part.parameters():
            value.add_(1.0)
    assert not torch.equal(part(x), before)
    assert torch.equal(other(x), before)
    assert all(value.grad is None for value in other.parameters())
    other(x).sum().backward()
    assert all(value.grad is not None for value in other.parameters())
    with torch.no_grad():
        for value, old in zip(part.parameters(), saved, strict=True):
            value.copy_(old)


class Shifted(dist.Distribution):
    """A class that Pyro does not have."""

    arg_constraints = {"loc": constraints.real}  # noqa: RUF012
    support = constraints.real
    has_rsample = True

    def __init__(self, loc: Tensor) -> None:
        self.loc = loc
        super().__init__(loc.shape, validate_args=False)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return self.loc + torch.randn(self._extended_shape(torch.Size(sample_shape)))

    def log_prob(self, value: Tensor) -> Tensor:
        return dist.Normal(self.loc, 1.0).log_prob(value)


LOC = torch.linspace(-1, 1, 6).reshape(3, 2)
MIXTURE = dist.MixtureSameFamily(
    dist.Categorical(torch.ones(3, 4)), dist.Independent(dist.Normal(LOC[:, None].expand(3, 4, 2), 1.0), 1)
)


@pytest.mark.parametrize(
    "fn",
    [
        dist.Normal(LOC, 1.0),
        dist.Independent(dist.Normal(LOC, 1.0), 1),
        dist.MultivariateNormal(LOC, torch.eye(2)),
        dist.TransformedDistribution(dist.Independent(dist.Laplace(LOC, 1.0), 1), [dist.ExpTransform()]),
        MIXTURE,
        dist.LogNormal(LOC, 1.0),
        dist.Uniform(LOC - 1, LOC + 1),
        dist.Poisson(LOC.exp()),
        dist.Beta(LOC.exp(), torch.ones(3, 2)),
        Shifted(LOC),
        pyro_dist.Normal(LOC, 1.0).to_event(1),
    ],
    ids=lambda fn: type(fn).__name__,
)
def test_a_distribution_is_the_same_in_pyro(fn: Any) -> None:
    own = as_pyro(fn)
    assert isinstance(own, TorchDistributionMixin)
    assert (own.batch_shape, own.event_shape) == (fn.batch_shape, fn.event_shape)
    torch.manual_seed(0)
    draws = fn.sample((5,))
    torch.manual_seed(0)
    assert torch.equal(own(sample_shape=torch.Size((5,))), draws)
    assert torch.equal(own.log_prob(draws), fn.log_prob(draws))
    if type(fn) is not Shifted:  # which does not implement it
        wider = own.expand((7, *own.batch_shape))
        torch.testing.assert_close(wider.log_prob(draws[0]), fn.log_prob(draws[0]).expand(wider.batch_shape))
    assert tuple(per_datapoint(fn).batch_shape) == (3,)
    assert tuple(per_datapoint(fn).event_shape) == (2,)


def test_distributions_of_pyro_are_left_as_they_are() -> None:
    fn = pyro_dist.Normal(LOC, 1.0).to_event(1)
    assert as_pyro(fn) is fn
    mixed = pyro_dist.Independent(dist.Normal(LOC, 1.0), 1)
    assert isinstance(as_pyro(mixed).base_dist, TorchDistributionMixin)


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (torch.zeros(3, 2), "a tensor of shape (3, 2)"),
        ((torch.zeros(3), [None]), "a tuple of 2 (a tensor of shape (3,), a list of 1 (a NoneType))"),
        ({"a": 1, "b": 2}, "a dict with a, b"),
        (Holder(), "a Holder with net"),
        (dist.Normal(LOC, 1.0), "a Normal of batch shape (3, 2) and event shape ()"),
    ],
)
def test_what_was_returned_in_words(output: Any, words: str) -> None:
    assert described(output) == words
