"""Why a kernel on data can stand in for the posterior: both pick the same datapoints, without a decoder and with it."""

import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.mapa.latent_line import panel
from benchmarks.mapa.plane import plane
from benchmarks.mapa.posteriors import EMPIRICALIZED, LINE, MAPA, WIDER, over_datapoints, true_posterior
from pyrogaps.models.synthetic import SyntheticData, SyntheticModel

TITLES = {
    EMPIRICALIZED: "empiricalized posterior,\n$q(i|x) \\propto p(x|z_i)$: needs the decoder",
    MAPA: "MAPA, variance of the noise,\n$q(i|x) \\propto \\kappa(x, x_i)$: needs the data alone",
    WIDER: "MAPA, twice the variance",
}


def draw(data: SyntheticData, figure: Figure) -> None:
    """A column for each posterior of one datapoint: over all datapoints in the plane, and over their latents below.

    The data are those of "figure-8", the datapoint is the one of two minds: see `of_two_minds`.
    """
    row, curve, q = of_two_minds(data), _curve(data.truth), over_datapoints(data)
    axes = figure.subplots(2, len(TITLES), height_ratios=(2, 1), sharex="row", sharey="row")
    for (above, below), (name, title) in zip(axes.T, TITLES.items(), strict=True):
        above.plot(curve[:, 0], curve[:, 1], color="0.75", lw=1)
        plane(above, data.train, row, q[name][row])
        above.set_title(title, loc="left", fontsize=9)
        panel(below, data.truth, data.train[row], data.latents["train"], {name: q[name][row]})
        below.set_xlabel("z")
    axes[0, 0].text(0, 0, "darker: larger q(i|x)", fontsize=8, va="top", transform=axes[0, 0].transAxes)
    axes[1, 0].set_ylabel("density of z")
    handles = {label: handle for ax in axes[1] for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside lower right", ncols=len(handles), frameon=False, fontsize=9)


def of_two_minds(data: SyntheticData) -> int:
    """The datapoint that the middle of the latent line and its ends explain most nearly alike.

    Both ends of the curve reach towards its middle: there it would cross itself.
    """
    density = true_posterior(data.truth, data.train)
    middle, ends = (density[:, where].sum(1) for where in (LINE.abs() < 0.5, LINE.abs() > 1.5))
    return int(torch.minimum(middle, ends).argmax())


def _curve(model: SyntheticModel) -> Tensor:
    with torch.no_grad():
        curve: Tensor = model.decoder(torch.linspace(-4, 4, 800)[:, None])
    return curve
