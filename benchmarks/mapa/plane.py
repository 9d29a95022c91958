"""A posterior over datapoints, seen where they lie."""

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from torch import Tensor

from pyrogaps.plots.source import SHADES

TINTS = LinearSegmentedColormap.from_list("posterior", ["#dde5ee", SHADES[0], "#12263d"])


def plane(ax: Axes, x: Tensor, row: int, q: Tensor) -> None:
    """The datapoints `x` `(N, 2)`, darker for a larger q(i|x) `(N,)`, the one that they explain, `row`, in a ring."""
    order = q.argsort()
    ax.scatter(x[order, 0], x[order, 1], c=q[order], cmap=TINTS, s=12, lw=0)
    ax.plot(*x[row], "o", mfc="none", mec=SHADES[1], mew=1.8, ms=9)
    ax.set_aspect("equal")
    ax.set_axis_off()
