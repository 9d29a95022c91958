"""The weights of a model and a guide: modules and Pyro's param store, in memory and on disk."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import pyro
import torch
from pyro import poutine
from pyro.distributions import constraints as pyro_constraints
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn
from torch.distributions import constraints as torch_constraints

from pyrogaps.density.data import Data
from pyrogaps.density.forms import as_indexed
from pyrogaps.density.runs import Program, modules_of
from pyrogaps.errors import InputError, counted
from pyrogaps.files import is_sealed, replacing, seal
from pyrogaps.streams import seeded

FORMAT = "pyrogaps checkpoint 1"
Weights = dict[str, Any]

_CONSTRAINTS = {
    item
    for module in (torch_constraints, pyro_constraints)
    for item in vars(module).values()
    if isinstance(item, type) and issubclass(item, torch_constraints.Constraint)
}


def save_weights(path: str | Path, model: Program, guide: Program) -> None:
    """Write the weights of `model` and `guide`, from modules and param store, to `path`, atomically.

    Raises `InputError` if the file cannot be written or a parameter has a constraint of a custom class.
    """
    write_file(path, weights_alone(model, guide))


def weights_alone(model: Program, guide: Program) -> dict[str, Any]:
    """The content of a checkpoint without a training run, for `write_file` or `dump`."""
    return {"weights": copy_weights(model, guide)}


def load_weights(path: str | Path, model: Program, guide: Program, data: Data | None = None) -> None:
    """Load the weights in `path`, written by `save_weights` or `train`, into `model` and `guide`.

    From a checkpoint of `train` the best weights are loaded. Some programs create parameters in their first run (Pyro's
    autoguides; functions that call `pyro.module` on modules they do not close over). They are run once on `data`, which
    must then be given.

    Raises `InputError` if the file is missing, damaged, or does not fit the model and the guide.
    """
    content = read_file(path)
    if data is not None:
        _run_once(model, guide, data)
    try:
        put_weights(content["weights"], model, guide, unknown_modules="refuse" if data is None else "ignore")
    except InputError as error:
        raise InputError(f"checkpoint {path}: {error}") from error


def load_model_weights(path: str | Path, model: Program, guide: Program, data: Data | None = None) -> None:
    """Load only the model's weights from `path` into `model`, regardless of the guide they were trained with.

    The weights of `guide` are unchanged. Arguments and files are otherwise as for `load_weights`.

    Raises `InputError` if the file is missing, damaged, or contains another model's weights, or if model and guide
    share a module.
    """
    content = read_file(path)["weights"]
    modules = all_modules(model, model)
    if {id(module) for module in modules} & {id(module) for module in modules_of(guide)}:
        raise InputError(
            f"model weights {path}: model and guide share a module, so their weights cannot be separated. Use "
            "load_weights."
        )
    try:
        if len(content["modules"]) < len(modules):
            raise InputError("the file does not fit the model: it contains too few modules")
        # The model's modules come first (see `all_modules`); the guide's store parameters have different names.
        content = {**content, "modules": content["modules"][: len(modules)]}
        names = [] if data is None else _loose_parameters(model, data)
        if lacking := [name for name in names if name not in content["store"]]:
            raise InputError(f"the file does not fit the model: it lacks '{lacking[0]}'")
        for part in ("store", "constraints"):
            content[part] = {name: content[part][name] for name in names}
        put_weights(content, model, model)
    except InputError as error:
        raise InputError(f"model weights {path}: {error}") from error


def _loose_parameters(model: Program, data: Data) -> list[str]:
    """Names of the store parameters that `model` registers and that belong to no module."""
    indexed = as_indexed(data, model)
    owned = {id(value) for module in modules_of(model) for value in module.parameters()}
    with torch.no_grad(), seeded(0, "set up"), poutine.trace(param_only=True) as capture:
        model(*indexed.fetch(torch.arange(min(len(indexed), 2))))
    sites: dict[str, Any] = {name: site for name, site in capture.trace.nodes.items() if site["type"] == "param"}
    return [name for name, site in sites.items() if id(site["value"].unconstrained()) not in owned]


def _run_once(model: Program, guide: Program, data: Data) -> None:
    indexed = as_indexed(data, model)
    rows = len(indexed) if isinstance(guide, AutoGuide) else min(len(indexed), 2)
    with torch.no_grad(), seeded(0, "set up"):
        args = indexed.fetch(torch.arange(rows))
        guide(*args)
        model(*args)


def all_modules(model: Program, guide: Program) -> list[nn.Module]:
    """The modules behind two programs, each once, in a fixed order, the model's first."""
    return list({id(module): module for program in (model, guide) for module in modules_of(program)}.values())


