"""What log p(x) costs: gradient evaluations per image until annealed importance sampling is within 0.1 nat.

Paths from the refined guide against paths from the prior (sigmoid schedule), on 50 test images under an MNIST VAE of
50 latent dimensions: `--chains` chains each, step sizes frozen after a pilot. Both are swept over temperatures and
leapfrog steps; for every number of leapfrog steps the cost at which the mean error crosses 0.1 nat is interpolated
(linear in the error, logarithmic in the cost), and each side is judged by its cheapest. The truth is a long run from
the guide, beside which stands a long run from the prior. Pilot and refinement are counted too, values as dear as
gradients.

Then: refinement of 1,000 test images with default settings, against a refinement of three times as many steps.

    PYROGAPS_DATA=... python -m benchmarks.evidence_efficiency    # 30 minutes the first time, most of it training
    python -m benchmarks.evidence_efficiency --quick              # seconds, on digits: does it run?
"""

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.mnist_vae import trained_vae
from benchmarks.reporting import machine, report
from pyrogaps import AIS, GuideDensity, JointDensity, Refinement
from pyrogaps.bounds import chunk_log_weights
from pyrogaps.capture import GradientEvaluator
from pyrogaps.evidence.ais import run_path, run_pilot
from pyrogaps.evidence.paths import anchored_path, prior_path
from pyrogaps.gaussians import gaussian_of
from pyrogaps.log_weights import log_mean_exp_estimate
from pyrogaps.refine import Refiner, own_family
from pyrogaps.run import Run
from pyrogaps.streams import Chunk, Stream, chunks, seeded

WITHIN = 0.1
QUICK_REFINEMENT = Refinement(num_steps=100, num_particles=4, learning_rate=0.1, num_selection=64)


class Cost(NamedTuple):
    """Gradients (and values) evaluated per image, and seconds."""

    evaluations: float
    seconds: float


class Point(NamedTuple):
    """One setting of one side: estimates `(seeds, N)` and what the chains and all that leads to them cost."""

    num_temperatures: int
    estimates: Tensor
    chains: Cost
    pilot: Cost


class Images:
    """Test images under the model, their guide, and what is measured on them; `evaluate` counts what it costs."""

    def __init__(self, model: torch.nn.Module, guide: torch.nn.Module, x: Tensor) -> None:
        self.joint = JointDensity(model, x)
        self.density = GuideDensity(guide, None, self.joint)
        self.family = own_family(self.density)
        self.whole = GradientEvaluator(self.joint)
        self.split = GradientEvaluator(self.joint, split=True)
        self.chunk = Chunk(0, len(x))

    def counted(self, work: Callable[[], object]) -> tuple[object, Cost]:
        evaluators = (self.whole, self.split)
        before = sum(e.num_gradients + e.num_values for e in evaluators)
        begin = time.perf_counter()
        result = work()
        seconds = time.perf_counter() - begin
        after = sum(e.num_gradients + e.num_values for e in evaluators)
        return result, Cost((after - before) / self.joint.num_datapoints, seconds)

    def evidence(self, settings: AIS, refined: object, seed: int) -> tuple[Tensor, Cost, Cost]:
        """log p(x) `(N,)`, what the chains cost, and the pilot."""
        run = Run(seed)
        if settings.initial == "prior":
            path, evaluator = prior_path(self.split, self.chunk, run.stream("scale prior")), self.split
        else:
            start = gaussian_of(self.joint, refined, self.chunk, run.stream("anchor")).widened(settings.widen)  # type: ignore[arg-type]
            path, evaluator = anchored_path(self.whole, start, self.chunk), self.whole
        # Recording a graph is no part of what is compared, and is done once per shape.
        for number in (settings.num_chains, settings.num_pilot_chains):
            evaluator.bind(self.chunk.indices, number)
        tuning, pilot = self.counted(lambda: run_pilot(path, self.chunk, settings, run))
        result, chains = self.counted(
            lambda: run_path(path, tuning, self.chunk, settings, run)  # type: ignore[arg-type]
        )
        return log_mean_exp_estimate(result.log_weights).value, chains, pilot  # type: ignore[attr-defined]


def average(costs: Sequence[Cost]) -> Cost:
    return Cost(*(sum(parts) / len(costs) for parts in zip(*costs, strict=True)))


def mean_and_error(values: Tensor) -> tuple[float, float]:
    return float(values.mean()), float(values.std() / len(values) ** 0.5) if len(values) > 1 else math.nan


