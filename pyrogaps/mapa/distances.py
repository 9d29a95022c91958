"""Distances of all datapoints from one another: fast ones to search by, and exact ones of what was found."""

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from pyrogaps.errors import InputError

# Of what is gathered to compare some datapoints with others element by element.
GATHERED_ELEMENTS = 2**23


class Comparison(Protocol):
    """The datapoints `x` of a data set, N of them, compared with all of them."""

    x: Tensor

    def scores(self, rows: Tensor) -> Tensor:
        """`(R, N)`, larger for what is nearer to each of the datapoints `rows` `(R,)`, to the data's precision."""
        ...

    def distances(self, rows: Tensor, columns: Tensor, scores: Tensor) -> Tensor:
        """Distances `(R, M)` in double precision of the datapoints `columns` `(R, M)`, `scores` being at hand."""
        ...

    def all_distances(self, rows: Tensor) -> Tensor:
        """Distances `(R, N)` in double precision."""
        ...


class SquaredDistances:
    """Squared Euclidean distances. The search expands the square into a matrix product, on centred data."""

    def __init__(self, x: Tensor) -> None:
        self.x = x if x.dtype == torch.float64 else x.float()
        self.centred = self.x - self.x.mean(0)
        self.squares = self.centred.square().sum(1)

    @staticmethod
    def between(x: Tensor, y: Tensor) -> Tensor:
        """`(n, m)`, from differences: a difference of squares would lose what is small beside the data's mean."""
        return torch.cdist(x.double(), y.double(), compute_mode="donot_use_mm_for_euclid_dist").square()

    def scores(self, rows: Tensor) -> Tensor:
        found = torch.addmm(-self.squares[None], self.centred[rows], self.centred.T, alpha=2)
        best = self.squares[rows]
        found = torch.minimum(found, best[:, None], out=found)
        found[torch.arange(len(rows), device=rows.device), rows] = best
        return found

    def distances(self, rows: Tensor, columns: Tensor, scores: Tensor) -> Tensor:
        parts = _gathered(self.x, rows, columns)
        return torch.cat([self.x[c].sub_(self.x[r, None]).square_().sum(-1) for r, c in parts]).double()

    def all_distances(self, rows: Tensor) -> Tensor:
        return self.between(self.x[rows], self.x)


class Mismatches:
    """How many elements differ, of zeros and ones. Sums of whole numbers are exact in single precision."""

    def __init__(self, x: Tensor) -> None:
        self.x = _signs(x)

    @staticmethod
    def between(x: Tensor, y: Tensor) -> Tensor:
        """`(n, m)`, in double precision."""
        return (x.shape[1] - (_signs(x) @ _signs(y).T).double()) / 2

    def scores(self, rows: Tensor) -> Tensor:
        return self.x[rows] @ self.x.T

    def distances(self, rows: Tensor, columns: Tensor, scores: Tensor) -> Tensor:
        return (self.x.shape[1] - scores.gather(1, columns).double()) / 2

    def all_distances(self, rows: Tensor) -> Tensor:
        return (self.x.shape[1] - self.scores(rows).double()) / 2


def _signs(x: Tensor) -> Tensor:
    """1 and -1 for 1 and 0: the product of two rows is then matches less mismatches."""
    return 2 * x.float() - 1


class Divergences:
    r"""$\sum_d A(\eta_{md}) - x_{nd} \eta_{md}$ of an exponential family with natural parameters `eta` `(N, D)`.

    `normaliser` `(N,)` are the sums of A.
    """

    def __init__(self, x: Tensor, eta: Tensor, normaliser: Tensor) -> None:
        self.x, self.eta, self.normaliser = x, eta, normaliser
        self.low = x if x.dtype == torch.float64 else x.float()
        self.low_eta, self.low_normaliser = eta.to(self.low.dtype), normaliser.to(self.low.dtype)

    @staticmethod
    def between(x: Tensor, eta: Tensor, normaliser: Tensor) -> Tensor:
        """`(n, m)`, in double precision."""
        return normaliser - x.double() @ eta.T

    def scores(self, rows: Tensor) -> Tensor:
        return torch.addmm(-self.low_normaliser[None], self.low[rows], self.low_eta.T)

    def distances(self, rows: Tensor, columns: Tensor, scores: Tensor) -> Tensor:
        parts = _gathered(self.x, rows, columns)
        products = [torch.einsum("rd,rmd->rm", self.x[r].double(), self.eta[c]) for r, c in parts]
        return self.normaliser[columns] - torch.cat(products)

    def all_distances(self, rows: Tensor) -> Tensor:
        return self.between(self.x[rows], self.eta, self.normaliser)


def _gathered(x: Tensor, rows: Tensor, columns: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    step = max(1, GATHERED_ELEMENTS // (columns.shape[1] * x.shape[1]))
    return zip(rows.split(step), columns.split(step), strict=True)


class OwnDistances:
    """-log kappa of a user's function of datapoints `(n, *event)` and `(m, *event)`."""

    def __init__(self, x: Tensor, log_kernel: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.x, self.log_kernel = x, log_kernel

    def scores(self, rows: Tensor) -> Tensor:
        found, shape = self.log_kernel(self.x[rows], self.x), (len(rows), len(self.x))
        if not isinstance(found, Tensor) or found.shape != shape:
            told = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise InputError(f"likelihood: the kernel must return log kappa of shape {shape}, (n, m), got {told}")
        if bool((found.isnan() | (found == torch.inf)).any()):
            raise InputError("likelihood: the kernel returned NaN or +infinity; log kappa must be below infinity")
        if bool((found == -torch.inf).all(1).any()):
            raise InputError(
                "likelihood: the kernel gives a datapoint log kappa = -infinity with all of them, itself too; at least "
                "one must explain it"
            )
        return found.detach()

    def distances(self, rows: Tensor, columns: Tensor, scores: Tensor) -> Tensor:
        return -scores.gather(1, columns).double()

    def all_distances(self, rows: Tensor) -> Tensor:
        return -self.scores(rows).double()
