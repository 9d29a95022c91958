"""Build the objects of a recipe: import dotted paths, check their arguments, call them."""

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import numpy as np
import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, Dataset, Subset

from pyrogaps.cli.recipe import Recipe
from pyrogaps.cli.typed import Component, typed_arguments
from pyrogaps.density.data import Data
from pyrogaps.density.forms import as_given, is_frame
from pyrogaps.density.runs import Program, check_callable, modules_of
from pyrogaps.errors import InputError
from pyrogaps.evidence import Evidence, Ladder
from pyrogaps.guard import described, failures_named

PAIR_REMEDY = "Name an object with both .model and .guide under pair"


def build_programs(recipe: Recipe) -> tuple[Program, Program]:
    """The model and the guide that `recipe` names, on its device."""
    programs = _named_programs(recipe)
    for module in (module for program in programs for module in modules_of(program)):
        module.to(recipe.device)
    return programs


def _named_programs(recipe: Recipe) -> tuple[Program, Program]:
    if recipe.pair is not None:
        pair = construct("pair", recipe.pair)
        for name in ("model", "guide"):
            if not callable(getattr(pair, name, None)):
                raise InputError(f"pair: {recipe.pair.class_path} has no method '{name}'. Name an object with both")
        return pair.model, pair.guide
    assert recipe.model is not None
    assert recipe.guide is not None
    model = _program("model", recipe.model)
    return model, _program("guide", recipe.guide, model)


def build_encoder(recipe: Recipe) -> Program | None:
    """The encoder with which MAPA trains the model of `recipe`; None where the recipe has none."""
    return None if recipe.encoder is None else _program("encoder", recipe.encoder)


def build_evidence(recipe: Recipe) -> Evidence:
    """The estimator of log p(x) that `recipe` names."""
    if isinstance(recipe.evidence, Ladder):
        return recipe.evidence
    evidence = construct("evidence", recipe.evidence)
    if not isinstance(evidence, Evidence):
        raise InputError(
            f"evidence: {recipe.evidence.class_path} is not a subclass of pyrogaps.Evidence. Name one, such as "
            "pyrogaps.AIS or pyrogaps.Ladder"
        )
    return evidence


def build_families(recipe: Recipe) -> dict[str, Callable[[Program], Program]]:
    """The further families of `recipe`, each a callable of the model."""
    return {name: _family(f"families.{name}", entry) for name, entry in recipe.families.items()}


def _program(key: str, component: Component, model: Program | None = None) -> Program:
    target = import_object(key, component.class_path)
    if not inspect.isclass(target):
        if component.init_args:
            raise InputError(f"{key}: {component.class_path} is not a class, so it takes no init_args. Remove them")
        return _callable(key, component, target)
    takes_model = model is not None and (issubclass(target, AutoGuide) or _first_parameter(target) == "model")
    leading = (model,) if takes_model and "model" not in component.init_args else ()
    return _callable(key, component, construct(key, component, *leading))


def _callable(key: str, component: Component, built: Any) -> Program:
    """`built`, checked to be something Pyro can run."""
    check_callable(built, f"{key}: {component.class_path}", PAIR_REMEDY)
    program: Program = built
    return program


def _family(key: str, component: Component) -> Callable[[Program], Program]:
    target = import_object(key, component.class_path)
    if not callable(target):
        raise InputError(
            f"{key}: {component.class_path} cannot be called. A family is a class or function that takes the model and "
            "returns a guide"
        )
    arguments = typed_arguments(f"{key}.init_args", target, component.init_args, leading=1)
    family: Callable[[Program], Program] = functools.partial(target, **arguments) if arguments else target
    if not arguments:
        return family
    # The ledger records a family by its name; a partial has none, and its repr changes from run to run.
    family.__name__ = f"{component.class_path}({', '.join(f'{k}={v!r}' for k, v in component.init_args.items())})"
    return family


def construct(key: str, component: Component, *leading: Any) -> Any:
    """Call the class or function that `component` names with `leading` and its `init_args`.

    Raises `InputError` where it cannot be imported, its arguments do not fit, or the call fails.
    """
    target = import_object(key, component.class_path)
    if not callable(target):
        raise InputError(f"{key}: {component.class_path} is not a class or function")
    arguments = typed_arguments(f"{key}.init_args", target, component.init_args, leading=len(leading))
    with failures_named(f"{key}: {component.class_path}", own_too=True):
        return target(*leading, **arguments)


def import_object(key: str, path: str) -> Any:
    """The object at a dotted `path`; `InputError` naming `key` where it cannot be imported."""
    module, _, name = path.rpartition(".")
    if not all(path.split(".")) or not module:
        raise InputError(f"{key}: '{path}' is not a dotted path such as package.module.Name")
    if module.partition(".")[0] in {"builtins", *sys.stdlib_module_names}:
        raise InputError(
            f"{key}: '{path}' is part of Python itself, and neither a program nor a data set. Name one of a package or "
            "file of yours"
        )
    try:
        imported = _import_module(module)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{module}.".startswith(f"{error.name}."):
            raise InputError(
                f"{key}: cannot import '{path}': no module named '{error.name}' "
                "(searched: installed packages, the recipe's folder, the current folder)"
            ) from error
        raise InputError(f"{key}: importing '{module}' failed: {described(error)}") from error
    if not hasattr(imported, name):
        near = get_close_matches(name, dir(imported), n=1)
        raise InputError(f"{key}: '{module}' has no '{name}'" + (f". Did you mean '{near[0]}'?" if near else ""))
    return getattr(imported, name)


