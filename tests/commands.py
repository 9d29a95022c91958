"""The command as a process of its own, on a user's recipe beside the module it names."""

import os
import subprocess
import sys
from pathlib import Path

import xarray as xr

import pyrogaps
from pyrogaps.cli.options import parse
from pyrogaps.cli.recipe import resolve

RESULTS = ["checkpoint.pt", "gaps.html", "gaps.png", "ledger.nc", "recipe.yaml", "run.json", "summary.csv"]

# A user's module. INTERRUPT="SIGKILL training.pt" sends the process that signal as soon as that file exists; of several
# processes it is that of rank VICTIM. COUNT names a file that has a line for every chunk that was measured and kept.
MODULE = '''
import glob, os, signal, threading, time
import pyro, pyro.distributions as dist, torch
from pyro.infer.autoguide import AutoNormal

def watch(name, pattern):
    while not glob.glob(pattern):
        time.sleep(0.0005)
    os.kill(os.getpid(), getattr(signal, name))

if "INTERRUPT" in os.environ and os.environ.get("RANK", "0") == os.environ.get("VICTIM", "0"):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background processes ignore it
    threading.Thread(target=watch, args=os.environ["INTERRUPT"].split(), daemon=True).start()

if "COUNT" in os.environ:
    from pyrogaps.chunk_cache import ChunkCache
    get = ChunkCache.get

    def counted(self, chunk, probe, compute):
        measured = []
        result = get(self, chunk, probe, lambda: measured.append(chunk) or compute())
        if measured:
            with open(os.environ["COUNT"], "a") as file:
                file.write(f"{chunk.start}\\n")
        return result

    ChunkCache.get = counted

class Data:
    def __init__(self, num_test: int = 70, scale: float = 1.0):
        draws = torch.randn(600, 4, generator=torch.Generator().manual_seed(0)) * scale
        self.train, self.test = draws[:100], draws[100:100 + num_test]

class Model(torch.nn.Module):
    def __init__(self, latent_dim: int = 2):
        super().__init__()
        self.decoder = torch.nn.Linear(latent_dim, 4)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(self.decoder.in_features), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

class Guide(torch.nn.Module):
    def __init__(self, latent_dim: int = 2):
        super().__init__()
        self.encoder = torch.nn.Linear(4, 2 * latent_dim)

    def forward(self, x):
        loc, scale = self.encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))

class Pair(torch.nn.Module):
    """As in Pyro's VAE example."""
    def __init__(self):
        super().__init__()
        self.decoder, self.encoder = Model(), Guide()

    def model(self, x):
        pyro.module("decoder", self.decoder)
        self.decoder(x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        self.encoder(x)

class Broken:
    def __init__(self):
        raise RuntimeError("out of\\ncheese")

class Silent:
    pass

def model(x):
    return Model()(x)

def make_pair():
    return Pair()

def autonormal(model, init_scale: float = 0.1):
    return AutoNormal(model, init_scale=init_scale)

class autoguide:
    def __new__(cls, model, init_scale: float = 0.1):
        return autonormal(model, init_scale)
'''

RECIPE = {
    "data": {"class_path": "mine.Data"},
    "model": {"class_path": "mine.Model"},
    "guide": "mine.Guide",
    "training": {"num_epochs": 4, "batch_size": 25, "learning_rate": "1e-2"},
    "families": {"mean-field": "pyro.infer.autoguide.AutoNormal"},
    "evidence": {
        "class_path": "pyrogaps.AIS",
        "init_args": {"num_chains": 2, "num_temperatures": 4, "num_leapfrog": 2},
    },
    "refinement": {"num_steps": 20},
    "num_particles": 50,
    "batch_size": 32,
}


def command(*arguments, ranks=1, restarts=0, **environment):
    """Run the command as a process of its own, or as several by torchrun, in the current folder."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    by = [] if ranks == 1 else [*torchrun, f"--max-restarts={restarts}"]
    root = str(Path(pyrogaps.__file__).parents[1])
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), root]))
    return subprocess.run(
        [sys.executable, *by, "-m", "pyrogaps.eval", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def ledger(folder):
    return xr.load_dataset(Path(folder) / "ledger.nc", group="per_datapoint", engine="h5netcdf")


def parsed(arguments):
    """The recipe and the options of a command line."""
    document, options = parse(arguments)
    return resolve(document), options
