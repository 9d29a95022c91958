"""The recorded path derivative: the same steps as through Pyro, wherever a guide can be recorded."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pyrogaps import JointDensity, refine
from pyrogaps.bounds import densities
from pyrogaps.capture import GradientEvaluator
from pyrogaps.guides.amortized import AmortizedNormal
from pyrogaps.guides.auxiliary_flows import AmortizedAuxiliaryFlow
from pyrogaps.guides.flows import AmortizedFlow
from pyrogaps.guides.mixture import AmortizedMixture
from pyrogaps.guides.sequential import StructuredNormal
from pyrogaps.models.dmm import DeepMarkovModel
from pyrogaps.models.vae import VAE
from pyrogaps.refine import Refinement, own_family
from pyrogaps.refine.path import MIN_STEPS, PathGradient
from pyrogaps.streams import Chunk, seeded

PARTICLES = 4


def images(guide: type[nn.Module]) -> Any:
    return VAE(data_dim=12, latent_dim=2), guide(12, 2), torch.rand(70, 12).round()


def chorus() -> Any:
    model = DeepMarkovModel(data_dim=3, latent_dim=2, emission_dim=4, transition_dim=4)
    guide = StructuredNormal(data_dim=3, latent_dim=2, rnn_dim=4, lookahead=0)
    return model, guide, (torch.rand(70, 4, 3).round(), torch.arange(70) % 4 + 1)


class Unbatched(nn.Module):
    """A guide without a family of its own: its weights are fine-tuned datapoint by datapoint."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            loc = self.net(x)
            base = dist.Normal(torch.zeros_like(loc), 1).to_event(1)
            shift = dist.transforms.AffineTransform(loc, 0.5, event_dim=1)
            pyro.sample("z", dist.TransformedDistribution(base, [shift]))


def fine_tuned() -> Any:
    model, _, x = images(AmortizedNormal)
    return model, Unbatched(), x[:3]


PAIRS = {
    "freed": lambda: images(AmortizedNormal),
    "flow": lambda: images(AmortizedFlow),
    "auxiliary flow": lambda: images(AmortizedAuxiliaryFlow),
    "mixture": lambda: images(AmortizedMixture),
    "masked sequences": chorus,
    "fine-tuned": fine_tuned,
}


def path_gradients(pair: Any, steps: int) -> PathGradient:
    """Of all datapoints, two blocks where there are more than 64, with `steps` steps to come of either kind."""
    model, guide, data = pair
    joint, density = densities(model, guide, data)
    chunk = Chunk(0, joint.num_datapoints)
    refinable = own_family(density).start(joint, chunk, seed=0)
    gradient = PathGradient(refinable, chunk, PARTICLES, 0, {True: steps, False: steps})
    gradient.density = GradientEvaluator(joint).bind(chunk.indices, PARTICLES)  # type: ignore[attr-defined]
    return gradient


def take(gradient: PathGradient, step: int, mirrored: bool) -> Any:
    density = gradient.density  # type: ignore[attr-defined]
    return gradient(density, "steps", step, measure=True, mirrored=mirrored)


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("name", PAIRS)
def test_record_gives_what_pyro_gives_after_parameters_have_moved(name: str, mirrored: bool) -> None:
    pyro.set_rng_seed(0)
    pair = PAIRS[name]()
    with seeded(0, "test"):
        gradient = path_gradients(pair, MIN_STEPS)
        take(gradient, 0, mirrored)
        assert mirrored in gradient._records
        with torch.no_grad():
            for value in gradient.refinable.parameters:
                value += 0.1 * torch.randn_like(value)
        elbo, gradients = take(gradient, 1, mirrored)
        gradient._recorded[mirrored] = False
        expected_elbo, expected = take(gradient, 1, mirrored)
    torch.testing.assert_close(elbo, expected_elbo, rtol=1e-4, atol=1e-4)
    for found, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max() + 1))


def test_few_steps_are_not_recorded() -> None:
    with seeded(0, "test"):
        gradient = path_gradients(images(AmortizedNormal), MIN_STEPS - 1)
        take(gradient, 0, True)
    assert not gradient._records


class Undecided(nn.Module):
    """A family whose draws depend on a comparison of values, which no record can hold."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.register_parameter("loc", None)

    def forward(self, x: Tensor) -> None:
        if self.loc is None:
            self.loc = nn.Parameter(torch.zeros(len(x), 2))
        with pyro.plate("data", len(self.loc)) as rows:
            loc = self.loc[rows]
            scale = 0.5 if float(loc.detach().mean()) > 100 else 1.0
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))


def test_what_cannot_be_recorded_goes_through_pyro() -> None:
    pyro.set_rng_seed(0)
    model, _, x = images(AmortizedNormal)
    refined = refine(model, Undecided, x[:4], settings=Refinement(num_steps=200))
    assert bool((refined.traces[:, -1] > refined.traces[:, 0]).all())


def test_masks_are_read_once_for_the_same_datapoints() -> None:
    model, _, data = chorus()
    joint, runs = JointDensity(model, data), []
    model.register_forward_pre_hook(lambda *_: runs.append(1))
    first = joint.active(torch.arange(5))
    count = len(runs)
    assert torch.equal(joint.active(torch.arange(5)), first)
    assert len(runs) == count
    assert not torch.equal(joint.active(torch.arange(1, 6)), first)
