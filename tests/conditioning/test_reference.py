"""`reference_guide`: it nears the best guide of its lookahead from below, and leaves model and guide as they were."""

import copy

import pytest
import torch

import pyrogaps as pg
from pyrogaps.conditioning import Lookahead, declared
from pyrogaps.guides.sequential import StructuredNormal
from pyrogaps.models.dmm import DeepMarkovModel
from pyrogaps.models.state_space import LinearGaussianStateSpace

MODEL = LinearGaussianStateSpace(0.9, 0.5, 1.0, 1.0, 1.0)


def test_nears_the_best_filter_from_below() -> None:
    torch.manual_seed(0)
    guide = StructuredNormal(1, 1, 16, lookahead=0)
    before = copy.deepcopy(guide.state_dict())
    shape = torch.zeros(64, 3, 1)
    reference = pg.reference_guide(
        MODEL,
        guide,
        shape,
        num_datapoints=128 * 150,
        num_epochs=1,
        batch_size=128,
        learning_rate=0.02,
        progress=False,
    )
    assert declared(reference) == Lookahead(0)
    assert all(torch.equal(value, before[name]) for name, value in guide.state_dict().items())
    x, _ = MODEL.simulate(500, 3, seed=2)
    best, found = (pg.elbo(MODEL, q, x, num_particles=100).value for q in (MODEL.optimal_guide(0), reference))
    short = best - found
    assert short.mean() > -4 * short.std() / 500**0.5
    assert short.mean() < 0.1


def test_neither_data_nor_model_are_learned_from() -> None:
    """Data enter by their shape alone, and a model with parameters keeps them."""
    torch.manual_seed(0)
    model, guide = DeepMarkovModel(3, 2, 4, 4), StructuredNormal(3, 2, 4, lookahead=1)
    before = copy.deepcopy(model.state_dict())
    lengths = torch.tensor([4, 2, 3])
    settings = {"num_epochs": 2, "batch_size": 2, "learning_rate": 0.1, "progress": False}
    ones, zeros = (
        pg.reference_guide(model, guide, (data, lengths), **settings)  # type: ignore[arg-type]
        for data in (torch.ones(3, 4, 3), torch.zeros(3, 4, 3))
    )
    assert isinstance(ones, StructuredNormal) and isinstance(zeros, StructuredNormal)
    for one, other in zip(ones.parameters(), zeros.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    assert any(not torch.equal(one, was) for one, was in zip(ones.parameters(), guide.parameters(), strict=True))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_guide_that_cannot_be_copied() -> None:
    with pytest.raises(pg.InputError, match=r"guide: no module with trainable parameters.*SimulatedData"):
        pg.reference_guide(MODEL, lambda x: None, torch.zeros(4, 3, 1))
