"""Programs with some of their sites set to given values."""

import functools

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from torch import nn

import pyrogaps as pg
from pyrogaps.density import runs
from pyrogaps.density.given import given
from pyrogaps.density.runs import modules_of


class Hierarchy(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("d", len(x)):
            z = pyro.sample("z", dist.Normal(m, 1.0))
            pyro.sample("x", dist.Normal(z, self.scale), obs=x)


def test_the_density_is_that_given_the_values():
    x = torch.tensor([0.3, -1.0, 2.0])
    joint = pg.JointDensity(given(Hierarchy(), {"m": torch.tensor(0.7)}), x)
    assert (joint.plate, joint.dim) == ("d", 1)
    z = torch.randn(4, 3, 1)
    right = dist.Normal(0.7, 1.0).log_prob(z[..., 0]) + dist.Normal(z[..., 0], 0.5).log_prob(x)
    torch.testing.assert_close(joint(z), right)


def test_modules_of_the_program_are_found():
    model = Hierarchy()
    assert model in modules_of(given(model, {}))


def test_modules_behind_handlers_and_partials_are_found():
    module = torch.nn.Linear(1, 1)

    def program(x, module):
        return module(x)

    partial = functools.partial(program, module=module)
    assert modules_of(partial) == [module]
    assert module in modules_of(poutine.scale(partial, scale=2.0))
    assert module in modules_of(config_enumerate(poutine.block(module.forward)))


def test_modules_further_away_are_found():
    layers = [nn.Linear(1, 1), nn.Linear(1, 2)]

    def helper(x):
        return layers[1](x)

    class Pair:
        def __init__(self):
            self.own = nn.Linear(1, 3)

        def model(self, x):
            return self.own(helper(x))

        def __call__(self, x):
            return self.own(x)

    pair = Pair()
    assert modules_of(lambda x: helper(x)) == layers
    assert modules_of(pair.model) == [pair.own, *layers]
    assert modules_of(poutine.scale(pair.model, scale=2.0)) == [pair.own, *layers]
    assert modules_of(pair) == [pair.own]
    assert modules_of(nn.functional.relu) == []


def test_modules_in_nested_lists_are_found_and_nested_data_are_not_searched(monkeypatch):
    """40 x 40 x 40 numbers in lists held a program up for seconds at every run."""
    levels = {"decoder": [[nn.Linear(1, 1), nn.Linear(1, 1)] for _ in range(8)]}
    data = [[[1.0] * 40 for _ in range(40)] for _ in range(40)]
    looked_at = []
    monkeypatch.setattr(
        runs, "_reached", lambda value, reached=runs._reached: looked_at.append(value) or reached(value)
    )
    found = modules_of(lambda x: (levels, data, x))
    assert found == [module for level in levels["decoder"] for module in level]
    assert len(looked_at) < 50


def test_modules_of_helpers_are_in_evaluation_mode():
    """Dropout of a guide that a lambda calls, and of one that is a method of a plain object."""
    x, dropout = torch.randn(6), nn.Dropout(0.9)

    def guide(x, width):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(dropout(x) + width, 0.5))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    first = pg.elbo(model, lambda x: guide(x, 0.1), x, num_particles=20)
    second = pg.elbo(model, lambda x: guide(x, 0.1), x, num_particles=20)
    assert torch.equal(first.value, second.value)
    assert dropout.training
