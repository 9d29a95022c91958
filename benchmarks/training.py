"""Training steps per second of `pyrogaps.train`, beside a hand-written PyTorch loop and Pyro's plain `SVI` loop.

All train the same VAE (784-200-200-50-200-200-784, ELU, Bernoulli) from the same weights on the same binary images held
in memory, in minibatches of 100, by Adam, reading the loss of every step. The hand-written loop is autograd with fused
cross-entropy and a Monte Carlo KL, and has the optimizer that `train` takes by default, Adam's fused kernel; with
PyTorch's own default it stands beside it. Pyro's is `SVI(model, guide, pyro.optim.Adam, Trace_ELBO())`.

They take turns: in a round, each trains anew for `--epochs` epochs. A round's figure is the median time of an epoch but
the first, in which `train` runs its first steps through Pyro and records one; as every epoch, it holds shuffling,
minibatches, checks, and keeping the epoch's weights. "set-up" is all that the whole run took beyond its number of such
epochs, seconds: checks before the first step, the slower first steps, and the recording. Ratios are of steps per second
in the same round.

With `--guides` every guide of the zoo is trained in both modes instead, with this VAE or a deep Markov model of short
sequences, and a row gives steps per second recorded over those through Pyro. Epochs of the second half count: by then
`train` has decided which is faster. `used` is what it chose.

    python -m benchmarks.training            # about two minutes
    python -m benchmarks.training --guides   # a quarter of an hour
    python -m benchmarks.training --quick    # seconds: does it run?
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Literal

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

import pyrogaps as pg
from benchmarks.reporting import machine, report
from pyrogaps.density.runs import Program
from pyrogaps.guides.amortized import AmortizedMultivariateNormal, AmortizedNormal
from pyrogaps.guides.auxiliary_flows import AmortizedAuxiliaryFlow, AutoLocalAuxiliaryFlow
from pyrogaps.guides.flows import AmortizedFlow, AutoLocalFlow
from pyrogaps.guides.local import AutoLocalMultivariateNormal
from pyrogaps.guides.mixture import AmortizedMixture, AutoLocalMixture
from pyrogaps.guides.partial import PartialNormal
from pyrogaps.guides.sequential import StructuredNormal
from pyrogaps.models.dmm import DeepMarkovModel
from pyrogaps.models.vae import VAE
from pyrogaps.training import TrainingResult

BATCH, RATE = 100, 1e-3
HAND, SVI_ = "by hand, fused Adam", "Pyro's SVI"
# Trains for some epochs; the time at which each began and the last ended, and the last one's ELBO, nats per datapoint.
Run = Callable[[int], tuple[list[float], float]]


def networks(hidden: tuple[int, ...]) -> tuple[VAE, AmortizedNormal]:
    torch.manual_seed(0)
    return VAE(784, 50, hidden), AmortizedNormal(784, 50, hidden)


def loop(step: Callable[[Tensor], float], x: Tensor, num_epochs: int) -> tuple[list[float], float]:
    """Epochs of `step`, which takes a minibatch and returns its loss, summed."""
    stamps = [time.perf_counter()]
    for _ in range(num_epochs):
        loss = sum(step(x[indices]) for indices in torch.randperm(len(x)).split(BATCH))
        stamps.append(time.perf_counter())
    return stamps, -loss / len(x)


def by_hand(x: Tensor, hidden: tuple[int, ...], **options: bool) -> Run:
    def run(num_epochs: int) -> tuple[list[float], float]:
        model, guide = networks(hidden)
        optimizer = torch.optim.Adam([*model.parameters(), *guide.parameters()], lr=RATE, **options)

        def step(batch: Tensor) -> float:
            mean, scale = guide.parameters_of(batch)
            noise = torch.randn_like(mean)
            z = mean + scale * noise
            cross_entropy = binary_cross_entropy_with_logits(model.decoder(z), batch, reduction="sum")
            kl = 0.5 * (z.square() - noise.square()).sum() - scale.log().sum()
            loss = cross_entropy + kl
            optimizer.zero_grad()
            (loss / len(batch)).backward()
            optimizer.step()
            return loss.item()

        return loop(step, x, num_epochs)

    return run


def by_svi(x: Tensor, hidden: tuple[int, ...]) -> Run:
    def run(num_epochs: int) -> tuple[list[float], float]:
        pyro.clear_param_store()
        networks_ = networks(hidden)

        def model(batch: Tensor) -> Tensor:
            return pyro.module("model", networks_[0])(batch)

        def guide(batch: Tensor) -> Tensor:
            return pyro.module("guide", networks_[1])(batch)

        svi = SVI(model, guide, pyro.optim.Adam({"lr": RATE}), Trace_ELBO())
        with pyro.validation_enabled(False):
            return loop(svi.step, x, num_epochs)

    return run


Mode = Literal["eager", "captured"]
Pair = tuple[Program, Program]


def by_train(x: Tensor, hidden: tuple[int, ...], mode: Mode) -> Run:
    def run(num_epochs: int) -> tuple[list[float], float]:
        stamps, result = stamped(networks(hidden), x, num_epochs, mode)
        return stamps, result.train_elbo

    return run


def stamped(pair: Pair, x: Tensor, num_epochs: int, mode: Mode) -> tuple[list[float], TrainingResult]:
    """Train by `pyrogaps.train`; the time at which each epoch began and the last ended."""
    stamps: dict[int, float] = {}
    begin = time.perf_counter()
    result = pg.train(
        *pair,
        x,
        num_epochs=num_epochs,
        batch_size=BATCH,
        learning_rate=RATE,
        schedule=lambda epoch: float(stamps.setdefault(epoch, time.perf_counter()) > 0),
        mode=mode,
        progress=False,
    )
    # The first epoch is charged with the set-up before it.
    return [begin, *list(stamps.values())[1:], time.perf_counter()], result


# The guides of the zoo: a function from the widths of hidden layers, so that a quick run is small.
Hidden = tuple[int, ...]
AMORTIZED: dict[str, Callable[[Hidden], Program]] = {
    "AmortizedNormal": lambda hidden: AmortizedNormal(784, 50, hidden),
    "AmortizedMultivariateNormal": lambda hidden: AmortizedMultivariateNormal(784, 50, hidden),
    "AmortizedFlow": lambda hidden: AmortizedFlow(784, 50, hidden),
    "AmortizedAuxiliaryFlow": lambda hidden: AmortizedAuxiliaryFlow(784, 50, hidden, flow_hidden=hidden[-1]),
    "AmortizedMixture": lambda hidden: AmortizedMixture(784, 50, hidden),
    "PartialNormal": lambda hidden: PartialNormal(784, 50, hidden, shown=392),
}
LOCAL: dict[str, Callable[[Program], Program]] = {
    "AutoLocalMultivariateNormal": AutoLocalMultivariateNormal,
    "AutoLocalFlow": lambda model: AutoLocalFlow(model, hidden=20),
    "AutoLocalAuxiliaryFlow": lambda model: AutoLocalAuxiliaryFlow(model, hidden=20),
    "AutoLocalMixture": AutoLocalMixture,
}


def zoo(hidden: Hidden) -> dict[str, Callable[[], Pair]]:
    """Pairs by name of the guide. A local guide has parameters for each of `BATCH` images and is trained on these."""

    def amortized(name: str) -> Pair:
        torch.manual_seed(0)
        return VAE(784, 50, hidden), AMORTIZED[name](hidden)

    def local(name: str) -> Pair:
        torch.manual_seed(0)
        model = VAE(784, 50, hidden)
        return model, LOCAL[name](model)

    def sequential() -> Pair:
        torch.manual_seed(0)
        return DeepMarkovModel(98, 10, 20, 20), StructuredNormal(98, 10, 20, lookahead=0)

    pairs = {name: partial(amortized, name) for name in AMORTIZED} | {name: partial(local, name) for name in LOCAL}
    return {**pairs, "StructuredNormal": sequential}


def compare_guides(x: Tensor, hidden: Hidden, num_rounds: int) -> list[list[object]]:
    """A row for each guide: steps per second through Pyro and recorded, their ratio in the same round, the choice."""
    rows: list[list[object]] = []
    for name, make in zoo(hidden).items():
        given = x[:BATCH] if name in LOCAL else x.unflatten(-1, (8, 98)) if name == "StructuredNormal" else x
        # Long enough for the trial steps of a record, and as many after them.
        num_steps = -(-len(given) // BATCH)
        num_epochs = 2 * max(2, -(-100 // num_steps))
        modes: tuple[Mode, ...] = ("eager", "captured")
        speeds: dict[Mode, list[float]] = {mode: [] for mode in modes}
        for _ in range(num_rounds):
            for mode in modes:
                pyro.clear_param_store()
                stamps, result = stamped(make(), given, num_epochs, mode)
                epochs = [after - before for before, after in pairwise(stamps)]
                speeds[mode].append(num_steps / median(epochs[num_epochs // 2 :]))
        ratio = median(b / a for a, b in zip(*speeds.values(), strict=True))
        rows.append([name, *(median(speeds[mode]) for mode in modes), ratio, result.mode])
    return rows


@dataclass
class Figures:
    """Of one implementation, by round: steps per second, set-up in seconds, the last epoch's ELBO."""

    speed: list[float] = field(default_factory=list)
    set_up: list[float] = field(default_factory=list)
    elbo: list[float] = field(default_factory=list)

    def add(self, stamps: list[float], elbo: float, num_steps: int) -> None:
        epochs = [after - before for before, after in pairwise(stamps)]
        self.speed.append(num_steps / median(epochs[1:]))
        self.set_up.append(sum(epochs) - len(epochs) * median(epochs[1:]))
        self.elbo.append(elbo)

    def row(self, others: list["Figures"]) -> list[float]:
        ratios = [median(a / b for a, b in zip(self.speed, other.speed, strict=True)) for other in others]
        return [median(self.speed), max(self.speed), *ratios, median(self.set_up), median(self.elbo)]


