"""Posteriors of one datapoint as densities over the latent line."""

from collections.abc import Mapping

from matplotlib.axes import Axes
from torch import Tensor

from benchmarks.mapa.posteriors import EMPIRICALIZED, LINE, MAPA, WIDER, smoothed, true_posterior
from pyrogaps.models.synthetic import SyntheticModel
from pyrogaps.plots.source import SHADES, tidy

COLOURS = {EMPIRICALIZED: SHADES[0], MAPA: SHADES[1], WIDER: SHADES[2]}
FORMS = {EMPIRICALIZED: "--", MAPA: "-", WIDER: ":"}
# What lies beyond has 0.1% of the prior's mass.
SEEN = 3.2


def panel(ax: Axes, model: SyntheticModel, x: Tensor, z: Tensor, posteriors: Mapping[str, Tensor]) -> None:
    """p(z|x) of one datapoint `x` `(2,)`, filled, and `posteriors` `(N,)` over datapoints with latents `z` `(N, 1)`.

    All are smoothed alike, so that their heights can be compared.
    """
    ax.fill_between(LINE, true_posterior(model, x[None])[0], color="0.82", lw=0, label="true p(z|x)")
    for name, q in posteriors.items():
        ax.plot(LINE, smoothed(q[None], z)[0], FORMS[name], color=COLOURS[name], lw=1.4, label=name)
    ax.set_xlim(-SEEN, SEEN)
    ax.set_ylim(0)
    ax.set_yticks([])
    tidy(ax)
