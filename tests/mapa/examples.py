"""Small models and encoders for MAPA, and its bound by enumeration."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor

from pyrogaps.mapa import MapaPosterior

DIM, LATENT = 3, 2
Likelihood = Callable[[Tensor], Any]


def gaussian(output: Tensor) -> Any:
    return dist.Normal(output, 0.5).to_event(1)


def bernoulli(output: Tensor) -> Any:
    return dist.Bernoulli(logits=output).to_event(1)


class Model(PyroModule):  # type: ignore[misc]
    """z ~ N(0, I), x | z ~ `likelihood` of an MLP of z; `decoded` counts rows."""

    def __init__(self, likelihood: Likelihood = gaussian, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.decoder = PyroModule[torch.nn.Sequential](
            PyroModule[torch.nn.Linear](LATENT, 8), PyroModule[torch.nn.Tanh](), PyroModule[torch.nn.Linear](8, DIM)
        ).double()
        self.likelihood = likelihood
        self.decoded: list[int] = []

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(LATENT, dtype=torch.float64), 1.0).to_event(1))
            self.decoded.append(len(z))
            pyro.sample("x", self.likelihood(self.decoder(z)), obs=x)


class Encoder(PyroModule):  # type: ignore[misc]
    """h, an affine map; `encoded` counts rows."""

    def __init__(self, seed: int = 1) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = PyroModule[torch.nn.Linear](DIM, LATENT).double()
        self.encoded: list[int] = []

    def forward(self, x: Tensor) -> None:
        self.encoded.append(len(x))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(self.net(x), event_dim=1))


def data(number: int = 7, seed: int = 2) -> Tensor:
    return torch.randn(number, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def log_likelihoods(model: Model, encoder: Encoder, x: Tensor) -> Tensor:
    """log p(x_n | h(x_i)), `(N, N)`, by brute force."""
    fn = model.likelihood(model.decoder(encoder.net(x)))
    table: Tensor = fn.log_prob(x[:, None])
    return table


def exact_log_likelihood(table: Tensor) -> Tensor:
    """log 1/N sum_i p(x_n | h(x_i)), `(N,)`."""
    return table.logsumexp(1) - math.log(len(table))


def enumerated_bound(table: Tensor, posterior: MapaPosterior, num_top: int, num_samples: int) -> Tensor:
    """The bound's expectation over draws with replacement, `(N,)`, over all of them in turn."""
    bounds = []
    for n, row in enumerate(posterior.indices.long()):
        log_p, log_q = table[n, row], posterior.log_q[n]
        log_tilde = torch.log_softmax(log_q[num_top:], 0)
        ratio = (log_p[num_top:] - log_tilde).exp()
        fixed, total = log_p[:num_top].exp().sum(), torch.zeros((), dtype=table.dtype)
        for draw in itertools.product(range(len(ratio)), repeat=num_samples):
            inner = fixed + (ratio[list(draw)].mean() if num_samples else 0.0)
            total = total + log_tilde[list(draw)].sum().exp() * (inner.log() - math.log(len(table)))
        bounds.append(total)
    return torch.stack(bounds)
