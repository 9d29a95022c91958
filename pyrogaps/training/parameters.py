"""The trainable tensors, and one optimizer for all of them."""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.optim import PyroOptim
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, get_total_norm
from torch.optim import Optimizer

from pyrogaps.density.copies import check_own
from pyrogaps.density.runs import Program
from pyrogaps.errors import InputError
from pyrogaps.family import augmented


def trainable_parameters(
    model: Program, guide: Program, args: tuple[Any, ...], *, freeze_model: bool
) -> dict[str, Tensor]:
    """The unconstrained leaf tensors to train, by a name that is the same in every process.

    They are the parameters that the programs register with Pyro when run on `args`, and those of an `nn.Module` that
    *is* the model or the guide, or owns it as a method. `freeze_model` keeps only those that the guide depends on.

    Raises `InputError` if no parameter is left to train, or if a frozen model shares parameters with its guide.
    """
    candidates = [*_module_parameters(model, guide), *_registered(model, guide, args)]
    # A tensor with several names keeps its first.
    unique = {id(value): (name, value) for name, value in reversed(candidates)}
    named = {name: value for name, value in unique.values() if value.requires_grad}
    if freeze_model:
        named = guide_parameters(named, model, guide, args, "freeze_model=True")
    if not named:
        raise InputError(
            "training: there are no trainable parameters. Register them with pyro.param or pyro.module, or make the "
            "model or the guide an nn.Module."
        )
    return dict(sorted(named.items()))


def _module_parameters(model: Program, guide: Program) -> Iterator[tuple[str, Tensor]]:
    for label, program in (("model", model), ("guide", guide)):
        module = program if isinstance(program, nn.Module) else getattr(program, "__self__", None)
        if isinstance(module, nn.Module):
            yield from ((f"{label}.{name}", value) for name, value in module.named_parameters())


def _registered(model: Program, guide: Program, args: tuple[Any, ...]) -> Iterator[tuple[str, Tensor]]:
    with torch.no_grad(), poutine.trace(param_only=True) as capture:
        guide_trace = poutine.trace(guide).get_trace(*args)
        poutine.replay(model, trace=guide_trace)(*args)
    for name, site in capture.trace.nodes.items():
        if site["type"] == "param":
            yield f"store:{name}", _own_tensor(name, site)


def _own_tensor(name: str, site: Any) -> Tensor:
    """The parameter behind a `pyro.param` site.

    If another module was registered under the same name before, the store still holds its tensor, and Pyro would
    silently train neither. The present module's parameter then replaces it in the store.
    """
    stored: Tensor = site["value"].unconstrained()
    own = site["args"][1] if len(site["args"]) > 1 else None
    if "$$$" not in name or not isinstance(own, nn.Parameter) or own is stored:
        return stored
    store = pyro.get_param_store()
    del store[name]
    store.setdefault(name, own)
    return own


def guide_parameters(
    named: dict[str, Tensor], model: Program, guide: Program, args: tuple[Any, ...], setting: str
) -> dict[str, Tensor]:
    """The parameters in `named` that the guide depends on.

    Raises `InputError` if the model depends on one of them too, which `setting` does not allow.
    """
    guide_trace = poutine.trace(guide).get_trace(*args)
    sites: list[Any] = [site for site in guide_trace.nodes.values() if site["type"] == "sample"]
    draws = sum(site["value"].sum() for site in sites)
    total = draws + guide_trace.log_prob_sum()
    check_own(guide, total)
    in_guide = _touched(total, named)
    guide_trace.detach_()
    in_model = _touched(poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args).log_prob_sum(), named)
    extended_model = augmented(model, guide)
    if extended_model is not model:
        extended = poutine.replay(extended_model, trace=guide_trace)
        in_guide |= _touched(poutine.trace(extended).get_trace(*args).log_prob_sum(), named) - in_model
    if shared := sorted(in_guide & in_model):
        raise InputError(
            f"training: {setting}, but the guide shares parameter '{shared[0]}' with the model. Give each its own."
        )
    return {name: value for name, value in named.items() if name in in_guide}


def _touched(total: Any, named: dict[str, Tensor]) -> set[str]:
    if not named or not isinstance(total, Tensor) or not total.requires_grad:
        return set()
    # cuDNN refuses gradients of recurrent layers in evaluation mode, which is on here.
    with torch.backends.cudnn.flags(enabled=False):
        gradients = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    return {name for name, gradient in zip(named, gradients, strict=True) if gradient is not None}


def clear_gradients(parameters: Iterable[Tensor]) -> None:
    for value in parameters:
        value.grad = None