def _import_module(path: str) -> Any:
    """The module at `path`, or a class in a module, for methods such as `module.Class.from_file`."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        parent, _, name = path.rpartition(".")
        if error.name == path and parent and inspect.isclass(getattr(_import_module(parent), name, None)):
            return getattr(_import_module(parent), name)
        raise


@dataclass(frozen=True)
class DataSet:
    """The data that the command uses: for training, for early stopping, and for evaluation."""

    train: Data | None
    validation: Data | None
    evaluated: Data

    @property
    def example(self) -> Data:
        """Data of the shape that is trained on."""
        return self.evaluated if self.train is None else self.train


def build_data(recipe: Recipe, *, data_root: str | None = None, download: bool = False) -> tuple[DataSet, list[str]]:
    """The data of `recipe`, and notes on the options that have no effect on its data set.

    `data_root` and `download` become the data set's arguments `data_root` (or `root`) and `download`, if it has them.
    They locate the data but do not determine them, so they are not part of a recipe.
    """
    component, notes = recipe.data, []
    accepted = _parameters(import_object("data", component.class_path))
    for option, value in (("data_root", data_root), ("download", download)):
        name = next((name for name in (option, option.removeprefix("data_")) if name in accepted), None)
        if value and name:
            component = Component(component.class_path, {**component.init_args, name: value})
        elif value:
            notes.append(f"--{option} has no effect: {component.class_path} has no such argument")
    data = construct("data", component)
    if isinstance(data, Dataset | DataLoader):  # which has no parts
        own = on_device(data, torch.device(recipe.device))
        return DataSet(own, None, _first(recipe, own)), notes
    evaluated = _part(recipe, data, recipe.evaluate.part, required=True)
    trains = recipe.training is not None or recipe.mapa is not None
    trains = (trains and recipe.checkpoint is None) or recipe.retraining is not None
    train = _part(recipe, data, "train", required=trains)
    validation = _part(recipe, data, "validation", required=False)
    return DataSet(train, validation, _first(recipe, evaluated)), notes


def _part(recipe: Recipe, data: Any, part: str, *, required: bool) -> Any:
    with failures_named(f"data: reading '{part}' of {recipe.data.class_path}", own_too=True):
        selected = getattr(data, part, None)
    if selected is None and required:
        remedy = "Set evaluate.part to another" if part == recipe.evaluate.part else "Use a data set that has it"
        raise InputError(f"data: {recipe.data.class_path} has no part '{part}'. {remedy}")
    return on_device(selected, torch.device(recipe.device))


def _first(recipe: Recipe, data: Any) -> Any:
    """The datapoints that `evaluate` asks for."""
    count = recipe.evaluate.num_datapoints
    if count is None:
        return data
    several = isinstance(data, tuple | Mapping)
    parts = list(data.values()) if isinstance(data, Mapping) else list(data) if several else [data]
    dataset = data.dataset if isinstance(data, DataLoader) else data
    if isinstance(dataset, Dataset) and hasattr(dataset, "__len__"):
        parts = [dataset]
    elif not all(isinstance(part, Tensor | np.ndarray) and part.ndim for part in parts):
        with part_named(recipe.evaluate.part):
            given = as_given(data)  # refused here, where this remedy would lead there
            number = 0 if recipe.plate is False else len(given.indexed())
        if not is_frame(data):
            raise InputError(
                "evaluate.num_datapoints: works only for tensors, arrays and frames with an axis of datapoints, and "
                "for a Dataset. Set it to null for these data"
            )
        parts = [range(number)]
    available = len(parts[0])
    if available == 0:
        raise InputError(f"data: the part '{recipe.evaluate.part}' has no datapoints. Set evaluate.part to another")
    if count > available:
        raise InputError(
            f"evaluate.num_datapoints: must be from 1 to {available}, the number of datapoints in "
            f"'{recipe.evaluate.part}', got {count}"
        )
    if isinstance(dataset, Dataset):
        subset: Dataset[Any] = Subset(dataset, range(count))
        return subset if dataset is data else DataLoader(subset, collate_fn=data.collate_fn)
    if is_frame(data):
        return data.iloc[:count]
    if isinstance(data, Mapping):
        return {name: value[:count] for name, value in data.items()}
    return tuple(t[:count] for t in data) if several else data[:count]


@contextmanager
def part_named(part: str) -> Iterator[None]:
    """Say which part of the data set it is that cannot be used."""
    try:
        yield
    except InputError as error:
        if not str(error).startswith("data: "):
            raise
        raise InputError(f"data: in the part '{part}': {str(error).removeprefix('data: ')}") from error


def on_device(item: Any, device: torch.device) -> Any:
    """A tensor, a collection of tensors, their data set or a module moved to `device`; anything else as it is."""
    if isinstance(item, Tensor | nn.Module):
        return item.to(device)
    if isinstance(item, list | tuple) and not hasattr(item, "_fields"):
        return type(item)(on_device(entry, device) for entry in item)
    if isinstance(item, Mapping):
        return {name: on_device(entry, device) for name, entry in item.items()}
    if isinstance(item, Dataset) and hasattr(item, "__len__") and device.type != "cpu":
        return OnDevice(item, device)
    return item


class OnDevice(Dataset[Any]):
    """A data set whose items are moved to `device`."""

    def __init__(self, data: Any, device: torch.device) -> None:
        self.data, self.device = data, device

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        return tree_map_only(Tensor, lambda tensor: tensor.to(self.device), self.data[index])


def check_device(name: str) -> torch.device:
    """The device called `name`; `InputError` where it is not available."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = " ".join(str(error).split()).split(". ")[0]
        raise InputError(f"device: '{name}' cannot be used here ({reason}). Use --device cpu") from error
    return device


def _first_parameter(target: Callable[..., Any]) -> str | None:
    return next(iter(_parameters(target)), None)


def _parameters(target: Callable[..., Any]) -> list[str]:
    try:
        return list(inspect.signature(target).parameters)
    except (TypeError, ValueError):
        return []
