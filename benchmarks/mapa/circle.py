"""`python -m benchmarks.mapa.circle`: why MAPA is worse on the circle, by KL(p_GT || p) of decoders under many priors.

Suspects are the prior that is recovered after training, and the training itself: the bound, its posterior, the steps.
The prior is separated from the decoder by `results/mapa_circle.csv`. Its rows are trained models under

- N(0, 1), with which a VAE and IWAE are trained;
- the rank map, by splines of 8 and of 32 pieces (`recovered_transport`);
- the aggregated posterior (`aggregated_transport`), which knows the decoder too;
- the latents as they are, each with 1/N of the mass;
- the best prior for the decoder, by EM on 20,000 further draws of the truth: what is left is the decoder's, and what
  the same costs under the truth's decoder.

MAPA-GT has the true posterior of the empiricalized model in place of MAPA's. The truth's own decoder and latents show
what a prior costs that is recovered from N draws. KL is by quadrature, of discrete priors by summation, in nats: means
over draws with standard errors, and the same for the difference from the VAE's on the same draws. Of the restarts, the
one of most validation likelihood is taken under each prior. "Off the circle" is the prior's mass where f(z) is more
than three standard deviations of the noise away from it, "misplaced" the share of the training data with f(h(x)) more
than four away from x.

Weights lie in the folder of the runs, a file for each training; a run that was stopped continues.
"""

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.mapa import runs
from benchmarks.mapa.priors import along, log_likelihood, transports, with_transport
from benchmarks.mapa.runs import Job, Options
from benchmarks.mapa.training import IWAE, MAPA, MAPA_GT, VAE, Fitted, fitted, latents_of, untrained
from benchmarks.reporting import report
from pyrogaps.errors import InputError
from pyrogaps.files import replacing
from pyrogaps.mapa.aggregated import aggregated_masses
from pyrogaps.models.synthetic import SyntheticData, SyntheticModel
from pyrogaps.streams import derive_seed

CIRCLE, TRUTH = "circle", "truth"
# The two that the question is about come first, so that a run that was stopped has them.
METHODS = ((VAE, 1), (MAPA, 10), (MAPA_GT, 10), (IWAE, 10))
STANDARD, AS_THEY_ARE, BEST = "N(0, 1)", "latents as they are", "best for the decoder"
NUM_FURTHER, NUM_STEPS_OF_EM = 20_000, 40
COLUMNS = (
    *("model", "S", "datapoints", "prior", "KL", "standard error", "draws"),
    *("minus VAE's", "standard error of the difference", "off the circle", "misplaced"),
)


@dataclass(frozen=True)
class Scored:
    """A model under one prior: what validation and test data lose against the truth, nats, and where its mass lies."""

    prior: str
    validation: float
    divergence: float
    off: float
    misplaced: float | None = None


def path_of(job: Job, options: Options) -> Path:
    return options.folder(CIRCLE) / f"{job.name}-fitted.pt"


def kept(job: Job, data: SyntheticData, options: Options) -> tuple[SyntheticModel, Tensor | None]:
    """The decoder, trained where it is not kept yet, and the latents of the training data where h is a point."""
    path = path_of(job, options)
    if not path.exists():
        found = fitted(job.method, job.num_samples, data, options.steps(CIRCLE), options.seed + job.restart)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, "weights") as file:
            torch.save({"decoder": found.model.decoder.state_dict(), "encoder": found.guide.state_dict()}, file)
    model, guide = untrained(job.method, data)
    weights = torch.load(path)
    model.decoder.load_state_dict(weights["decoder"])
    guide.load_state_dict(weights["encoder"])
    return model, None if job.method in (VAE, IWAE) else latents_of(Fitted(model, guide, 0.0, 0.0, 0.0), data.train)


def scores(model: SyntheticModel, latents: Tensor | None, data: SyntheticData) -> Iterator[Scored]:
    """The decoder under every prior that there is for it; `latents` `(N, 1)` of the training data."""
    variance = float(model.variance)
    misplaced = None
    if latents is None:
        z = torch.linspace(-4, 4, 801)[:, None]
        masses = torch.distributions.Normal(0.0, 1.0).log_prob(z[:, 0].double()).softmax(0)
        yield Scored(STANDARD, *_integrated(model, data), _off(model, z, masses))
        latents = z
    else:
        with torch.no_grad():
            misplaced = float(((model.decoder(latents) - data.train).square().sum(1) > 16 * variance).double().mean())
        eps = torch.special.ndtri((torch.arange(20_000) + 0.5) / 20_000)[:, None]
        for name, transport in transports(model, latents, data.train):
            off = _off(model, transport(eps), torch.full((len(eps),), 1 / len(eps)))
            try:
                yield Scored(name, *_integrated(with_transport(model, transport), data), off, misplaced)
            except InputError:  # too steep for quadrature
                yield Scored(name, math.inf, math.nan, off, misplaced)
        masses = torch.full((len(latents),), 1 / len(latents), dtype=torch.float64)
        yield _discrete(AS_THEY_ARE, model, latents, masses, data, misplaced)
    z = along(model, latents)
    further = data.truth.draw(NUM_FURTHER, derive_seed(0, "circle"))[0]
    masses = aggregated_masses(log_likelihood(model, further, z), NUM_STEPS_OF_EM)
    yield _discrete(BEST, model, z[:, None], masses, data, misplaced)


