"""Many particles of a model without a data plate in one run, though the model is written for one: `torch.func.vmap`."""

import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor
from torch.func import vmap
from torch.overrides import TorchFunctionMode

from pyrogaps.density.score import ScoreModel

# How the particles of a model without a data plate are evaluated, fastest first: its own operations broadcast over a
# further axis; its operations for one particle are batched by `torch.func.vmap`; so they are, with a buffer for each
# particle, because the model writes latents into buffers; one run for each.
Particles = Literal["broadcast", "mapped", "mapped buffers", "one by one"]
# Evaluations of log p(x, z) of a default ledger, roughly, for the prediction of its time.
EVALUATIONS = 20_000
MIN_ANNOUNCED = 10.0  # seconds
BUFFERS = {
    *(torch.zeros, torch.ones, torch.empty, torch.full, torch.eye),
    *(torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like, torch.clone),
    *(Tensor.new_zeros, Tensor.new_ones, Tensor.new_empty, Tensor.new_full, Tensor.new_tensor, Tensor.clone),
}


class _BuffersOfEach(TorchFunctionMode):
    """Makes new floating-point tensors batched, as `zero` is, so that batched values can be written into them."""

    def __init__(self, zero: Tensor) -> None:
        super().__init__()
        self.zero = zero

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in BUFFERS and isinstance(result, Tensor) and result.is_floating_point():
            return result + self.zero.to(result.dtype)
        return result


def mapped_rows(run_row: Callable[[Tensor], ScoreModel], flat: Tensor, particles: Particles) -> ScoreModel:
    """The handler of one run for all rows `flat` `(R, dim)`, of which `run_row` takes one, `(1, dim)`.

    What a run leaves besides tensors, such as the frames of plates, is the same for every row.
    """
    handlers: list[ScoreModel] = []
    with torch.no_grad():
        run_row(flat[:1])  # Pyro registers parameters in a program's first run, which vmap would refuse

    def one(row: Tensor, zero: Tensor) -> dict[str, Any]:
        with _BuffersOfEach(zero) if particles == "mapped buffers" else nullcontext():
            handler = run_row(row[None])
        handlers[:] = [handler]
        masks = {name: mask for name, mask in handler.masks.items() if mask is not None}
        log_prior, log_likelihood = handler.terms
        terms = {"log_prior": log_prior, "log_likelihood": log_likelihood, "log_jacobian": handler.log_jacobian}
        return {"terms": terms, "values": handler.values, "masks": masks}

    # Draws that do not matter, such as those of hidden sites, are made for each row, as in one run for each.
    with warnings.catch_warnings():  # of operations that vmap does one by one: still faster than one run for each
        warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
        results = vmap(one, randomness="different")(flat, flat.new_zeros(len(flat)))
    handlers[0].take_rows(results["terms"], results["values"], results["masks"])
    return handlers[0]


def seconds_of(call: Callable[[], Any]) -> float:
    """The shorter time of two calls, in seconds."""
    times = []
    for _ in range(2):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def one_by_one_note(seconds: float, reason: Exception | None) -> str | None:
    """The announcement of a model that takes one run for each particle, in `seconds` each; None where that is fast."""
    if EVALUATIONS * seconds < MIN_ANNOUNCED:
        return None
    why = "together, they have other values"
    if reason is not None:
        why = f"{type(reason).__name__}: {' '.join(str(reason).split())[:120]}"
    return (
        f"model: it runs once for every particle, {1e3 * seconds:.1f} ms each, so that a ledger takes about "
        f"{_duration(EVALUATIONS * seconds)}. Neither broadcasting nor torch.func.vmap can evaluate particles together "
        f"({why}). Use operations that broadcast over a left axis (x.sum(-1), not x.sum()), without .item() and "
        "without if statements on latents"
    )


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
