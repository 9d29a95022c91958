"""Two decoders of one data set: posteriors over latents differ, the posterior over datapoints is the same."""

from collections.abc import Iterable

import torch
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.mapa.latent_line import SEEN, panel
from benchmarks.mapa.plane import plane
from benchmarks.mapa.posteriors import MAPA, over_datapoints
from pyrogaps.models.synthetic import SyntheticData, SyntheticModel
from pyrogaps.plots.source import tidy

# Where along the segment the datapoints are that are shown, as shares of all.
PLACES = (0.15, 0.5, 0.85)


def draw(data: SyntheticData, figure: Figure) -> None:
    """A column for each of three datapoints: MAPA's posterior over the data, then, under either decoder, over z.

    `data` are those of "absolute-value". A datapoint has a latent z there; under "absolute-value-monotone" it is the
    one at which that decoder has the same value. MAPA's q(i|x) is known without a decoder, and brought to either's z_i.
    """
    along = data.train.mean(1)
    rows = [int(along.argsort()[round(share * (len(along) - 1))]) for share in PLACES]
    q = over_datapoints(data)[MAPA]
    axes = figure.subplots(3, 1 + len(rows), height_ratios=(1.5, 1, 1), width_ratios=(1.1, *[1] * len(rows)))
    for column, (ax, row) in enumerate(zip(axes[0, 1:], rows, strict=True), start=1):
        plane(ax, data.train, row, q[row])
        ax.set_title("abc"[column - 1])
    for line, (title, (model, z)) in zip(axes[1:], variants(data).items(), strict=True):
        _decoder(line[0], model, along[rows].tolist())
        line[0].set_title(title, loc="left", fontsize=9)
        for ax, row in zip(line[1:], rows, strict=True):
            panel(ax, model, data.train[row], z, {MAPA: q[row]})
    for ax in axes[2]:
        ax.set_xlabel("z")
    _explain(axes[0, 0], *axes[1, 1].get_legend_handles_labels())


def variants(data: SyntheticData) -> dict[str, tuple[SyntheticModel, Tensor]]:
    """Both models, and the latents of the training data under each."""
    z = data.latents["train"]
    monotone = torch.special.ndtri(2 * (torch.special.ndtr(z.double()) - 0.5).abs()).to(z)
    return {
        "f(z) = |Φ(z) − ½|": (data.truth, z),
        "f(z) = ½ Φ(z)": (SyntheticModel("absolute-value-monotone", "surrogate"), monotone),
    }


def _explain(ax: Axes, handles: list[Artist], labels: list[str]) -> None:
    ax.set_axis_off()
    text = "MAPA's q(i|x), darker\nwhere it is larger: made of\ndata, it is the same under\nboth decoders"
    ax.text(0, 1, text, fontsize=9, va="top", linespacing=1.4, transform=ax.transAxes)
    title = "Densities of z"
    legend = ax.legend(handles, labels, title=title, title_fontsize=9, fontsize=9, loc="lower left", frameon=False)
    legend.set_alignment("left")


def _decoder(ax: Axes, model: SyntheticModel, places: Iterable[float]) -> None:
    """Either coordinate of f(z), which are the same, and how far along the segment the datapoints are."""
    z = torch.linspace(-SEEN, SEEN, 200)
    with torch.no_grad():
        ax.plot(z, model.decoder(z[:, None]).mean(1), color="0.3", lw=1.4)
    for name, place in zip("abc", places, strict=True):
        ax.axhline(place, color="0.8", lw=0.8, zorder=0)
        ax.annotate(name, (1, place), xycoords=("axes fraction", "data"), va="center", fontsize=9)
    ax.set_xlim(-SEEN, SEEN)
    tidy(ax)
