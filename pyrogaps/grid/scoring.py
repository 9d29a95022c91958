"""Densities of a guide at one datapoint with two latent dimensions."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter  # type: ignore[import-untyped]
from torch import Tensor

from pyrogaps.density import JointDensity
from pyrogaps.density.draws import Posterior
from pyrogaps.density.local import LocalGuide
from pyrogaps.errors import InputError
from pyrogaps.grid.quadrature import Array, Window

MAX_ROWS = 4096
NUM_DRAWS = 20_000


class Scorer:
    """A guide at one datapoint: its density at points, or, where it has none, a kernel density of its draws."""

    def __init__(self, joint: JointDensity, posterior: Posterior, index: Tensor) -> None:
        self.joint, self.local = joint, posterior.at(index)
        draws = _draws(joint, posterior, self.local, NUM_DRAWS)
        self.draws = array(draws[:, 0])
        self.window = extent(self.draws, f"datapoint {int(index)}")
        self.scores = self._can_score(draws[:1])

    def _can_score(self, z: Tensor) -> bool:
        if self.local.joint.dim != self.joint.dim or not hasattr(self.local, "log_prob"):
            return False
        try:
            self.local.log_prob(z)
        except NotImplementedError:
            return False
        return True

    def on(self, window: Window, num_points: int) -> tuple[Array, Array | None]:
        """The density and, if the guide can be scored, its logarithm, at the grid's points `(num_points ** 2,)`."""
        if not self.scores:
            return _kernel_density(self.draws, window, num_points).ravel(), None
        log_q = in_rows(self.local.log_prob, window.points(num_points), self.joint)
        return np.exp(log_q), log_q


def _draws(joint: JointDensity, posterior: Posterior, local: LocalGuide, number: int) -> Tensor:
    """Draws of the model's own latents `(number, 1, 2)`."""
    z = torch.cat([local.sample(MAX_ROWS)[0] for _ in range(-(-number // MAX_ROWS))])[:number]
    guide_joint: JointDensity = posterior.joint
    return guide_joint.columns_of(z, joint) if z.shape[-1] != joint.dim else z


def _kernel_density(draws: Array, window: Window, num_points: int) -> Array:
    """A histogram smoothed by a Gaussian of Scott's width (doi:10.1002/9780470316849)."""
    edges = [
        np.append(axis - spacing / 2, axis[-1] + spacing / 2)
        for axis, spacing in zip(window.axes(num_points), window.sides / (num_points - 1), strict=True)
    ]
    counts, _ = np.histogramdd(draws, bins=edges)
    # A Normal's interquartile range is 1.349 standard deviations, and far tails do not widen it.
    quartiles = np.subtract(*np.quantile(draws, [0.75, 0.25], axis=0))
    spread = np.minimum(draws.std(0), quartiles / 1.349)
    width = spread * len(draws) ** (-1 / 6) / (window.sides / (num_points - 1))
    smooth: Array = gaussian_filter(counts, width, mode="constant")
    return smooth / (len(draws) * window.cell(num_points))


def in_rows(log_density: Any, points: Array, joint: JointDensity) -> Array:
    """`log_density` of z `(S, 1, 2)` at `points` `(G, 2)`, `MAX_ROWS` at a time; `(G,)` in double precision."""
    z = torch.as_tensor(points, dtype=joint.dtype, device=joint.device)[:, None]
    return np.concatenate([array(log_density(part)[:, 0]) for part in z.split(MAX_ROWS)])


def array(values: Tensor) -> NDArray[np.float64]:
    return values.detach().double().cpu().numpy()


def extent(points: Array, name: str) -> Window:
    """The window of all but the most extreme draws, widened to hold the tails."""
    if not np.isfinite(points).all():
        raise InputError(f"{name}: some draws of z are NaN or infinite. Check the parameters of model and guide")
    low, high = np.quantile(points, [0.002, 0.998], axis=0)
    centre, side = (low + high) / 2, np.maximum(high - low, 1e-12)
    return Window(centre - 0.9 * side, centre + 0.9 * side)
