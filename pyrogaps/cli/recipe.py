"""Recipes: model, guide, data and settings of a run, as a typed value and as YAML."""

import dataclasses
import inspect
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentError, ArgumentParser, get_loader

from pyrogaps.conditioning import Conditioning
from pyrogaps.errors import InputError
from pyrogaps.evidence import AIS
from pyrogaps.gaps import Certificate, Retraining
from pyrogaps.mapa import Mapa
from pyrogaps.refine import Refinement
from pyrogaps.training import Training

Document = dict[str, Any]


@dataclass(frozen=True)
class Component:
    """A class or function, by its dotted path, and the arguments to call it with."""

    class_path: str
    init_args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluate:
    """Which datapoints are evaluated.

    Args:
        part: the attribute of the data set to evaluate, such as `test` or `train`.
        num_datapoints: how many of its datapoints, from the first; null: all.
    """

    part: str = "test"
    num_datapoints: int | None = None


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a ledger.

    Args:
        model: the Pyro model: a class to build or a plain function.
        guide: its guide: a class to build or a plain function; an autoguide is given the model.
        pair: instead of `model` and `guide`, one object with the attributes `.model` and `.guide`.
        data: the data set: an object with tensors `.train`, `.test` and, optionally, `.validation`.
        evaluate: which datapoints are evaluated.
        mapa: settings of MAPA, which trains the model before `training`; null: no MAPA.
        encoder: the encoder h that MAPA trains the model with; null: the guide; MAPA's bound is then one of log p(x).
        training: settings of `pyrogaps.train`; null: no training.
        families: further variational families to compare, by name; each is called with the model.
        evidence: the estimator of log p(x): fields of AIS, or class_path (such as pyrogaps.Ladder) and init_args.
        refinement: settings of the per-datapoint refinement.
        conditioning: settings of the shared posterior, for a guide that is not shown all of x.
        reference: training settings of the reference guide for the conditioning gap of a lookahead; null: none.
        retraining: settings of further training (phi-hat) that splits the amortization gap in three; null: no split.
        certificate: settings of the check of how wrong the bounds can be; null: no check.
        num_particles: number of draws for each bound.
        batch_size: datapoints processed at once; null: chosen to suit the model.
        max_memory: memory that a process may use, such as 4GiB; null: four fifths of the free memory.
        compile: whether to compile the model's density with torch.compile; worthwhile in long runs.
        plate: name of the data plate; null finds it, false treats the whole data set as one datapoint.
        seed: seed of all random numbers.
        device: the device to run on, such as cpu, cuda or cuda:1.
        checkpoint: weights to load instead of training, such as an earlier run's checkpoint.pt.
        model_checkpoint: weights of the model alone, from an earlier run's checkpoint.pt, to start training from.
    """

    data: Component
    model: Component | None = None
    guide: Component | None = None
    pair: Component | None = None
    evaluate: Evaluate = field(default_factory=Evaluate)
    mapa: Mapa | None = None
    encoder: Component | None = None
    training: Training | None = field(default_factory=Training)
    families: dict[str, Component] = field(default_factory=dict)
    evidence: AIS | Component = field(default_factory=AIS)
    refinement: Refinement = field(default_factory=Refinement)
    conditioning: Conditioning = field(default_factory=Conditioning)
    reference: Training | None = None
    retraining: Retraining | None = None
    certificate: Certificate | None = None
    num_particles: int = 1000
    batch_size: int | None = None
    max_memory: int | str | None = None
    compile: bool = False
    plate: str | Literal[False] | None = None
    seed: int = 0
    device: str = "cpu"
    checkpoint: str | None = None
    model_checkpoint: str | None = None

    def __post_init__(self) -> None:
        if self.pair is not None and (self.model is not None or self.guide is not None):
            raise InputError("recipe: pair replaces model and guide. Set these to null")
        if self.pair is None and (self.model is None or self.guide is None):
            raise InputError("recipe: a model and a guide are missing. Set both, or pair in place of both")
        if self.checkpoint is not None and self.model_checkpoint is not None:
            raise InputError(
                "recipe: checkpoint includes the model's weights. Set only one of checkpoint and model_checkpoint"
            )
        if self.encoder is not None and self.mapa is None:
            raise InputError("recipe: only mapa uses an encoder. Set mapa too, or leave encoder out")

    def to_yaml(self) -> str:
        """The recipe as YAML, with every field written out."""
        document = _plain(self)
        return str(yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=100))


COMPONENTS = ("model", "guide", "pair", "data", "encoder")
SECTIONS: dict[str, type] = {
    "evaluate": Evaluate,
    "mapa": Mapa,
    "training": Training,
    "evidence": AIS,
    "refinement": Refinement,
    "conditioning": Conditioning,
    "reference": Training,
    "retraining": Retraining,
    "certificate": Certificate,
}
FIELDS = dict(re.findall(r"^ {8}(\w+): (.+)$", Recipe.__doc__ or "", re.MULTILINE))
NULLABLE = (
    "mapa",
    "training",
    "reference",
    "retraining",
    "certificate",
    "batch_size",
    "max_memory",
    "plate",
    "checkpoint",
    "model_checkpoint",
)
SCALARS = {f.name: f.type for f in dataclasses.fields(Recipe) if f.name not in {*COMPONENTS, *SECTIONS, "families"}}


def shipped() -> list[str]:
    """Names of the recipes that come with pyrogaps."""
    names = (file.name for file in _recipes().iterdir())
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def _recipes() -> Traversable:
    return resources.files("pyrogaps").joinpath("recipes")


def read_document(recipe: str) -> Document:
    """The YAML document of a recipe, shipped (by name) or a file (by path), with `extends` resolved.

    `extends` names another recipe, shipped or a file beside this one, which provides the fields that this one omits:
    mappings are merged field by field, everything else is replaced. The file's folder and the current one become
    importable, so that recipes can name classes in files beside them.

    Raises `InputError` where there is no such recipe, it is not a YAML mapping, or it extends itself.
    """
    return _extended(recipe, ())


def _extended(recipe: str, above: tuple[str, ...]) -> Document:
    if recipe in above:
        raise InputError(f"{recipe}: extends itself ({' -> '.join((*above, recipe))})")
    document = _own_document(recipe)
    base = document.pop("extends", None)
    if base is None:
        return document
    if not isinstance(base, str):
        raise InputError(f"{recipe}: extends: expected the name or path of a recipe, got {base!r}")
    beside = Path(recipe).parent / base
    source = str(beside) if recipe not in shipped() and beside.is_file() else base
    return _merged(_extended(source, (*above, recipe)), document)


def _merged(base: Document, document: Document) -> Document:
    """`base` with the fields of `document` over it."""
    both = {name: _merged(base[name], value) for name, value in document.items() if _are_mappings(base, name, value)}
    return {**base, **document, **both}


def _are_mappings(base: Document, name: str, value: Any) -> bool:
    """Whether to merge two mappings; not if `value` names a class and the base has fields of no named class."""
    below = base.get(name)
    return isinstance(value, dict) and isinstance(below, dict) and ("class_path" in below or "class_path" not in value)


def _own_document(recipe: str) -> Document:
    path = Path(recipe)
    if recipe in shipped():
        text = _recipes().joinpath(f"{recipe}.yaml").read_text("utf-8")
    elif path.is_file():
        text = _read(path)
    else:
        raise InputError(
            f"no recipe '{recipe}': neither a file nor a shipped recipe ({', '.join(shipped())}) has this name"
        )
    for folder in (str(Path.cwd()), str(path.resolve().parent)):
        if folder not in sys.path and recipe not in shipped():
            sys.path.insert(0, folder)
    document = load_yaml(text, recipe)
    if not isinstance(document, dict):
        raise InputError(f"{recipe}: a recipe is a YAML mapping of fields such as model, guide and data")
    return document


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from error


def load_yaml(text: str, source: str) -> Any:
    """Parse YAML as jsonargparse does (`1e-3` is a number); `source` names it in the `InputError` of bad YAML."""
    try:
        return get_loader("yaml")(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or "cannot be parsed"
        raise InputError(f"{source}{line}: not valid YAML: {problem}") from error


def override(document: Document, key: str, value: Any) -> None:
    """Set the field with dotted name `key`, such as `data.init_args.num_test`, in place.

    A component written as a bare dotted path is first spelled out; a null section becomes one with defaults. A
    `class_path` replaces fields that belong to no named class, such as those of AIS in `evidence`.
    """
    *parents, last = key.split(".")
    node = document
    for parent in parents:
        child = node.get(parent)
        if isinstance(child, str):
            child = {"class_path": child}
        elif not isinstance(child, dict):
            child = {}
        node[parent] = child
        node = child
    if last == "class_path" and last not in node:
        node.clear()
    node[last] = value


def resolve(document: Document) -> Recipe:
    """The typed recipe of a document, defaults filled in.

    Raises `InputError` naming the field for an unknown one (with the nearest known), or a value of the wrong type.
    """
    check_names(document, [f.name for f in dataclasses.fields(Recipe)], "recipe")
    if document.get("data") is None:
        raise InputError(
            "recipe: data is missing. Name a data set, such as data: {class_path: pyrogaps.datasets.Digits}"
        )
    families = document.get("families") or {}
    if not isinstance(families, dict):
        raise InputError("families: expected a mapping of names to dotted paths")
    fields: Document = {name: component(name, document[name]) for name in COMPONENTS if document.get(name) is not None}
    # Null removes a family that an extended recipe named.
    named = {str(name): entry for name, entry in families.items() if entry is not None}
    if (evidence := _evidence(document.get("evidence"))) is not None:
        fields["evidence"] = evidence
        document = {name: entry for name, entry in document.items() if name != "evidence"}
    fields["families"] = {name: component(f"families.{name}", entry) for name, entry in named.items()}
    return Recipe(**{**_typed(document), **fields})


def _evidence(entry: Any) -> Component | None:
    """An evidence that names its class, with the settings beside `class_path`; None for fields of AIS."""
    if isinstance(entry, str):
        return Component(entry)
    if not isinstance(entry, dict) or "class_path" not in entry:
        return None
    beside = {name: value for name, value in entry.items() if name not in ("class_path", "init_args")}
    named = component("evidence", {name: value for name, value in entry.items() if name not in beside})
    return Component(named.class_path, {**named.init_args, **beside})


def component(key: str, entry: Any) -> Component:
    """A component from its YAML: a dotted path, or `class_path` and `init_args`."""
    if isinstance(entry, str):
        return Component(entry)
    if not isinstance(entry, dict):
        raise InputError(f"{key}: expected a dotted path, or class_path and init_args, got {entry!r}")
    check_names(entry, ["class_path", "init_args"], key)
    path, arguments = entry.get("class_path"), entry.get("init_args") or {}
    if not isinstance(path, str):
        raise InputError(f"{key}.class_path: expected a dotted path, got {path!r}")
    if not isinstance(arguments, dict):
        raise InputError(f"{key}.init_args: expected a mapping of argument names to values, got {arguments!r}")
    return Component(path, arguments)


def check_names(given: Mapping[str, Any], known: list[str], where: str) -> None:
    """Refuse a name in `given` that is not in `known`; suggest the nearest one."""
    for name in given:
        if name not in known:
            near = get_close_matches(str(name), known, n=1)
            hint = f"Did you mean '{near[0]}'?" if near else f"Known are {', '.join(known)}"
            raise InputError(f"{where}: unknown field '{name}'. {hint}")


def _typed(document: Document) -> Document:
    """The sections and scalars of `document`, type-checked, as `Recipe` takes them."""
    given = {name: document[name] for name in (*SECTIONS, *SCALARS) if name in document}
    absent = [name for name, value in given.items() if value is None and name in NULLABLE]
    absent += [
        f.name for f in dataclasses.fields(Recipe) if f.name in SECTIONS and f.default is None and f.name not in given
    ]
    for name, value in given.items():
        if name in SECTIONS and name not in absent:
            if not isinstance(value, dict):
                raise InputError(f"{name}: expected a mapping of its fields, got {value!r}")
            check_names(value, [f.name for f in dataclasses.fields(SECTIONS[name])], name)
        elif value is None and name not in absent:
            raise InputError(f"{name}: expected a value, got null")
    present = {name: value for name, value in given.items() if name not in absent}
    values = parse_typed(parser(), present)
    return {name: None if name in absent else values[name] for name in (*SECTIONS, *SCALARS)}


def parser() -> ArgumentParser:
    """The jsonargparse parser of the recipe's sections and scalars."""
    sections = ArgumentParser(exit_on_error=False, add_help=False)
    for name, section in SECTIONS.items():
        sections.add_class_arguments(section, name)
    for f in dataclasses.fields(Recipe):
        if f.name in SCALARS:
            sections.add_argument(f"--{f.name}", type=f.type, default=f.default, help=FIELDS[f.name])
    return sections


