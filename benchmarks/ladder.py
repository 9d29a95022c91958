"""What log p(x) by the ladder costs beside AIS: gradient evaluations at equal standard error.

Test images under the MNIST VAE of `mnist_vae.py`, one refinement for all. AIS from the refined guide is swept over
temperatures, with few and with many chains; the cost at which the root mean square of its standard errors equals that
of a ladder is interpolated (both logarithmic), and the cheaper number of chains is what the ladder is compared
with. Pilots are counted on either side, values (which the ladder uses too) as dear as gradients, beside gradients
alone. The truth is one long AIS run, which also says by how many standard errors the values of the ladder are off.

    PYROGAPS_DATA=... python -m benchmarks.ladder    # 20 minutes after training
    python -m benchmarks.ladder --quick              # seconds, on digits: does it run?
"""

import argparse
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.mnist_vae import trained_vae
from benchmarks.reporting import machine, report
from pyrogaps import AIS, Evidence, Ladder, Problem, Refinement
from pyrogaps.evidence import METHODS
from pyrogaps.log_weights import Estimate
from pyrogaps.refine import Refiner, own_family
from pyrogaps.run import Run
from pyrogaps.streams import chunks, seeded

LONG = AIS(num_chains=64, num_temperatures=400)
SWEEPS = {16: (25, 50, 100, 200, 400), 64: (10, 20, 40, 80)}
TOLERANCES = (0.1, 0.05)


class Cost(NamedTuple):
    """Per image: gradients evaluated, gradients and values, seconds."""

    gradients: float
    evaluations: float
    seconds: float


class Images:
    """Test images, refined once."""

    def __init__(self, model: torch.nn.Module, guide: torch.nn.Module, x: Tensor, refinement: Refinement) -> None:
        self.problem = Problem.of(model, guide, x)
        refiner, evaluator = Refiner(own_family(self.problem.guide_density()), refinement), self.problem.evaluator
        self.refined = [(chunk, refiner(evaluator, chunk, Run(0))[0]) for chunk in chunks(len(x), 128)]

    def measured(self, evidence: Evidence, seed: int) -> tuple[Any, Cost]:
        """log p(x), and what it costs. Gradients are counted as they were evaluated, with what batches are padded by;
        a ladder's evaluations, with values, as datapoints are charged for them.
        """
        evaluator, number = self.problem.evaluator, self.problem.num_datapoints
        measurement = evidence.prepare(self.problem, Run(seed))
        before, begin = evaluator.num_gradients, time.perf_counter()
        estimate = measurement.estimate([measurement.measure(chunk, posterior) for chunk, posterior in self.refined])
        gradients, seconds = (evaluator.num_gradients - before) / number, time.perf_counter() - begin
        charged = getattr(estimate, "num_evaluations", None)
        evaluations = gradients if charged is None else float(charged.double().mean())
        return estimate, Cost(gradients, evaluations, seconds / number)


def spread(estimate: Estimate) -> float:
    """The root mean square of the standard errors."""
    return float(estimate.mcse.square().mean().sqrt())


def cost_at(points: list[tuple[float, Cost]], error: float) -> float:
    """Gradients at which the error is reached, interpolated along a sweep, or extrapolated from its last two points."""
    points = sorted(points, key=lambda point: -point[0])
    after = next((k for k in range(1, len(points)) if points[k][0] <= error), len(points) - 1)
    (left, low), (right, high) = points[after - 1], points[after]
    fraction = math.log(left / error) / math.log(left / right)
    return math.exp(math.log(low.gradients) + fraction * math.log(high.gradients / low.gradients))


def compare(images: Images, options: argparse.Namespace) -> None:
    """The sweep, the ladders, and how far both are from the long run."""
    truth, cost = images.measured(options.long, 1001)
    print(f"the long run: standard errors {spread(truth):.3f}, {cost.gradients:,.0f} gradients an image", flush=True)
    rows, sweeps = [], {}
    for number, lengths in options.sweeps.items():
        sweeps[number] = []
        for temperatures in lengths:
            found, cost = images.measured(AIS(num_chains=number, num_temperatures=temperatures), 1)
            sweeps[number].append((spread(found), cost))
            rows.append(
                row(f"AIS, {number} chains, {temperatures} temperatures", found, cost, truth, math.nan, math.nan)
            )
    for tolerance in options.tolerances:
        settings = replace(options.ladder, tolerance=tolerance)
        found, cost = images.measured(settings, 1)
        dearer = min(cost_at(points, spread(found)) for points in sweeps.values())
        name = f"ladder to {tolerance:g}"
        ratio = dearer / cost.gradients if cost.gradients else math.inf
        rows.append(row(name, found, cost, truth, ratio, dearer / cost.evaluations))
        ways = [(way, int((found.method == place).sum())) for place, way in enumerate(METHODS)]
        print(f"{name}: " + ", ".join(f"{way} {number}" for way, number in ways if number), flush=True)
    columns = [
        "", "gradients", "and values", "ms", "rms s.e.", "rms error", "mean error", "beyond 4 s.e.", "in 95% interval",
        "ratio", "values too",
    ]  # fmt: skip
    report(
        "ladder",
        "log p(x) of an image: what it costs, and how far it is off (nats)",
        columns,
        rows,
        quick=options.quick,
    )


def row(name: str, found: Estimate, cost: Cost, truth: Estimate, *ratios: float) -> list[Any]:
    error = found.value - truth.value
    low, high = found.interval()
    off = (error / torch.hypot(found.mcse, truth.mcse)).abs()
    covered = ((low <= truth.value) & (truth.value <= high)).double().mean()
    return [
        name, cost.gradients, cost.evaluations, 1000 * cost.seconds, spread(found), float(error.square().mean().sqrt()),
        float(error.mean()), int((off > 4).sum()), float(covered), *ratios,
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="seconds, on digits: does it run?")
    parser.add_argument("--runs", type=Path, default=Path(__file__).parent / "runs")
    options = parser.parse_args()
    options.ladder, options.tolerances = Ladder(), TOLERANCES
    options.long, options.sweeps, refinement, number = LONG, SWEEPS, Refinement(), 256
    if options.quick:
        options.long, options.sweeps = AIS(num_temperatures=20), {4: (3, 6)}
        options.ladder, options.tolerances = Ladder(temperatures=(4, 8)), (0.3,)
        refinement, number = Refinement(num_steps=60, num_particles=4, learning_rate=0.1, num_selection=16), 16
    model, guide, test = trained_vae(options.runs, quick=options.quick)
    print(f"{machine()}; {number} test images")
    with seeded(0, "unused"):
        compare(Images(model, guide, test[:number], refinement), options)


if __name__ == "__main__":
    main()
