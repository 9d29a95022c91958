"""The paper's way to evaluate, IWAE with a mixture of Gaussians, beside quadrature, which is exact, on trained models.

Of each method, with S = 10 (the VAE's is 1) and on the first draw of a data set, the training of most validation
likelihood is run once more. Its weights, and what the evaluation finds, are kept beside the runs.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

import pyrogaps as pg
from benchmarks.mapa.runs import Job, Options, drawn, train, write_json
from benchmarks.mapa.training import VAE
from pyrogaps.files import replacing
from pyrogaps.guides.mixture import AmortizedMixture
from pyrogaps.mapa import MonotoneTransport
from pyrogaps.models.synthetic import SyntheticData, SyntheticModel
from pyrogaps.plots.source import mean_and_error
from pyrogaps.streams import seeded

NUM_SAMPLES = 10
NUM_PARTICLES, QUICK_PARTICLES = 5000, 100
QUICK_FIT = {"num_draws": 1000, "num_steps": 50}
TRUTH = "truth"
COLUMNS = (
    *("data set", "model", "S", "log p(x)", "log p(x) by IWAE"),
    *("difference", "standard error", "largest difference", "KL", "KL by IWAE"),
)


@dataclass(frozen=True)
class Evaluation:
    """Mean log p(x) of the test data by quadrature and by IWAE, nats per datapoint.

    `difference` is quadrature less IWAE, with its `error` over datapoints, and `largest` that of the datapoint where
    they are farthest apart.
    """

    quadrature: float
    iwae: float
    difference: float
    error: float
    largest: float


def evaluations(best: pd.DataFrame, options: Options) -> Iterator[list[object]]:
    """Rows of the table: for each data set of `best` the truth, then each method that has a model of its first draw.

    KL(p_GT || p) is the difference of the truth's and the model's mean log p(x), both found in the same way.
    """
    first = best[best["draw"].eq(0) & best["divergence"].notna()]
    chosen = first[first["S"].eq(NUM_SAMPLES) | first["method"].eq(VAE)]
    for data_set, group in chosen.groupby("data set", sort=False):
        data = drawn(str(data_set), 0, options)
        truth = _kept(TRUTH, data.truth, data, options)
        yield _row(data_set, TRUTH, None, truth, truth)
        for method, number, restart in group[["method", "S", "restart"]].itertuples(index=False):
            job = Job(str(data_set), 0, method, number, restart)
            found = _kept(job.name, retrained(job, data, options), data, options)
            yield _row(data_set, method, number, found, truth)


def _row(data_set: object, model: str, number: int | None, found: Evaluation, truth: Evaluation) -> list[object]:
    divergences = truth.quadrature - found.quadrature, truth.iwae - found.iwae
    return [data_set, model, number, *asdict(found).values(), *divergences]


def _kept(name: str, model: SyntheticModel, data: SyntheticData, options: Options) -> Evaluation:
    """The evaluation of `model`, made where it is not kept yet."""
    folder, file = options.folder(data.truth.curve), f"{name}-evaluation.json"
    if not (folder / file).exists():
        write_json(folder, file, asdict(evaluated(model, data.test, options)))
    return Evaluation(**json.loads((folder / file).read_text()))


def evaluated(model: SyntheticModel, x: Tensor, options: Options) -> Evaluation:
    """Both ways on `x` `(N, 2)`; the mixture is fitted to draws of the model."""
    with seeded(options.seed, "evaluation"):
        guide = AmortizedMixture()
    guide.fit(model, x, **(QUICK_FIT if options.quick else {}), seed=options.seed)
    number = QUICK_PARTICLES if options.quick else NUM_PARTICLES
    iwae = pg.iwae(model, guide, x, num_particles=number, batch_size=250, seed=options.seed).value
    quadrature = model.log_evidence(x)
    differences = np.asarray(quadrature - iwae)
    largest = float(differences[np.abs(differences).argmax()])
    return Evaluation(float(quadrature.mean()), float(iwae.mean()), *mean_and_error(differences), largest)


def retrained(job: Job, data: SyntheticData, options: Options) -> SyntheticModel:
    """The model that a training leaves, which is run once more where its weights are not kept yet."""
    path = options.folder(job.data_set) / f"{job.name}.pt"
    if not path.exists():
        found = train(job, data, options)
        weights = {"num_pieces": found.num_pieces, "decoder": found.model.decoder.state_dict()}
        with replacing(path, "weights") as file:
            torch.save(weights, file)
    return _restored(job.data_set, **torch.load(path))


def _restored(curve: str, num_pieces: int | None, decoder: dict[str, Tensor]) -> SyntheticModel:
    model = SyntheticModel(curve)
    if num_pieces is not None:
        transport = MonotoneTransport(torch.zeros(num_pieces + 1), torch.zeros(num_pieces, 4))
        model.decoder = nn.Sequential(transport, model.decoder)
    model.decoder.load_state_dict(decoder)
    return model
