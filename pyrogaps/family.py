"""What guides may declare: two base classes, every part of them optional.

A guide need not subclass them. The library reads the same attributes of any Pyro guide, see `AmortizedGuide.of`.
"""

from collections.abc import Callable
from typing import Any

from pyrogaps.errors import InputError
from pyrogaps.guard import failures_named


class AmortizedGuide:
    """A guide with one network, or one set of parameters, for all datapoints.

    Attributes:
        local_family: `local_family(model) -> guide`, its own family with parameters for each datapoint. Without it the
            guide's distributions are freed, given earlier draws where they depend on these, or, for flows, its weights
            fine-tuned for each datapoint.
        start_local: `start_local(guide, *args)` puts a guide that `local_family` made at this guide's own output for
            the model's arguments. Without it, at the moments of that output.
        conditions: what it is shown of the data: a boolean mask over the model's first argument, True where it is
            shown, or a function from the model's arguments to masks. Without it, all of the data.
        lookahead: for sequences, how many steps ahead the factor of each step looks.
        augment: `augment(model)`, the model with a reverse model for the guide's auxiliary variables, whose evidence is
            the model's own.

    Example:
        >>> import torch, pyrogaps as pg
        >>> from pyrogaps.guides.amortized import AmortizedNormal
        >>> class UpperHalf(AmortizedNormal):
        ...     def seen(self, x): return x * (torch.arange(16) < 8)
        ...     def conditions(self, x): return (torch.arange(16) < 8).expand(x.shape)
        >>> int(pg.AmortizedGuide.of(UpperHalf(16, 2, (8,))).conditions(torch.zeros(3, 16)).sum())
        24
    """

    local_family: Callable[..., Any] | None = None
    start_local: Callable[..., None] | None = None
    conditions: Any = None
    lookahead: Any = None
    augment: Callable[..., Any] | None = None

    @staticmethod
    def of(guide: Any) -> "AmortizedGuide":
        """What any guide declares: the guide itself where it is an `AmortizedGuide`, else a view of its attributes."""
        return guide if isinstance(guide, AmortizedGuide) else _DeclaredByAnyGuide(guide)


class LocalFamily:
    """A guide with parameters for each datapoint.

    Attributes:
        starts_from: another family, which is refined first; this one starts at the Gaussian that it ends at.
        start_at: `start_at(loc, scale)` starts the guide at a factorised Gaussian, `(B, dim)` each.
        location_scale: `location_scale(loc, scale_tril)` sets a guide that is Gaussian in unconstrained space to
            these means `(B, dim)` and factors `(B, dim, dim)`, so that it is refined by natural gradients.
        units: `units()`, natural steps of its parameters by name, by which refinement scales its own.

    Example:
        >>> import torch, pyrogaps as pg
        >>> from pyrogaps.guides.local import AutoLocalMultivariateNormal
        >>> from pyrogaps.models.linear_gaussian import LinearGaussian
        >>> pg.LocalFamily.of(AutoLocalMultivariateNormal(LinearGaussian.random(4, 2))).start_at is not None
        True
    """

    starts_from: Callable[..., Any] | None = None
    start_at: Callable[..., None] | None = None
    location_scale: Callable[..., None] | None = None
    units: Callable[[], dict[str, Any]] | None = None

    @staticmethod
    def of(guide: Any) -> "LocalFamily":
        """What any guide declares: the guide itself where it is a `LocalFamily`, else a view of its attributes."""
        return guide if isinstance(guide, LocalFamily) else _DeclaredByAnyFamily(guide)


class _DeclaredByAnyGuide(AmortizedGuide):
    def __init__(self, guide: Any) -> None:
        self.local_family = getattr(guide, "local_family", None)
        self.start_local = getattr(guide, "start_local", None)
        self.conditions = getattr(guide, "conditions", None)
        self.lookahead = getattr(guide, "lookahead", None)
        self.augment = getattr(guide, "augment", None)


class _DeclaredByAnyFamily(LocalFamily):
    def __init__(self, guide: Any) -> None:
        self.starts_from = getattr(guide, "starts_from", None)
        self.start_at = getattr(guide, "start_at", None)
        self.location_scale = getattr(guide, "location_scale", None)
        self.units = getattr(guide, "units", None)


def augmented(model: Callable[..., Any], guide: Any) -> Callable[..., Any]:
    """`model` with the guide's reverse model for its auxiliary variables; itself where the guide has none."""
    augment = AmortizedGuide.of(guide).augment
    if augment is None:
        return model
    with failures_named("guide.augment"):
        extended: Callable[..., Any] = augment(model)
    if not callable(extended):
        raise InputError(f"guide.augment: it must return a model, got {type(extended).__name__}")
    return extended
