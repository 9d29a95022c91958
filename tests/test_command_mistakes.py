"""Wrong command lines, recipes, data and files: exit code 2, one line that names the field or file, nothing lost."""

import os
import re
import resource
import shlex
import sys
from pathlib import Path

import pytest
import yaml

from pyrogaps.cli import stages
from pyrogaps.cli.run_folder import RunFolder
from pyrogaps.eval import main
from tests.commands import MODULE, RESULTS, command

FURTHER = """

import numpy as np
import pandas as pd
import pyrogaps as pg

DRAWS = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))

class Parts:
    def __init__(self, **parts):
        vars(self).update(parts)

def no_train(): return Parts(test=DRAWS)
def no_test(): return Parts(train=DRAWS)
def empty(): return Parts(train=DRAWS, test=DRAWS[:0])
def empty_train(): return Parts(train=DRAWS[:0], test=DRAWS)
def scalar(): return Parts(train=DRAWS, test=torch.tensor(3.0))
def text(): return Parts(train=DRAWS, test="abc")
def whole_numbers(): return Parts(train=DRAWS.long(), test=DRAWS.long())
def doubles(): return Parts(train=DRAWS.double(), test=DRAWS.double())
def nan(): return Parts(train=DRAWS, test=DRAWS / 0 * 0)
def nan_train(): return Parts(train=DRAWS / 0 * 0, test=DRAWS)
def nan_validation(): return Parts(train=DRAWS, test=DRAWS, validation=DRAWS / 0 * 0)
def narrow(): return Parts(train=DRAWS[:, :3], test=DRAWS)
def pairs(): return Parts(train=(DRAWS, DRAWS), test=(DRAWS, DRAWS))
def uneven(): return Parts(train=(DRAWS, DRAWS[:3]), test=(DRAWS, DRAWS))
def arrays(): return Parts(train=DRAWS.numpy(), test=DRAWS.numpy())
def needy(a: int): return Parts(train=DRAWS, test=DRAWS)
def ends(): raise SystemExit(3)

class Unreadable:
    test = DRAWS
    @property
    def train(self): raise OSError("disk gone")

value = 3

def discrete(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Poisson(torch.tensor(0.5)))
        pyro.sample("x", dist.Normal(z[..., None].expand(-1, 4), 1.0).to_event(1), obs=x)

def unobserved(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

def of_two(x, y): return Model()(x)
def ending(x): raise SystemExit("bye")
def elsewhere(x):
    with pyro.plate("data", len(x)):
        pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
def failing(x): raise ValueError("out of cheese")
def silent(x): pass
def no_rate(epoch): return "fast"
def failing_rate(epoch): raise OSError("no rates today")

class Shared(Model):
    def forward(self, x):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z) + m, 1.0).to_event(1), obs=x)

class SharedGuide(Guide):
    def __init__(self):
        super().__init__()
        self.m = torch.nn.Parameter(torch.tensor(0.1))
    def forward(self, x):
        pyro.sample("m", dist.Normal(self.m, 0.5))
        super().forward(x)

class Items(torch.utils.data.Dataset):
    def __init__(self, get): self.get = get
    def __len__(self): return 10
    def __getitem__(self, index): return self.get(index)

class Stream(torch.utils.data.IterableDataset):
    def __iter__(self): return iter(DRAWS)

def gone(index): raise OSError("disk gone")
def items(get): return Parts(train=DRAWS, test=Items(get))
def random_items(): return Items(lambda index: DRAWS[index] + torch.randn(4))
def random_test(): return items(lambda index: DRAWS[index] + torch.randn(4))
def coarse_items(): return items(lambda index: DRAWS[index].half())
def items_of_text(): return items(lambda index: "a")
def broken_items(): return items(gone)
def mixed_items(): return items(lambda index: DRAWS[index].double() if index % 2 else DRAWS[index])
def stream(): return Stream()
def loader(): return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(DRAWS, DRAWS))
def by_another_name(): return Parts(train={"y": DRAWS}, test={"y": DRAWS})
def by_two_names(): return Parts(train={"x": DRAWS, "y": DRAWS}, test={"x": DRAWS, "y": DRAWS})
def frame(): return pd.DataFrame(DRAWS.numpy())
def frames(): return Parts(train=frame(), test=frame())
def words(): return Parts(train=frame().assign(name="a"), test=frame().assign(name="a"))
def dates(): return Parts(train=DRAWS, test=pd.Series(pd.to_datetime(["2020-01-01"] * 10)))
def masked(): return Parts(train=DRAWS, test=np.ma.masked_array(DRAWS.numpy(), mask=DRAWS.numpy() > 1))
def ragged(): return Parts(train=DRAWS, test=[[1.0, 2.0], [3.0]])
def one_by_one(): return Parts(train=DRAWS, test=(row for row in DRAWS))
def complexes(): return Parts(train=DRAWS, test=DRAWS + 0j)
def a_class(): return Parts(train=DRAWS, test=torch.utils.data.TensorDataset)

def coins(x):
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Bernoulli(torch.full((20,), 0.5)).to_event(1))
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(k[..., :4] + z[..., :1], 1.0).to_event(1), obs=x)

def masked_by(mask):
    def program(x):
        with pyro.poutine.mask(mask=mask(x)):
            Model()(x)
    return program

short_mask = masked_by(lambda x: torch.ones(3).bool())
float_mask = masked_by(lambda x: (x[:, 0] > 0).float())

def column(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=x[:, :1])

class Unprepared(pg.Evidence):
    def prepare(self, problem, run, refine=None): raise RuntimeError("not today")

class Forgetful(pg.Evidence):
    def prepare(self, problem, run, refine=None): pass
"""
RECIPE = {
    "data": "mine.Data",
    "model": "mine.Model",
    "guide": "mine.Guide",
    "evaluate": {"num_datapoints": 4},
    "training": {"num_epochs": 1},
    "evidence": {"class_path": "pyrogaps.AIS", "init_args": {"num_chains": 2, "num_temperatures": 3}},
    "refinement": {"num_steps": 5},
    "num_particles": 20,
}
TEXT = yaml.safe_dump(RECIPE)
MINE = {"mine.py": MODULE + FURTHER, "linear.yaml": TEXT, "notes.txt": "mine", "runs.txt": "mine"}


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder, the current one."""
    for name, content in MINE.items():
        (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    return tmp_path


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be trained."""
    monkeypatch.setattr(stages, "train", lambda *args, **settings: pytest.fail("it was trained first"))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str, after: str = "") -> str:
    """The line that refuses `arguments`, the last of those said; `after` is what may stand before it."""
    capsys.readouterr()
    assert main([*arguments]) == 2
    captured = capsys.readouterr()
    *before, line = captured.err.splitlines()
    assert captured.out == "" and "\n".join(before) == after
    assert line.startswith("pyrogaps: ") and len(line) < 1000
    return line


