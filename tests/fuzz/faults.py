"""The faults of random programs: words that the message must hold, and the changes that a fault makes to a pair."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from tests.fuzz.programs import Program, read

# Those without a row in `CHANGES` are in the programs themselves.
FAULTS: dict[str, tuple[str, ...]] = {
    "latent outside the plate": ("site 'outside'",),
    "hard-coded plate": ("plate", "has size"),
    "site missing from the guide": ("site 'a'", "missing"),
    "site missing from the model": ("site 'extra'",),
    "observed in the guide": ("site 'a'", "observed"),
    "the model as the guide": ("observed in the guide",),
    "another support": ("site 'a'", "support"),
    "NaN in the data": ("NaN",),
    "NaN in a parameter": ("NaN",),
    "batch statistics in the model": ("rows",),
    "batch statistics in the guide": ("rows",),
    "delta in the guide": ("site 'a'", "Delta"),
    "wrong shape in the guide": ("site 'a'", "guide's"),
    "unknown plate": ("plate",),
    "fails on a subset": ("guide",),
    "random density": ("random",),
    "rows drawn with replacement": ("random",),
    "guide's plate of another size": ("plate 'data'", "size"),
    "event dimension in the guide": ("'a'", "guide's"),
    "discrete in the guide": ("site 'a'", "discrete"),
    "discrete latent": ("site 'd'", "Poisson"),
    "delta in the model": ("site 'd'", "Delta"),
    "projected normal": ("site 'd'", "reparametrise"),
    "latent for some rows": ("site 'd'",),
    "observed outside the plate": ("plate",),
    "loop over the plate": ("plate",),
    "data outside the support": ("site 'seen'", "support"),
    "no observed site": ("observed",),
    "two plates around every site": ("several plates",),
    "masked NaN in the data": ("NaN",),
    "too many arguments": ("model", "argument"),
    "guide without arguments": ("guide", "argument"),
    "lengths differ": ("data", "lengths"),
    "no datapoints": ("data", "no datapoints"),
    "swapped": ("model",),
}


@dataclass(frozen=True)
class Pair:
    """What `decompose` is called with, and how to read x from the model's arguments."""

    model: Any
    guide: Any
    data: Any
    x: Callable[..., Tensor]

    def beside(self, draw: Callable[[Tensor], Any], *, plate: bool = True, guide: bool = False) -> "Pair":
        """With another site in the model, drawn by `draw(x)`, and in the guide."""

        def extended(program: Any) -> Callable[..., None]:
            def both(*args: Any) -> None:
                program(*args)
                x = self.x(*args)
                with pyro.plate("data", len(x)) if plate else poutine.mask(mask=True):
                    draw(x)

            return both

        return Pair(extended(self.model), extended(self.guide) if guide else self.guide, self.data, self.x)


def sample(distribution: Any, obs: Callable[[Tensor], Tensor | None] = lambda x: None, name: str = "d") -> Any:
    return lambda x: pyro.sample(name, distribution(x), obs=obs(x))


def _loop(x: Tensor) -> None:
    for row in pyro.plate("rows", len(x)):
        pyro.sample(f"row {row}", dist.Normal(0.0, 1.0), obs=x[row, 0])


def _some_rows(x: Tensor) -> None:
    if bool(x[0, 0] > x[-1, 0]) or len(x) % 2:
        pyro.sample("d", dist.Normal(x[:, 0], 1.0))


def _mask_nan(pair: Pair) -> Pair:
    data = pair.data.clone()
    data[0, 0] = torch.nan
    return Pair(poutine.mask(pair.model, mask=False), pair.guide, data, pair.x)


def _twice(pair: Pair) -> Pair:
    def model(*args: Any) -> None:
        for _ in pyro.plate("everything", 1):
            pair.model(*args)

    return Pair(model, pair.guide, pair.data, pair.x)


CHANGES: dict[str, Callable[[Pair], Pair]] = {
    "discrete latent": lambda pair: pair.beside(sample(lambda x: dist.Poisson(0.5 + 0 * x[:, 0])), guide=True),
    "delta in the model": lambda pair: pair.beside(sample(lambda x: dist.Delta(x[:, 0]))),
    "projected normal": lambda pair: pair.beside(
        sample(lambda x: dist.ProjectedNormal(torch.ones(len(x), 2, dtype=x.dtype))), guide=True
    ),
    "latent for some rows": lambda pair: pair.beside(_some_rows),
    "observed outside the plate": lambda pair: pair.beside(
        sample(lambda x: dist.Normal(0.0, 1.0), lambda x: x.sum()), plate=False
    ),
    "loop over the plate": lambda pair: pair.beside(_loop, plate=False),
    "data outside the support": lambda pair: pair.beside(
        sample(lambda x: dist.Bernoulli(0.5 + 0 * x[:, 0]), lambda x: 2.0 + 0 * x[:, 0], "seen")
    ),
    "no observed site": lambda pair: Pair(poutine.uncondition(pair.model), pair.guide, pair.data, pair.x),
    "two plates around every site": _twice,
    "masked NaN in the data": _mask_nan,
    "too many arguments": lambda pair: Pair(lambda x: pair.model(x), pair.guide, (pair.data, pair.data), pair.x),
    "guide without arguments": lambda pair: Pair(pair.model, lambda: None, pair.data, pair.x),
    "lengths differ": lambda pair: Pair(pair.model, pair.guide, (pair.data, pair.data[1:]), pair.x),
    "no datapoints": lambda pair: Pair(pair.model, pair.guide, pair.data[:0], pair.x),
    "the model as the guide": lambda pair: Pair(pair.model, pair.model, pair.data, pair.x),
    "swapped": lambda pair: Pair(pair.guide, pair.model, pair.data, pair.x),
}


def pair_of(program: Program, guide: Any) -> Pair:
    """Model, guide and data of a program, with its fault."""
    spec = program.spec
    pair = Pair(program.model, guide, program.data, lambda *args: read(spec, *args)[0])
    return CHANGES[spec.fault](pair) if spec.fault in CHANGES else pair
