"""Posteriors over the latent line, datapoint by datapoint: the true one, the empiricalized model's and MAPA's."""

from collections.abc import Mapping

import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.mapa.latent_line import panel
from benchmarks.mapa.posteriors import EMPIRICALIZED, MAPA, over_datapoints, true_posterior
from pyrogaps.models.synthetic import SyntheticData

# Of the datapoints ordered by the entropy of p(z|x), how far up those that are shown stand.
SHOWN = {"narrow": 0.1, "middling": 0.5, "wide": 0.9}


def draw(draws: Mapping[str, SyntheticData], figure: Figure) -> None:
    """A column for each data set, and in its rows datapoints whose true posteriors are narrow, middling and wide."""
    axes = figure.subplots(len(SHOWN), len(draws), sharex=True, squeeze=False)
    for column, (data_set, data) in enumerate(draws.items()):
        q = over_datapoints(data)
        rows = _by_entropy(data)
        for ax, share in zip(axes[:, column], SHOWN.values(), strict=True):
            row = rows[round(share * (len(rows) - 1))]
            shown = {name: q[name][row] for name in (EMPIRICALIZED, MAPA)}
            panel(ax, data.truth, data.train[row], data.latents["train"], shown)
        axes[0, column].set_title(data_set, loc="left", fontsize=10)
        axes[-1, column].set_xlabel("z")
    for ax, name in zip(axes[:, 0], SHOWN, strict=True):
        ax.set_ylabel(name)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=len(labels), frameon=False, fontsize=9)


def _by_entropy(data: SyntheticData) -> Tensor:
    """The training data in the order of the entropies of their true posteriors."""
    entropies: Tensor = torch.special.entr(true_posterior(data.truth, data.train)).sum(1)
    return entropies.argsort()
