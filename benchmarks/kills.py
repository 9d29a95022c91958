"""Runs that are killed at random moments: is anything lost, is anything measured twice, is the ledger the same?

The recipe `digits`, from trained weights, by torchrun in several processes. Again and again, one of them (any but the
first), the first one, or all of them together with torchrun itself is killed (SIGKILL) after a random time; then the
same command is started again, until it ends. Every chunk that was measured and kept is counted, and the ledger compared
with that of an undisturbed run in one process. Times are of the processor, not of a clock, so that kills strike the
same stages of a run on a machine that other work shares.

    python -m benchmarks.kills            # 20 kills: about ten minutes
    python -m benchmarks.kills --quick    # 2 kills
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import xarray as xr
import yaml

from benchmarks.reporting import machine, report

ROOT = Path(__file__).parents[1]
VICTIMS = ("another rank", "rank 0", "all")

# The guide's module, which the command imports: it writes down every chunk that was measured and kept.
COUNTING = """
from pyrogaps.chunk_cache import ChunkCache
from pyrogaps.guides.amortized import AmortizedNormal as Guide

get = ChunkCache.get

def counted(self, chunk, probe, compute):
    measured = []
    result = get(self, chunk, probe, lambda: measured.append(chunk) or compute())
    if measured:
        with open("count", "a") as file:
            file.write(f"{chunk.start}\\n")
    return result

ChunkCache.get = counted
"""


def command(folder: Path, num_processes: int, *arguments: str) -> subprocess.Popen[bytes]:
    """Start the command on the recipe in `folder`."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    by = torchrun if num_processes > 1 else []
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, *by, "-m", "pyrogaps.eval", "counted.yaml", "--quiet", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def kill(run: subprocess.Popen[bytes], victim: str, num_processes: int) -> bool:
    """Kill whom it says, and wait until all are gone; whether there was anyone left to kill."""
    if run.poll() is not None:
        return False
    own = descendants(run.pid)
    ranks = {rank: pid for pid in own if (rank := rank_of(pid)) is not None}
    wanted = {"another rank": range(1, num_processes), "rank 0": [0], "all": []}[victim]
    chosen = [ranks[rank] for rank in wanted if rank in ranks][:1]
    for pid in chosen or [run.pid, *own]:  # all, too, where they have not started yet
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    run.wait()
    return True


def descendants(pid: int) -> list[int]:
    """The processes that a process started, and those that they started."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found[1:]


def processor_seconds(pid: int) -> float:
    """Of the process that has used the most, among a process and its descendants."""
    return max(map(_own_seconds, [pid, *descendants(pid)]))


def _own_seconds(pid: int) -> float:
    with suppress(OSError):
        fields = (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def rank_of(pid: int) -> int | None:
    """The rank that torchrun gave a process; None where it is none of its own."""
    with suppress(OSError):
        entries = (Path("/proc") / str(pid) / "environ").read_bytes().split(b"\0")
        return next((int(entry[5:]) for entry in entries if entry.startswith(b"RANK=")), None)
    return None


def ledger(folder: Path) -> xr.Dataset:
    return xr.load_dataset(folder / "ledger.nc", group="per_datapoint", engine="h5netcdf")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a short run, to see that it works")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--most", type=float, default=30.0, help="processor seconds until a kill, at the most")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.quick:
        options.kills, options.most = 2, 25.0
    chance = random.Random(options.seed)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "counted.py").write_text(COUNTING)
        arguments = {"data_dim": 64, "latent_dim": 8, "hidden": [100, 100]}
        recipe = {
            "extends": "digits",
            "guide": {"class_path": "counted.Guide", "init_args": arguments},
            "batch_size": 64,  # many small chunks
            "refinement": {"num_steps": 100 if options.quick else 250},
            "evaluate": {"part": "train", "num_datapoints": 128 if options.quick else None},
        }
        (folder / "counted.yaml").write_text(yaml.safe_dump(recipe))
        assert command(folder, 1, "--out", "undisturbed").wait() == 0
        (folder / "count").unlink()
        expected = ledger(folder / "undisturbed")

        rows, done = [], 0
        while len(rows) < options.kills:
            run = command(folder, options.processes, "--checkpoint", "undisturbed/checkpoint.pt", "--out", "killed")
            seconds, victim = chance.uniform(4.0, options.most), VICTIMS[len(rows) % len(VICTIMS)]
            while run.poll() is None and processor_seconds(run.pid) < seconds:
                time.sleep(0.02)
            if not kill(run, victim, options.processes):
                # It ended first: once more from the start.
                done += 1
                _compare(folder, expected)
                subprocess.run(["rm", "-rf", "killed", "count"], cwd=folder, check=True)
                continue
            kept = len(list((folder / "killed" / "parts").glob("*.npz")))
            rows.append([len(rows) + 1, victim, seconds, kept])
        last = command(folder, options.processes, "--checkpoint", "undisturbed/checkpoint.pt", "--out", "killed")
        if last.wait() != 0:
            raise SystemExit("the run that nobody killed did not end well")
        twice, difference = _compare(folder, expected)
    report(
        "kills", "Runs killed", ["kill", "victim", "after processor seconds", "chunks kept"], rows, quick=options.quick
    )
    print(
        f"{done + 1} runs ended; chunks measured twice: {twice}; largest difference from the ledger: {difference:.2g}"
    )
    print(machine())


def _compare(folder: Path, expected: xr.Dataset) -> tuple[int, float]:
    """How many chunks were measured twice, and by how much the finished ledger differs; an error where that is much."""
    times = Counter((folder / "count").read_text().split()) if (folder / "count").exists() else Counter[str]()
    twice = sum(count > 1 for count in times.values())
    found = ledger(folder / "killed")
    pairs = [(expected[name].values.astype(float), found[name].values.astype(float)) for name in expected.data_vars]
    difference = max(float(np.nanmax(np.abs(left - right), initial=0.0)) for left, right in pairs)
    if twice or difference > 1e-5:
        raise SystemExit(f"{twice} chunks were measured twice, and the ledger differs by {difference:.2g}")
    return twice, difference


if __name__ == "__main__":
    main()