class JointOptimizer(PyroOptim):
    """One torch optimizer over all parameters, for `pyro.infer.SVI`.

    Pyro's own optimizers clip the gradient of each parameter separately; this one clips the norm of the whole gradient.
    Parameters that first appear during training are added, unless `fixed`. A step moves only the parameters whose names
    `moves` accepts (default: all). It raises `FloatingPointError`, and changes nothing, if the gradient is not finite.
    """

    moves: Callable[[str], bool] | None = None

    def __init__(
        self,
        kind: type[Optimizer],
        options: dict[str, Any],
        named: dict[str, Tensor],
        *,
        clip_norm: float | None = None,
        fixed: bool = False,
    ) -> None:
        super().__init__(kind, options)
        self.named, self.max_norm, self.fixed = dict(named), clip_norm, fixed
        try:
            self.optimizer: Optimizer = kind(list(named.values()), **self._fused(kind, options, named.values()))
        except (TypeError, ValueError) as error:
            raise InputError(f"training: optimizer {kind.__name__}: {error}") from error

    def move_only(self, moves: Callable[[str], bool] | None) -> None:
        """Let steps move only the parameters whose names `moves` accepts; None: all."""
        self.moves = moves

    @staticmethod
    def _fused(kind: type[Optimizer], options: dict[str, Any], values: Iterable[Tensor]) -> dict[str, Any]:
        """`options` plus `fused=True` if the optimizer supports it here and no implementation was chosen."""
        choices = {"fused", "foreach", "capturable", "differentiable"}
        offered = "fused" in inspect.signature(kind).parameters and not choices & set(options)
        supported = all(value.is_floating_point() and value.device.type in ("cpu", "cuda") for value in values)
        return {**options, "fused": True} if offered and supported else options

    def set_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def __call__(self, params: Iterable[Tensor], *args: Any, **kwargs: Any) -> None:
        if not self.fixed:
            self._adopt(params)
        if self.moves is not None:
            clear_gradients(value for name, value in self.named.items() if not self.moves(name))
        norm = self._norm()
        if not math.isfinite(norm):
            raise FloatingPointError(f"the norm of the gradient is {norm}")
        self.optimizer.step()
        clear_gradients(self.named.values())

    def _norm(self) -> float:
        """Norm of the whole gradient before clipping; clips the gradient if there is a bound."""
        if self.max_norm is not None:
            return float(clip_grad_norm_(list(self.named.values()), self.max_norm))
        gradients = [value.grad for value in self.named.values() if value.grad is not None]
        return float(get_total_norm(gradients))

    def _adopt(self, params: Iterable[Tensor]) -> None:
        known = {id(value) for value in self.named.values()}
        unknown = [value for value in params if value.grad is not None and id(value) not in known]
        names = ((pyro.get_param_store().param_name(value), value) for value in unknown)
        added = {f"store:{name}": value for name, value in names if name}
        for name, value in sorted(added.items()):
            self._add(name, value)
        # The norm is a sum: a fixed order makes a resumed run round it in the same way.
        self.named = dict(sorted(self.named.items())) if added else self.named

    def _add(self, name: str, value: Tensor) -> None:
        self.named[name] = value
        group = {key: option for key, option in self.optimizer.param_groups[0].items() if key != "params"}
        self.optimizer.add_param_group({"params": [value], **group})

    def get_state(self) -> dict[str, Any]:
        """A copy of the optimizer's state of each parameter, by name."""
        states = {name: self.optimizer.state.get(value, {}) for name, value in self.named.items()}
        return {
            name: {key: item.clone() if isinstance(item, Tensor) else item for key, item in state.items()}
            for name, state in states.items()
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Restore the result of `get_state`, including parameters that were added during training.

        Raises `InputError` for a name that is neither in the optimizer nor in the param store.
        """
        store = pyro.get_param_store()
        for name in sorted(set(state) - set(self.named)):
            bare = name.removeprefix("store:")
            if bare not in store:
                raise InputError(f"its optimizer state has parameter '{bare}', which the model and the guide lack")
            self._add(name, store._params[bare])
        self.named = dict(sorted(self.named.items()))
        for name, entries in state.items():
            value = self.named[name]
            self.optimizer.state[value] = {key: self._like(item, key, value) for key, item in entries.items()}

    def _like(self, item: Any, key: str, value: Tensor) -> Any:
        # Optimizers that are not fused keep their step counter on the CPU, and all else on the parameter's device.
        fused = self.optimizer.param_groups[0].get("fused")
        return item.to(value.device) if isinstance(item, Tensor) and (fused or key != "step") else item
