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

    python -m benchmarks.training            # about two minutes
    python -m benchmarks.training --quick    # seconds: does it run?
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field
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
from pyrogaps.guides.amortized import AmortizedNormal
from pyrogaps.models.vae import VAE

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


def by_train(x: Tensor, hidden: tuple[int, ...], mode: Literal["eager", "captured"]) -> Run:
    def run(num_epochs: int) -> tuple[list[float], float]:
        stamps: dict[int, float] = {}
        begin = time.perf_counter()
        result = pg.train(
            *networks(hidden),
            x,
            num_epochs=num_epochs,
            batch_size=BATCH,
            learning_rate=RATE,
            schedule=lambda epoch: float(stamps.setdefault(epoch, time.perf_counter()) > 0),
            mode=mode,
        )
        # The first epoch is charged with the set-up before it.
        return [begin, *list(stamps.values())[1:], time.perf_counter()], result.train_elbo

    return run


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
    print(machine())
    torch.set_num_threads(threads)


if __name__ == "__main__":
    main()
