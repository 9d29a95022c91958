"""Recipes as YAML documents: read, extended by one another, overridden field by field. They import nothing."""

import os
import re
import sys
from difflib import get_close_matches
from importlib import resources
from importlib.resources.abc import Traversable
from itertools import takewhile
from pathlib import Path
from textwrap import shorten
from typing import Any

import yaml
from jsonargparse import get_loader

from pyrogaps.errors import InputError

Document = dict[str, Any]
MAX_TITLE = 110  # characters


def shipped() -> list[str]:
    """Names of the recipes that come with pyrogaps."""
    names = (file.name for file in _recipes().iterdir())
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def _recipes() -> Traversable:
    return resources.files("pyrogaps").joinpath("recipes")


def title_of(recipe: str) -> str:
    """What a shipped recipe is, in a line: the first sentence of the comment that it begins with."""
    lines = _recipes().joinpath(f"{recipe}.yaml").read_text("utf-8").splitlines()
    comment = " ".join(line.removeprefix("#").strip() for line in takewhile(lambda line: line.startswith("#"), lines))
    sentence = re.split(r"(?<!\bal)\.\s", comment)[0].removesuffix(".")
    return shorten(sentence, MAX_TITLE, placeholder=" ...")


def read_document(recipe: str) -> Document:
    """The YAML document of a recipe, shipped (by name) or a file (by path), with `extends` resolved.

    `extends` names another recipe, shipped or a file beside this one, which provides the fields that this one omits:
    mappings are merged field by field, everything else is replaced. The file's folder and the current one become
    importable, so that recipes can name classes in files beside them.

    Raises `InputError` where there is no such recipe, it is not a YAML mapping, or it extends itself.
    """
    return _extended(recipe, ())


def _extended(recipe: str, above: tuple[str, ...]) -> Document:
    place = recipe if recipe in shipped() else os.path.realpath(recipe)  # a file has many spellings
    if place in above:
        raise InputError(f"{recipe}: extends itself, by way of {len(above)} recipe(s). Remove extends from one of them")
    document = _own_document(recipe)
    base = document.pop("extends", None)
    if base is None:
        return document
    if not isinstance(base, str):
        raise InputError(f"{recipe}: extends: expected the name or path of one recipe, got {base!r}")
    beside = Path(recipe).parent / base
    source = str(beside) if recipe not in shipped() and _is_file(beside) else base
    if source not in shipped() and not _is_file(Path(source)):
        raise InputError(f"{recipe}: extends: {_no_recipe(source)}")
    return merged(_extended(source, (*above, place)), document)


def merged(base: Document, document: Document) -> Document:
    """`base` with the fields of `document` over it."""
    both = {name: merged(base[name], value) for name, value in document.items() if _are_mappings(base, name, value)}
    return {**base, **document, **both}


def _are_mappings(base: Document, name: str, value: Any) -> bool:
    """Whether to merge two mappings; not if `value` names a class and the base has fields of no named class."""
    below = base.get(name)
    return isinstance(value, dict) and isinstance(below, dict) and ("class_path" in below or "class_path" not in value)


def _own_document(recipe: str) -> Document:
    path = Path(recipe)
    if recipe in shipped():
        text = _recipes().joinpath(f"{recipe}.yaml").read_text("utf-8")
    elif _is_file(path):
        text = _read(path)
    else:
        raise InputError(_no_recipe(recipe))
    for folder in (str(Path.cwd()), str(path.resolve().parent)):
        # Behind what is installed, so that a file beside a recipe takes no package's place.
        if folder not in sys.path and recipe not in shipped():
            sys.path.append(folder)
    document = load_yaml(text, recipe)
    if not isinstance(document, dict):
        raise InputError(f"{recipe}: is no mapping. A recipe is a YAML mapping of fields such as model, guide and data")
    return document


def _no_recipe(recipe: str) -> str:
    """That there is no such recipe, and which one may be meant."""
    try:
        beside = [str(path) for path in Path(recipe).parent.glob("*.y*ml")]
        if recipe and Path(recipe).is_dir():
            return f"no recipe '{recipe}': it is a folder. Name a recipe file in it"
    except (OSError, ValueError):
        beside = []
    named = [path for path in beside if Path(path).stem == Path(recipe).stem]
    near = named or get_close_matches(recipe, [*beside, *shipped()], n=1)
    remedy = f"Did you mean '{near[0]}'?" if near else f"Shipped are {', '.join(shipped())}"
    return f"no recipe '{recipe}': neither a file nor a shipped recipe has this name. {remedy}"


def _is_file(path: Path) -> bool:
    """Whether there is such a file; False for names that the system cannot have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not text in UTF-8. Save it as UTF-8, or name a recipe") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}. Name a file that can be") from error


def load_yaml(text: str, source: str) -> Any:
    """Parse YAML as jsonargparse does (`1e-3` is a number); `source` names it in the `InputError` of bad YAML."""
    try:
        _check_keys(yaml.compose(text, yaml.SafeLoader), source, ())
        return get_loader("yaml")(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or "a character that YAML does not allow"
        tab = mark is not None and "\t" in (text.splitlines() or [""])[min(mark.line, len(text.splitlines()) - 1)]
        remedy = ". Indent by spaces, not by tabs" if tab else ""
        raise InputError(f"{source}{line}: not valid YAML: {problem}{remedy}") from error
    except RecursionError as error:
        raise InputError(f"{source}: not valid YAML: nested too deeply. Remove some of its brackets") from error
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{source}: a number has too many digits. Shorten it") from error


def _check_keys(node: Any, source: str, above: tuple[Any, ...]) -> None:
    """Refuse keys that stand twice in one mapping, of which YAML would take the last, and nodes inside themselves."""
    if any(node is outer for outer in above):
        raise InputError(f"{source}, line {node.start_mark.line + 1}: an anchor contains itself. Write its content out")
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_keys(item, source, (*above, node))
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                place = f"{source}, line {key.start_mark.line + 1}"
                raise InputError(f"{place}: '{key.value}' stands there twice. Remove one of the two")
            seen.add(str(key.value))
            _check_keys(value, source, (*above, node))


def override(document: Document, key: str, value: Any) -> None:
    """Set the field with dotted name `key`, such as `data.init_args.num_test`, in place.

    A component written as a bare dotted path is first spelled out; a null section becomes one with defaults. A
    `class_path` replaces fields that belong to no named class, such as those of Ladder in `evidence`.
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
