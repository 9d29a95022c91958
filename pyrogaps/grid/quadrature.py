"""log p(x) of one datapoint with two latent dimensions, by quadrature over an adapted window."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pyrogaps.errors import InputError

Array = NDArray[np.float64]
LogDensity = Callable[[Array], Array]  # of points (G, 2), giving (G,) in nats

# The integral is taken over the points whose density is within a factor exp(-DEPTH) of the highest; what is
# shown is within exp(-BODY).
DEPTH, BODY = 25.0, 14.0
# The first search uses the finer grid, because a narrow mode that it misses is lost.
SEARCH_POINTS, MAX_SEARCHES = (193, 65), 40
FIRST_POINTS, MAX_POINTS = 129, 1025
TOLERANCE, MAX_ERROR = 1e-4, 0.05


@dataclass(frozen=True)
class Window:
    """A rectangle: lower and upper ends `(2,)`."""

    low: Array
    high: Array

    @property
    def sides(self) -> Array:
        return self.high - self.low

    def axes(self, num_points: int) -> tuple[Array, Array]:
        """Coordinates `(num_points,)` along both dimensions, ends included."""
        first, second = (np.linspace(low, high, num_points) for low, high in zip(self.low, self.high, strict=True))
        return first, second

    def points(self, num_points: int) -> Array:
        """The grid's points `(num_points ** 2, 2)`, the first dimension slowest."""
        return np.stack(np.meshgrid(*self.axes(num_points), indexing="ij"), -1).reshape(-1, 2)

    def cell(self, num_points: int) -> float:
        """The area that a point of the grid stands for."""
        return float(np.prod(self.sides / (num_points - 1)))


def around(*parts: Window) -> Window:
    """The smallest window that holds all of `parts`."""
    return Window(np.min([part.low for part in parts], 0), np.max([part.high for part in parts], 0))


@dataclass(frozen=True)
class Quadrature:
    """log of the integral, in nats, its difference from half the resolution, and the window of the mass."""

    log_evidence: float
    error: float
    body: Window


def integrate(log_joint: LogDensity, start: Window, name: str) -> Quadrature:
    r"""$\log \int \exp \ell(z) \, dz$ by the trapezoidal rule, over a window adapted from `start`.

    For smooth integrands that vanish at the window's edge the rule converges faster than any power of the
    spacing; the error given is the difference from the rule on every other point, an upper estimate.

    Raises `InputError`, which begins with `name`, where the integrand is NaN or infinite, does not decay, or is
    too rough for a grid of 1,025 points along each dimension.
    """
    window = _fitted(log_joint, start, name)
    num_points = FIRST_POINTS
    while True:
        values = _values(log_joint, window, num_points, name)
        fine = _log_sum(values) + np.log(window.cell(num_points))
        coarse = _log_sum(values[::2, ::2]) + np.log(4 * window.cell(num_points))
        error = abs(fine - coarse)
        if error < TOLERANCE or num_points >= MAX_POINTS:
            break
        num_points = 2 * num_points - 1
    if error > MAX_ERROR:
        raise InputError(
            f"{name}: the quadrature of p(x, z) over {_described(window)} has an error of {error:.2g} nats. The "
            "posterior is too narrow or too irregular for a grid"
        )
    body, _ = _bounds(values > values.max() - BODY, window)
    return Quadrature(fine, error, body)


def _fitted(log_joint: LogDensity, window: Window, name: str) -> Window:
    """The window in which the integrand is within exp(-DEPTH) of its peak."""
    for search in range(MAX_SEARCHES):
        values = _values(log_joint, window, SEARCH_POINTS[search > 0], name)
        fitted, at_edge = _bounds(values > values.max() - DEPTH, window)
        if at_edge or bool((fitted.sides < 0.7 * window.sides).any()):
            window = fitted
            continue
        return fitted
    raise InputError(
        f"{name}: p(x, z) does not decay towards the edges of {_described(window)}. Check that the prior is proper"
    )


def _bounds(inside: NDArray[np.bool_], window: Window) -> tuple[Window, bool]:
    """The rectangle around the points that are `inside`, beyond the window where they touch its edge."""
    low, high, at_edge = window.low.copy(), window.high.copy(), False
    steps = len(inside) - 1
    for dimension, side in enumerate(window.sides):
        occupied = np.flatnonzero(inside.any(1 - dimension))
        spacing = side / steps
        first, last = occupied[0], steps - occupied[-1]
        # Between the last point inside and the next one the density may still be high.
        low[dimension] += spacing * (first - 2) if first else -0.5 * side
        high[dimension] -= spacing * (last - 2) if last else -0.5 * side
        at_edge |= not (first and last)
    return Window(low, high), at_edge


def _values(log_joint: LogDensity, window: Window, num_points: int, name: str) -> Array:
    values = log_joint(window.points(num_points)).reshape(num_points, num_points)
    if np.isnan(values).any() or not np.isfinite(values.max()):
        raise InputError(
            f"{name}: log p(x, z) is NaN or infinite over {_described(window)}. Check the model's parameters"
        )
    return values


def _log_sum(values: Array) -> float:
    top = values.max()
    return float(top + np.log(np.exp(values - top).sum()))


def _described(window: Window) -> str:
    sides = (f"[{low:.3g}, {high:.3g}]" for low, high in zip(window.low, window.high, strict=True))
    return " x ".join(sides)
