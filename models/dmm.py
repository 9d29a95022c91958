"""The deep Markov model: a Markov chain with a gated neural transition and a neural Bernoulli emission."""

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyrogaps.errors import InputError
from pyrogaps.models.mlp import mlp
from pyrogaps.models.sequences import SequenceModel

# A scale that underflows would make log p infinite.
MIN_SCALE = 1e-6


class GatedTransition(nn.Module):
    r"""Mean and scale of z_t given z_{t-1}, a gated mixture of a linear map and a network:

    $$m(z) = (1 - g) \odot (A z + a) + g \odot h, \quad s(z) = \mathrm{softplus}(B\, \mathrm{relu}(h) + b)$$

    The gate $g$ in (0, 1) and the proposed mean $h$ are networks with one ReLU layer of `hidden` units. Initially A = I
    and a = 0. Maps `(..., latent_dim)` to two tensors of the same shape.
    """

    def __init__(self, latent_dim: int, hidden: int) -> None:
        super().__init__()
        self.inner = nn.Linear(latent_dim, 2 * hidden)  # of both networks
        self.gate, self.proposal = nn.Linear(hidden, latent_dim), nn.Linear(hidden, latent_dim)
        self.linear, self.scale = nn.Linear(latent_dim, latent_dim), nn.Linear(latent_dim, latent_dim)
        nn.init.eye_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        gate_units, proposal_units = torch.relu(self.inner(z)).chunk(2, -1)
        proposed = self.proposal(proposal_units)
        loc = torch.lerp(self.linear(z), proposed, torch.sigmoid(self.gate(gate_units)))
        return loc, softplus(self.scale(torch.relu(proposed))) + MIN_SCALE


class DeepMarkovModel(SequenceModel):
    r"""The deep Markov model of binary sequences (Krishnan, Shalit and Sontag, arXiv:1609.09869).

    $$z_t \sim \mathcal N(m(z_{t-1}), s(z_{t-1})^2), \quad x_t \sim \mathrm{Bernoulli}(\mathrm{logits} = f(z_t))$$

    m and s are a `GatedTransition` with `transition_dim` units, f is a network with two ReLU layers of `emission_dim`
    units, and z_0 is a parameter, as in Pyro's example. Call `model(x)` or `model(x, lengths)` with `x`
    `(N, T, data_dim)` of zeros and ones; sites and errors are those of `SequenceModel`. Raises `InputError` for a
    dimension below 1.
    """

    def __init__(
        self, data_dim: int = 88, latent_dim: int = 100, emission_dim: int = 100, transition_dim: int = 200
    ) -> None:
        super().__init__()
        if min(data_dim, latent_dim, emission_dim, transition_dim) < 1:
            given = f"{data_dim}, {latent_dim}, {emission_dim} and {transition_dim}"
            raise InputError(
                "DeepMarkovModel: data_dim, latent_dim, emission_dim and transition_dim must be at least 1, "
                f"got {given}"
            )
        self.data_dim, self.latent_dim = data_dim, latent_dim
        self.z_0 = nn.Parameter(torch.zeros(latent_dim))
        self.gated = GatedTransition(latent_dim, transition_dim)
        self.emitter = mlp([latent_dim, emission_dim, emission_dim, data_dim], "ReLU")

    def first(self, number: int) -> tuple[Tensor, Tensor]:
        loc, scale = self.gated(self.z_0)
        return loc.expand(number, -1), scale.expand(number, -1)

    def transition(self, z: Tensor) -> tuple[Tensor, Tensor]:
        loc, scale = self.gated(z)
        return loc, scale

    def emission(self, z: Tensor) -> Tensor:
        logits: Tensor = self.emitter(z)
        return logits

    def likelihood(self, output: Tensor) -> dist.TorchDistribution:
        notes: dist.TorchDistribution = dist.Bernoulli(logits=output).to_event(1)
        return notes
