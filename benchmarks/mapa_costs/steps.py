"""What a training step takes: MAPA's, IWAE's, and a VAE's.

Steps are timed in blocks that take turns, in a new order in every round, so that what slows the machine slows all of
them. Times are CPU seconds of one thread, which another process that takes the core away does not add to. MAPA is
compared with the quicker of the two losses that have as many terms.
"""

import random
import time
from collections.abc import Iterator
from itertools import cycle, islice

import pyro
import torch
from pyro.infer import ELBO, RenyiELBO, Trace_ELBO
from torch import Tensor

import pyrogaps as pg
from benchmarks.mapa_costs.pair import Pair
from benchmarks.mapa_costs.settings import BANDWIDTHS, BATCH_SIZE, Settings
from pyrogaps.streams import seeded

TITLE = f"Training steps on {BATCH_SIZE} images, ms of CPU; ratios in the same round"
COLUMNS = (
    *("loss", "bandwidth", "replacement", "decoded per point", "encoded per point", "step"),
    *("/ IWAE", "25%", "75%", "/ VAE"),
)
VAE, IWAE, RENYI = "pyro Trace_ELBO", "IWAE_ELBO", "pyro RenyiELBO"
NUM_TERMS, NUM_STEPS, NUM_WARM_UP = 10, 4, 3
# Bandwidth and replacement.
MAPA_SETTINGS = ((BANDWIDTHS[0], True), (BANDWIDTHS[1], True), (BANDWIDTHS[0], False))


class Line:
    """A line of the table: `named` in its first columns, a loss, and the batches of indices it is given."""

    def __init__(self, named: tuple[object, ...], loss: ELBO, batches: list[Tensor], x: Tensor) -> None:
        self.named, self.loss, self.x = named, loss, x
        self.by_index = isinstance(loss, pg.MAPA_ELBO)
        self.pair = Pair(loss, x)
        self.turns = cycle(batches)

    def step(self, number: int) -> float:
        """Milliseconds of CPU a step, of `number` steps."""
        started = time.process_time()
        for indices in islice(self.turns, number):
            self.pair.svi.step(indices if self.by_index else self.x[indices])
        return (time.process_time() - started) / number * 1e3

    def passes(self) -> tuple[float, float]:
        """Rows decoded and encoded per datapoint of a batch."""
        if self.by_index:
            return self.loss.num_decoded / self.loss.num_scored, self.loss.num_encoded / self.loss.num_scored
        return float(self.loss.num_particles), 1.0


def rows(settings: Settings) -> list[list[object]]:
    """The losses that MAPA is compared with come first."""
    pyro.clear_param_store()
    with seeded(settings.seed, "steps"), pyro.validation_enabled(False):
        lines = list(_lines(settings))
        times = timed(lines, settings)
    return _table(lines, times)


def _lines(settings: Settings) -> Iterator[Line]:
    x = settings.images()
    batches = list(torch.randperm(len(x)).split(BATCH_SIZE))
    others = {
        VAE: Trace_ELBO(),
        IWAE: pg.IWAE_ELBO(NUM_TERMS, vectorize_particles=True),
        RENYI: RenyiELBO(alpha=0, num_particles=NUM_TERMS, vectorize_particles=True),
    }
    for name, loss in others.items():
        yield Line((name, None, None), loss, batches, x)
    posterior = settings.posterior(x)
    for bandwidth, replacement in MAPA_SETTINGS:
        loss = pg.MAPA_ELBO(
            posterior.with_bandwidth(bandwidth), num_top=1, num_samples=NUM_TERMS - 1, replacement=replacement
        )
        yield Line(("MAPA_ELBO", bandwidth, replacement), loss, batches, x)


def timed(lines: list[Line], settings: Settings) -> Tensor:
    """Milliseconds a step, `(rounds, lines)`."""
    order = random.Random(settings.seed)
    for line in lines:
        line.step(NUM_WARM_UP)
    times = torch.empty(settings.num_rounds, len(lines), dtype=torch.float64)
    for row in times:
        for k in order.sample(range(len(lines)), len(lines)):
            row[k] = lines[k].step(NUM_STEPS)
    return times


def _table(lines: list[Line], times: Tensor) -> list[list[object]]:
    typical = times.median(0).values.tolist()
    where = {line.named[0]: k for k, line in enumerate(lines)}
    vae, iwae = times[:, where[VAE]], times[:, min(where[IWAE], where[RENYI], key=lambda k: typical[k])]
    quartiles = torch.tensor([0.5, 0.25, 0.75], dtype=torch.float64)
    table = []
    for k, line in enumerate(lines):
        ratios = (times[:, k] / iwae).quantile(quartiles).tolist()
        table.append([*line.named, *line.passes(), typical[k], *ratios, float((times[:, k] / vae).quantile(0.5))])
    return table
