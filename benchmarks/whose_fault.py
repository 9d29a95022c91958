"""Three guides, each broken in one way, told apart by their ledgers alone: `python -m benchmarks.whose_fault`.

The data are linear-Gaussian, where the best encoder is linear and every bound is known: a linear encoder that squeezes
two latents through one number (capacity), the right encoder stopped early (optimization), and a large network fitted
to 30 points (generalization). For every seed and cause, the three children of the amortization gap are held against
their closed forms at the fitted weights, on the same datapoints, and `diagnose()` has to name the cause.
`results/whose_fault.csv` has a line for each.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import pyrogaps as pg
from benchmarks.reporting import machine, report
from pyrogaps.density.simulate import simulate
from pyrogaps.gaps import amortization
from pyrogaps.guides.amortized import AmortizedNormal
from pyrogaps.models.linear_gaussian import LinearGaussian
from pyrogaps.training import Cosine, Training, train

GAPS = CAPACITY, OPTIMIZATION, GENERALIZATION = "capacity_gap", "optimization_gap", "generalization_gap"
NUM_TEST, NUM_MEASURED, BATCH_SIZE = 128, 128, 100


@dataclass(frozen=True)
class Broken:
    """A guide that is broken in one way, the data it was trained on and others, and how to train it on."""

    model: LinearGaussian
    guide: AmortizedNormal
    train: Tensor
    test: Tensor
    retraining: pg.Retraining


def too_small(seed: int) -> Broken:
    """Two latents through one number."""
    return _fitted(_started(6, (1,), 400, _rounds(40), seed), _training(150))


def stopped_early(seed: int) -> Broken:
    """The right encoder after a tenth of the steps that it needs."""
    return _fitted(_started(6, (), 400, _rounds(60), seed), _training(20, 3e-3))


def overfitted(seed: int) -> Broken:
    """A network of thousands of weights on 30 points of 30 dimensions."""
    return _fitted(_started(30, (64,), 30, _rounds(400, 3e-3, num_restarts=0), seed), _training(1500, 3e-3))


CASES: dict[str, Callable[[int], Broken]] = {
    CAPACITY: too_small,
    OPTIMIZATION: stopped_early,
    GENERALIZATION: overfitted,
}


def _training(num_epochs: int, learning_rate: float = 1e-2) -> Training:
    return Training(num_epochs, BATCH_SIZE, learning_rate, Cosine(num_epochs, final=0.01))


def _rounds(num_epochs: int, learning_rate: float = 1e-2, num_restarts: int = 1) -> pg.Retraining:
    training = _training(num_epochs, learning_rate)
    return pg.Retraining(training, num_restarts, max_rounds=4, num_datapoints=NUM_MEASURED)


def _started(data_dim: int, hidden: tuple[int, ...], number: int, retraining: pg.Retraining, seed: int) -> Broken:
    model = LinearGaussian.random(data_dim, 2, noise_scale=1.0, seed=seed).double()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        x = simulate(pg.JointDensity(model, torch.zeros(number + NUM_TEST, data_dim).double()))[0]
        guide = AmortizedNormal(data_dim, 2, hidden, "Identity" if hidden == (1,) else "Tanh").double()
    return Broken(model, guide, x[:number], x[number:], retraining)


def _fitted(case: Broken, training: Training) -> Broken:
    train(case.model, case.guide, case.train, **{**vars(training), "freeze_model": True}, progress=False)
    return case


def measured(case: Broken, seed: int) -> tuple[pg.GapLedger, dict[str, float]]:
    """The ledger of the guide, and the children of its amortization gap in closed form, nats."""
    found: list[Any] = []
    original = amortization.retrain

    def watched(*args: Any, **options: Any) -> list[Any]:
        found.extend(original(*args, **options))
        return found

    amortization.retrain = watched
    try:
        ledger = pg.decompose(
            case.model,
            case.guide,
            case.test,
            split=pg.Split(case.train, case.retraining),
            evidence=pg.AIS(num_chains=4, num_temperatures=10, num_leapfrog=3),
            refinement=pg.Refinement(num_steps=300),
            num_particles=400,
            seed=seed,
            progress=False,
        )
    finally:
        amortization.retrain = original
    return ledger, exact_gaps(case, found[0].guide)


def exact_gaps(case: Broken, best: AmortizedNormal) -> dict[str, float]:
    """The children over the datapoints of the ledger, `best` being phi-hat."""
    data, _ = pg.Split(case.train, case.retraining).measured()
    (x,) = data.fetch(torch.arange(len(data)))
    there, capacity, here = _short(case, case.guide, x), _short(case, best, x), _short(case, case.guide, case.test)
    return {CAPACITY: capacity, OPTIMIZATION: there - capacity, GENERALIZATION: here - there}


def _short(case: Broken, guide: AmortizedNormal, x: Tensor) -> float:
    """How far `guide` lies below the best diagonal Gaussians, mean over `x`, nats."""
    with torch.no_grad():
        return float(case.model.amortization_gap(x, *guide.parameters_of(x)).mean())


def row(cause: str, seed: int) -> list[object]:
    """A line of the table."""
    ledger, exact = measured(CASES[cause](seed), seed)
    summary, diagnosis = ledger.summary(), ledger.diagnose()
    named = diagnosis.dominant_within("amortization_gap") or "none"
    cells: list[object] = [cause.removesuffix("_gap"), seed, named.removesuffix("_gap")]
    for gap in GAPS:
        mean, mcse = (float(summary.loc[gap, name]) for name in ("mean", "mcse"))
        cells += [mean, exact[gap], (mean - exact[gap]) / mcse]
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, to see that it works")
    parser.add_argument("--seeds", type=int, default=10, help="how often every guide is broken")
    options = parser.parse_args()
    seeds = range(1 if options.quick else options.seeds)
    rows = [row(cause, seed) for cause, seed in tqdm([(cause, seed) for cause in CASES for seed in seeds])]
    names = [f"{gap.removesuffix('_gap')}{part}" for gap in GAPS for part in ("", " exact", " standard errors off")]
    report("whose_fault", "Broken guides, nats", ["broken", "seed", "diagnosed", *names], rows, quick=options.quick)
    right = sum(line[0] == line[2] for line in rows)
    print(f"\nnamed rightly: {right} of {len(rows)}", machine(), sep="\n")


if __name__ == "__main__":
    main()
