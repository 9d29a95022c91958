"""Distances between all datapoints: fast scores to search by, exact distances of the neighbours."""

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from pyrogaps.errors import InputError

# The size of the largest tensor that a comparison element by element gathers.
GATHERED_ELEMENTS = 2**23


class Comparison(Protocol):
    """The N datapoints `x` of a data set, each compared with all of them."""

    x: Tensor

    def scores(self, rows: Tensor) -> Tensor:
        """Scores `(R, N)` of all datapoints for the datapoints `rows` `(R,)`, in the data's precision.

        The nearer a datapoint, the larger its score.
        """
        ...

    def distances(self, rows: Tensor, columns: Tensor, scores: Tensor) -> Tensor:
        """Distances `(R, M)` of the datapoints `columns` `(R, M)` from `rows`, in double precision.

        `scores` are those of `rows`; an implementation may reuse them.
        """
        ...

    def all_distances(self, rows: Tensor) -> Tensor:
        """Distances `(R, N)` of all datapoints from `rows`, in double precision."""
        ...


class SquaredDistances:
    """Squared Euclidean distances. Scores expand the square into a matrix product of the centred data."""

    def __init__(self, x: Tensor) -> None:
        self.x = x if x.dtype == torch.float64 else x.float()
        self.centred = self.x - self.x.mean(0)
        self.squares = self.centred.square().sum(1)

    @staticmethod
    def between(x: Tensor, y: Tensor) -> Tensor:
        """Distances `(n, m)`, computed from differences.

        Expanding the square would lose digits where distances are small beside the data's mean.
        """
        return torch.cdist(x.double(), y.double(), compute_mode="donot_use_mm_for_euclid_dist").square()

    def scores(self, rows: Tensor) -> Tensor:
        scores = torch.addmm(-self.squares[None], self.centred[rows], self.centred.T, alpha=2)
        best = self.squares[rows]
        scores = torch.minimum(scores, best[:, None], out=scores)
        scores[torch.arange(len(rows), device=rows.device), rows] = best
        return scores

    def distances(self, rows: Tensor, columns: Tensor, scores: Tensor) -> Tensor:
        parts = _parts(self.x, rows, columns)
        return torch.cat([self.x[c].sub_(self.x[r, None]).square_().sum(-1) for r, c in parts]).double()

    def all_distances(self, rows: Tensor) -> Tensor:
        return self.between(self.x[rows], self.x)


class Mismatches:
    """Numbers of elements that differ, for data of zeros and ones. They are exact in single precision."""

    def __init__(self, x: Tensor) -> None:
        self.x = _signs(x)

    @staticmethod
    def between(x: Tensor, y: Tensor) -> Tensor:
        """Distances `(n, m)`, in double precision."""
        return (x.shape[1] - (_signs(x) @ _signs(y).T).double()) / 2

    def scores(self, rows: Tensor) -> Tensor:
        return self.x[rows] @ self.x.T

    def distances(self, rows: Tensor, columns: Tensor, scores: Tensor) -> Tensor:
        return (self.x.shape[1] - scores.gather(1, columns).double()) / 2

    def all_distances(self, rows: Tensor) -> Tensor:
        return (self.x.shape[1] - self.scores(rows).double()) / 2


def _signs(x: Tensor) -> Tensor:
    """1 and -1 for 1 and 0: the product of two rows is the number of matches minus that of mismatches."""
    return 2 * x.float() - 1


class Divergences:
    r"""$\sum_d A(\eta_{md}) - x_{nd} \eta_{md}$ of an exponential family with natural parameters `eta` `(N, D)`.

    `normaliser` `(N,)` is $\sum_d A(\eta_{md})$.
    """

    def __init__(self, x: Tensor, eta: Tensor, normaliser: Tensor) -> None:
        self.x, self.eta, self.normaliser = x, eta, normaliser
        self.low = x if x.dtype == torch.float64 else x.float()
        self.low_eta, self.low_normaliser = eta.to(self.low.dtype), normaliser.to(self.low.dtype)

    @staticmethod
    def between(x: Tensor, eta: Tensor, normaliser: Tensor) -> Tensor:
        """Distances `(n, m)`, in double precision."""
        return normaliser - x.double() @ eta.T

    def scores(self, rows: Tensor) -> Tensor:
        return torch.addmm(-self.low_normaliser[None], self.low[rows], self.low_eta.T)

    def distances(self, rows: Tensor, columns: Tensor, scores: Tensor) -> Tensor:
        parts = _parts(self.x, rows, columns)
        products = [torch.einsum("rd,rmd->rm", self.x[r].double(), self.eta[c]) for r, c in parts]
        return self.normaliser[columns] - torch.cat(products)

    def all_distances(self, rows: Tensor) -> Tensor:
        return self.between(self.x[rows], self.eta, self.normaliser)


def _parts(x: Tensor, rows: Tensor, columns: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Parts of `rows` and `columns` that gather at most `GATHERED_ELEMENTS` elements of `x`."""
    step = max(1, GATHERED_ELEMENTS // (columns.shape[1] * x.shape[1]))
    return zip(rows.split(step), columns.split(step), strict=True)


class CustomDistances:
    """-log kappa of a user's function of datapoints `(n, *event)` and `(m, *event)`."""

    def __init__(self, x: Tensor, log_kernel: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.x, self.log_kernel = x, log_kernel

    def scores(self, rows: Tensor) -> Tensor:
        log_kappa, shape = self.log_kernel(self.x[rows], self.x), (len(rows), len(self.x))
        if not isinstance(log_kappa, Tensor) or log_kappa.shape != shape:
            got = tuple(log_kappa.shape) if isinstance(log_kappa, Tensor) else type(log_kappa).__name__
            raise InputError(f"likelihood: the kernel must return log kappa of shape (n, m) = {shape}, got {got}")
        if bool((log_kappa.isnan() | (log_kappa == torch.inf)).any()):
            raise InputError(
                "likelihood: the kernel returned NaN or +infinity. Each log kappa must be finite or -infinity"
            )
        if bool((log_kappa == -torch.inf).all(1).any()):
            raise InputError(
                "likelihood: the kernel returned -infinity for all pairs of one datapoint. At least one of its pairs, "
                "such as that with itself, needs a finite log kappa"
            )
        return log_kappa.detach()

    def distances(self, rows: Tensor, columns: Tensor, scores: Tensor) -> Tensor:
        return -scores.gather(1, columns).double()

    def all_distances(self, rows: Tensor) -> Tensor:
        return -self.scores(rows).double()
