"""`Certificate`: how wrong a ledger's bounds can be, what is spent on finding out, and the answer in words."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import xarray as xr

from pyrogaps.errors import counted
from pyrogaps.gaps.terms import standard_error
from pyrogaps.settings import Several, checked

# A refinement that gains more than this, nats, had not ended.
IMPROVING = 0.01
# Of the one-sided bound of the mean, by Markov's inequality: see `SimulatedBounds.mean_interval`.
CERTAIN = 0.95


@checked("certificate")
@dataclass(frozen=True)
class Certificate:
    """What is spent on finding out how wrong the bounds of a ledger can be.

    Args:
        num_simulated: datapoints drawn from the model, on which BDMC bounds log p(x) from both sides.
        num_refined_again: of the ledger's datapoints, evenly spaced, how many are refined once more.
        longer: how many times as many steps that takes.

    Raises `InputError` for a setting out of range.

    Example:
        >>> import torch, pyrogaps as pg
        >>> from pyrogaps.guides.amortized import AmortizedNormal
        >>> from pyrogaps.models.linear_gaussian import LinearGaussian
        >>> model, guide, x = LinearGaussian.random(4, 2), AmortizedNormal(4, 2, (8,)), torch.randn(6, 4)
        >>> ledger = pg.decompose(model, guide, x, certificate=pg.Certificate(6, 4), num_particles=50, progress=False)
        >>> ledger.certificate.sizes["simulated"]
        6
    """

    num_simulated: Several = 64
    num_refined_again: Several = 32
    longer: Several = 4


def lines_of(certificate: xr.Dataset) -> Iterator[str]:
    """The certificate in words, a line for each of its parts."""
    width = (certificate["upper"] - certificate["lower"]).values
    middle, most = np.quantile(width, [0.5, 0.9])
    mean, error = float(width.mean()), float(np.nan_to_num(standard_error(width)))
    beyond = math.log(1 / (1 - CERTAIN)) / len(width)  # Markov's inequality for the mean of exp(log p(x) - upper)
    certain = mean + beyond
    if abs(mean) <= 2 * error:
        found = f"log p(x) as measured and its upper bound agree within their error ({_mean(width)} nats apart)"
    elif mean < 0:
        found = f"log p(x) as measured is {_mean(-width)} nats above its upper bound, by chance"
    else:
        found = f"log p(x) is at most {_mean(width)} nats higher than measured on average"
    yield (
        f"certificate of log p(x), by BDMC on {counted(len(width), 'datapoint')} simulated from the model: {found}; "
        f"with {CERTAIN:.0%} confidence log p(x) is at most {max(certain, 0.0):.3f} nats higher than measured (the "
        f"distance plus {beyond:.3f}, which more simulated datapoints lower). Upper bound less log p(x) of a "
        f"datapoint: median {middle:.3f}, 90th percentile {most:.3f}, maximum {width.max():.3f}"
    )
    gain = certificate["gain"].values
    share = float((gain > IMPROVING + 2 * certificate["gain_mcse"].values).mean())
    yield (
        f"certificate of the refinement: {counted(certificate.attrs['longer'], 'time')} as many steps change the ELBO "
        f"of {counted(len(gain), 'datapoint')} by {_mean(gain)} nats on average. For {share:.0%} of them the gain "
        f"exceeds {IMPROVING} nats by more than twice its error"
    )


def cautions(certificate: xr.Dataset, inference_gap: float, last_gap: str) -> Iterator[str]:
    """What the certificate says against the ledger: errors beyond a tenth of the inference gap.

    `last_gap` is what the difference between the refined and the guide's own bound is called.
    """
    width = float((certificate["upper"] - certificate["lower"]).mean())
    gain = float(certificate["gain"].mean())
    if width > abs(inference_gap) / 10:
        more = certificate.attrs.get("more", "Spend more on the evidence")
        yield f"log p(x) may be {width:.3f} nats higher than measured (BDMC). {more}"
    if gain > abs(inference_gap) / 10:
        yield (
            f"a longer refinement gains {gain:.3f} nats; the approximation gap is too large and the {last_gap} too "
            "small by this amount. Raise num_steps of Refinement"
        )


def _mean(values: np.ndarray) -> str:
    error = f" ± {standard_error(values):.3f}" if len(values) > 1 else ""
    return f"{values.mean():.3f}{error}"