def _discrete(
    name: str, model: SyntheticModel, z: Tensor, masses: Tensor, data: SyntheticData, misplaced: float | None
) -> Scored:
    held = (data.validation, data.test)
    lost = _lost(data, *((log_likelihood(model, x, z[:, 0]) + masses.log()).logsumexp(1) for x in held))
    return Scored(name, *lost, _off(model, z, masses), misplaced)


def _integrated(model: SyntheticModel, data: SyntheticData) -> tuple[float, float]:
    held = (data.validation, data.test)
    return _lost(data, *(model.log_evidence(x, tolerance=1e-3) for x in held))


def _lost(data: SyntheticData, validation: Tensor, test: Tensor) -> tuple[float, float]:
    """log p of the truth less those of a model, means over validation and test data."""
    of_truth = _evidence_of_truth(data)
    return float((of_truth[0] - validation).mean()), float((of_truth[1] - test).mean())


@cache
def _evidence_of_truth(data: SyntheticData) -> tuple[Tensor, Tensor]:
    return data.truth.log_evidence(data.validation), data.truth.log_evidence(data.test)


def _off(model: SyntheticModel, z: Tensor, masses: Tensor) -> float:
    with torch.no_grad():
        radius = model.decoder(z).norm(dim=1)
    return float(masses[(radius - 1).abs() > 3 * float(model.variance) ** 0.5].sum())


def table(options: Options, write_only: bool) -> pd.DataFrame:
    """A row for each draw, model and prior: the restart of most validation likelihood under this prior.

    `write_only`: of the draws whose restarts are all trained.
    """
    rows = []
    for method, number in METHODS:
        for draw in tqdm(range(options.draws), desc=method, unit="draw"):
            jobs = [Job(CIRCLE, draw, method, number, restart) for restart in range(options.restarts)]
            if write_only and not all(path_of(job, options).exists() for job in jobs):
                continue
            data = runs.drawn(CIRCLE, draw, options)
            found = [scored for job in jobs for scored in scores(*kept(job, data, options), data)]
            rows += [[method, number, draw, *vars(best).values()] for best in _best(found)]
    for draw in range(options.draws):
        data = runs.drawn(CIRCLE, draw, options)
        for scored in scores(data.truth, data.latents["train"], data):
            rows.append([TRUTH, None, draw, *vars(scored).values()])
    return pd.DataFrame(rows, columns=["model", "S", "draw", *Scored.__dataclass_fields__])


def _best(found: list[Scored]) -> list[Scored]:
    names = dict.fromkeys(scored.prior for scored in found)
    return [min((s for s in found if s.prior == name), key=lambda s: s.validation) for name in names]


def summary(best: pd.DataFrame, num_train: int) -> Iterator[list[object]]:
    """Means over draws, a row for each model and prior; the VAE's own prior is what others are compared with."""
    vae = best[best["model"].eq(VAE) & best["prior"].eq(STANDARD)].set_index("draw")["divergence"]
    for (model, number, prior), of in best.groupby(["model", "S", "prior"], sort=False, dropna=False):
        kl = of.set_index("draw")["divergence"].dropna()
        less = (kl - vae).dropna()
        compared = model not in (VAE, TRUTH) and len(less) > 0
        difference = [float(less.mean()), float(less.sem())] if compared else [None, None]
        misplaced = None if of["misplaced"].isna().all() else float(of["misplaced"].mean())
        counted = None if pd.isna(number) else int(number)
        row = [model, counted, num_train, prior, float(kl.mean()), float(kl.sem()), len(kl)]
        yield [*row, *difference, float(of["off"].mean()), misplaced]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny runs, to see that it works")
    parser.add_argument("--runs", type=Path, default=Path("benchmarks/runs/mapa"))
    parser.add_argument("--draws", type=int, default=10, help="of the data")
    parser.add_argument("--restarts", type=int, default=3, help="of each training")
    parser.add_argument("--num_steps", type=int, help="of a training (default: 1200)")
    parser.add_argument("--num_train", type=int, default=500, help="datapoints, and as many to validate")
    parser.add_argument("--num_test", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write_only", action="store_true", help="train nothing; the table of what is trained")
    arguments = vars(parser.parse_args())
    write_only = arguments.pop("write_only")
    options = Options(**arguments)
    if options.quick:
        options = Options(options.runs / "quick", True, min(2, options.draws), 1, 20, 200, 50, options.seed)
    rows = list(summary(table(options, write_only), options.num_train))
    report("mapa_circle", "KL(p_GT || p) on the circle in nats, means over draws", COLUMNS, rows, quick=options.quick)


if __name__ == "__main__":
    main()
