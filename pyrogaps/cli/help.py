"""What `pyrogaps --help` prints: an overview, and sections of at most a screen."""

import dataclasses
import re
from collections.abc import Iterator
from textwrap import wrap
from typing import Any

from pyrogaps.cli.options import RUN_OPTIONS
from pyrogaps.cli.recipe import COMPONENTS, FIELDS, SCALARS, SECTIONS
from pyrogaps.errors import InputError
from pyrogaps.signatures import nearest

WIDTH, INDENT = 118, 36
OVERVIEW = """usage: pyrogaps [eval] [RECIPE] [options]
       pyrogaps compare RUN RUN [...] [options]
       pyrogaps report RUN [options]
       pyrogaps recipes

eval      train a Pyro model and guide, or load their weights, and print a decomposition of their inference gap in
          nats. RECIPE is a shipped recipe (default digits) or a path to one. The word eval may be left out
compare   print the differences of finished runs of the same data, with a verdict
report    write the interactive page of a finished run
recipes   list the shipped recipes
--version print the version

pyrogaps --help SECTION shows one of
  options     of a run: where results go, what is shown
  fields      of a recipe, each of which is an option too
  {sections}
  processes   several processes or machines, and exit codes
  compare, report, recipes

First steps:  pyrogaps                                 a small VAE of digits, in runs/digits/
              pyrogaps digits --seed 1 --out runs/b    the same with another seed
              pyrogaps compare runs/digits runs/b"""
OVERRIDES = """Every field of a recipe is an option. Options override the recipe; later ones override earlier ones:
  --training.num_epochs 3   --training null   --evidence.num_chains=32   --data.init_args.num_test 100
  --guide pyro.infer.autoguide.AutoNormal     --families.flow mymodels.AutoFlow     --families {}
--guide replaces the whole field; --guide.class_path keeps the recipe's init_args."""
PROCESSES = """Several processes, on one or more machines, can share the work:
  torchrun --nproc-per-node 8 -m pyrogaps.eval RECIPE --out a/folder/that/all/see

Exit codes: 0 success, 2 invalid input (explained in one line on stderr), 130 interrupted, 1 a process died."""
COMPARE = """usage: pyrogaps compare RUN RUN [...] [options]

RUN               folder of a finished run, or a ledger file that ledger.save wrote
--reference NAME  the run that the others are compared with; default: the first
--format FORM     text, markdown or latex; default: text
--picture FILE    draw the differences, as PNG, SVG or PDF by the ending of FILE

Runs are named after their folders. They must be of the same datapoints and the same kind of likelihood."""
REPORT = """usage: pyrogaps report RUN [options]

RUN               folder of a finished run, or a ledger file that ledger.save wrote
--out FILE        the page, one HTML file that needs no network; default: RUN's name and .html, here
--title TEXT      its heading

A run writes this page to its own folder too, as gaps.html. There it also shows data that no ledger holds."""
RECIPES = """usage: pyrogaps recipes

Lists the shipped recipes, a line each. pyrogaps NAME runs one; pyrogaps NAME --print_config prints it. A recipe of
your own is a YAML file, which may say "extends: NAME" and only what differs."""

# Their class refers to the text of `pyrogaps.train`, which describes them together.
TRAINING = {
    "num_epochs": "passes over the training data, at most.",
    "batch_size": "datapoints of a minibatch.",
    "learning_rate": "of the optimizer.",
    "schedule": "a factor of the learning rate for each epoch, such as pyrogaps.training.Cosine.",
    "optimizer": "a class of torch.optim.",
    "optimizer_options": "its further arguments.",
    "kl_warmup": "epochs in which the weight of the KL term rises from 0 to 1.",
    "entropy_annealing": "epochs in which the weight of log q in the ELBO rises from 0 to 1.",
    "clip_norm": "the gradient's norm is at most this; null: any.",
    "num_particles": "draws for each step.",
    "patience": "epochs without a better ELBO on the validation data after which training stops; null: none.",
    "freeze_model": "whether the guide alone is trained.",
    "objective": "another bound, such as pyrogaps.IWAE_ELBO; null: the ELBO.",
    "guide_steps": "steps of the guide before each step of the model, at most.",
    "mode": "captured records steps and replays them; eager goes through Pyro each time.",
}


def overview() -> str:
    """The first screen."""
    return OVERVIEW.format(sections="\n  ".join(wrap(", ".join(SECTIONS), WIDTH - 20)))


def section_text(name: str) -> str:
    """One section; raises `InputError` where there is none of that name."""
    texts = {
        "options": f"usage: pyrogaps [RECIPE] [options]\n\n{RUN_OPTIONS}",
        "fields": f"{OVERRIDES}\n\n{_fields()}",
        "processes": PROCESSES,
        "compare": COMPARE,
        "report": REPORT,
        "recipes": RECIPES,
        "eval": f"usage: pyrogaps [RECIPE] [options]\n\n{RUN_OPTIONS}\n\n{OVERRIDES}",
    }
    if name in texts:
        return texts[name]
    if name in SECTIONS:
        lines = [line for field in dataclasses.fields(SECTIONS[name]) for line in _field(name, field)]
        return "\n".join([f"fields of {name}: {FIELDS[name]}", "", *lines])
    near = nearest(name, [*texts, *SECTIONS], "")
    hint = f"Did you mean '{near}'?" if near else f"Sections are {', '.join([*texts, *SECTIONS])}"
    raise InputError(f"--help: there is no section '{name}'. {hint}")


def _field(section: str, field: Any) -> Iterator[str]:
    """An option with its default, and what it means, from the description of its class."""
    text = SECTIONS[section].__doc__ or ""
    # Several fields may share a description; it ends where that of the next one begins.
    found = re.search(rf"^ {{8}}(?:\w+, )*{field.name}(?:, \w+)*: ((?:.+\n)(?: {{12}}.+\n)*)", text, re.MULTILINE)
    meaning = " ".join(found[1].split()) if found else TRAINING.get(field.name, "")
    first = re.split(r"(?<=\.)\s+(?=[A-Z`])", meaning)[0]
    default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
    shown = "null" if default is None else getattr(default, "__name__", str(default))
    shown = "its own settings" if dataclasses.is_dataclass(default) else shown
    lines = wrap(f"{first} [{shown}]", WIDTH - INDENT) or [""]
    head = f"  --{section}.{field.name}"
    yield f"{head:{INDENT - 1}} {lines[0]}"
    yield from (" " * INDENT + line for line in lines[1:])


def _fields() -> str:
    """Fields without a section of their own, a line each."""
    names = [*COMPONENTS, "families", *SCALARS]
    lines = [f"  --{name:<17} {re.sub(r'; null.*', '', FIELDS[name])}" for name in names]
    sections = wrap(f"Sections, with fields of their own: {', '.join(SECTIONS)}", WIDTH)
    return "\n".join([*lines, "", *sections])
