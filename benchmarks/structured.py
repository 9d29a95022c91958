"""What a default ledger costs where guide or model has structure: seconds, CPU seconds, ratios to a plain twin.

- a two-level guide, z2 then z1 given z2, on 32 datapoints;
- a deep Markov model with an LSTM over packed sequences as its guide, 16 ragged sequences of at most 8 steps;
- a Bayesian regression written for one particle, with `AutoMultivariateNormal`;
- a model of two scalars that does not broadcast over particles, and its twin that does;
- a guide of Normals behind a sigmoid, and `AutoNormal` on the same model.

Guides are untrained, but for the regression's. Twins take turns within one process, on one thread; the first turn is
not counted. A ratio is the median of those of the same turn.

    python -m benchmarks.structured            # some minutes on one thread
    python -m benchmarks.structured --quick    # does it run?
"""

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import Tensor, nn
from torch.nn.functional import softplus

import pyrogaps as pg
from benchmarks.reporting import machine, report

Case = tuple[Any, Any, Any, bool | None]  # model, guide, data, plate


def network(inputs: int, outputs: int, hidden: int = 32) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, outputs))


def normal(outputs: Tensor, least: float = 1e-3) -> Any:
    loc, raw = outputs.chunk(2, -1)
    return dist.Normal(loc, softplus(raw) + least).to_event(1)


