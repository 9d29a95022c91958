"""The command line of `pyrogaps.eval`: run options, and overrides of any field of a recipe."""

import dataclasses
import re
import shlex
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from pyrogaps.cli.documents import Document, load_yaml, override, read_document, shipped
from pyrogaps.cli.pictures import check_picture
from pyrogaps.cli.recipe import COMPONENTS, FIELDS, KINDS, SCALARS, SECTIONS, Recipe
from pyrogaps.errors import InputError

COMMAND = ("python", "-m", "pyrogaps.eval")
USAGE = f"usage: {' '.join(COMMAND)} [RECIPE] [options]"

RUN_OPTIONS = """run options:
  --out DIR         folder of the results (default runs/<recipe>/); an interrupted run continues from it
  --overwrite       replace the run in DIR
  --picture FILE    write the picture there too, as PNG, SVG or PDF by the ending of FILE
  --checkpoint FILE load weights from an earlier run's checkpoint.pt and train nothing
  --data_root DIR   folder of the data, for data sets with this option
  --download        download missing data, for data sets with this option
  --quiet           show no progress bars; they are left out too where output is no terminal
  --print_config    print the resolved recipe and exit
  --help            print this text and exit"""
HELP = """
Train a Pyro model and guide (or load their weights) and print a decomposition of their inference gap, in nats.

RECIPE            a shipped recipe ({shipped}; default digits) or a path to a recipe file

{options}

Every field of the recipe is an option too. Options override the recipe; later ones override earlier ones:
  --training.num_epochs 3   --training null   --evidence.num_chains=32   --data.init_args.num_test 100
  --guide pyro.infer.autoguide.AutoNormal     --families.flow mymodels.AutoFlow     --families {{}}
--guide replaces the whole field; --guide.class_path keeps the recipe's init_args.

{fields}
Several processes, on one or more machines, can share the work:
  torchrun --nproc-per-node 8 -m pyrogaps.eval RECIPE --out a/folder/that/all/see

Exit codes: 0 success, 2 invalid input (explained in one line on stderr), 130 interrupted, 1 a process died."""

FLAGS = ("overwrite", "download", "quiet", "print_config", "help")
VALUES = ("out", "data_root", "picture")


@dataclass(frozen=True)
class Options:
    """Run options of the command."""

    out: Path = Path("runs")
    data_root: str | None = None
    picture: Path | None = None
    overwrite: bool = False
    download: bool = False
    quiet: bool = False
    print_config: bool = False
    command: str = ""  # the line that the user wrote


def parse(arguments: list[str]) -> tuple[Document, Options] | None:
    """The recipe, as a document, and the options on a command line; None where it asks for help.

    Raises `InputError` for invalid options.
    """
    has_recipe = bool(arguments) and not arguments[0].startswith("-")
    name = arguments[0] if has_recipe else "digits"
    given, overrides = _split(arguments[has_recipe:])
    if given.pop("help", False):
        return None
    given["picture"] = check_picture(given.get("picture"))
    document = read_document(name)
    for key, text in _class_first(overrides):
        override(document, key, load_yaml(text, f"--{key}"))
    out = Path(given.pop("out", Path("runs") / _run_name(name)))
    return document, Options(out=out, command=shlex.join([*COMMAND, *arguments]), **given)


def _class_first(overrides: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Overrides with the class of the evidence before its fields, because a class clears those of another."""
    whole = [place for place, (key, _) in enumerate(overrides) if key == "evidence"]
    start = whole[-1] + 1 if whole else 0
    return overrides[:start] + sorted(overrides[start:], key=lambda pair: pair[0] != "evidence.class_path")


def help_text() -> str:
    """The text that `--help` prints."""
    built = "".join(f"  --{name:<15} {FIELDS[name]}\n" for name in (*COMPONENTS, "families"))
    listed = _parser().format_help().partition("options:\n")[2]
    # Sections are options by field or as YAML, not the configuration files that jsonargparse would read.
    fields = re.sub(r"  --[\w.]+ CONFIG\s+Path to a configuration file.\n", "", listed)
    fields = re.sub(r"Annotated\[([^,\]]+),(\s+)([^\]]+)\]", r"\1\2(\3)", fields)
    fields = re.sub(r"Optional\[([^\[\]]*)\]", r"\1 | null", fields)
    return (
        USAGE
        + "\n"
        + HELP.format(shipped=", ".join(shipped()), options=RUN_OPTIONS, fields=f"fields:\n{built}{fields}")
    )


def _parser() -> ArgumentParser:
    """A parser of the recipe's sections and scalars, which is there for its help."""
    parser = ArgumentParser(exit_on_error=False, add_help=False)
    for name, section in SECTIONS.items():
        parser.add_class_arguments(section, name)
    for name in SCALARS:
        parser.add_argument(f"--{name}", type=KINDS[name], default=getattr(Recipe, name), help=FIELDS[name])
    return parser


def _split(tokens: list[str]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Run options by name, and overrides of the recipe in the order given."""
    given: dict[str, Any] = {}
    overrides: list[tuple[str, str]] = []
    rest = iter(tokens)
    for token in rest:
        token = "--help" if token == "-h" else token
        key, equals, text = token.removeprefix("--").partition("=")
        if not token.startswith("--") or not key:
            raise InputError(f"unexpected argument '{token}'. The recipe comes first ({USAGE})")
        _check_option(key)
        if key in FLAGS:
            if equals:
                raise InputError(f"--{key} takes no value")
            given[key] = True
            continue
        value = text if equals else next(rest, None)
        if value is None:
            raise InputError(f"--{key} needs a value")
        if not value.strip():  # such as that of a shell's variable that is not set
            raise InputError(f"--{key} needs a value, got an empty one. Fill it in, or leave the option out")
        if key in VALUES:
            given[key] = value
        else:
            overrides.append((key, value))
    return given, overrides


def _check_option(key: str) -> None:
    """Refuse an option that is neither a run option nor a field of the recipe."""
    first, *inner = key.split(".")
    known = [*FLAGS, *VALUES, *KINDS]
    if first in known and all(inner) and not (inner and first in (*FLAGS, *VALUES, *SCALARS)):
        return
    sections = [f"{name}.{f.name}" for name, section in SECTIONS.items() for f in dataclasses.fields(section)]
    components = [f"{name}.{part}" for name in COMPONENTS for part in ("class_path", "init_args")]
    near = get_close_matches(key, [*known, *sections, *components], n=1)
    # Users often omit the section of a field.
    bare = [section for section in sections if section.split(".")[1] == key]
    hint = f". Did you mean --{(bare or near)[0]}?" if bare or near else ". Use --help to list the options"
    raise InputError(f"unknown option --{key}{hint}")


def _run_name(recipe: str) -> str:
    """Name of a recipe's run folder; for the `recipe.yaml` of an earlier run, that run's folder."""
    path = Path(recipe)
    return path.resolve().parent.name if path.name == "recipe.yaml" else path.stem
