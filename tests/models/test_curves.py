"""The five curves against their definitions, and the perceptrons fitted to them."""

import math

import pytest
import torch
from scipy.special import ndtr
from torch import Tensor

from pyrogaps.errors import InputError
from pyrogaps.models.curves import CURVES, surrogate

Z = torch.tensor([-2.3, -0.9, -0.1, 0.0, 0.4, 1.7], dtype=torch.float64)[:, None]


def by_hand(name: str, z: float) -> tuple[float, float]:
    """f(z) in plain arithmetic."""
    share = float(ndtr(z))
    if name == "figure-8":
        u = (0.6 + 1.8 * share) * math.pi
        bottom = math.sin(u) ** 2 + 1
        return math.sqrt(2) / 2 * math.cos(u) / bottom, math.sqrt(2) * math.cos(u) * math.sin(u) / bottom
    if name == "circle":
        return math.cos(2 * math.pi * share), math.sin(2 * math.pi * share)
    if name == "absolute-value":
        return (abs(share - 0.5),) * 2
    if name == "absolute-value-monotone":
        return (share / 2,) * 2
    turns = 2 if name == "clusters" else 4
    u = turns * math.pi / (1 + math.exp(-math.pi * z / 2))
    step = math.tanh(10 * u - 20 * math.floor(u / 2) - 10)
    if name == "clusters":
        t = 2 * step + 4 * math.floor(u / 2) + 2
        return math.cos(t), math.sin(t)
    t = step + 2 * math.floor(u / 2) + 1
    return t * math.cos(t), t * math.sin(t)


@pytest.mark.parametrize("name", CURVES)
def test_formulas(name: str) -> None:
    expected = torch.tensor([by_hand(name, float(z)) for z in Z], dtype=torch.float64)
    torch.testing.assert_close(CURVES[name].function(Z), expected)
    assert CURVES[name].function(Z.float().reshape(3, 2, 1)).shape == (3, 2, 2)


@pytest.mark.parametrize("name", CURVES)
def test_curves_are_continuous(name: str) -> None:
    z = torch.linspace(-8, 8, 400_001, dtype=torch.float64)[:, None]
    assert CURVES[name].function(z).diff(dim=0).abs().max().item() < 0.06


@pytest.mark.parametrize("name", CURVES)
def test_surrogates_are_near_their_curves(name: str) -> None:
    """In standard deviations of the noise, within a tenth in the mean; passages of the spiral take a step in 1/50."""
    fitted = surrogate(name)
    assert fitted.max_error < (1.0 if name == "spiral-dots" else 0.2)
    assert fitted.rms_error < (0.2 if name == "spiral-dots" else 0.05)
    tails = torch.linspace(-8, 8, 801, dtype=torch.float64)[:, None]
    error = (fitted.decoder(tails) - CURVES[name].function(tails)).norm(dim=-1) / math.sqrt(CURVES[name].variance)
    assert error.max().item() < (1.0 if name == "spiral-dots" else 0.3)
    assert not any(value.requires_grad for value in fitted.decoder.parameters())


def test_surrogates_are_fitted_alike_and_handed_out_as_copies() -> None:
    """Two fits agree as far as either fits; sums may be rounded otherwise from one to the next."""
    from pyrogaps.models.curves import _fitted

    torch.manual_seed(7)
    state = torch.get_rng_state()
    first = surrogate("circle")
    _fitted.cache_clear()
    second = surrogate("circle").decoder
    assert torch.equal(torch.get_rng_state(), state)
    z = torch.linspace(-4, 4, 400, dtype=torch.float64)[:, None]
    apart = (first.decoder(z) - second(z)).norm(dim=-1).max() / math.sqrt(CURVES["circle"].variance)
    assert apart < 2 * first.max_error
    weights = [parameter.clone() for parameter in second.parameters()]
    for parameter in second.parameters():
        parameter.fill_(0.0)
    third: list[Tensor] = list(surrogate("circle").decoder.parameters())
    assert all(torch.equal(left, right) for left, right in zip(third, weights, strict=True))


def test_unknown_curves_are_named() -> None:
    with pytest.raises(InputError, match=r"no curve 'square'\. Use one of figure-8"):
        surrogate("square")