class TwoLevels(nn.Module):
    """z2, z1 given z2, and binary data; the guide in the same order."""

    def __init__(self) -> None:
        super().__init__()
        self.prior, self.decoder = network(2, 10), network(5, 20)
        self.top, self.bottom = network(20, 4), network(22, 10)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            z1 = pyro.sample("z1", normal(self.prior(z2), 0.1))
            pyro.sample("x", dist.Bernoulli(logits=3 * self.decoder(z1)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", normal(self.top(x)))
            pyro.sample("z1", normal(self.bottom(torch.cat([x, z2], -1))))


class DeepMarkov(nn.Module):
    """A deep Markov model of binary sequences, and a guide that reads them backwards."""

    def __init__(self, data_dim: int = 6, latent_dim: int = 3, hidden: int = 16) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.transition, self.emission = network(latent_dim, 2 * latent_dim, hidden), network(latent_dim, data_dim)
        self.rnn = nn.LSTM(data_dim, hidden, batch_first=True)
        self.inner, self.heads = nn.Linear(latent_dim, hidden), nn.Linear(hidden, 2 * latent_dim)

    def model(self, x: Tensor, lengths: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = x.new_zeros(len(x), self.latent_dim)
            for t in range(x.shape[1]):
                with poutine.mask(mask=t < lengths):
                    z = pyro.sample(f"z_{t}", normal(self.transition(z)))
                    pyro.sample(f"x_{t}", dist.Bernoulli(logits=3 * self.emission(z)).to_event(1), obs=x[:, t])

    def guide(self, x: Tensor, lengths: Tensor) -> None:
        states = backwards(self.read(backwards(x, lengths), lengths), lengths)
        with pyro.plate("data", len(x)):
            z = x.new_zeros(len(x), self.latent_dim)
            for t in range(x.shape[1]):
                with poutine.mask(mask=t < lengths):
                    z = pyro.sample(f"z_{t}", normal(self.heads((torch.tanh(self.inner(z)) + states[:, t]) / 2)))

    def read(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        states, _ = nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True, total_length=x.shape[1])
        return states


def backwards(x: Tensor, lengths: Tensor) -> Tensor:
    return torch.stack([torch.cat([row[:n].flip(0), row[n:]]) for row, n in zip(x, lengths.tolist(), strict=True)])


def two_levels() -> Case:
    programs = TwoLevels().requires_grad_(False)
    z2 = torch.randn(32, 2)
    z1 = normal(programs.prior(z2), 0.1).sample()
    return programs.model, programs.guide, torch.bernoulli(torch.sigmoid(3 * programs.decoder(z1))), None


def deep_markov() -> Case:
    programs = DeepMarkov().requires_grad_(False)
    lengths = torch.randint(3, 9, (16,))
    lengths[0] = 8
    return programs.model, programs.guide, (torch.bernoulli(torch.full((16, 8, 6), 0.5)), lengths), None


def regression() -> Case:
    x = torch.randn(100, 5)
    y = x @ torch.linspace(-1, 1, 5) + 0.5 * torch.randn(100)

    def model(x: Tensor, y: Tensor) -> None:
        weights = pyro.sample("weights", dist.Normal(torch.zeros(5), 1.0).to_event(1))
        bias, scale = pyro.sample("bias", dist.Normal(0.0, 2.0)), pyro.sample("scale", dist.HalfNormal(1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ weights + bias, scale), obs=y)

    guide = AutoMultivariateNormal(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    for _ in range(1500):
        svi.step(x, y)
    return model, guide, (x, y), False


def scalars(*, broadcasts: bool) -> Case:
    y = 1.3 + torch.randn(20)

    def model(y: Tensor) -> None:
        mean, scale = pyro.sample("mean", dist.Normal(0.0, 3.0)), pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        if broadcasts:
            mean, scale = mean[..., None], scale[..., None]
        else:
            mean, scale = torch.stack([mean.reshape(())] * len(y)), scale.reshape(())
        pyro.sample("y", dist.Normal(mean, scale).expand(mean.shape[:-1] + y.shape).to_event(1), obs=y)

    guide = AutoNormal(model)
    guide(y)
    return model, guide, y, False


class Bounded(nn.Module):
    """Latents between 0 and 1."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.weight = nn.Linear(8, 6), torch.randn(3, 8)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            p = pyro.sample("p", dist.Beta(torch.full((3,), 2.0), 2.0).to_event(1))
            pyro.sample("x", dist.Normal(p @ self.weight, 0.3).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        loc, raw = self.encoder(x).chunk(2, -1)
        sigmoid = [dist.transforms.SigmoidTransform()]
        with pyro.plate("data", len(x)):
            p = dist.TransformedDistribution(dist.Normal(loc, softplus(raw) + 1e-3), sigmoid)
            pyro.sample("p", p.to_event(1))


def bounded(*, auto: bool) -> Case:
    programs = Bounded()
    x = torch.rand(32, 3) @ programs.weight + 0.3 * torch.randn(32, 8)
    guide = AutoNormal(programs.model) if auto else programs.guide
    if auto:
        guide(x)
    return programs.model, guide, x, None


# A case, the most seconds that it may take, the twin, and the largest ratio to it.
CASES: dict[str, tuple[Callable[[], Case], float | None, Callable[[], Case] | None, float | None]] = {
    "two-level guide, 32 datapoints": (two_levels, 15.0, None, None),
    "LSTM-guided deep Markov model, 16 sequences": (deep_markov, 60.0, None, None),
    "Bayesian regression, AutoMultivariateNormal": (regression, 10.0, None, None),
    "two scalars, for one particle / broadcasting": (
        lambda: scalars(broadcasts=False),
        None,
        lambda: scalars(broadcasts=True),
        5.0,
    ),
    "Normals behind a sigmoid / AutoNormal": (lambda: bounded(auto=False), None, lambda: bounded(auto=True), 2.0),
}


def seconds(make: Callable[[], Case], options: dict[str, Any]) -> tuple[float, float]:
    """Seconds of a ledger by the clock, and CPU seconds."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    model, guide, data, plate = make()
    clock, processor = time.perf_counter(), time.process_time()
    pg.decompose(model, guide, data, plate=plate, progress=False, **options)
    return time.perf_counter() - clock, time.process_time() - processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny run, to see that it works")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    given = parser.parse_args()
    torch.set_num_threads(1)
    options: dict[str, Any] = {}
    if given.quick:
        given.rounds = 1
        options = {"refinement": pg.Refinement(num_steps=5, num_selection=16), "referee": False}
    rows = []
    for name, (make, most, twin, ratio) in CASES.items():
        if given.only not in name:
            continue
        clock, taken, theirs = [], [], []
        for turn in range(given.rounds + (twin is not None)):
            wall, own = seconds(make, options)
            other = seconds(twin, options)[1] if twin is not None else None
            if turn or twin is None:
                clock.append(wall)
                taken.append(own)
                theirs += [] if other is None else [other]
        ratios = [own / other for own, other in zip(taken, theirs, strict=False)]
        of_twin = (median(each) if each else None for each in (theirs, ratios))
        rows.append([name, median(clock), most, median(taken), *of_twin, ratio])
    columns = ["case", "seconds", "at most", "CPU seconds", "twin's CPU seconds", "ratio", "ratio at most"]
    report("structured", "Default ledgers where guide or model has structure", columns, rows, quick=given.quick)
    print(machine())


if __name__ == "__main__":
    main()