def parse_typed(typed: ArgumentParser, document: Document) -> dict[str, Any]:
    """Type-check `document` with `typed` and build its objects; `InputError` for values that do not fit."""
    try:
        return dict(vars(typed.instantiate(typed.parse_object(document))))
    except (ArgumentError, TypeError, ValueError) as error:
        raise InputError(_one_line(str(error))) from error


_FRAME = ("Parser key", "Does not validate", "Subtypes", "Errors", "Given")


def _one_line(message: str) -> str:
    """jsonargparse's report of a value of the wrong type, in one line: field, problem, given value."""
    option = re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message)
    if option:
        return f"{option[1]}: unknown field '{option[2]}'"
    plain = re.sub(r"<class '([^']+)'>", r"\1", message).replace("typing.", "")
    key = re.search(r'Parser key ["\']([\w.]+)["\']:', plain)
    given = re.search(r"(?:Got value|Given value): (.*)", plain)
    reasons = [r.strip(" .") for r in re.findall(r"(?:^|- )((?:(?!- ).)*?)(?:\.? Got value.*)?$", plain, re.MULTILINE)]
    reasons = [r for r in reasons if r and not r.startswith(_FRAME)]
    problems = [r for r in reasons if not r.startswith("Expected a ")]
    if not problems:
        kinds = [r.removeprefix("Expected a ").replace("NoneType", "null") for r in reasons]
        problems = [f"expected {' or '.join(kinds)}" + (f", got {given[1]}" if given else "")]
    return " ".join((f"{key[1]}: " if key else "").split() + "; ".join(problems).split())


def _plain(value: Any) -> Any:
    """`value` in the types that YAML has; a setting that is an object becomes `class_path` and `init_args`."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, type) or inspect.isroutine(value):
        return f"{value.__module__}.{value.__qualname__}"
    if dataclasses.is_dataclass(value):
        fields = {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, (Recipe, Component, *SECTIONS.values())):
            return fields
        return {"class_path": f"{type(value).__module__}.{type(value).__qualname__}", "init_args": fields}
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
