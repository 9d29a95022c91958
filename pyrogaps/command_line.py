"""The command line of `pyrogaps.eval`: run options, and overrides of any field of a recipe."""

import dataclasses
import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pyrogaps.errors import InputError
from pyrogaps.recipe import (
    COMPONENTS,
    FIELDS,
    SCALARS,
    SECTIONS,
    Recipe,
    load_yaml,
    override,
    parser,
    read_document,
    resolve,
    shipped,
)

USAGE = "usage: python -m pyrogaps.eval [RECIPE] [options]"

HELP = """
Train a Pyro model and guide (or load their weights), take their inference gap apart, print the table in nats.

RECIPE            a shipped recipe ({shipped}; default digits) or a path to a recipe file

run options:
  --out DIR         where results go (default runs/<recipe>/); a run that was stopped continues from there
  --overwrite       replace what DIR holds
  --checkpoint FILE load weights from an earlier run's checkpoint.pt and train nothing
  --data_root DIR   folder of the data, for data sets that take one
  --download        fetch missing data, for data sets that can
  --quiet           no progress bars
  --print_config    print the recipe as resolved and stop
  --help            this text

Every field of the recipe can be set as well, later ones over earlier ones and over the recipe's:
  --training.num_epochs 3   --training null   --evidence.num_chains=4   --data.init_args.num_test 100
  --guide pyro.infer.autoguide.AutoNormal     --families.flow mymodels.AutoFlow     --families {{}}
A field given whole, as --guide, is replaced; --guide.class_path alone keeps the recipe's init_args.

{fields}
Several processes, on one machine or more, share the work:
  torchrun --nproc-per-node 8 -m pyrogaps.eval RECIPE --out a/folder/that/all/see

Exit codes: 0 done, 2 input that cannot be used (one line on stderr says why), 130 interrupted, 1 a process died."""

FLAGS = ("overwrite", "download", "quiet", "print_config", "help")
VALUES = ("out", "data_root")


@dataclass(frozen=True)
class Options:
    """What the command was asked to do with a recipe."""

    out: Path = Path("runs")
    data_root: str | None = None
    overwrite: bool = False
    download: bool = False
    quiet: bool = False
    print_config: bool = False


def parse(arguments: list[str]) -> tuple[Recipe, Options] | None:
    """The recipe and the options on a command line; None where it asks for help.

    Raises `InputError` for anything that cannot be used.
    """
    named = bool(arguments) and not arguments[0].startswith("-")
    name = arguments[0] if named else "digits"
    given, overrides = _split(arguments[named:])
    if given.pop("help", False):
        return None
    document = read_document(name)
    for key, text in _class_first(overrides):
        override(document, key, load_yaml(text, f"--{key}"))
    out = Path(given.pop("out", Path("runs") / _run_name(name)))
    return resolve(document), Options(out=out, **given)


def _class_first(overrides: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The class of the evidence before its fields, whatever their order, because a class clears another one's fields."""
    whole = [place for place, (key, _) in enumerate(overrides) if key == "evidence"]
    start = whole[-1] + 1 if whole else 0
    return overrides[:start] + sorted(overrides[start:], key=lambda pair: pair[0] != "evidence.class_path")


def help_text() -> str:
    """What `--help` prints."""
    built = "".join(f"  --{name:<15} {FIELDS[name]}\n" for name in (*COMPONENTS, "families"))
    listed = parser().format_help().partition("options:\n")[2]
    # Sections are given field by field or as YAML here, not as the files that jsonargparse would take.
    fields = re.sub(r"  --[\w.]+ CONFIG\s+Path to a configuration file.\n", "", listed)
    return USAGE + "\n" + HELP.format(shipped=", ".join(shipped()), fields=f"fields:\n{built}{fields}")


def _split(tokens: list[str]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Run options by name, and overrides of the recipe in the order given."""
    given: dict[str, Any] = {}
    overrides: list[tuple[str, str]] = []
    rest = iter(tokens)
    for token in rest:
        if token == "-h":
            token = "--help"
        key, equals, text = token.removeprefix("--").partition("=")
        if not token.startswith("--") or not key:
            raise InputError(f"unexpected argument '{token}'; {USAGE}, the recipe first")
        _check_option(key)
        if key in FLAGS:
            if equals:
                raise InputError(f"--{key} takes no value")
            given[key] = True
            continue
        value = text if equals else next(rest, None)
        if value is None:
            raise InputError(f"--{key} needs a value")
        if key in VALUES:
            given[key] = value
        else:
            overrides.append((key, value))
    return given, overrides


def _check_option(key: str) -> None:
    """Refuse an option that is neither a run option nor a field of the recipe."""
    first, *inner = key.split(".")
    fields = [f.name for f in dataclasses.fields(Recipe)]
    known = [*FLAGS, *VALUES, *fields]
    if first in known and not (inner and first in (*FLAGS, *VALUES, *SCALARS)):
        return
    sections = [f"{name}.{f.name}" for name, section in SECTIONS.items() for f in dataclasses.fields(section)]
    components = [f"{name}.{part}" for name in COMPONENTS for part in ("class_path", "init_args")]
    near = get_close_matches(key, [*known, *sections, *components], n=1)
    # A field of a section is often given without the section's name.
    bare = [section for section in sections if section.split(".")[1] == key]
    hint = f"; did you mean --{(bare or near)[0]}?" if bare or near else "; --help lists the options"
    raise InputError(f"unknown option --{key}{hint}")


def _run_name(recipe: str) -> str:
    """Name of a recipe's run folder; that of an earlier run's `recipe.yaml` is the run's own."""
    path = Path(recipe)
    return path.resolve().parent.name if path.name == "recipe.yaml" else path.stem
