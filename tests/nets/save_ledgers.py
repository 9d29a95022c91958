"""Ledgers of eight small pairs, to compare before and after a change that should leave every number as it was.

    python tests/nets/save_ledgers.py save FOLDER [PAIR ...]
    python tests/nets/save_ledgers.py compare BEFORE AFTER

`save` writes one file a pair, in about three minutes of one core; the same commit gives the same files on the same
machine. `compare` lists every quantity that is not equal bit by bit, and exits with 1 where one is out of bounds.

Bounds: a quantity is equal to rounding (`ROUNDING`), or else, where it has a Monte Carlo standard error, its mean over
datapoints has moved by at most 4 combined standard errors, which are themselves at most 0.02 nats. One standard error
of the mean of a column may not hide a wrong datapoint, so no datapoint may have moved by more than 8 of its own
combined standard errors and 0.02 nats. Other quantities (diagnostics, counts, traces) that differ are listed only.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
import xarray as xr
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from sklearn.datasets import load_digits
from torch import Tensor

# --- What a refactoring may rename: everything that this script takes from the library.
import pyrogaps as pg
from pyrogaps.family import augmented
from pyrogaps.guides.amortized import AmortizedNormal
from pyrogaps.guides.auxiliary_flows import AmortizedAuxiliaryFlow
from pyrogaps.guides.flows import AmortizedFlow, AutoLocalFlow
from pyrogaps.guides.local import AutoLocalMultivariateNormal
from pyrogaps.guides.partial import PartialNormal
from pyrogaps.guides.sequential import StructuredNormal
from pyrogaps.models.dmm import DeepMarkovModel
from pyrogaps.models.state_space import LinearGaussianStateSpace
from pyrogaps.models.toy import MissingGaussian
from pyrogaps.models.vae import VAE
from pyrogaps.training import Training

OWN_AIS: dict[str, Any] = {"evidence": pg.AIS(num_chains=16, num_temperatures=20, num_pilot_temperatures=10)}
LADDER: dict[str, Any] = {"evidence": pg.Ladder()}
SETTINGS: dict[str, Any] = {
    "refinement": pg.Refinement(num_steps=100),
    "num_particles": 200,
    "batch_size": 64,
    "progress": False,
}
decompose = partial(pg.decompose, **SETTINGS)


def tree_of(ledger: Any) -> xr.DataTree:
    return ledger.to_datatree()


# --- The pairs. 70 datapoints are two blocks of random numbers, the second one short.
NUMBER = 70
Ledger = Callable[[], Any]
PAIRS: dict[str, Ledger] = {}


def pair(build: Ledger) -> Ledger:
    PAIRS[build.__name__] = build
    return build


def fitted(model: Any, guide: Any, *args: Any, steps: int = 400) -> Any:
    """`guide`, and `model` where it has parameters, trained without the library, whose own training may change."""
    parameters = [*guide.parameters(), *(model.parameters() if isinstance(model, torch.nn.Module) else ())]
    optimizer = torch.optim.Adam([value for value in parameters if value.requires_grad], lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        Trace_ELBO().differentiable_loss(augmented(model, guide), guide, *args).backward()
        optimizer.step()
    return guide


def curved(data_dim: int = 5, latent_dim: int = 2) -> VAE:
    """A decoder with weights so large that its posteriors are not Normal."""
    model = VAE(data_dim, latent_dim, (8,), likelihood="gaussian", noise_scale=0.7).double()
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.mul_(1.7)
    return model.requires_grad_(False)


def drawn(model: VAE, number: int = NUMBER) -> Tensor:
    z = torch.randn(number, model.latent_dim, dtype=torch.float64)
    return model.decode(z, torch.Size([model.data_dim])).sample()


@pair
def digits() -> Any:
    """Single precision, trained together, a further family."""
    x = torch.tensor(load_digits().data[:NUMBER] > 7, dtype=torch.float32)
    model, guide = VAE(64, 4, (32,)), AmortizedNormal(64, 4, (32,))
    fitted(model, guide, x)
    return decompose(model, guide, x, families={"full": AutoLocalMultivariateNormal}, **OWN_AIS)


@pair
def flow() -> Any:
    model = curved()
    x = drawn(model)
    guide = fitted(model, AmortizedFlow(5, 2, (16,), num_steps=1, flow_hidden=6).double(), x)
    small = partial(AutoLocalFlow, num_steps=1, hidden=4)
    small.__name__ = "small flow"  # type: ignore[attr-defined]
    return decompose(model, guide, x, families={"Normal": AutoNormal, "small flow": small}, **OWN_AIS)


@pair
def auxiliary_flow() -> Any:
    model = curved()
    x = drawn(model)
    guide = fitted(model, AmortizedAuxiliaryFlow(5, 2, (16,), num_steps=1, flow_hidden=6).double(), x)
    return decompose(model, guide, x, **OWN_AIS)


@pair
def conditions() -> Any:
    """The guide is shown two of four elements; completions are doubled where the halves overfit."""
    model = MissingGaussian.random(4, 2, shown=2).double()
    model.requires_grad_(False)
    x = model.bias + torch.randn(NUMBER, 2).double() @ model.weight.T + torch.randn(NUMBER, 4).double()
    guide = fitted(model, PartialNormal(4, 2, (8,), shown=2).double(), x)
    return decompose(model, guide, x, conditioning=pg.Conditioning(32, 64), **OWN_AIS)


@pair
def lookahead() -> Any:
    """A filter, and the best filter as the reference."""
    model = LinearGaussianStateSpace(*(torch.tensor([[v]]).double() for v in (0.9, 0.5, 1.0, 1.0, 1.0)))
    x, _ = model.simulate(NUMBER, 3, seed=1)
    guide = fitted(model, StructuredNormal(1, 1, 4, lookahead=0).double(), x)
    return decompose(model, guide, x, reference=model.optimal_guide(0), **OWN_AIS)


@pair
def ragged() -> Any:
    """A deep Markov model of sequences of 1 to 3 steps."""
    model = DeepMarkovModel(6, 2, 8, 8).double().requires_grad_(False)
    x = torch.bernoulli(torch.full((NUMBER, 3, 6), 0.4)).double()
    lengths = 1 + torch.arange(NUMBER) % 3
    guide = fitted(model, StructuredNormal(6, 2, 6).double(), x, lengths)
    return decompose(model, guide, (x, lengths), **OWN_AIS)


@pair
def without_plate() -> Any:
    """A regression: the data set is one datapoint. Runs of such a model are recorded one by one, so there are few."""

    def regression(x: Tensor, y: Tensor) -> None:
        slope = pyro.sample("slope", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.StudentT(5.0, x @ slope, 0.5).to_event(1), obs=y)

    x = torch.tensor([[1.0, 0.2], [-1.0, 0.3], [0.4, 1.0], [0.1, -1.0], [-0.8, -0.1]]).double()
    y = x @ x.new_tensor([0.5, -1.0]) + 0.4 * torch.randn(5).double()
    guide = AutoNormal(regression)
    guide(x, y)
    fitted(regression, guide.double(), x, y)
    long = pg.AIS(num_chains=16, num_temperatures=200)
    return decompose(regression, guide, (x, y), plate=False, num_particles=128, evidence=long)


@pair
def escalation() -> Any:
    """Every rung, the amortization gap split in three, and a certificate."""
    model = curved()
    x = drawn(model)
    guide = fitted(model, AmortizedNormal(5, 2, (8,)).double(), x)
    retraining = pg.Retraining(Training(num_epochs=3, batch_size=32), num_restarts=1, max_rounds=2)
    options = {"split": pg.Split(drawn(model), retraining), "certificate": pg.Certificate(8, 24, 2)}
    return decompose(model, guide, x, **options, **LADDER)


# --- Saving.
def save(folder: Path, names: list[str]) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for name in names or PAIRS:
        started = time.process_time()
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        tree_of(PAIRS[name]()).to_netcdf(folder / f"{name}.nc", engine="h5netcdf")
        print(f"{name:15s} {time.process_time() - started:5.1f} s of CPU", flush=True)
    return 0


# --- Comparing.
ROUNDING = 1e-5  # relative, or nats
STANDARD_ERRORS, LARGEST_ERROR = 4.0, 0.02
ONE_DATAPOINT = 8.0
Array = np.ndarray[Any, Any]
Columns = dict[str, Array]


def columns_of(path: Path) -> Columns:
    """Every variable of a saved ledger, as "group/name", or "group/name[family]"."""
    found: Columns = {}
    with xr.open_datatree(path, engine="h5netcdf") as tree:
        for group, node in tree.load().children.items():
            for name, value in node.to_dataset().data_vars.items():
                families = value["family"].values if "family" in value.dims else []
                found |= {f"{group}/{name}[{family}]": value.sel(family=family).values for family in families}
                if not len(families):
                    found[f"{group}/{name}"] = np.asarray(value.values)
    return found


def differences(before: Columns, after: Columns) -> Iterator[tuple[str, str, bool]]:
    """(quantity, what is different, whether that is within bounds), for all that are not equal bit by bit."""
    for name in sorted(before.keys() ^ after.keys()):
        # What a change adds is listed; what it takes away has to be explained.
        yield name, "only in the ledger " + ("before" if name in before else "after"), name in after
    for name in sorted(before.keys() & after.keys()):
        old, new = before[name], after[name]
        if old.shape != new.shape:
            yield name, f"shape {old.shape} is now {new.shape}", False
        elif not np.array_equal(old, new, equal_nan=old.dtype.kind == "f"):
            yield name, *_difference(name, before, after)


def _difference(name: str, before: Columns, after: Columns) -> tuple[str, bool]:
    old, new = (columns[name].astype(float) for columns in (before, after))
    if not np.array_equal(np.isfinite(old), np.isfinite(new)):
        return "finite for other datapoints", False
    finite = np.isfinite(old)
    old, new = old[finite], new[finite]
    text = f"largest difference {np.abs(new - old).max(initial=0.0):.2g}"
    if np.allclose(old, new, rtol=ROUNDING, atol=ROUNDING):
        return f"{text}, rounding", True
    error = _error_of(name, before)
    if error is None:
        return f"{text}; mean {old.mean():.4g} is now {new.mean():.4g}; no standard error", True
    return _within_errors(text, new - old, np.hypot(error, _error_of(name, after))[finite])


def _error_of(quantity: str, columns: Columns) -> Any:
    """The standard errors of a quantity; None where it has none."""
    if quantity == "certificate/upper":
        # Reverse chains of AIS share their start, so this bound has no error; that of the lower one stands for it.
        return columns["certificate/lower_mcse"]
    name, *family = quantity.split("[", 1)
    return columns.get("[".join([f"{name}_mcse", *family]))


def _within_errors(text: str, difference: Array, error: Array) -> tuple[str, bool]:
    scaled = np.abs(difference) / np.maximum(error, 1e-12)
    moved, mean_error = abs(float(difference.mean())), float(np.sqrt(np.square(error).sum())) / max(error.size, 1)
    text += f"; the mean moved by {moved:.4f}, {moved / max(mean_error, 1e-12):.1f} of its errors of {mean_error:.4f}"
    one = np.abs(difference) <= ONE_DATAPOINT * error + LARGEST_ERROR
    within = moved <= STANDARD_ERRORS * mean_error and mean_error <= LARGEST_ERROR and bool(one.all())
    return f"{text}; largest {scaled.max():.1f}", within


def compare(before: Path, after: Path) -> int:
    out_of_bounds = 0
    for name in PAIRS:
        missing = [folder for folder in (before, after) if not (folder / f"{name}.nc").exists()]
        if missing:
            print(f"{name}: OUT OF BOUNDS: no ledger in {', '.join(map(str, missing))}")
            out_of_bounds += 1
            continue
        old, new = (columns_of(folder / f"{name}.nc") for folder in (before, after))
        found = list(differences(old, new))
        print(f"{name}: {len(old)} quantities, {len(found)} of them not equal bit by bit")
        for quantity, text, within in found:
            print(f"    {quantity}: {'' if within else 'OUT OF BOUNDS: '}{text}")
        out_of_bounds += sum(not within for _, _, within in found)
    print("all within bounds" if not out_of_bounds else f"{out_of_bounds} out of bounds")
    return int(out_of_bounds > 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    saving = commands.add_parser("save", help="write the ledgers")
    saving.add_argument("folder", type=Path)
    saving.add_argument("pairs", nargs="*", metavar="PAIR", help=f"some of {', '.join(PAIRS)}; all by default")
    comparing = commands.add_parser("compare", help="compare two folders of ledgers")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    options = parser.parse_args()
    if options.command == "compare":
        return compare(options.before, options.after)
    unknown = [name for name in options.pairs if name not in PAIRS]
    if unknown:
        parser.error(f"no such pair: {', '.join(unknown)}; there are {', '.join(PAIRS)}")
    return save(options.folder, options.pairs)


if __name__ == "__main__":
    sys.exit(main())