def sweep(
    images: Images, settings: AIS, refined: object, temperatures: list[int], leapfrogs: list[int], repetitions: int
) -> dict[int, list[Point]]:
    """By number of leapfrog steps, the estimates along a ladder of temperatures."""
    result: dict[int, list[Point]] = {}
    for leapfrog in leapfrogs:
        result[leapfrog] = []
        for number in temperatures:
            one = replace(settings, num_temperatures=number, num_leapfrog=leapfrog)
            values, chains, pilots = zip(
                *(images.evidence(one, refined, seed) for seed in range(repetitions)), strict=True
            )
            point = Point(number, torch.stack(values), average(chains), average(pilots))
            result[leapfrog].append(point)
            made = f"{settings.initial}, {number} temperatures x {leapfrog}"
            print(f"  {made}: {point.chains.evaluations:.0f} evaluations", flush=True)
    return result


def crossing(points: list[Point], truth: Tensor, rows: Tensor) -> dict[str, float] | None:
    """Where the mean error over images `rows` falls below `WITHIN`: temperatures, evaluations, seconds; or nowhere."""
    errors = [float((truth - point.estimates)[:, rows].mean()) for point in points]
    below = next((k for k, error in enumerate(errors) if error < WITHIN), None)
    if below is None:
        return None
    if below == 0:
        fraction, before, after = 1.0, points[0], points[0]
    else:
        before, after = points[below - 1], points[below]
        fraction = (errors[below - 1] - WITHIN) / (errors[below - 1] - errors[below])

    def between(value: Callable[[Point], float]) -> float:
        left, right = math.log(value(before)), math.log(value(after))
        return math.exp(left + fraction * (right - left))

    return {
        "temperatures": between(lambda p: p.num_temperatures),
        "chains": between(lambda p: p.chains.evaluations),
        "pilot": between(lambda p: p.pilot.evaluations),
        "seconds": between(lambda p: p.chains.seconds + p.pilot.seconds),
    }


def cheapest(side: dict[int, list[Point]], truth: Tensor, rows: Tensor) -> dict[str, float] | None:
    """Of the numbers of leapfrog steps, the one that crosses soonest."""
    crossings = {leapfrog: crossing(points, truth, rows) for leapfrog, points in side.items()}
    found = [{**at, "leapfrog": float(leapfrog)} for leapfrog, at in crossings.items() if at is not None]
    return min(found, key=lambda at: at["chains"], default=None)


def ratios(guide: dict[str, float], prior: dict[str, float], refinement: Cost) -> tuple[float, float, float]:
    """Prior over guide: in the chains, with pilot and refinement, in seconds."""
    everything = guide["chains"] + guide["pilot"] + refinement.evaluations
    seconds = prior["seconds"] / (guide["seconds"] + refinement.seconds)
    return prior["chains"] / guide["chains"], (prior["chains"] + prior["pilot"]) / everything, seconds


