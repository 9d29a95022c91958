"""Number of modes of a density on a grid."""

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import label, maximum_position  # type: ignore[import-untyped]

DIAGONALS_TOO = np.ones((3, 3))
NUM_LEVELS = 120


def count_modes(density: NDArray[np.floating], *, prominence: float = 0.5, height: float = 0.05) -> int:
    """The number of modes of `density` `(n, m)`, given on a grid.

    A mode is a peak of at least `height` times the highest, from which no path leads to a higher peak without falling
    below `prominence` times its own height, so that ripples do not count.
    """
    top = float(density.max())
    if not top > 0:
        return 0
    peaks = set()
    for level in top * np.geomspace(1.0, prominence * height, NUM_LEVELS):
        regions, number = label(density >= level, DIAGONALS_TOO)
        for position in maximum_position(density, regions, range(1, number + 1)):
            if density[position] >= max(height * top, level / prominence):
                peaks.add(position)
    return len(peaks)
