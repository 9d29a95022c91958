"""What the benchmarks share: the machine in words, tables on the screen and as CSV, ledgers kept on disk."""

import csv
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import xarray as xr

from pyrogaps import GapLedger
from pyrogaps.density import Data
from pyrogaps.density.runs import Program
from pyrogaps.files import replacing
from pyrogaps.training import load_weights, save_weights

RESULTS = Path(__file__).parent / "results"


def machine() -> str:
    """The machine and the versions, in one line."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    packages = ("pyrogaps", "pyro-ppl", "torch", "blackjax", "jax")
    versions = ", ".join(f"{name} {found}" for name in packages if (found := _version(name)))
    hardware = f"{cores}-core {platform.machine()} CPU ({processor()}), {device}, {torch.get_num_threads()} threads"
    return f"{hardware}; Python {platform.python_version()}, {versions}"


def processor() -> str:
    """The processor's model, with family and model numbers, because a virtual machine may hide its name."""
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return platform.processor() or "unknown model"
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    entries = {name.strip(): value.strip() for name, _, value in pairs}
    name = entries.get("model name") or platform.processor() or "unknown model"
    numbers = [f"{key.removeprefix('cpu ')} {entries[key]}" for key in ("cpu family", "model") if key in entries]
    return ", ".join([name, *numbers])


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@contextmanager
def one_core() -> Iterator[None]:
    """One thread on one core for everybody: JAX too, which must not have been imported before."""
    threads, cores = torch.get_num_threads(), os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
    torch.set_num_threads(1)
    if cores:
        os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if cores:
            os.sched_setaffinity(0, cores)


def report(name: str, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], *, quick: bool) -> None:
    """Print `rows` under `title` as a table and write them to `results/<name>.csv`, the machine in its last column.

    A quick run measures nothing, so that its file is another.
    """
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(line[k]) for line in [list(columns), *cells]) for k in range(len(columns))]
    print(f"\n{title}\n{'-' * len(title)}")
    for line in [list(columns), *cells]:
        first, *others = (text.rjust(width) for text, width in zip(line, widths, strict=True))
        print("  ".join([first.strip().ljust(widths[0]), *others]))
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{name}{'-quick' if quick else ''}.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*columns, "machine"])
        writer.writerows([*row, machine()] for row in rows)


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def keep_trained(weights: Path, model: Program, guide: Program, data: Data, train: Callable[[], object]) -> None:
    """Give the pair the weights in the file `weights`, trained by `train` where there is no such file yet."""
    if weights.exists():
        load_weights(weights, model, guide, data)
        return
    weights.parent.mkdir(parents=True, exist_ok=True)
    train()
    save_weights(weights, model, guide)


def kept_ledger(path: Path, measure: Callable[[], GapLedger]) -> GapLedger:
    """The ledger in the file `path`, measured and written there where it does not lie there yet."""
    if not path.exists():
        write(path, measure().to_datatree().to_netcdf(engine="h5netcdf"))
    with xr.open_datatree(path, engine="h5netcdf") as tree:
        return GapLedger.from_datatree(tree.load())


def keep_noted(path: Path, text: Callable[[], str]) -> str:
    """The text in the file `path`, written there where it does not lie there yet."""
    if not path.exists():
        write(path, text().encode())
    return path.read_text()


def write(path: Path, content: bytes | memoryview) -> None:
    """Write a file that appears whole or not at all."""
    with replacing(path, "file") as file:
        file.write(content)
