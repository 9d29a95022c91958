"""Capture and recapture of animals (Cormack-Jolly-Seber): alive or not is a masked, enumerated Markov chain."""

import functools
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal, init_to_median
from torch import Tensor
from torch.distributions.utils import clamp_probs

from tests.pyro_programs.pairs import Pair, assert_same, elbo_of

ANIMALS, OCCASIONS = 32, 4
HISTORY = torch.tensor(
    [
        [1, 1, 0, 1],
        [1, 0, 0, 0],
        [0, 1, 1, 0],
        [0, 1, 0, 0],
        [0, 0, 1, 1],
        [1, 1, 1, 0],
        [0, 1, 0, 1],
        [0, 0, 1, 0],
    ]
    * 4
).float()
PARALLEL = {"enumerate": "parallel"}


def constant(history: Tensor, states_masked: bool = True) -> None:
    """One probability of survival `phi` and one of recapture `rho`.

    Pyro counts both values of a masked state once, we by their own probabilities: its twin masks no states.
    """
    phi, rho = (pyro.sample(name, dist.Uniform(0.0, 1.0)) for name in ("phi", "rho"))
    with pyro.plate("animals", len(history), dim=-1):
        alive, marked = torch.ones(len(history)), torch.zeros(len(history), dtype=torch.bool)
        for t in pyro.markov(range(OCCASIONS)):
            survives = torch.where(marked, phi * alive, torch.ones(()))
            with poutine.mask(mask=marked if states_masked else True):
                alive = pyro.sample(f"z_{t}", dist.Bernoulli(clamp_probs(survives)), infer=PARALLEL)
            with poutine.mask(mask=marked):
                pyro.sample(f"y_{t}", dist.Bernoulli(clamp_probs(rho * alive)), obs=history[:, t])
            marked = marked | history[:, t].bool()


def varying(history: Tensor, states_masked: bool = True) -> None:
    """A probability of survival for each occasion, drawn inside the chain."""
    rho = pyro.sample("rho", dist.Uniform(0.0, 1.0))
    animals = pyro.plate("animals", len(history), dim=-1)
    alive, marked = torch.ones(len(history)), torch.zeros(len(history), dtype=torch.bool)
    for t in pyro.markov(range(OCCASIONS)):
        phi = pyro.sample(f"phi_{t}", dist.Uniform(0.0, 1.0)) if t else 1.0
        survives = torch.where(marked, phi * alive, torch.ones(()))
        with animals, poutine.mask(mask=marked if states_masked else True):
            alive = pyro.sample(f"z_{t}", dist.Bernoulli(clamp_probs(survives)), infer=PARALLEL)
        with animals, poutine.mask(mask=marked):
            pyro.sample(f"y_{t}", dist.Bernoulli(clamp_probs(rho * alive)), obs=history[:, t])
        marked = marked | history[:, t].bool()


@pytest.mark.parametrize("model", [constant, varying])
@pytest.mark.parametrize("family", [AutoNormal, AutoDiagonalNormal])
def test_ledger(model, family, mode: Any) -> None:  # type: ignore[no-untyped-def]
    guide = family(
        poutine.block(model, hide_fn=lambda site: site["name"].startswith(("z_", "y_"))),
        init_loc_fn=init_to_median,
        init_scale=0.2,
    )
    guide(HISTORY)
    twin = (functools.partial(model, states_masked=False), guide)
    pair = Pair(model, guide, (HISTORY,), ANIMALS, plate="animals", nesting=1, clean=twin)
    assert_same(elbo_of(pair.ledger(mode), ANIMALS), pair.elbo_of_pyro())
