"""Values of a recipe, as YAML has them, in the types that fields and arguments are annotated with."""

import inspect
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser, get_loader

from pyrogaps.errors import InputError
from pyrogaps.settings import conform, is_plain
from pyrogaps.signatures import nearest

# Lines of jsonargparse's errors that only lead to the reason.
_FRAME = ("Parser key", "Does not validate", "Subtypes", "Errors", "Given", "Problem with", "Expected a NoneType")


@dataclass(frozen=True)
class Component:
    """A class or function, by its dotted path, and the arguments to call it with."""

    class_path: str
    init_args: dict[str, Any] = field(default_factory=dict)


def typed(key: str, kind: Any, value: Any) -> Any:
    """`value` as the annotation `kind` has it: a number or text; a mapping of the fields of a dataclass, which is
    built; or an object, by a dotted path or by class_path and init_args. Raises `InputError`, which begins with `key`.
    """
    parts = (kind, *get_args(kind))
    if get_origin(kind) is dict and not is_plain(kind):  # null takes away what an extended recipe named
        entries = conform(key, dict[str, Any], value).items()
        return {name: typed(f"{key}.{name}", parts[-1], entry) for name, entry in entries if entry is not None}
    sections = [part for part in parts if isinstance(part, type) and is_dataclass(part)]
    named = isinstance(value, str) or (isinstance(value, dict) and "class_path" in value)
    if type(None) in parts and value in (None, "None"):  # as messages and Python write it
        return None
    if Component in sections and (named or sections == [Component]):
        return _component(key, value)
    if is_plain(kind) or not (sections or isinstance(value, str | dict | list)):
        return _plain(key, kind, value)
    if not sections or str in parts or (isinstance(value, dict) and named):
        return _parsed(key, kind, value)
    if not isinstance(value, dict):
        raise InputError(f"{key}: expected a mapping of its fields, got {value!r}")
    return sections[0](**typed_arguments(key, sections[0], value))


def typed_arguments(key: str, target: Callable[..., Any], given: dict[str, Any], *, leading: int = 0) -> dict[str, Any]:
    """`given` checked against the signature of `target`, past its `leading` parameters, in the types it annotates."""
    try:
        parameters = list(inspect.signature(target).parameters.values())[leading:]
    except (TypeError, ValueError):
        return given
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    known = [p.name for p in named]
    unknown = [name for name in given if name not in known]
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters):
        near = nearest(str(unknown[0]), known, target.__doc__ or "")
        hint = f"Did you mean '{near}'?" if near else f"Known are {', '.join(known) or 'none'}"
        raise InputError(f"{key or 'recipe'}: unknown field '{unknown[0]}'. {hint}")
    missing = [p.name for p in named if p.default is p.empty and p.name not in given]
    if missing:
        raise InputError(f"{key or 'recipe'}: {', '.join(missing)} missing. Set {key or 'recipe'}.{missing[0]}")
    try:
        kinds = get_type_hints(target.__init__ if inspect.isclass(target) else target, include_extras=True)
    except Exception:  # an annotation that cannot be read: leave the values as they are
        return given
    return {
        name: typed(f"{key}.{name}".lstrip("."), kinds.get(name, Any) if name in known else Any, value)
        for name, value in given.items()
    }


def _component(key: str, value: Any) -> Component:
    if isinstance(value, str):
        return Component(value)
    if not isinstance(value, dict):
        raise InputError(f"{key}: expected a dotted path, or class_path and init_args, got {value!r}")
    if value.get("class_path") is None:
        raise InputError(f"{key}: class_path is missing. Set it to a dotted path such as package.module.Name")
    # Arguments stand in init_args, or beside class_path.
    beside = {name: part for name, part in value.items() if name not in ("class_path", "init_args")}
    arguments = conform(f"{key}.init_args", dict[str, Any], value.get("init_args") or {})
    return Component(conform(f"{key}.class_path", str, value.get("class_path")), {**arguments, **beside})


def _plain(key: str, kind: Any, value: Any) -> Any:
    try:
        return conform(key, kind, value)
    except InputError:
        if not isinstance(value, str):
            raise
    with suppress(yaml.YAMLError):  # a number may be quoted
        value = get_loader("yaml")(value)
    return conform(key, kind, value)


def _parsed(key: str, kind: Any, value: Any) -> Any:
    """`value` as jsonargparse reads it."""
    parser = ArgumentParser(exit_on_error=False, add_help=False)
    try:
        parser.add_argument("--value", type=kind)
    except Exception:  # an annotation that jsonargparse does not know
        return value
    try:
        return parser.instantiate(parser.parse_object({"value": value})).value
    except (ArgumentError, AttributeError, TypeError, ValueError) as error:
        lines = [line.strip(" -.") for line in re.sub(r"<class '([^']+)'>", r"\1", str(error)).splitlines()]
        reasons = [line.partition(" Got value: ")[0] for line in lines if line and not line.startswith(_FRAME)]
        # Of a class that is called for an object, the kind of object stands first.
        reasons = [re.sub(r"^Type .+? expects a function or a callable class: ", "", reason) for reason in reasons]
        raise InputError(f"{key}: {'; '.join(reasons)}") from error
