"""Noisy curves in the plane: models with one latent, whose log p(x) is exact by quadrature."""

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Literal

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrogaps.errors import InputError
from pyrogaps.log_weights import mcse_of_mean
from pyrogaps.models.curves import ACTIVATION, HIDDEN, curve_named, surrogate
from pyrogaps.models.mlp import mlp
from pyrogaps.streams import derive_seed

_LIMIT = 12.0
_ORDER, _MAX_REFINEMENT, _MAX_PANELS = 8, 64, 2**16
_CELLS = 2**21
_ROUGH = "The decoder is too steep or too rough. Train it with a lower learning rate."


class SyntheticModel(nn.Module):
    r"""z ~ N(0, 1), x | z ~ N(f(z), variance I) in the plane, with f one of five curves or a perceptron.

    The data sets are those of "Towards Model-Agnostic Posterior Approximation" (AABI 2024): `curve` is "figure-8",
    "clusters", "circle", "absolute-value" or "spiral-dots". "absolute-value-monotone" is a second decoder with the same
    data distribution as "absolute-value". `decoder` selects f:

    - "learned": an MLP with `hidden` layers and `activation`, with the usual random initialisation;
    - "surrogate": a fixed MLP of the same default architecture, fitted to the curve
      (`pyrogaps.models.curves.surrogate`). As a ground truth it can be matched exactly by a learned decoder;
    - "exact": the curve's formula.

    `variance` is that of the noise; None uses the curve's. A Pyro model: `model(x)` with `x` `(N, 2)`; sites "z"
    `(N, 1)` and "x" `(N, 2)` in the plate "data".

    Raises `InputError` for invalid settings, and for `x` of another shape.
    """

    variance: Tensor

    def __init__(
        self,
        curve: str = "figure-8",
        decoder: Literal["learned", "surrogate", "exact"] = "learned",
        hidden: Sequence[int] = HIDDEN,
        activation: str = ACTIVATION,
        variance: float | None = None,
    ) -> None:
        super().__init__()
        named_curve = curve_named(curve)
        self.curve = curve
        if decoder == "learned":
            self.decoder: nn.Module = mlp([1, *hidden, 2], activation)
        elif decoder == "surrogate":
            self.decoder = surrogate(curve).decoder.to(torch.get_default_dtype())
        elif decoder == "exact":
            self.decoder = _Formula(named_curve.function)
        else:
            choices = "learned, surrogate, exact"
            raise InputError(f"SyntheticModel: decoder must be one of {choices}, got '{decoder}'")
        chosen = named_curve.variance if variance is None else variance
        if not 0 < chosen < math.inf:
            raise InputError(f"SyntheticModel: variance must be positive, got {variance}")
        self.register_buffer("variance", torch.tensor(float(chosen), dtype=torch.get_default_dtype()))

    def forward(self, x: Tensor) -> Tensor:
        """Run the model on `x` `(N, 2)`; returns z, shape `(N, 1)`."""
        _check_plane(x)
        with pyro.plate("data", len(x)):
            z: Tensor = pyro.sample("z", dist.Normal(self.variance.new_zeros(1), 1.0).to_event(1))
            likelihood = dist.Normal(self.decoder(z), self.variance.sqrt()).to_event(1)
            pyro.sample("x", likelihood, obs=x.to(self.variance.dtype))
        return z

    def draw(self, number: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Draw data `(number, 2)` and their latents `(number, 1)`; a larger `number` extends the same sequence."""
        # In NumPy a longer draw starts with the shorter one; torch does not guarantee this.
        draws = np.random.default_rng(derive_seed(seed, "synthetic")).standard_normal((number, 3))
        z, noise = torch.from_numpy(draws).to(self.variance).split([1, 2], -1)
        with torch.no_grad():
            return self.decoder(z) + self.variance.sqrt() * noise, z

    def log_evidence(self, x: Tensor, *, tolerance: float = 1e-6) -> Tensor:
        r"""log p(x) of `x` `(N, 2)`, in nats and double precision, `(N,)`.

        $$p(x) = \int \mathcal N(z; 0, 1) \, \mathcal N(x; f(z), \mathrm{variance}\, I) \, dz$$

        by Gauss-Legendre quadrature with eight points per panel. On a panel z moves by at most 1/2 and f(z) by at most
        one standard deviation of the noise; panels are halved until no value changes by more than `tolerance`. The tail
        beyond |z| = 12 is omitted, at most 4e-33 / (2 pi variance).

        Raises `InputError` if this needs too many panels because f is too steep or too rough, and if f or `x` is not
        finite.
        """
        _check_plane(x)
        if not bool(torch.isfinite(x).all()):
            raise InputError("SyntheticModel: x contains NaN or infinite values. Remove them first.")
        log_evidence = self._quadrature(x, 1)
        refinement = 2
        while refinement <= _MAX_REFINEMENT:
            finer = self._quadrature(x, refinement)
            if bool(((finer - log_evidence).abs() <= tolerance).all()):
                return finer
            log_evidence, refinement = finer, 2 * refinement
        change = float((finer - log_evidence).abs().max())
        raise InputError(f"SyntheticModel: the quadrature of log p(x) has an error of {change:.2g} nats. {_ROUGH}")

    def log_posterior(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(z|x) of every `x` `(N, 2)` at every `z` `(G,)`, nats, double precision, `(N, G)`."""
        points = z.detach().to(x.device, torch.float64)
        return self._log_joint(x, points, _decoded(self.decoder, points)) - self.log_evidence(x)[:, None]

    def _quadrature(self, x: Tensor, refinement: int) -> Tensor:
        z, log_width = _nodes(self.decoder, float(self.variance) ** 0.5, refinement)
        z, log_width = z.to(x.device), log_width.to(x.device)
        means = _decoded(self.decoder, z)
        size = max(1, _CELLS // len(z))
        parts = [torch.logsumexp(self._log_joint(part, z, means) + log_width, -1) for part in x.split(size)]
        return torch.cat(parts)

    def _log_joint(self, x: Tensor, z: Tensor, means: Tensor) -> Tensor:
        """log p(x_n, z_g) `(N, G)` of `x` `(N, 2)`, `z` `(G,)` and f(z) `(G, 2)`."""
        variance = float(self.variance)
        distance = (x.detach().double()[:, None] - means).square().sum(-1)
        log_prior = -(z.square() + math.log(2 * math.pi)) / 2
        return log_prior - distance / (2 * variance) - math.log(2 * math.pi * variance)


def divergence(truth: SyntheticModel, model: SyntheticModel, x: Tensor) -> tuple[float, float]:
    """KL(p_truth || p_model) over the data, in nats per datapoint, and its standard error.

    The estimate is the mean of log p_truth(x) - log p_model(x), each by quadrature, over `x` `(N, 2)`: draws of `truth`
    that `model` was not trained on. The error is due to the N draws only. A finite sample's mean can be negative.
    """
    ratios = truth.log_evidence(x) - model.log_evidence(x)
    return float(ratios.mean()), float(mcse_of_mean(ratios))


class SyntheticData:
    """Draws `train`, `validation` and `test`, each `(number, 2)`, of a ground truth, and their `latents` by part.

    `curve` and `decoder` are those of the `SyntheticModel` `truth`. Each part has its own random stream derived from
    `seed`, so that its draws do not depend on the sizes of the others. Raises `InputError` for sizes below 1
    (`num_validation` may be 0: `validation` is then None).
    """

    def __init__(
        self,
        curve: str = "figure-8",
        num_train: int = 500,
        num_validation: int = 500,
        num_test: int = 1000,
        seed: int = 0,
        decoder: Literal["surrogate", "exact"] = "surrogate",
    ) -> None:
        sizes = {"train": num_train, "validation": num_validation, "test": num_test}
        for part, number in sizes.items():
            if number < (part != "validation"):
                raise InputError(f"SyntheticData: num_{part} must be at least 1, got {number}")
        self.truth = SyntheticModel(curve, decoder)
        draws = {part: self.truth.draw(number, derive_seed(seed, part)) for part, number in sizes.items() if number}
        self.train, self.test = draws["train"][0], draws["test"][0]
        self.validation = draws["validation"][0] if num_validation else None
        self.latents = {part: z for part, (_, z) in draws.items()}


class _Formula(nn.Module):
    """A decoder given by a formula."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, z: Tensor) -> Tensor:
        return self.function(z)


def _decoded(decoder: nn.Module, z: Tensor) -> Tensor:
    """f(z) `(G, 2)` for `z` `(G,)`, in double precision and without gradients."""
    with torch.no_grad():
        means: Tensor = deepcopy(decoder).to(z.device, torch.float64)(z.double()[:, None])
    return means


def _nodes(decoder: nn.Module, noise_scale: float, refinement: int) -> tuple[Tensor, Tensor]:
    """Nodes z and the logs of their weights, `(G,)` each, on the panels described in `log_evidence`."""
    z = torch.linspace(-_LIMIT, _LIMIT, 2**15 + 1, dtype=torch.float64)
    steps = _decoded(decoder, z).diff(dim=0).norm(dim=-1) / noise_scale + 2 * z.diff()
    length = np.concatenate([[0.0], np.cumsum(steps.numpy())])
    if not length[-1] * refinement < _MAX_PANELS:
        raise InputError(
            f"SyntheticModel: the curve f(z) is {length[-1]:.2g} standard deviations of the noise long, too long to "
            f"integrate over. {_ROUGH}"
        )
    panels = refinement * math.ceil(length[-1])
    edges = np.interp(np.linspace(0, length[-1], panels + 1), length, z.numpy())
    points, weights = np.polynomial.legendre.leggauss(_ORDER)
    half, middle = np.diff(edges)[:, None] / 2, (edges[1:] + edges[:-1])[:, None] / 2
    nodes, widths = (middle + half * points).ravel(), (half * weights).ravel()
    return torch.from_numpy(nodes), torch.from_numpy(np.log(widths))


def _check_plane(x: Tensor) -> None:
    if x.dim() != 2 or x.shape[1] != 2:
        raise InputError(f"SyntheticModel: x must have shape (N, 2), got {tuple(x.shape)}")