def copy_weights(model: Program, guide: Program) -> Weights:
    """A copy of every module's state and of the param store's entries that belong to no module."""
    modules = all_modules(model, guide)
    owned = {id(value) for module in modules for value in module.parameters()}
    state = pyro.get_param_store().get_state()
    loose = {name: value for name, value in state["params"].items() if id(value) not in owned}
    for name in loose:
        _check_constraint(name, state["constraints"][name])
    return {
        "modules": [{name: _copy(value) for name, value in module.state_dict().items()} for module in modules],
        "store": {name: _copy(value) for name, value in loose.items()},
        "constraints": {name: state["constraints"][name] for name in loose},
    }


def put_weights(weights: Weights, model: Program, guide: Program, *, unknown_modules: str = "ignore") -> None:
    """Restore a copy made by `copy_weights`, into the same tensors if they exist.

    A store entry of a module that is not registered yet cannot be tied to the module's tensor; `unknown_modules` is
    "ignore" or "refuse". Raises `InputError`, before anything is changed, if the copy does not fit.
    """
    modules, store = all_modules(model, guide), pyro.get_param_store()
    if len(modules) != len(weights["modules"]):
        raise InputError(
            f"the file contains {counted(len(weights['modules']), 'module')}, but the model and the guide have "
            f"{len(modules)}"
        )
    for module, state in zip(modules, weights["modules"], strict=True):
        _check_fit(state, module.state_dict(), type(module).__name__)
    present = {name: store._params[name] for name in store.keys() if name in weights["store"]}  # noqa: SIM118
    _check_fit({name: weights["store"][name] for name in present}, present, "the param store")
    absent = [name for name in weights["store"] if name not in present]
    if unknown_modules == "refuse" and any("$$$" in name for name in absent):
        raise InputError(
            "the file contains modules that pyro.module has not registered yet. Pass data=, so that model and guide "
            "run once to register them."
        )
    for module, state in zip(modules, weights["modules"], strict=True):
        module.load_state_dict(state)
    with torch.no_grad():
        for name, value in present.items():
            value.copy_(weights["store"][name])
    device = next((value.device for module in modules for value in module.parameters()), torch.get_default_device())
    _add_to_store(weights, [name for name in absent if "$$$" not in name], device)


def _add_to_store(weights: Weights, names: list[str], device: torch.device) -> None:
    pyro.get_param_store().set_state(
        {
            "params": {name: _copy(weights["store"][name]).to(device).requires_grad_() for name in names},
            "constraints": {name: weights["constraints"][name] for name in names},
        }
    )


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _check_fit(stored: Mapping[str, Any], present: Mapping[str, Any], where: str) -> None:
    if odd := sorted(set(stored) ^ set(present)):
        difference = f"'{odd[0]}' is in the file only" if odd[0] in stored else f"it lacks '{odd[0]}'"
        hint = "" if present else ". An autoguide has no parameters before its first run, so pass data=."
        raise InputError(f"the file does not fit {where}: {difference}{hint}")
    for name, value in stored.items():
        if isinstance(value, Tensor) and value.shape != present[name].shape:
            shapes = f"{tuple(value.shape)} in the file, but {tuple(present[name].shape)} here"
            raise InputError(f"the file does not fit {where}: '{name}' has shape {shapes}")


def _check_constraint(name: str, constraint: Any) -> None:
    base = getattr(constraint, "base_constraint", None)
    if type(constraint) not in _CONSTRAINTS:
        raise InputError(
            f"parameter '{name}': its constraint {type(constraint).__name__} cannot be saved. Use a constraint of "
            "torch or Pyro."
        )
    if base is not None:
        _check_constraint(name, base)


def write_file(path: str | Path, content: dict[str, Any]) -> None:
    """Write `content` so that `path` holds either its old content or all of the new. Raises `InputError`."""
    with replacing(Path(path), "checkpoint") as file:
        dump(file, content)


def dump(file: BinaryIO, content: dict[str, Any]) -> None:
    """Write `content` to a file open for reading and writing, as a checkpoint with its checksum."""
    torch.save({"format": FORMAT, **content}, file)
    seal(file)


def read_file(path: str | Path) -> dict[str, Any]:
    """The content that `write_file` wrote. Raises `InputError` if the file is missing, damaged or not a checkpoint."""
    damaged = (
        f"checkpoint {path}: is damaged, or not a checkpoint of this version of pyrogaps. Restore a copy, or move it "
        "away and train again."
    )
    try:
        with open(path, "rb") as file, torch.serialization.safe_globals(list(_CONSTRAINTS)):
            # torch verifies no checksums; bits that flipped on the disk would become weights.
            content = torch.load(file, map_location="cpu", weights_only=True) if is_sealed(file) else None
    except FileNotFoundError:
        raise InputError(f"checkpoint {path}: there is no such file. Check the path.") from None
    except IsADirectoryError:
        raise InputError(f"checkpoint {path}: is a folder. Name a file in it.") from None
    except OSError as error:
        raise InputError(f"checkpoint {path}: cannot be read: {error.strerror or error}. Use a copy.") from error
    except Exception as error:  # torch raises many kinds of errors for a file that is no checkpoint
        raise InputError(damaged) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(damaged)
    return content
