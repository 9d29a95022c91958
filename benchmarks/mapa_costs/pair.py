"""A decoder, an encoder, and steps that train them by any loss."""

import pyro
import torch
from pyro.infer import ELBO, SVI
from torch import Tensor, nn

import pyrogaps as pg
from pyrogaps.density.runs import Program
from pyrogaps.guides.amortized import AmortizedNormal
from pyrogaps.guides.delta import AmortizedDelta
from pyrogaps.models.vae import VAE
from pyrogaps.training.parameters import JointOptimizer, trainable_parameters

LATENT, HIDDEN, LEARNING_RATE = 10, (200, 200), 1e-3


class Pair:
    """Networks for the images `x`, and `pyro.infer.SVI` by `loss` and one Adam for both; MAPA's encoder is a Delta."""

    def __init__(self, loss: ELBO, x: Tensor) -> None:
        sizes = x[0].numel(), LATENT, HIDDEN
        self.model = VAE(*sizes)
        self.guide = AmortizedDelta(*sizes) if isinstance(loss, pg.MAPA_ELBO) else AmortizedNormal(*sizes)
        named = trainable_parameters(self.model, self.guide, (x[:2],), freeze_model=False)
        optimizer = JointOptimizer(torch.optim.Adam, {"lr": LEARNING_RATE, "fused": True}, named, fixed=True)
        self.svi = SVI(_registered(self.model), _registered(self.guide), optimizer, loss=loss)

    def parameters(self) -> list[Tensor]:
        """All that is trained."""
        return [*self.model.parameters(), *self.guide.parameters()]


def _registered(module: nn.Module) -> Program:
    """The module as a program whose parameters Pyro sees: without any, its own losses take no gradient."""
    name = f"{type(module).__name__} {id(module)}"

    def program(x: Tensor) -> None:
        pyro.module(name, module)
        module(x)

    return program