def measure(runs: dict[str, Run], num_rounds: int, num_epochs: int, num_steps: int) -> dict[str, Figures]:
    """All runs in turns; first all of them once, unmeasured."""
    for run in runs.values():
        run(1)
    found = {name: Figures() for name in runs}
    for _ in range(num_rounds):
        for name, run in runs.items():
            found[name].add(*run(num_epochs), num_steps)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny run, to see that it works")
    parser.add_argument("--guides", action="store_true", help="every guide of the zoo, recorded and not")
    parser.add_argument("--images", type=int, default=12_000)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    hidden: tuple[int, ...] = (200, 200)
    if options.quick:
        options.images, options.epochs, options.rounds, hidden = 2000, 4, 1, (8,)
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    x = (torch.rand(options.images, 784, generator=torch.Generator().manual_seed(1)) < 0.2).float()
    if options.guides:
        report(
            "training_guides",
            f"Training steps of {BATCH} datapoints, {options.threads} threads: per second, recorded over through Pyro",
            ["guide", "through Pyro", "recorded", "ratio", "used"],
            compare_guides(x, hidden, options.rounds),
            quick=options.quick,
        )
    else:
        compare_implementations(x, hidden, options)
    print(machine())
    torch.set_num_threads(threads)


def compare_implementations(x: Tensor, hidden: Hidden, options: argparse.Namespace) -> None:
    """`pyrogaps.train` beside a hand-written loop and Pyro's."""
    runs = {
        HAND: by_hand(x, hidden, fused=True),
        "by hand, default Adam": by_hand(x, hidden),
        SVI_: by_svi(x, hidden),
        "pyrogaps.train, eager": by_train(x, hidden, "eager"),
        "pyrogaps.train, captured": by_train(x, hidden, "captured"),
    }
    found = measure(runs, options.rounds, options.epochs, -(-options.images // BATCH))
    elbos = [median(figures.elbo) for figures in found.values()]
    if max(elbos) - min(elbos) > 0.02 * abs(max(elbos)):
        raise SystemExit(f"they do not train alike: ELBOs from {min(elbos):.2f} to {max(elbos):.2f}")
    report(
        "training" if options.threads == 1 else f"training-{options.threads}-threads",
        f"Training steps of {BATCH} images, {options.threads} threads: per second, ratios of the same round",
        ["implementation", "median", "best", "/ by hand", "/ SVI", "set-up", "ELBO"],
        [[name, *figures.row([found[HAND], found[SVI_]])] for name, figures in found.items()],
        quick=options.quick,
    )


if __name__ == "__main__":
    main()
