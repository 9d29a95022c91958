"""An extended Kalman filter whose covariances are latent: all else is integrated out by the filter."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.contrib.tracking.distributions import EKFDistribution
from pyro.contrib.tracking.dynamic_models import NcvContinuous
from pyro.infer.autoguide import AutoDelta
from torch import Tensor

from pyrogaps import InputError
from tests.pyro_programs.pairs import Pair, assert_same_draws

FRAMES = 5


def model(track: Tensor) -> None:
    start = pyro.sample("pv_cov", dist.HalfCauchy(0.5)) * torch.eye(4)
    noise = pyro.sample("measurement_cov", dist.HalfCauchy(0.5)) * torch.eye(2)
    state = torch.cat([track[0], torch.tensor([1.0, 0.5])])
    motion = NcvContinuous(dimension=4, sa2=0.5)
    filtered = EKFDistribution(state, start, motion, noise, time_steps=FRAMES)
    pyro.sample("track", filtered, obs=track)


def track() -> Tensor:
    return torch.stack([torch.arange(FRAMES) + 0.3 * torch.randn(FRAMES), 0.5 * torch.arange(FRAMES)], -1)


def test_point_estimates_alone_are_refused(mode: Any) -> None:
    """`AutoDelta` over both covariances, as in the tutorial, leaves nothing latent."""
    data = track()
    guide = AutoDelta(model)
    guide(data)
    with pytest.raises(InputError, match="'pv_cov': a Delta") as refusal:
        Pair(model, guide, (data,), 1, plate=False).ledger(mode)
    assert "\n" not in str(refusal.value)


def test_ledger_of_a_guide_with_distributions(mode: Any) -> None:
    data = track()

    def guide(track: Tensor) -> None:
        for name, loc in (("pv_cov", 0.1), ("measurement_cov", -0.5)):
            pyro.sample(name, dist.LogNormal(pyro.param(f"loc_{name}", torch.tensor(loc)), 0.3))

    pair = Pair(model, guide, (data,), 1, plate=False)
    pair.ledger(mode)
    assert_same_draws(pair)
