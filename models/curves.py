"""Curves in the plane as decoders of one standard Normal latent, and perceptrons fitted to them."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from pyrogaps.errors import InputError
from pyrogaps.models.mlp import mlp

# Architecture of the surrogates and, by default, of learned decoders, which can then represent the truth exactly.
HIDDEN, ACTIVATION = (50, 50), "Tanh"
_NUM_QUANTILES, _NUM_ITERATIONS = 500, 400


def figure_8(z: Tensor) -> Tensor:
    """Most of a lemniscate; maps `z` `(*, 1)` to `(*, 2)`, like all curves here."""
    u = (0.6 + 1.8 * _uniform(z)) * math.pi
    along = math.sqrt(2) * u.cos() / (u.sin() ** 2 + 1)
    return torch.cat([along / 2, along * u.sin()], -1)


def clusters(z: Tensor) -> Tensor:
    """Four clusters on the unit circle, with fast transitions between them."""
    t = _stairs(2 * math.pi * torch.sigmoid(math.pi * z / 2), 2.0)
    return torch.cat([t.cos(), t.sin()], -1)


def circle(z: Tensor) -> Tensor:
    """The unit circle at uniform speed; the two ends of the latent line meet."""
    t = 2 * math.pi * _uniform(z)
    return torch.cat([t.cos(), t.sin()], -1)


def absolute_value(z: Tensor) -> Tensor:
    """A segment traversed twice: each of its points has two latents."""
    return (_uniform(z) - 0.5).abs().expand(*z.shape[:-1], 2)


def absolute_value_monotone(z: Tensor) -> Tensor:
    """The same segment traversed once; the data distribution is that of `absolute_value`."""
    return (_uniform(z) / 2).expand(*z.shape[:-1], 2)


def spiral_dots(z: Tensor) -> Tensor:
    """Seven clusters on a spiral, with fast transitions between them."""
    t = _stairs(4 * math.pi * torch.sigmoid(math.pi * z / 2), 1.0)
    return torch.cat([t * t.cos(), t * t.sin()], -1)


def _uniform(z: Tensor) -> Tensor:
    """Phi(z), the standard Normal's distribution function."""
    return torch.special.ndtr(z)


def _stairs(u: Tensor, height: float) -> Tensor:
    """A smooth staircase: steps of twice `height`, one in the middle of every two units of `u`."""
    step = torch.floor(u / 2)
    return height * (torch.tanh(10 * u - 20 * step - 10) + 2 * step + 1)


@dataclass(frozen=True)
class Curve:
    """A decoder f from `(*, 1)` to `(*, 2)`, and the variance of the noise around it."""

    function: Callable[[Tensor], Tensor]
    variance: float


CURVES = {
    "figure-8": Curve(figure_8, 0.02),
    "clusters": Curve(clusters, 0.2),
    "circle": Curve(circle, 0.01),
    "absolute-value": Curve(absolute_value, 0.01),
    "absolute-value-monotone": Curve(absolute_value_monotone, 0.01),
    "spiral-dots": Curve(spiral_dots, 0.08),
}


def curve_named(name: str) -> Curve:
    """The curve called `name`; `InputError` if there is none."""
    if name not in CURVES:
        raise InputError(f"curve: there is no curve '{name}'. Use one of {', '.join(CURVES)}.")
    return CURVES[name]


@dataclass(frozen=True)
class Surrogate:
    """A multilayer perceptron that approximates a curve, in double precision.

    `max_error` is its largest distance from the curve over the central 99.99% of the latent's mass, and `rms_error` is
    the root mean square under the latent's distribution, both in standard deviations of the noise.
    """

    decoder: nn.Sequential
    max_error: float
    rms_error: float


def surrogate(name: str) -> Surrogate:
    """The perceptron fitted to the curve called `name`: two hidden layers of 50 tanh units.

    It is fitted by 400 iterations of L-BFGS on the squared error at 500 quantiles of z and at points in its tails, from
    a fixed start, in double precision and on one thread. The results of two machines may differ by as much as the fit's
    own error, because the iterations amplify rounding. Fitting takes about two seconds, once per process. Raises
    `InputError` for an unknown name.
    """
    fitted = _fitted(name)
    return Surrogate(deepcopy(fitted.decoder), fitted.max_error, fitted.rms_error)


@cache
def _fitted(name: str) -> Surrogate:
    curve = curve_named(name)
    with _one_thread(), torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        decoder = mlp([1, *HIDDEN, 2], ACTIVATION).double()
        _spread(decoder)
        z = torch.cat([_quantiles(_NUM_QUANTILES), torch.linspace(-6, 6, 61, dtype=torch.float64)])[:, None]
        _regress(decoder, z, curve.function(z))
    decoder.requires_grad_(False)
    fine = _quantiles(10_000)[:, None]
    error = (decoder(fine) - curve.function(fine)).norm(dim=-1) / math.sqrt(curve.variance)
    return Surrogate(decoder, float(error.max()), float(error.square().mean().sqrt()))


def _spread(decoder: nn.Sequential) -> None:
    """Spread the first layer's units over z: the usual start does not reach narrow features."""
    first = decoder[0]
    assert isinstance(first, nn.Linear)
    with torch.no_grad():
        first.weight.copy_(4 * torch.randn_like(first.weight))
        centres = torch.linspace(-2.5, 2.5, len(first.bias), dtype=torch.float64)
        first.bias.copy_(-first.weight[:, 0] * centres)


def _regress(decoder: nn.Module, z: Tensor, target: Tensor) -> None:
    optimizer = torch.optim.LBFGS(
        decoder.parameters(), max_iter=_NUM_ITERATIONS, history_size=50, line_search_fn="strong_wolfe",
        tolerance_grad=0.0, tolerance_change=0.0,
    )  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (decoder(z) - target).square().sum(-1).mean()
        loss.backward()
        return loss

    optimizer.step(closure)


def _quantiles(number: int) -> Tensor:
    """`number` quantiles of N(0, 1), each in the middle of an equal share of the mass."""
    return torch.special.ndtri((torch.arange(number, dtype=torch.float64) + 0.5) / number)


@contextmanager
def _one_thread() -> Iterator[None]:
    # A sum over threads depends on their number, and hundreds of iterations amplify any difference.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