def files() -> dict[str, bytes]:
    found = [path for path in Path().rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {str(path): path.read_bytes() for path in found}


# A command line, without the recipe, and what its refusal says. Each begins with the field or option.
FIELDS = [
    ("--seed 1e400", "seed: must be a whole number of 64 bits, got inf"),
    ("--seed 1.5", "seed: must be"),
    ("--seed 999999999999999999999999", "seed: must be"),
    ("--seed true", "seed: must be"),
    ("--seed null", "seed: must be"),
    ("--num_particles 1", "num_particles: must be a whole number of at least 2, got 1"),
    ("--num_particles many", "num_particles: must be"),
    ("--num_particles 1e9", "num_particles: must be"),
    ("--num_particles 10000000000000", "max_memory: .* fewer draws"),
    ("--batch_size 0", "batch_size: must be"),
    ("--batch_size ten", "batch_size: must be"),
    ("--max_memory 0", "max_memory: must be"),
    ("--max_memory 4XB", "max_memory: must be"),
    ("--max_memory 1KiB", "max_memory: .*Allow at least"),
    ("--compile maybe", "compile: must be True or False"),
    ("--plate 3", "plate: must be"),
    ("--plate nosuch", r"plate: the model has no plate named 'nosuch' \(its plates are data\)"),
    ("--device toaster", "device: must be a device such as cpu"),
    ("--device meta", "data: in the part 'train': .*meta device"),
    ("--checkpoint 3", "checkpoint: must be"),
    ("--checkpoint .", "checkpoint: no file .. Name an earlier run's checkpoint.pt"),
    ("--checkpoint gone.pt", "checkpoint: no file gone.pt. Name an earlier run's checkpoint.pt"),
    ("--checkpoint notes.txt", "checkpoint notes.txt: is damaged, or not a checkpoint"),
    ("--model_checkpoint notes.txt", "checkpoint notes.txt: is damaged, or not a checkpoint"),
    ("--model_checkpoint /dev/null", "model_checkpoint: no file"),
    ("--evaluate 3", "evaluate: expected a mapping"),
    ("--evaluate null", "evaluate: expected a mapping"),
    ("--evaluate.part exam", "data: mine.Data has no part 'exam'. Set evaluate.part"),
    ("--evaluate.num_datapoints 0", "evaluate.num_datapoints: must be"),
    ("--evaluate.num_datapoints 99999", "evaluate.num_datapoints: must be from 1 to 70"),
    ("--evaluate.nmu 3", "evaluate: unknown field 'nmu'. Known are part, num_datapoints"),
    ("--training []", "training: expected a mapping"),
    ("--training abc", "training: expected a mapping of its fields, got 'abc'"),
    ("--training.num_epochs null", "training.num_epochs: must be"),
    ("--training.learning_rate 0", "training.learning_rate: must be"),
    ("--training.learning_rate .nan", "training.learning_rate: must be"),
    ("--training.batch_size -1", "training.batch_size: must be"),
    ("--training.schedule 3", "training.schedule: must be callable or None, got 3"),
    ("--training.schedule pyrogaps.training.Cosine", "training.schedule: the following .*required: num_epochs"),
    (
        "--training.schedule '{class_path: pyrogaps.training.Cosine, init_args: {num_epoch: 3}}'",
        "training.schedule: Option 'num_epoch' is not accepted",
    ),
    ("--training.schedule mine.no_rate", r"training.schedule\(0\): must be a number of at least 0, got 'fast'"),
    ("--training.schedule mine.failing_rate", "training.schedule: its first epoch failed: OSError: no rates today"),
    ("--training.optimizer torch.nn.Linear", "training.optimizer: "),
    ("--training.optimizer 3", "training.optimizer: must be a subclass of Optimizer"),
    ("--training.optimizer torch.optim.LBFGS", "training: optimizer LBFGS .* Use Adam"),
    ("--training.optimizer torch.optim.SparseAdam", "training: optimizer SparseAdam .* Use Adam"),
    ("--training.optimizer_options 3", "training.optimizer_options: must be a mapping"),
    ("--training.optimizer_options '{betaz: 3}'", "training: .*optimizer_options .*'betaz'.* Change them"),
    ("--training.optimizer_options '{betas: 3}'", "training: .*optimizer_options"),
    ("--training.optimizer_options.betas '[2, 3]'", "training: .*optimizer_options .*Invalid beta"),
    ("--training.patience 3", "training.patience: mine.Data has no part 'validation'. Set training.patience to null"),
    ("--training.objective pyro.infer.TraceEnum_ELBO", "training: objective TraceEnum_ELBO is for discrete latents"),
    ("--training.objective pyro.infer.RenyiELBO", "training: objective RenyiELBO .* Use one that has"),
    ("--training.mode fast", "training.mode: must be one of eager, captured"),
    ("--training.guide_steps 3 --training.freeze_model true", "training: guide_steps has no effect .* Set guide_steps"),
    ("--evidence 3", "evidence: expected a mapping"),
    ("--evidence abc", "evidence: 'abc' is not a dotted path"),
    ("--evidence pyrogaps.Refinement", "evidence: pyrogaps.Refinement is not a subclass of pyrogaps.Evidence. Name"),
    ("--evidence pyrogaps.Evidence", "evidence: pyrogaps.Evidence failed: .* abstract .*prepare"),
    ("--evidence mine.Unprepared", "Unprepared.prepare failed: RuntimeError: not today"),
    ("--evidence mine.Forgetful", "evidence: Forgetful.prepare returns a NoneType. Return"),
    ("--evidence '{class_path: pyrogaps.Ladder, init_args: {tolernce: 1}}'", "evidence.*Did you mean 'tolerance'"),
    ("--evidence '{class_path: pyrogaps.Ladder, init_args: 3}'", "evidence.init_args: must be a mapping"),
    ("--evidence '{init_args: {tolerance: 1}}'", "evidence: unknown field 'init_args'"),
    ("--evidence.widen 0.5", "evidence.init_args.widen: must be"),
    ("--evidence.num_chain 3", "evidence.init_args: unknown field 'num_chain'. Did you mean 'num_chains'?"),
    ("--evidence.num_chains 100000000000", "max_memory: .*fewer chains"),
    ("--refinement abc", "refinement: expected a mapping"),
    ("--refinement.num_particles 1000000000000", "max_memory: .*fewer draws"),
    ("--refinement.tolerance -1", "refinement.tolerance: must be"),
    ("--conditioning.num_completions 5", "conditioning.num_completions: must be even, got 5"),
    ("--conditioning.max_completions 2", "conditioning.max_completions: must be at least num_completions"),
    ("--reference true", "reference: expected a mapping"),
    ("--retraining.training.patience 3", "retraining.training: leave patience out"),
    ("--retraining.num_datapoints 1", "retraining.num_datapoints: must be"),
    ("--retraining.training.optimizer_options '{betaz: 3}'", "training: .*optimizer_options"),
    ("--certificate.longer 1", "certificate.longer: must be"),
    ("--shared 3", "shared: expected a mapping of its fields, got 3"),
    ("--shared null", "shared: expected a mapping"),
    ("--shared []", "shared: expected a mapping"),
    ("--shared.num_draws 1", "shared.num_draws: must be a whole number of at least 2 and at most 10000, got 1"),
    ("--shared.num_draws 2.5", "shared.num_draws: must be"),
    ("--shared.num_draws many", "shared.num_draws: must be"),
    ("--shared.num_draws null", "shared.num_draws: must be"),
    ("--shared.num_draws 1000000000", "shared.num_draws: must be .* at most 10000"),
    ("--shared.max_draws 1", "shared.max_draws: must be"),
    ("--shared.max_draws 1000000000", "shared.max_draws: must be .* at most 1000000"),
    ("--shared.tolerance 0", "shared.tolerance: must be a number above 0"),
    ("--shared.tolerance .nan", "shared.tolerance: must be"),
    ("--shared.max_evaluations 0", "shared.max_evaluations: must be"),
    ("--shared.draws 3", "shared: unknown field 'draws'. Did you mean 'num_draws'?"),
    ("--mapa '{}'", "mapa.bandwidth: a gaussian likelihood needs one"),
    ("--mapa '{likelihood: bernoulli, bandwidth: 0.1}'", "mapa.bandwidth: BernoulliKernel.alpha: must be"),
    ("--mapa '{num_top: 0, num_samples: 0, bandwidth: 1}'", "mapa: num_top and num_samples are both 0. Raise"),
    ("--mapa.training.patience 3", "mapa.training: patience needs .* Leave patience out"),
    ("--encoder mine.Guide", "recipe: only mapa uses an encoder. Set mapa"),
    ("--families 3", "families: must be a mapping"),
    ("--families '{1: mine.autonormal}'", "families: a key: must be a string, got 1"),
    ("--families.x 3", "families.x: expected a dotted path"),
    ("--families.x.y 3", "families.x: class_path is missing. Set it"),
    ("--families. mine.autonormal", "unknown option --families.. Did you mean --families?"),
    ("--families.x mine.Guide", "family Guide failed"),
    ("--families.x torch.pi", "families.x: torch.pi cannot be called. A family is"),
    ("--families.x torch.nn.Linear", "families.x.init_args: out_features missing. Set families.x.init_args.out_feat"),
    ("--families.own mine.autonormal", "families: 'own' is the name of the guide's own family. Choose another"),
    ("--families.x pyro.infer.autoguide.AutoDelta", "site 'z': a Delta in the guide .* Use a guide with a density"),
    ("--pair mine.Pair", "recipe: pair replaces model and guide. Set these to null"),
    ("--pair mine.Silent --model null --guide null", "pair: mine.Silent has no method 'model'. Name"),
]
PROGRAMS = [
    ("--model null", "recipe: a model and a guide are missing. Set both"),
    ("--model mine", "model: 'mine' is not a dotted path"),
    ("--model mine.", "model: 'mine.' is not a dotted path"),
    ("--model mine..Model", "model: 'mine..Model' is not a dotted path"),
    ("--model mine.Mödel", "model: 'mine' has no 'Mödel'. Did you mean 'Model'?"),
    ("--model nowhere.Model", "model: cannot import 'nowhere.Model'"),
    ("--model subprocess.run", "model: 'subprocess.run' is part of Python itself.* Name one"),
    ("--model 3", "model: expected a dotted path"),
    ("--model '{}'", "model: class_path is missing. Set it"),
    ("--model '{class_path: mine.Model, init_args: [1]}'", "model.init_args: must be a mapping"),
    ("--model '{class_path: mine.Model, latent_dim: 1.5}'", "model.init_args.latent_dim: must be a whole number"),
    ("--model '{class_path: mine.Model, latent_dim: 3}'", "site 'z': the guide's value has shape"),
    ("--model mine.value", "model: mine.value: an object of int cannot be called"),
    ("--model mine.discrete", "site 'z': a Poisson has infinitely many values.* Truncate it"),
    ("--model mine.unobserved", "model: there is no observed sample site. Pass"),
    ("--model mine.of_two", "model failed: TypeError: of_two.. missing"),
    ("--model mine.ending", "code that the recipe names ended the program: SystemExit: bye .mine.py, line"),
    (
        "--guide mine.elsewhere",
        "site 'w': in the guide but not in the model, whose latents are z. Remove it or rename it",
    ),
    ("--guide mine.failing", "guide failed: ValueError: out of cheese .mine.py, line"),
    ("--guide mine.silent", "site 'z': latent in the model but missing from the guide. Add"),
    ("--guide mine.Model", "site 'x': observed in the guide. Remove obs="),
    ("--guide pyro.infer.autoguide.AutoDelta --evaluate '{part: train}'", "site 'z': a Delta in the guide"),
    ("--guide pyro.infer.autoguide.AutoDiagonalNormal --evaluate '{part: train}'", "site 'z': AutoDiagonalNormal"),
    ("--guide pyro.infer.autoguide.AutoNormal", "guide: the plate 'data' of this AutoNormal has size 100, .* 4 datap"),
    ("--data null", "recipe: data is missing. Name a data set"),
    ("--data mine.value", "data: mine.value is not a class or function"),
    ("--data mine.needy", "data.init_args: a missing. Set data.init_args.a"),
    ("--data mine.Broken", "data: mine.Broken failed: RuntimeError: out of cheese"),
    ("--data mine.ends", "code that the recipe names ended the program: SystemExit: 3"),
    ("--data mine.Unreadable", "data: reading 'train' of mine.Unreadable failed: OSError: disk gone"),
    ("--data mine.no_train", "data: mine.no_train has no part 'train'. Use"),
    ("--data mine.no_test", "data: mine.no_test has no part 'test'. Set evaluate.part"),
    ("--data mine.empty", "data: the part 'test' has no datapoints. Set evaluate.part"),
    ("--data mine.empty_train", "data: in the part 'train': there are no datapoints"),
    ("--data mine.scalar", "data: in the part 'test': a tensor without dimensions has no axis of datapoints. Pass"),
    ("--data mine.scalar --plate false", "evaluate.num_datapoints: works only for .* Set it to null"),
    ("--data mine.text", "data: in the part 'test': expected a tensor .* got str. Pass"),
    ("--data mine.whole_numbers", "guide failed: .* Convert the data and the parameters to one dtype"),
    ("--data mine.doubles", "guide failed: .* Convert the data and the parameters to one dtype"),
    ("--data mine.nan", "data: in the part 'test': .*NaN.* Remove"),
    ("--data mine.nan_train", "data: in the part 'train': .*NaN.* Remove"),
    ("--data mine.nan_validation", "data: in the part 'validation': .*NaN.* Remove"),
    ("--data mine.narrow", "site 'x': its log_prob failed"),
    ("--data mine.pairs", "model failed: .* a tuple or an item .x, y. two"),
    ("--data mine.uneven", "data: in the part 'train': the tensors have different lengths"),
]
SHARING = "--model mine.Shared --guide mine.SharedGuide"
MAPA = "--mapa '{likelihood: gaussian, bandwidth: 1.0}'"
FORMS = [
    (
        "--data mine.random_items",
        "data: in the part 'train': the same datapoints changed between two calls.* Draw them",
    ),
    ("--data mine.random_test", "data: in the part 'test': the same datapoints changed between two calls.* Draw them"),
    ("--data mine.coarse_items", "data: in the part 'test': element 0 of its items has dtype torch.float16"),
    ("--data mine.items_of_text", "data: in the part 'test': its items hold a str"),
    ("--data mine.broken_items", "data: in the part 'test': reading the items of Items failed: OSError: disk gone"),
    ("--data mine.mixed_items", "data: in the part 'test': the items differ in dtype"),
    ("--data mine.stream", "data: in the part 'test': a Stream has no items to select by index. Collect"),
    ("--data mine.stream --evaluate.num_datapoints null", "data: in the part 'train': a Stream has no items"),
    ("--data mine.loader", "model failed: TypeError: .* Pass only what the programs take"),
    ("--data mine.by_another_name", r"data: in the part 'train': no key of the dictionary \('y'\) .* x\['y'\]"),
    ("--data mine.by_two_names", "data: in the part 'train': the model has no parameter 'y'"),
    ("--data mine.words", "data: in the part 'test': column 'name' cannot become numbers"),
    ("--data mine.words --evaluate.num_datapoints null", "data: in the part 'train': column 'name' cannot become"),
    ("--data mine.frames --evaluate.num_datapoints 11", "evaluate.num_datapoints: must be from 1 to 10"),
    ("--data mine.dates", "data: in the part 'test': its values cannot become numbers .dtype datetime64"),
    ("--data mine.masked", "data: in the part 'test': an array has masked elements"),
    ("--data mine.ragged", "data: in the part 'test': the lists differ in length"),
    ("--data mine.one_by_one", "data: in the part 'test': a generator has no items"),
    ("--data mine.complexes", "data: in the part 'test': the tensor is complex"),
    ("--data mine.a_class", "data: in the part 'test': TensorDataset is a class. Pass an object"),
    ("--model mine.coins", "site 'k': an event of 20 discrete elements has 2.20 values"),
    ("--model mine.short_mask", r"site 'z': its mask has shape \(3,\)"),
    ("--model mine.float_mask", "model failed: ValueError: Expected mask to be a BoolTensor"),
    ("--model mine.column", "site 'x': its observed value has shape"),
    ("--model mine.Shared", "site 'm': latent in the model but missing from the guide"),
    (f"{SHARING} --plate rows", "plate: the model has no plate named 'rows' .its plates are data"),
    (f"{SHARING} --plate m", "plate: the model has no plate named 'm'"),
    (f"{SHARING} --retraining {{}}", "split: not available where datapoints share latents .'m'.. Leave it out"),
    (f"{SHARING} --certificate {{}}", "certificate: not available where datapoints share latents"),
    (f"{SHARING} {MAPA}", "site 'm': .* MAPA explains datapoints by others. Make these latents parameters"),
    (f"{SHARING} --data mine.nan", "data: in the part 'test': .*NaN"),
    (
        f"{SHARING} --families.x pyro.infer.autoguide.AutoMultivariateNormal",
        "family AutoMultivariateNormal: .*not local",
    ),
    (f"{SHARING} --families.x pyro.infer.autoguide.AutoDelta", "site 'z': a Delta in the guide"),
]
LINES = [
    ("--", "unexpected argument '--'. The recipe comes first"),
    ("-x", "unexpected argument '-x'"),
    ("another.yaml", "unexpected argument 'another.yaml'. The recipe comes first"),
    ("--=3", "unexpected argument '--=3'"),
    ("--seed", "--seed needs a value"),
    ("--seed ''", "--seed needs a value, got an empty one. Fill it in, or leave"),
    ("--out ''", "--out needs a value, got an empty one. Fill it in, or leave"),
    ("--checkpoint=", "--checkpoint needs a value, got an empty one"),
    ("--seed -h", "seed: must be .*'-h'"),
    ("--help=3", "--help takes no value"),
    ("--quiet=yes", "--quiet takes no value"),
    ("--quiet yes", "unexpected argument 'yes'"),
    ("--Seed 3", "unknown option --Seed. Did you mean --seed?"),
    ("--num-particles 3", "unknown option --num-particles. Did you mean --num_particles?"),
    ("--epochs 3", "unknown option --epochs. Use --help"),
    ("--seed.x 3", "unknown option --seed.x. Did you mean --seed?"),
    ("--training..num_epochs 3", "unknown option --training..num_epochs. Did you mean --training.num_epochs?"),
    ("--seed '[1'", "--seed, line 1: not valid YAML"),
    ("--families '{a: b: c}'", "--families, line 1: not valid YAML"),
    ("--families '{a: b.c, a: b.d}'", "--families, line 1: 'a' stands there twice. Remove one"),
    ("--seed '*a'", "--seed, line 1: not valid YAML: found undefined alias"),
    ("--print_config --seed x", "seed: must be"),
    ("--out linear.yaml", "cannot write to linear.yaml: File exists. Choose another --out"),
    ("--out notes.txt/run", "cannot write to notes.txt/run: Not a directory. Choose another --out"),
    ("--out /proc/run", "cannot write to /proc/run: .* Choose another --out"),
    ("--out /dev/null", "cannot write to /dev/null: .* Choose another --out"),
]
# The content of a recipe file, and what its refusal says.
RECIPES = [
    ("", "bad.yaml: is no mapping. A recipe is"),
    ("# nothing\n", "bad.yaml: is no mapping"),
    ("- a\n", "bad.yaml: is no mapping"),
    ("abc", "bad.yaml: is no mapping"),
    ("null", "bad.yaml: is no mapping"),
    ("data:\n\tx: 1\n", "bad.yaml, line 2: not valid YAML: .* Indent by spaces, not by tabs"),
    ("data: {class_path: x\n", "bad.yaml, line 2: not valid YAML"),
    ("seed: 1\0\n", "bad.yaml: not valid YAML"),
    ("seed: *nope\n" + TEXT, "bad.yaml, line 1: not valid YAML: found undefined alias"),
    ("data: &a\n  class_path: mine.Data\n  init_args: *a\n", "bad.yaml, line 1: an anchor contains itself. Write"),
    (TEXT + "---\n" + TEXT, "bad.yaml, line .*: not valid YAML"),
    ("data: !!python/object/apply:os.system ['touch ran']\n", "bad.yaml, line 1: not valid YAML"),
    ("[1, 2]: 3\n" + TEXT, "bad.yaml, line 1: not valid YAML"),
    ("[" * 5000, "bad.yaml.*not valid YAML"),
    ("seed: 1\nseed: 2\n" + TEXT, "bad.yaml, line 2: 'seed' stands there twice. Remove one"),
    (TEXT + "families:\n  a: x.y\n  a: x.z\n", "bad.yaml, line .*: 'a' stands there twice"),
    ("seed: " + "9" * 5000 + "\n" + TEXT, "bad.yaml: a number has too many digits. Shorten it"),
    ("sed: 3\n" + TEXT, "recipe: unknown field 'sed'. Did you mean 'seed'?"),
    ("3: 4\n" + TEXT, "recipe: unknown field '3'. Known are"),
    ("".join(f"{name}: null\n" for name in RECIPE), "recipe: data is missing. Name a data set"),
    ("extends: [digits]\n", "bad.yaml: extends: expected the name or path of one recipe"),
    ("extends: nosuch\n", "bad.yaml: extends: no recipe 'nosuch'"),
    ("extends: digitz\n", "bad.yaml: extends: no recipe 'digitz': .* Did you mean 'digits'?"),
    ("extends: .\n", "bad.yaml: extends: no recipe '.': it is a folder. Name a recipe file in it"),
    ("extends: bad.yaml\n", "bad.yaml: extends itself"),
    (bytes(range(256)), "bad.yaml: is not text in UTF-8. Save it as UTF-8"),
    (TEXT.encode("utf-16"), "bad.yaml: is not text in UTF-8"),
]
NAMES = [
    (".", "no recipe '.': it is a folder. Name a recipe file in it"),
    ("linear", "no recipe 'linear': .* Did you mean 'linear.yaml'?"),
    ("linear.yml", "no recipe 'linear.yml': .* Did you mean 'linear.yaml'?"),
    ("digit", "no recipe 'digit': .* Did you mean 'digits'?"),
    ("", "no recipe '': .* Shipped are chorales"),
    ("x" * 300, "no recipe 'x"),
    ("nosuch --print_config", "no recipe 'nosuch'"),
    ("mnist-ffg --data_root nowhere", "MNIST: there is no file nowhere/MNIST/.* Set --data_root"),
    ("chorales --data_root nowhere", "Chorales: there is no file .*nowhere/jsb"),
    ("cifar-ffg --data_root linear.yaml", "CIFAR10: there is no file .* Set --data_root"),
]


def check(capsys: pytest.CaptureFixture[str], match: str, *arguments: str) -> None:
    before = files()
    assert re.search(f"^pyrogaps: {match}", line := refused(capsys, *arguments)), line
    assert files() == before
    assert not Path("runs").exists()


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize(("line", "match"), [*FIELDS, *PROGRAMS, *FORMS, *LINES])
def test_command_lines(line: str, match: str, capsys: pytest.CaptureFixture[str]) -> None:
    check(capsys, match, "linear.yaml", *shlex.split(line))


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize(("content", "match"), RECIPES, ids=[match for _, match in RECIPES])
def test_recipe_files(content: str | bytes, match: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    check(capsys, match, "bad.yaml")


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize(("line", "match"), NAMES)
def test_names_of_recipes(line: str, match: str, capsys: pytest.CaptureFixture[str]) -> None:
    check(capsys, match, *(shlex.split(line) or [""]))


# Folders and files of earlier runs


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The checkpoint of a run that was interrupted when it was about to measure."""
    with monkeypatch.context() as patch:
        patch.setattr(stages, "decompose", interrupt)
        assert main(["linear.yaml", "--quiet", "--out", "first"]) == 130
    return Path("first/checkpoint.pt")


def interrupt(*arguments: object, **settings: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
@pytest.mark.parametrize("option", ["--checkpoint", "--model_checkpoint"])
def test_damaged_checkpoints(damage: str, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "train", lambda *args, **settings: None)
        patch.setattr(stages, "decompose", interrupt)
        assert main(["linear.yaml", "--quiet", "--out", "first"]) == 130
    content = Path("first/checkpoint.pt").read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    Path("mine.pt").write_bytes({"truncated": content[:middle], "flipped": flipped, "empty": b""}[damage])
    check(capsys, "checkpoint mine.pt: is damaged", "linear.yaml", option, "mine.pt")


@pytest.mark.parametrize("option", ["--checkpoint", "--model_checkpoint"])
def test_a_checkpoint_of_another_model(option: str, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    larger = [f"--{name}.init_args.latent_dim=3" for name in ("model", "guide")]
    check(
        capsys, "(checkpoint|model weights) .*'decoder.weight' has shape", "linear.yaml", *larger, option, str(trained)
    )


def test_files_of_the_users_own_in_the_way(capsys: pytest.CaptureFixture[str]) -> None:
    Path("folder").mkdir()
    for name, overwrite in (("recipe.yaml", []), ("ledger.nc", ["--overwrite"]), ("run.json", ["--overwrite"])):
        Path("folder", name).write_text("mine")
        check(capsys, f"folder/{name}.* Choose another --out", "linear.yaml", "--out", "folder", *overwrite)
        Path("folder", name).unlink()


@pytest.mark.usefixtures("brief_check")
def test_an_earlier_recipe_with_changed_fields(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "train", lambda *args, **settings: pytest.fail("it was trained again"))
    before = files()
    line = refused(capsys, "linear.yaml", "--out", "first", "--training.num_epochs", "2")
    assert "different recipe (training.num_epochs). Choose another folder with --out, or replace" in line
    # The run's own recipe, edited, is not taken for what the run wrote.
    recipe = Path("first/recipe.yaml")
    recipe.write_text(recipe.read_text().replace("num_epochs: 1", "num_epochs: 2"))
    assert "first/recipe.yaml is damaged, or was changed" in refused(capsys, str(recipe), "--out", "first")
    recipe.write_bytes(before[str(recipe)])
    assert files() == before
    # The remedies: another folder, and the same recipe, which goes on from the weights.
    assert main(["linear.yaml", "--quiet", "--out", "first"]) == 0
    assert {name: files()[name] for name in ("first/checkpoint.pt", *MINE)} == {
        name: before[name] for name in ("first/checkpoint.pt", *MINE)
    }


def test_two_commands_in_one_folder(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files()
    folder = RunFolder(Path("first"))
    folder.claim(Path("first/recipe.yaml").read_text(), overwrite=False)
    for overwrite in ([], ["--overwrite"]):
        line = refused(capsys, "linear.yaml", "--out", "first", "--quiet", *overwrite)
        assert "first: another run is writing there. Wait for it, or choose another --out" in line
    assert files() == before
    folder.release()


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("you tried to allocate 80 bytes: can't allocate memory")]
)
def test_too_little_memory(
    error: Exception, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhaust(*arguments: object, **settings: object) -> None:
        raise error

    monkeypatch.setattr(stages, "decompose", exhaust)
    line = refused(capsys, "linear.yaml", "--training", "null", after="decomposing the inference gap")
    assert "memory: there is too little" in line and "Lower batch_size" in line


@pytest.mark.usefixtures("brief_check")
def test_unusual_seeds_and_names(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What may look like a mistake and is none."""
    monkeypatch.setattr(stages, "decompose", interrupt)
    Path("mon modèle.yaml").write_text(TEXT)
    for arguments in (["--seed", "-1"], ["--seed", str(2**40)], ["--batch_size", "1000000000"], ["--plate", "None"]):
        assert main(["mon modèle.yaml", "--quiet", "--overwrite", *arguments]) == 130
        assert "again to continue from runs/mon modèle" in capsys.readouterr().err
    assert main(["linear.yaml", "--quiet", "--data", "mine.arrays"]) == 130


@pytest.mark.usefixtures("brief_check")
def test_a_full_disk(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The result that does not fit is named, and the same command goes on from there."""
    assert main(["linear.yaml", "--quiet", "--training", "null", "--out", "whole"]) == 0
    ledger = Path("whole/ledger.nc").stat().st_size
    before = {name: files()[name] for name in MINE}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ledger // 2, limits[1]))
    try:
        line = main(["linear.yaml", "--quiet", "--training", "null"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    captured = capsys.readouterr().err.splitlines()
    assert line == 2 and re.search(r"^pyrogaps: .* cannot be written: File too large. Fix this", captured[-1])
    assert main(["linear.yaml", "--quiet", "--training", "null"]) == 0
    assert sorted(os.listdir("runs/linear")) == RESULTS
    assert {name: files()[name] for name in MINE} == before


@pytest.mark.slow
def test_interrupted_in_measuring() -> None:
    run = command("linear.yaml", "--quiet", "--evaluate.num_datapoints=70", INTERRUPT="SIGINT runs/linear/parts/*.npz")
    assert run.returncode == 130 and "Traceback" not in run.stderr
    assert run.stderr.strip().endswith("run the same command again to continue from runs/linear")
    assert main(["linear.yaml", "--quiet", "--evaluate.num_datapoints=70"]) == 0
    assert sorted(os.listdir("runs/linear")) == RESULTS
