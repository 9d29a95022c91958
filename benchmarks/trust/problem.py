"""`Problem`: a Pyro model, a guide and data whose evidence and best bounds are known without the library."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Generator, Tensor


@dataclass(frozen=True)
class Bounds:
    """Exact ELBOs per datapoint, nats, `(N,)` each; None where there is no deterministic way to them.

    Attributes:
        elbo: L[q] of the guide.
        elbo_refined: L[q*], of the best member of the guide's family for each datapoint.
        elbo_shared: L[q*_C] on these data, of the best member that is shown what the guide is shown.
    """

    elbo: Tensor | None = None
    elbo_refined: Tensor | None = None
    elbo_shared: Tensor | None = None


@dataclass(frozen=True)
class Instance:
    """A problem with its data drawn.

    Attributes:
        model, guide: Pyro programs, called with `data`.
        data: a tensor of N datapoints, or one data set for `plate=False`.
        log_evidence: exact log p(x_n), nats, `(N,)`, in double precision.
        bounds: computes the exact ELBOs of these data; called once, because some take a second.
        plate: passed on to `decompose`.
    """

    model: Any
    guide: Any
    data: Tensor
    log_evidence: Tensor
    bounds: Callable[[], Bounds]
    plate: bool | None = None


@dataclass(frozen=True)
class Problem:
    """How to draw an `Instance`.

    Attributes:
        name: in tables and on the command line.
        make: from a number of datapoints and a generator of random numbers. With the same generator a larger number
            need not begin with the smaller one's data.
        number: datapoints of the ledger.
        number_of_evidence: datapoints for `log_evidence`, which costs less; over three seeds 1,000 or more where
            intervals are to be counted.
        easy: whether a flag on a right mean counts as a false alarm. Marked before the first run, on twelve problems.
        about: what is difficult about it, in a few words.
    """

    name: str
    make: Callable[[int, Generator], Instance]
    about: str
    number: int = 64
    number_of_evidence: int = 64
    easy: bool = False
