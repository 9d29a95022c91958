"""How the cost of a ledger grows: with datapoints, chains, temperatures, latent dimensions and processes.

VAEs on binary images, one setting varied at a time from the same middle; seconds of `decompose` alone, after a short
one that records what is recorded once. Slopes of CPU seconds (of seconds, for processes) are fitted on log-log, with
their standard errors. Peak memory is that of a process of its own for each setting. Processes are torchrun's, one
thread each.

    python -m benchmarks.scaling                 # about a quarter of an hour
    python -m benchmarks.scaling --quick         # does it run?
"""

import argparse
import json
import os
import subprocess
import sys
import time
from statistics import median
from typing import Any

import numpy as np
import torch

import pyrogaps as pg
from benchmarks.reporting import machine, report
from pyrogaps import memory, processes
from pyrogaps.guides.amortized import AmortizedNormal
from pyrogaps.models.vae import VAE

PIXELS, HIDDEN = 784, (200, 200)
MIDDLE = {"datapoints": 256, "chains": 16, "temperatures": 50, "dimensions": 50}
SWEEPS = {
    "datapoints": (512, 1024, 2048, 4096),
    "chains": (16, 32, 64, 128),
    "temperatures": (50, 100, 200, 400),
    "dimensions": (25, 50, 100, 200),
}
QUICK_SWEEPS = {name: values[:2] for name, values in {**SWEEPS, "datapoints": (64, 128)}.items()}
PROCESSES = (1, 2)


def measured(setting: dict[str, int], *, steps: int) -> dict[str, float]:
    """Seconds of one ledger in this process, by the clock and of its CPUs, and the peak of its memory in MiB."""
    torch.manual_seed(0)
    model = VAE(PIXELS, setting["dimensions"], HIDDEN).requires_grad_(False)
    guide = AmortizedNormal(PIXELS, setting["dimensions"], HIDDEN).requires_grad_(False)
    x = (torch.rand(setting["datapoints"], PIXELS) < 0.2).float()
    options: dict[str, Any] = {"refinement": pg.Refinement(num_steps=steps), "compile": "off", "progress": False}
    evidence = pg.AIS(num_chains=setting["chains"], num_temperatures=setting["temperatures"])
    pg.decompose(model, guide, x[:64], evidence=pg.AIS(num_temperatures=2), **options)
    begin, busy = time.perf_counter(), time.process_time()
    pg.decompose(model, guide, x, evidence=evidence, **options)
    seconds, cpu = time.perf_counter() - begin, time.process_time() - busy
    return {"seconds": seconds, "cpu": cpu, "peak": memory.peak() / (1 << 20)}


def elsewhere(setting: dict[str, int], options: argparse.Namespace, num_processes: int = 1) -> dict[str, float]:
    """`measured` in one or several processes of its own."""
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    by = several if num_processes > 1 else []
    threads = 1 if options.sweep == "processes" else options.threads
    told = subprocess.run(
        [sys.executable, *by, "-m", "benchmarks.scaling", "--one", json.dumps(setting), "--threads", str(threads)]
        + ["--quick"] * options.quick,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    found: dict[str, float] = json.loads(told.stdout.splitlines()[-1])
    return found


def slope(sizes: list[float], seconds: list[float]) -> tuple[float, float]:
    """Of log seconds over log sizes, and its standard error; NaN from two points."""
    x, y = np.log(sizes), np.log(seconds)
    design = np.stack([x - x.mean(), np.ones_like(x)], 1)
    fitted, *_ = np.linalg.lstsq(design, y, rcond=None)
    rest = y - design @ fitted
    error = np.sqrt(rest @ rest / (len(x) - 2) / (design[:, 0] @ design[:, 0])) if len(x) > 2 else np.nan
    return float(fitted[0]), float(error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny run, to see that it works")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", choices=[*SWEEPS, "processes"], help="one sweep alone, with a file of its own")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.sweep = ""
    torch.set_num_threads(options.threads)
    if options.one:
        with processes.joined():
            found = measured(json.loads(options.one), steps=5 if options.quick else 300)
            if processes.rank() == 0:
                print(json.dumps(found))
        return

    sweeps = QUICK_SWEEPS if options.quick else SWEEPS
    rows: list[list[object]] = []
    wanted = {**sweeps, "processes": PROCESSES}
    for options.sweep, values in {n: v for n, v in wanted.items() if options.only in (None, n)}.items():
        for value in values:
            setting, num_processes = {**MIDDLE, "datapoints": 64 if options.quick else MIDDLE["datapoints"]}, 1
            if options.sweep == "processes":
                setting["datapoints"], num_processes = sweeps["datapoints"][-1] // 4, value
            else:
                setting[options.sweep] = value
            runs = [elsewhere(setting, options, num_processes) for _ in range(options.rounds)]
            seconds, cpu, peak = (median(run[name] for run in runs) for name in ("seconds", "cpu", "peak"))
            rows.append([options.sweep, value, seconds, cpu, peak, None, None])
            print(f"{options.sweep} {value}: {seconds:.1f} s, {peak:.0f} MiB", file=sys.stderr, flush=True)
        own = [row for row in rows if row[0] == options.sweep]
        # What other processes take of the machine is in no CPU time; several processes are for the clock.
        cost = 2 if options.sweep == "processes" else 3
        own[-1][5:] = slope([float(str(row[1])) for row in own], [float(str(row[cost])) for row in own])
    columns = ["varied", "value", "seconds", "CPU seconds", "peak MiB", "slope", "s.e."]
    name = f"scaling-{options.only}" if options.only else "scaling"
    report(name, "The cost of a ledger", columns, rows, quick=options.quick)
    print(machine())


if __name__ == "__main__":
    main()
