"""The trainings of the benchmark, one file each, and the table that is made of those that are finished."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.mapa.training import IWAE, MAPA, MAPA_GT, MAPA_NAIVE, VAE, Trained, trained
from benchmarks.reporting import write
from pyrogaps.errors import InputError
from pyrogaps.models.curves import CURVES
from pyrogaps.models.synthetic import SyntheticData, divergence

# "absolute-value-monotone" is a second decoder of the same data.
DATA_SETS = tuple(name for name in CURVES if name != "absolute-value-monotone")
METHODS = (IWAE, MAPA, MAPA_GT, MAPA_NAIVE)
SAMPLES = (3, 10, 30)
# Of a training, on minibatches of 100. In 1,200 no method gets near the truth of the spiral.
NUM_STEPS = {name: 4000 if name == "spiral-dots" else 1200 for name in DATA_SETS}
KEY = ["data set", "method", "S"]
COLUMNS = (
    *(*KEY, "steps"),
    *("KL", "standard error", "draws"),
    *("decoder passes per point", "encoder passes per point", "training CPU seconds", "failed restarts"),
)


@dataclass(frozen=True)
class Options:
    """Where runs lie, how many there are and how long they take: `num_steps`, or by data set where that is None."""

    runs: Path
    quick: bool
    draws: int
    restarts: int
    num_steps: int | None
    num_train: int
    num_test: int
    seed: int

    def steps(self, data_set: str) -> int:
        return NUM_STEPS[data_set] if self.num_steps is None else self.num_steps

    def folder(self, data_set: str) -> Path:
        """What makes another run has another folder."""
        return self.runs / f"{self.num_train}-datapoints-{self.steps(data_set)}-steps-seed-{self.seed}" / data_set


@dataclass(frozen=True)
class Job:
    """One training: on the draw `draw` of a data set, from the start `restart`. A VAE has S = 1."""

    data_set: str
    draw: int
    method: str
    num_samples: int
    restart: int

    @property
    def name(self) -> str:
        return f"{self.method}-{self.num_samples}-draw-{self.draw}-restart-{self.restart}"


@dataclass(frozen=True)
class Run:
    """What is kept of a training: its mean log p(x) of validation data and KL(p_GT || p) on test data, nats.

    Both are None where training diverged or left no density that quadrature can integrate, which `note` then says.
    """

    validation: float | None = None
    divergence: float | None = None
    num_pieces: int | None = None
    decoder_passes: float | None = None
    encoder_passes: float | None = None
    seconds: float | None = None
    note: str = ""


def jobs(data_set: str, options: Options) -> Iterator[Job]:
    """All trainings on a data set, those of a draw together."""
    settings = [(VAE, 1), *((method, number) for number in SAMPLES for method in METHODS)]
    for draw in range(options.draws):
        for method, number in settings:
            for restart in range(options.restarts):
                yield Job(data_set, draw, method, number, restart)


def finished(job: Job, options: Options) -> Run | None:
    """What is kept of a training that is done."""
    path = options.folder(job.data_set) / f"{job.name}.json"
    return Run(**json.loads(path.read_text())) if path.exists() else None


def measure(job: Job, data: SyntheticData, options: Options) -> None:
    """Train where that is not done yet, and keep what comes out."""
    if finished(job, options) is not None:
        return
    try:
        found = train(job, data, options)
        run = _kept(found, divergence(data.truth, found.model, data.test)[0])
    except (FloatingPointError, InputError) as error:
        run = Run(note=str(error))
    write_json(options.folder(job.data_set), f"{job.name}.json", asdict(run))


def train(job: Job, data: SyntheticData, options: Options) -> Trained:
    """The training itself, which has the same result whenever it is repeated on one machine."""
    return trained(job.method, job.num_samples, data, options.steps(job.data_set), options.seed + job.restart)


def _kept(found: Trained, kl: float) -> Run:
    return Run(found.validation, kl, found.num_pieces, found.decoder_passes, found.encoder_passes, found.seconds)


def write_json(folder: Path, name: str, content: dict[str, Any]) -> None:
    """Keep `content`, in a file that appears whole or not at all."""
    write(folder / name, json.dumps(content, indent=1).encode())


def drawn(data_set: str, draw: int, options: Options) -> SyntheticData:
    """One draw of a data set; validation data are as many as there are to train on."""
    return SyntheticData(data_set, options.num_train, options.num_train, options.num_test, options.seed + draw)


def best_runs(options: Options) -> pd.DataFrame:
    """Of every data set, draw, method and S whose restarts are all finished, the one of most validation likelihood.

    A row has the run's numbers, its `restart`, the mean `seconds` of the restarts and how many `failed`; where all did,
    its divergence is NaN.
    """
    rows = []
    for data_set in DATA_SETS:
        steps = options.steps(data_set)
        for job in jobs(data_set, options):
            if (run := finished(job, options)) is not None:
                key = [job.data_set, job.method, job.num_samples, steps, job.draw, job.restart]
                rows.append([*key, *asdict(run).values()])
    table = pd.DataFrame(rows, columns=[*KEY, "steps", "draw", "restart", *Run.__dataclass_fields__])
    table = table.astype(dict.fromkeys(("validation", "divergence", "seconds"), float))
    groups = [group for _, group in table.groupby([*KEY, "draw"], sort=False) if len(group) == options.restarts]
    return pd.DataFrame([_best(group) for group in groups], columns=[*table.columns, "failed"])


def _best(restarts: pd.DataFrame) -> pd.Series:
    best = restarts.sort_values("validation", ascending=False, na_position="last").iloc[0].copy()
    best["seconds"] = restarts["seconds"].mean()
    best["failed"] = int(restarts["validation"].isna().sum())
    return best


def summary(best: pd.DataFrame) -> pd.DataFrame:
    """Means over draws of the best runs, a row for each data set, method and S."""
    rows = []
    for key, group in best.groupby(KEY, sort=False):
        kl = group["divergence"].dropna()
        means = [float(group[name].astype(float).mean()) for name in ("decoder_passes", "encoder_passes", "seconds")]
        error = float(kl.sem()) if len(kl) > 1 else None
        steps = int(group["steps"].iloc[0])
        rows.append([*key, steps, float(kl.mean()), error, len(group), *means, int(group["failed"].sum())])
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype({"standard error": float})
