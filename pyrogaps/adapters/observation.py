"""p(x | z) from what a decoder returns."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from pyrogaps.adapters.distributions import described, entry, per_datapoint
from pyrogaps.adapters.posterior import SCALES, finite, span, words
from pyrogaps.density.parts import Part, recording
from pyrogaps.errors import InputError
from pyrogaps.likelihoods import LIKELIHOODS, OUTPUTS, Likelihood

LEARNED, UNKNOWN = "learned", "unknown"
Given = str | Callable[..., Any] | None
Scale = float | str | Callable[[], Any] | None


class Observation(nn.Module):
    """The likelihood of a decoder's output: one by name, a function of the output, or the distribution returned.

    Args:
        likelihood: a name in `LIKELIHOODS`, a function, or None where the decoder returns a distribution.
        output: what the decoder returns, a name in `OUTPUTS`; None for what is usual.
        scale: where the scale of a likelihood by name comes from: a number, "learned", a function without arguments,
            or what the decoder's second output is.

    Raises `InputError` for what does not go together.
    """

    def __init__(self, likelihood: Given, output: str | None, scale: Scale) -> None:
        super().__init__()
        if isinstance(likelihood, str) and likelihood not in LIKELIHOODS:
            raise InputError(
                f"likelihood: must be one of {', '.join(LIKELIHOODS)}, or a function from the decoder's output to a "
                f"distribution, got '{likelihood}'"
            )
        self.row = LIKELIHOODS[likelihood] if isinstance(likelihood, str) else None
        self.name = likelihood if isinstance(likelihood, str) else ""
        self.function = Part("likelihood", likelihood) if callable(likelihood) else None
        self.kind, self.said = self._kind_of(output), output is not None
        self.second = self._second_of(scale)
        self.given_scale = Part("scale", scale) if callable(scale) else None
        self.fixed_scale = None if callable(scale) or isinstance(scale, str) else scale
        self.log_scale = nn.Parameter(torch.zeros(())) if scale == LEARNED else None

    def _kind_of(self, output: str | None) -> str:
        kinds = () if self.row is None else self.row.outputs
        if output is None and self.row is not None and self.row.must_be_said:
            raise InputError(
                f"output: the likelihood '{self.name}' needs it. Pass output='{kinds[0]}' or output='{kinds[1]}', "
                "whichever the decoder returns"
            )
        if output is not None and output not in kinds:
            known = f"is one of {', '.join(kinds)} for '{self.name}'" if kinds else "has no use with this likelihood"
            raise InputError(f"output: it {known}, got '{output}'. {'Pass one of them' if kinds else 'Leave it out'}")
        return output or next(iter(kinds), "")

    def _second_of(self, scale: Scale) -> str:
        """What the decoder's second output is; empty where it has one output, UNKNOWN where that is not said."""
        if self.row is None or self.row.second != "scale":
            if scale is not None:
                raise InputError("scale: this likelihood has none. Leave it out")
            return "" if self.row is None else self.row.second
        if isinstance(scale, str) and scale not in (LEARNED, *SCALES):
            raise InputError(
                f"scale: must be a number, a function, '{LEARNED}', or what the decoder's second output is, one of "
                f"{', '.join(SCALES)}, got '{scale}'"
            )
        if scale is None:
            return UNKNOWN
        return scale if isinstance(scale, str) and scale in SCALES else ""

    def forward(self, output: Any, x: Tensor) -> tuple[Any, Tensor, str]:
        """p(x | z) of Pyro, with batch shape `(B,)`; x in the shape that it scores; a remedy for x outside its support.

        Raises `InputError` for outputs of unknown form, or of another size than x.
        """
        if self.function is not None:
            output = self.function(output)
        if isinstance(output, Distribution):
            if self.row is not None:
                raise InputError(
                    f"likelihood: it is '{self.name}', but the decoder returns {described(output)}. Leave likelihood "
                    "out"
                )
            return self._of_distribution(output, x)
        if self.row is None:
            at = "likelihood" if self.function is not None else "decoder"
            names = ", ".join(LIKELIHOODS)
            what = "a distribution" if self.function is not None else f"a distribution, or name a likelihood: {names}"
            raise InputError(f"{at}: it returned {described(output)}. Return {what}")
        first, second = self._parts(output)
        value = self._shaped(first, x, self.row)
        fn = self.row.build(value, self.kind, None if second is None else self._like(second, first).reshape(x.shape))
        seen = x if self.row.over_classes else x.to(value.dtype)
        return per_datapoint(fn), seen, self.row.remedy

    def _parts(self, output: Any) -> tuple[Tensor, Tensor | None]:
        """The decoder's output and the second parameter, where there is one."""
        first, *second = self._tensors(output)
        if second:
            return first, self._second(second[0])
        if self.given_scale is not None:
            return first, torch.as_tensor(self.given_scale())
        if self.log_scale is not None:
            return first, self.log_scale.exp()
        return first, None if self.fixed_scale is None else torch.as_tensor(self.fixed_scale)

    def _tensors(self, output: Any) -> tuple[Tensor, ...]:
        """The one or two tensors that a decoder returned."""
        if (held := entry(output, "reconstruction")) is not None:
            output = held
        pair = isinstance(output, tuple | list) and len(output) == 2 and all(isinstance(o, Tensor) for o in output)
        if not pair and not isinstance(output, Tensor):
            raise InputError(
                f"decoder: it returned {described(output)}. Return a tensor, two tensors (mean, scale), a distribution "
                "or an object with .reconstruction"
            )
        if self.second == UNKNOWN and pair:
            raise InputError(
                f"decoder: it returned {described(output)}. Say what the second is: scale='log_variance', 'log_scale' "
                "or 'scale'"
            )
        if self.second == UNKNOWN:
            raise InputError(
                f"scale: the likelihood '{self.name}' needs one. Pass a number (1.0 where the loss is half a sum of "
                "squares, 0.5**0.5 where it is a sum of squares), a function that returns yours, or "
                f"scale='{LEARNED}'"
            )
        if pair != bool(self.second):
            wanted = f"(mean, {words(self.second)})" if self.second else "one tensor"
            said = self.row is not None and self.row.second == "scale" and not self.second
            further = ", or say by scale= what the second is" if said else ""
            raise InputError(f"decoder: it returned {described(output)}. Return {wanted}{further}")
        return tuple(output) if pair else (output,)

    def _second(self, second: Tensor) -> Tensor:
        if self.second in ("scale", "dispersion") and not recording() and float(second.detach().min()) < 0:
            remedy = "Pass scale='log_scale' or scale='log_variance'" if self.second == "scale" else "Return its exp"
            raise InputError(
                f"decoder: its second output has negative values ({span(second)}), so it is no {self.second}. {remedy}"
            )
        return SCALES[self.second](second) if self.second in SCALES else second

    def _like(self, second: Tensor, first: Tensor) -> Tensor:
        second = second.to(first)
        if (second.numel() == len(first) and second.dim() > 1) or second.shape == first.shape[:1]:
            return second.reshape(-1, *[1] * (first.dim() - 1)).expand_as(first)  # one for each datapoint
        try:
            return second.expand_as(first)
        except RuntimeError as error:
            raise InputError(
                f"decoder: its output has shape {tuple(first.shape)}, and its {self.second or 'scale'} "
                f"{tuple(second.shape)}. Give it one number, or one for each element"
            ) from error

    def _shaped(self, value: Tensor, x: Tensor, row: Likelihood) -> Tensor:
        """The decoder's output in the shape of x, classes last."""
        if not row.over_classes:
            if len(value) == len(x) and value.numel() == x.numel():
                return value.reshape(x.shape)
            shapes = f"{tuple(value.shape[1:])} per datapoint, but x has {tuple(x.shape[1:])}"
            raise InputError(f"decoder: its output has shape {shapes}. Make them equal, or of equal size")
        if value.shape[:-1] != x.shape and value.shape[:1] + value.shape[2:] == x.shape:
            return value.movedim(1, -1)
        if value.dim() > 1 and value.shape[0] == len(x) and value.shape[:-1].numel() == x.numel():
            return value.reshape(*x.shape, value.shape[-1])
        raise InputError(
            f"decoder: its output has shape {tuple(value.shape[1:])} per datapoint, but x has {tuple(x.shape[1:])}. "
            "Return x's shape with a last axis of classes"
        )

    def _of_distribution(self, output: Distribution, x: Tensor) -> tuple[Any, Tensor, str]:
        fn = per_datapoint(output)
        if tuple(fn.batch_shape) != (len(x),) or fn.event_shape.numel() != x[0].numel():
            raise InputError(
                f"likelihood: it is {described(output)} for {len(x)} datapoints of shape {tuple(x.shape[1:])}. Return "
                "one with the datapoints as its first batch dimension, and of their size"
            )
        return fn, x.reshape(len(x), *fn.event_shape), ""

    def judge(self, outputs: list[Any]) -> None:
        """Refuse outputs, of latents near and far, that cannot be of the kind that they are said or assumed to be."""
        if self.row is None or not self.kind or (self.said and self.kind == "logits"):
            return
        row, firsts = OUTPUTS[self.kind], [self._tensors(output)[0] for output in outputs]
        values = finite(firsts)
        if bool((values != values[:1]).any()) and row.contradicted(values):
            raise InputError(
                f"decoder: {row.reason} ({span(firsts[0])}), so they are no {row.noun}. "
                f"Pass output='{row.likelier}'" + ("; or output='logits', if they are" if self.kind == "logits" else "")
            )
