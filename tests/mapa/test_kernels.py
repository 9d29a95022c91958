"""Kernels against brute force, and the continuous Bernoulli's natural parameter."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pyrogaps.mapa import BernoulliKernel, ContinuousBernoulliKernel, GaussianKernel
from pyrogaps.mapa.continuous_bernoulli import log_normaliser, natural_parameter

GENERATOR_SEED = 0


def drawn(kind: str, rows: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(GENERATOR_SEED + rows)
    x = torch.rand(rows, 2, 3, generator=generator, dtype=torch.float64)
    x = {"gaussian": 3 * x - 1, "bernoulli": x.round(), "continuous": x}[kind]
    if kind == "continuous":
        x[0, 0], x[0, 1] = 0.0, 1.0
    return x.to(dtype)


def brute(kind: str, x: Tensor, y: Tensor) -> float:
    """log kappa of two datapoints, element by element."""
    a, b = x.flatten().tolist(), y.flatten().tolist()
    if kind == "gaussian":
        return -sum((u - v) ** 2 for u, v in zip(a, b, strict=True)) / (2 * 0.3)
    if kind == "bernoulli":
        return sum(math.log(0.8 if u == v else 0.2) for u, v in zip(a, b, strict=True))
    total = 0.0
    for u, v in zip(a, b, strict=True):
        total += log_density(u, mean=0.1 + 0.8 * v) / 2.0
    return total


def log_density(x: float, mean: float) -> float:
    """Of the continuous Bernoulli distribution with that mean, by bisection."""
    low, high = -1e3, 1e3
    for _ in range(200):
        middle = (low + high) / 2
        value = 0.5 if abs(middle) < 1e-9 else 1 / -math.expm1(-middle) - 1 / middle if middle > -700 else -1 / middle
        low, high = (middle, high) if value < mean else (low, middle)
    if abs(low) < 1e-6:
        return low * x - low / 2
    return low * x - math.log(math.expm1(low) / low)


KERNELS = {
    "gaussian": GaussianKernel(0.3),
    "bernoulli": BernoulliKernel(0.8),
    "continuous": ContinuousBernoulliKernel(2.0, alpha=0.9),
}


@pytest.mark.parametrize("kind", KERNELS)
def test_kernel_is_that_of_brute_force(kind: str) -> None:
    x, y = drawn(kind, 5), drawn(kind, 4)
    expected = [[brute(kind, a, b) for b in y] for a in x]
    torch.testing.assert_close(KERNELS[kind](x, y), torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_distances_give_the_kernel_but_for_a_constant_of_each_row(kind: str, dtype: torch.dtype) -> None:
    kernel: Any = KERNELS[kind]
    x = drawn(kind, 9, dtype)
    compared, rows = kernel.compare(x), torch.tensor([7, 0, 3])
    columns = torch.arange(9).flip(0).expand(3, -1)
    log_kernel = kernel(x[rows], x).log_softmax(1)
    chosen = kernel.of_distances(compared.distances(rows, columns, compared.scores(rows))).log_softmax(1)
    every = kernel.of_distances(compared.all_distances(rows)).log_softmax(1)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(every, log_kernel, rtol=0, atol=tolerance)
    torch.testing.assert_close(chosen, log_kernel.flip(1), rtol=0, atol=tolerance)
    # What a search goes by is a decreasing function of the distance, row by row.
    order = compared.scores(rows).argsort(1, descending=True)
    ordered = compared.all_distances(rows).gather(1, order)
    assert float((ordered[:, :-1] - ordered[:, 1:]).max()) < tolerance


def test_squared_distances_do_not_suffer_from_the_mean() -> None:
    x = 1e6 + drawn("gaussian", 6)
    compared, rows = GaussianKernel(1.0).compare(x), torch.arange(6)
    expected = (x[:, None] - x).square().flatten(2).sum(-1)
    torch.testing.assert_close(compared.all_distances(rows), expected, rtol=1e-12, atol=0)
    nearest = compared.scores(rows).argsort(1, descending=True)
    assert torch.equal(nearest, expected.argsort(1))


def test_natural_parameter_inverts_the_mean() -> None:
    eta = torch.cat([torch.linspace(-2, 2, 401), torch.logspace(0.3, 4, 50), -torch.logspace(0.3, 4, 50)]).double()
    eta.requires_grad_()
    (mean,) = torch.autograd.grad(log_normaliser(eta).sum(), eta)
    torch.testing.assert_close(natural_parameter(mean), eta.detach(), rtol=1e-9, atol=1e-9)


def test_log_normaliser_is_torchs() -> None:
    eta = torch.linspace(-20, 20, 801, dtype=torch.float64)
    x = torch.linspace(0, 1, 801, dtype=torch.float64)
    expected = torch.distributions.ContinuousBernoulli(logits=eta).log_prob(x)
    torch.testing.assert_close(x * eta - log_normaliser(eta), expected, rtol=1e-6, atol=1e-6)


def test_log_normaliser_has_finite_gradients_far_out() -> None:
    eta = torch.tensor([0.0, 1e-4, 1.0, 1e5, -1e5], requires_grad=True)
    (slope,) = torch.autograd.grad(log_normaliser(eta).sum(), eta)
    torch.testing.assert_close(slope[[0, 3, 4]], torch.tensor([0.5, 1.0, 0.0]), rtol=0, atol=2e-5)
    assert bool(torch.isfinite(slope).all())