def compare(images: Images, options: argparse.Namespace) -> None:
    """The two sides, and what separates them."""
    settings = AIS(num_chains=options.chains, schedule="linear")
    from_prior = replace(settings, initial="prior", schedule="sigmoid", target_acceptance=0.65)
    images.whole.bind(images.chunk.indices, QUICK_REFINEMENT.num_particles)
    (refined, _), refinement = images.counted(  # type: ignore[misc]
        lambda: Refiner(images.family, QUICK_REFINEMENT)(images.whole, images.chunk, Run(0))
    )
    long = replace(settings, num_chains=2 * options.chains, num_temperatures=options.long, num_leapfrog=5)
    well, _ = Refiner(images.family, options.refinement)(images.whole, images.chunk, Run(1))
    truth, _, _ = images.evidence(long, well, 1001)
    beside, _, _ = images.evidence(replace(from_prior, num_temperatures=10 * options.long, num_leapfrog=5), None, 1001)
    gap, error = mean_and_error(beside - truth)
    print(f"log p(x): {float(truth.mean()):.3f} from the guide, {gap:+.3f} +- {error:.3f} from the prior")

    guide_side = sweep(images, settings, refined, *options.guide)
    prior_side = sweep(images, from_prior, None, *options.prior)
    rows = [
        [name, leapfrog, point.num_temperatures, point.chains.evaluations, point.pilot.evaluations,
         *mean_and_error((truth - point.estimates).mean(1)), point.chains.seconds + point.pilot.seconds]
        for name, side in (("guide", guide_side), ("prior", prior_side))
        for leapfrog, points in side.items()
        for point in points
    ]  # fmt: skip
    columns = ["from", "leapfrogs", "temperatures", "in chains", "in pilot", "error", "+-", "seconds"]
    report("evidence_sweep", "Evaluations per image and error of log p(x), nats", columns, rows, quick=options.quick)

    everyone = torch.arange(len(truth))
    guide, prior = cheapest(guide_side, truth, everyone), cheapest(prior_side, truth, everyone)
    if guide is None or prior is None:
        print(f"a side stayed more than {WITHIN} nat away: no ratio")
        return
    generator = torch.Generator().manual_seed(0)
    resampled = []
    for _ in range(200):
        some = torch.randint(len(truth), (len(truth),), generator=generator)
        pair = cheapest(guide_side, truth, some), cheapest(prior_side, truth, some)
        if pair[0] and pair[1]:
            resampled.append(ratios(pair[0], pair[1], refinement))
    low, high = torch.tensor(resampled).quantile(torch.tensor([0.05, 0.95]), 0).tolist()
    names = ("in the chains", "with pilot and refinement", "wall time, all included")
    rows = [[n, r, a, b] for n, r, a, b in zip(names, ratios(guide, prior, refinement), low, high, strict=True)]
    title = f"Within {WITHIN} nat: prior over guide (90% interval over images)"
    report("evidence_efficiency", title, ["evaluations", "ratio", "5%", "95%"], rows, quick=options.quick)
    for name, at, extra in (("guide", guide, refinement), ("prior", prior, Cost(0, 0))):
        print(
            f"{name}: {at['temperatures']:.0f} temperatures x {at['leapfrog']:.0f}; evaluations per image: "
            f"{at['chains']:.0f} in the chains, {at['pilot']:.0f} in the pilot, {extra.evaluations:.0f} in refinement; "
            f"{at['seconds'] + extra.seconds:.1f} s"
        )


def refine_many(images: Images, options: argparse.Namespace) -> None:
    """Refinement of many images: seconds, and how far below a much longer one it ends."""
    rows, elbos = [], []
    longer = replace(options.refinement, num_steps=3 * options.refinement.num_steps)
    pieces = chunks(images.joint.num_datapoints, options.batch_size)
    for name, chosen in (("default", options.refinement), ("three times as long", longer)):
        begin = time.perf_counter()
        refiner = Refiner(images.family, chosen)
        parts = [(piece, *refiner(images.whole, piece, Run(0))) for piece in pieces]
        seconds = time.perf_counter() - begin
        weights = [chunk_log_weights(images.joint, part, c, 1000, Stream(0, "score")) for c, part, _ in parts]
        elbos.append(torch.cat([w.mean(0) for w in weights]))
        converged = torch.cat([how.converged for _, _, how in parts]).double().mean()
        rows.append([name, float(elbos[-1].mean()), float(converged), seconds])
    below = elbos[1] - elbos[0]
    title = f"Refinement of {images.joint.num_datapoints} images in batches of {options.batch_size}"
    report("refinement", title, ["settings", "L[q*]", "converged", "seconds"], rows, quick=options.quick)
    print(f"the default ends {float(below.mean()):.4f} nats below, at worst {float(below.max()):.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny run on digits, to see that it works")
    parser.add_argument("--images", type=int, default=50)
    parser.add_argument("--refine-images", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=256, help="images refined at once")
    parser.add_argument("--chains", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=Path, default=Path(__file__).parent / "runs", help="folder of the checkpoint")
    options = parser.parse_args()
    # Temperatures, leapfrog steps and repetitions of the two sweeps.
    options.guide, options.prior = ([4, 6, 9, 14, 20, 30], [1, 2, 3], 6), ([100, 200, 400, 800], [3, 5, 10], 4)
    options.long, options.refinement = 400, Refinement()
    if options.quick:
        options.images, options.refine_images, options.chains, options.long = 8, 64, 4, 20
        options.guide, options.prior = ([2, 8], [2], 1), ([4, 64], [3], 1)
        options.refinement = Refinement(num_steps=50)
    torch.set_num_threads(options.threads)
    model, guide, test = trained_vae(options.runs, quick=options.quick)
    with seeded(0, "benchmark"):
        compare(Images(model, guide, test[: options.images]), options)
        refine_many(Images(model, guide, test[: options.refine_images]), options)
    print(machine())


if __name__ == "__main__":
    main()
