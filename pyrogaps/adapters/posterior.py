"""q(z | x) from what an encoder returns."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution

from pyrogaps.adapters.distributions import described, entry, per_datapoint
from pyrogaps.density.parts import recording
from pyrogaps.errors import InputError

# The standard deviation of q from each kind of second output.
SCALES: dict[str, Callable[[Tensor], Tensor]] = {
    "log_variance": lambda second: (second / 2).exp(),
    "log_scale": lambda second: second.exp(),
    "scale": lambda second: second,
}
MEANS = ("embedding", "mean", "mu", "loc")
# Names under which encoders return the second, in attributes or keys.
SECONDS = {
    **dict.fromkeys(("log_covariance", "logvar", "log_var", "log_variance"), "log_variance"),
    **dict.fromkeys(("log_scale", "log_std", "logstd", "log_sigma"), "log_scale"),
    **dict.fromkeys(("scale", "std", "sigma"), "scale"),
}
# The largest of log-variances that are positive by a collapse to the prior.
COLLAPSED = 0.1


@dataclass(frozen=True)
class Reader:
    """How the output of an encoder is read.

    Attributes:
        second: what the second of two outputs is, or None.
        latent_dim: the length of z, or None.
        standard: whether the prior is the standard Normal, beside which scales can be judged.
    """

    second: str | None
    latent_dim: int | None
    standard: bool

    def __call__(self, output: Any) -> Any:
        """q(z | x) of Pyro, with batch shape `(B,)`, from an encoder's output for B datapoints.

        Raises `InputError` for outputs of unknown form, and numbers that cannot be what they are said to be.
        """
        fn = self._read(output)
        shape = tuple(fn.event_shape)
        if len(fn.batch_shape) != 1 or not shape:
            raise InputError(
                f"encoder: its output is q(z | x) with batch shape {tuple(fn.batch_shape)} and event shape {shape}. "
                "Return a mean, or a distribution, of shape (B, latent_dim) for B datapoints"
            )
        if self.latent_dim is not None and shape != (self.latent_dim,):
            found = f"{shape[0]} latents" if len(shape) == 1 else f"latents of shape {shape}"
            right = f"Pass latent_dim={shape[0]}, or leave it out" if len(shape) == 1 else "Leave latent_dim out"
            raise InputError(f"latent_dim: it is {self.latent_dim}, but the encoder returns {found}. {right}")
        return fn

    def _read(self, output: Any) -> Any:
        if isinstance(output, Distribution):
            return per_datapoint(output)
        if (held := entry(output, "latent_dist")) is not None:
            return self._read(held)
        if (named := _named(output)) is not None:
            mean, second, kind = named
            if self.second not in (None, kind):
                raise InputError(
                    f"second: it is '{self.second}', but the encoder returns {described(output)}, whose name says "
                    f"'{kind}'. Leave second out, or return (mean, second) as a tuple"
                )
            return self._normal(mean, second, kind)
        if isinstance(output, tuple | list) and len(output) == 2 and all(isinstance(o, Tensor) for o in output):
            if self.second is None:
                raise InputError(
                    f"encoder: it returned {described(output)}. Say what the second is: second='log_variance', "
                    "'log_scale' or 'scale'"
                )
            return self._normal(output[0], output[1], self.second)
        raise InputError(
            f"encoder: it returned {described(output)}. Return (mean, log-variance) and say second='log_variance' "
            f"(or 'log_scale', 'scale'), or a torch distribution{_hint(output)}"
        )

    def _normal(self, mean: Tensor, second: Tensor, kind: str) -> Any:
        if mean.shape != second.shape:
            raise InputError(
                f"encoder: its mean has shape {tuple(mean.shape)} and its {words(kind)} "
                f"{tuple(second.shape)}. Return both in one shape, (B, latent_dim)"
            )
        if kind == "scale" and not recording() and float(second.detach().min()) < 0:
            raise InputError(
                f"encoder: its second output has negative values ({span(second)}), so it is no "
                "scale. Pass second='log_variance' or second='log_scale'"
            )
        return per_datapoint(dist.Normal(mean, SCALES[kind](second)))

    def judge(self, outputs: list[Any]) -> None:
        """Refuse log-variances and log-scales that are positive throughout, for inputs near and far, as scales are.

        They would make q(z | x) wider than the standard Normal prior everywhere, which no encoder learns.
        """
        seconds = [found for output in outputs if (found := self._second_of(output)) is not None]
        kinds = {kind for _, kind in seconds}
        if not self.standard or len(seconds) < len(outputs) or kinds & {"scale"}:
            return
        values = finite(second for second, _ in seconds)
        if bool((values >= 0).all()) and bool((values > COLLAPSED).any()):
            raise InputError(
                f"encoder: its second output is positive throughout ({span(seconds[0][0])}), as scales are; as a "
                f"{words(*kinds)} it would make q(z | x) wider than the prior everywhere. Pass second='scale'; or, if "
                "it is right, return a distribution, dist.Normal(mean, scale)"
            )

    def _second_of(self, output: Any) -> tuple[Tensor, str] | None:
        if isinstance(output, Distribution):
            return None
        if (held := entry(output, "latent_dist")) is not None:
            return self._second_of(held)
        if (named := _named(output)) is not None:
            return named[1:]
        return (output[1], self.second) if isinstance(output, tuple | list) and self.second else None


def _named(output: Any) -> tuple[Tensor, Tensor, str] | None:
    """Mean, second, and what the second is, by their names."""
    means = [mean for name in MEANS if isinstance(mean := entry(output, name), Tensor)]
    seconds = [(second, kind) for name, kind in SECONDS.items() if isinstance(second := entry(output, name), Tensor)]
    return (means[0], *seconds[0]) if means and seconds else None


def _hint(output: Any) -> str:
    if isinstance(output, Tensor):
        return ", as in encoder=lambda x: net(x).chunk(2, -1) where mean and second stand side by side"
    if isinstance(output, tuple | list) and len(output) > 2:
        return ", as in encoder=lambda x: net(x)[1:3] to pick them"
    return ""


def words(kind: str) -> str:
    return kind.replace("_", "-")


def span(values: Tensor) -> str:
    """The range of values."""
    return f"from {float(values.detach().min()):.3g} to {float(values.detach().max()):.3g}"


def finite(outputs: Iterable[Tensor]) -> Tensor:
    """All finite values of outputs, `(K,)`. Those for far inputs may overflow, or be those of no data."""
    values = torch.cat([output.detach().flatten() for output in outputs])
    return values[values.isfinite()]
