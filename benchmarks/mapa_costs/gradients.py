"""What batches of neighbours do to the gradient of a half-trained model, against uniform batches as large.

K = 10 and S = 0, so that the bound's draws add no noise: a batch's gradient is a function of the batch, and the whole
data's is exact. One batch at random is taken of each of many cuttings; these are independent, and unbiased where every
datapoint is in one batch of a cutting. The squared distance of their mean from the whole data's gradient is then one
squared standard error in expectation; larger where there is bias.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pyro
import torch
from torch import Tensor

import pyrogaps as pg
from benchmarks.mapa_costs.pair import Pair
from benchmarks.mapa_costs.settings import BATCH_SIZE, NEIGHBOURHOODS, Settings
from pyrogaps.mapa import neighbourhood_batches
from pyrogaps.streams import seeded

TITLE = f"Gradients of batches of {BATCH_SIZE}: squared distance of their mean, and variance against uniform batches"
COLUMNS = (
    *("neighbourhood", "batches", "decoded per point", "bias^2 / standard error^2", "+- without bias"),
    *("variance / uniform", "+-", "variance x decoded / uniform"),
)
NUM_TOP, NUM_EPOCHS = 10, 3


@dataclass(frozen=True)
class Sample:
    """What the gradients of `number` independent batches tell, and the rows decoded per datapoint.

    `squared_bias` is in squared standard errors and 1 in expectation where there is no bias, `bias_error` then its
    standard deviation; `variance` is the trace of a gradient's covariance.
    """

    number: int
    squared_bias: float
    bias_error: float
    variance: float
    variance_error: float
    decoded: float


def rows(settings: Settings) -> list[list[object]]:
    """Uniform batches first, as neighbourhoods of one."""
    pyro.clear_param_store()
    with seeded(settings.seed, "gradients"), pyro.validation_enabled(False):
        loss, pair = half_trained(settings)
        whole = whole_gradient(loss, pair)
        samples = {size: sample(loss, pair, whole, size, settings.num_cuttings) for size in (1, *NEIGHBOURHOODS)}
    return [_row(size, of, samples[1]) for size, of in samples.items()]


def _row(size: int, of: Sample, uniform: Sample) -> list[object]:
    ratio = of.variance / uniform.variance
    relative = math.hypot(of.variance_error / of.variance, uniform.variance_error / uniform.variance)
    error = None if of is uniform else ratio * relative
    bias = of.squared_bias, of.bias_error
    return [size, of.number, of.decoded, *bias, ratio, error, ratio * of.decoded / uniform.decoded]


def half_trained(settings: Settings) -> tuple[pg.MAPA_ELBO, Pair]:
    """A few epochs of uniform batches."""
    x = settings.images(settings.num_images)
    loss = pg.MAPA_ELBO(settings.posterior(x), num_top=NUM_TOP)
    pair = Pair(loss, x)
    for _ in range(NUM_EPOCHS):
        for indices in torch.randperm(len(x)).split(BATCH_SIZE):
            pair.svi.step(indices)
    return loss, pair


def gradient(loss: pg.MAPA_ELBO, pair: Pair, indices: Tensor) -> Tensor:
    """Of the mean bound over `indices`, in all parameters, one vector."""
    parts = torch.autograd.grad(-loss.differentiable_loss(pair.model, pair.guide, indices), pair.parameters())
    return torch.cat([part.flatten() for part in parts])


def whole_gradient(loss: pg.MAPA_ELBO, pair: Pair) -> Tensor:
    """Of the mean bound over all the data."""
    number = loss.posterior.num_datapoints
    parts = torch.arange(number).split(5 * BATCH_SIZE)
    return torch.stack([gradient(loss, pair, part) * (len(part) / number) for part in parts]).sum(0)


def sample(loss: pg.MAPA_ELBO, pair: Pair, whole: Tensor, size: int, number: int) -> Sample:
    """Of `number` batches by neighbourhoods of `size`; `whole` is the whole data's gradient."""
    loss.reset_counts()
    found = torch.stack([gradient(loss, pair, indices) for indices in random_batches(loss, size, number)])
    deviations = found - found.mean(0)
    squares = deviations.square().sum(1)
    variance = float(squares.sum() / (number - 1))
    inner = (deviations @ deviations.T).double()
    # The mean of so many squares of standard Normals would vary as the squared bias does.
    directions = float(inner.trace() ** 2 / inner.square().sum())
    bias = float((found.mean(0) - whole).square().sum()) * number / variance
    error = float(squares.std() / number**0.5)
    return Sample(number, bias, (2 / directions) ** 0.5, variance, error, loss.num_decoded / loss.num_scored)


def random_batches(loss: pg.MAPA_ELBO, size: int, number: int) -> Iterator[Tensor]:
    """A batch at random of each of `number` cuttings into neighbourhoods of `size`, 1 for uniform batches."""
    for _ in range(number):
        if size == 1:
            yield torch.randperm(loss.posterior.num_datapoints)[:BATCH_SIZE]
        else:
            batches = list(neighbourhood_batches(loss.posterior, BATCH_SIZE, neighbourhood_size=size, width=NUM_TOP))
            yield batches[int(torch.randint(len(batches), ()))]
