"""Programs with some of their sites set to given values."""

import functools

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from torch import nn

import pyrogaps as pg
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
