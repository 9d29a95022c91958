"""The semi-supervised VAE (Kingma et al., 2014): class and style of an image; unlabelled images sum over the class."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import config_enumerate
from torch import Tensor, nn

from tests.pyro_programs.pairs import Pair, assert_same, assert_same_draws, elbo_of, joined

PIXELS, CLASSES, STYLES, IMAGES = 9, 3, 2, 6


class SemiSupervisedVAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Sequential(nn.Linear(STYLES + CLASSES, 8), nn.Softplus(), nn.Linear(8, PIXELS), nn.Sigmoid())
        self.classifier = nn.Sequential(nn.Linear(PIXELS, 8), nn.Softplus(), nn.Linear(8, CLASSES), nn.Softmax(-1))
        self.encoder = nn.Sequential(nn.Linear(PIXELS + CLASSES, 8), nn.Softplus(), nn.Linear(8, 2 * STYLES))

    def model(self, images: Tensor, classes: Tensor | None = None) -> None:
        pyro.module("ss_vae", self)
        with pyro.plate("data"):  # of no stated size
            prior = dist.Normal(images.new_zeros(len(images), STYLES), images.new_ones(len(images), STYLES))
            style = pyro.sample("style", prior.to_event(1))
            shares = images.new_ones(len(images), CLASSES) / CLASSES
            classes = pyro.sample("class", dist.OneHotCategorical(shares), obs=classes)
            mean = self.decoder(joined(style, classes))
            pyro.sample("image", dist.Bernoulli(mean, validate_args=False).to_event(1), obs=images)

    def guide(self, images: Tensor, classes: Tensor | None = None) -> None:
        with pyro.plate("data"):
            if classes is None:
                classes = pyro.sample("class", dist.OneHotCategorical(self.classifier(images)))
            loc, log_scale = self.encoder(joined(images, classes)).chunk(2, -1)
            pyro.sample("style", dist.Normal(loc, log_scale.exp()).to_event(1))


def images() -> Tensor:
    return (torch.rand(IMAGES, PIXELS) < 0.4).float()


@pytest.mark.parametrize("how", ["parallel", "sequential", "drawn"])
def test_unlabelled(how: str, mode: Any) -> None:
    vae, x = SemiSupervisedVAE(), images()
    guide = vae.guide if how == "drawn" else config_enumerate(vae.guide, how, expand=True)
    reference = config_enumerate(vae.guide, "parallel", expand=True)
    pair = Pair(vae.model, guide, (x,), IMAGES, clean=(vae.model, reference), nesting=1, repeats=50)
    assert_same(elbo_of(pair.ledger(mode)), pair.elbo_of_pyro())


def test_labelled(mode: Any) -> None:
    vae, x, y = SemiSupervisedVAE(), images(), torch.eye(CLASSES)[torch.arange(IMAGES) % CLASSES]
    pair = Pair(vae.model, vae.guide, (x, y), IMAGES, repeats=50)
    assert_same(elbo_of(pair.ledger(mode)), pair.elbo_of_pyro())
    assert_same_draws(pair)
