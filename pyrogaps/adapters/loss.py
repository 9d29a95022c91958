"""The loss that a model was trained with beside the ELBO of its pair, and why the two differ."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyrogaps.adapters.distributions import described
from pyrogaps.density.layout import leaf
from pyrogaps.density.runs import evaluating
from pyrogaps.errors import InputError
from pyrogaps.guard import failures_named
from pyrogaps.problem import Problem
from pyrogaps.streams import seeded

NUM_DATAPOINTS, NUM_DRAWS, MIN_DRAWS = 8, 2048, 64
# Calls with one datapoint, and with copies of it.
NUM_CALLS, NUM_BATCHES, NUM_COPIES = 48, 24, 64
# Standard errors within which two values are equal, and the share of a value that rounding may change.
NUM_ERRORS, ROUNDING = 4.0, 1e-5
# Numbers of draws of an importance-weighted bound that are tried.
NUM_IMPORTANCE = (2, 3, 5, 7, 10, 15, 20, 30, 50, 64, 100)
TRAINED = "The numbers are of the ELBO, not of the objective trained"


@dataclass(frozen=True)
class Losses:
    """The loss of each of n datapoints, `(n,)` with standard errors; or, with n = 1, that of one batch of `rows`."""

    value: Tensor
    error: Tensor
    rows: int = 1

    @classmethod
    def of(cls, values: list[list[float]]) -> "Losses":
        """From the values of several calls for each datapoint."""
        calls = torch.tensor(values, dtype=torch.float64)
        return cls(calls.mean(1), calls.std(1) / calls.shape[1] ** 0.5)

    def is_near(self, other: "Losses") -> bool:
        """Whether the values differ by no more than their errors."""
        far = (self.value - other.value).abs() > NUM_ERRORS * (self.error**2 + other.error**2).sqrt()
        return not bool(far.any())

    @property
    def readings(self) -> Iterator["Losses"]:
        """The same as the negative loss, which may be what was given; and as a mean over the batch, and as a sum."""
        for sign in (-1.0, 1.0):
            yield Losses(sign * self.value, self.error)
            if self.rows > 1:
                yield Losses(sign * self.value / self.rows, self.error)


@dataclass(frozen=True)
class Terms:
    """The terms of a pair's ELBO at draws of its guide, `(S, n)` each, in nats.

    Attributes:
        likelihood: log p(x | z).
        divergence: log q(z | x) - log p(z), whose mean is the KL term.
        omitted: the part of log p(x | z) that losses leave out, and its name; None where there is none.
        squares: 2 scale^2 of a Normal that has one scale, else None.
        num_elements, num_latents: of a datapoint.
    """

    likelihood: Tensor
    divergence: Tensor
    omitted: tuple[Tensor, str] | None
    squares: float | None
    num_elements: int
    num_latents: int

    @property
    def elbo(self) -> Tensor:
        """The ELBO of each datapoint at every draw, `(S, n)`."""
        return self.likelihood - self.divergence

    def of_batch(self) -> "Terms":
        """The means over all datapoints, as those of one."""
        omitted = None if self.omitted is None else (self.omitted[0].mean(1, keepdim=True), self.omitted[1])
        likelihood, divergence = (part.mean(1, keepdim=True) for part in (self.likelihood, self.divergence))
        return replace(self, likelihood=likelihood, divergence=divergence, omitted=omitted)

    def forms(self) -> Iterator["Form"]:
        """The forms that losses have, the ELBO's own first, and those that differ in more ways later."""
        parts: list[tuple[str, Tensor]] = [("", self.likelihood)]
        if self.omitted is not None:
            rest = self.likelihood - self.omitted[0]
            parts.append((f"it leaves out {self.omitted[1]} of p(x | z)", rest))
            if self.squares is not None:
                scale = (self.squares / 2) ** 0.5
                words = f"it has the sum of squares in place of log p(x | z), which is scale=0.5**0.5, not {scale:.4g}"
                parts.append((words, rest * self.squares))
        number = self.num_elements
        factors: list[tuple[str, float, float | None]] = [("", 1.0, 1.0), ("", 1.0, None)]
        if number > 1:
            mean = f"it takes the mean of log p(x | z) over the {number} elements of x, not the sum"
            whole = f"it is divided by {number}, the number of elements of x"
            factors += [(mean, 1 / number, 1.0), (whole, 1 / number, 1 / number), (mean, 1 / number, None)]
        forms = [
            Form([words for words in (part[0], factor[0]) if words], part[1] * factor[1], factor[2])
            for part in parts
            for factor in factors
        ]
        return iter(sorted(forms, key=lambda form: (form.weight is None, len(form.words))))


@dataclass(frozen=True)
class Form:
    """A loss as a reconstruction `(S, n)` less the KL term times a weight; None for any weight."""

    words: list[str]
    reconstruction: Tensor
    weight: float | None

    def matches(self, terms: Terms, losses: Losses) -> list[str] | None:
        """The words of a form that a negative loss has; None where it has another."""
        if self.weight is not None:
            return self.words if self._equals(terms, losses, self.weight) else None
        if len(losses.value) < 2:  # any value has some weight
            return None
        difference, divergence = self.reconstruction.mean(0) - losses.value, terms.divergence.mean(0)
        weight = float((difference * divergence).sum() / divergence.square().sum())
        error = float((self._error(terms, losses, weight) * divergence).norm() / divergence.square().sum())
        if weight < -NUM_ERRORS * error or not self._equals(terms, losses, weight):
            return None
        mean = f", as a mean over the {terms.num_latents} latents does" if terms.num_latents > 1 else ""
        mean = mean if abs(weight - 1 / terms.num_latents) < NUM_ERRORS * error < 0.5 * weight else ""
        return [*self.words, f"it weighs the KL term by {weight:.2g} ± {error:.1g} (beta){mean}"]

    def _equals(self, terms: Terms, losses: Losses, weight: float) -> bool:
        """Whether the differences are within their errors: each, their mean, and as a multiple of the KL terms."""
        draws = self.reconstruction - weight * terms.divergence
        difference, error = losses.value - draws.mean(0), self._error(terms, losses, weight)
        together = torch.stack([torch.ones_like(error), terms.divergence.mean(0)])
        weights = torch.cat([torch.eye(len(error), dtype=error.dtype), together])
        limit = NUM_ERRORS * (weights.square() @ error.square()).sqrt() + ROUNDING * weights.abs() @ losses.value.abs()
        return bool(((weights @ difference).abs() <= limit).all())

    def _error(self, terms: Terms, losses: Losses, weight: float) -> Tensor:
        """Standard errors of the difference between the losses and this form, `(n,)`."""
        draws = self.reconstruction - weight * terms.divergence
        return (losses.error**2 + draws.var(0) / len(draws)).sqrt()


def losses_of(elbo: Callable[..., Any], rows: tuple[Any, ...], programs: tuple[Any, ...]) -> Losses:
    """The loss of every datapoint of `rows`: of one datapoint, whose sum and mean are the same, and where that can be
    told apart, of many copies of it, which is more precise.
    """
    number = next(len(row) for row in rows if isinstance(row, Tensor))
    with evaluating(elbo, *programs), seeded(0, "loss"), torch.no_grad():
        singles = Losses.of([[_called(elbo, rows, n, 1) for _ in range(NUM_CALLS)] for n in range(number)])
        copies = Losses.of([[_called(elbo, rows, n, NUM_COPIES) for _ in range(NUM_BATCHES)] for n in range(number)])
    scaled = [replace(copies, value=copies.value / by, error=copies.error / by) for by in (1, NUM_COPIES)]
    same = [each for each in scaled if each.is_near(singles)]
    return same[0] if len(same) == 1 else singles


def _called(elbo: Callable[..., Any], rows: tuple[Any, ...], n: int, copies: int) -> float:
    place = torch.full((copies,), n)
    args = (row[place.to(row.device)] if isinstance(row, Tensor) and row.dim() else row for row in rows)
    with failures_named("elbo"):
        loss = torch.as_tensor(elbo(*args))
    if loss.numel() != 1:
        raise InputError(f"elbo: for one datapoint it returned {described(loss)}. Return one number")
    return float(loss)


def explanation(terms: Terms, losses: Losses) -> list[str] | None:
    """In what a loss differs from the ELBO of a pair: empty where it does not, None where no known form is it."""
    terms = terms if losses.rows == 1 else terms.of_batch()
    readings = [*losses.readings]
    if losses.rows > 1:  # of one draw for each datapoint
        readings = [replace(reading, error=terms.elbo.std(0)) for reading in readings]
    for form in terms.forms():
        for reading in readings:
            if (words := form.matches(terms, reading)) is not None:
                return words
    return next((words for reading in readings if (words := _importance_weighted(terms, reading))), None)


def _importance_weighted(terms: Terms, losses: Losses) -> list[str]:
    """Words for a bound of several draws: log of their mean weight, or the mean of log w by normalised weights, which
    has the same gradient. Empty for another loss.
    """
    found = []
    for number in NUM_IMPORTANCE if len(losses.value) > 1 else ():
        log_weights = terms.elbo[: len(terms.elbo) // number * number].unflatten(0, (-1, number))
        means = torch.logsumexp(log_weights, 1) - math.log(number), (log_weights.softmax(1) * log_weights).sum(1)
        for bounds in means:
            error = (losses.error**2 + bounds.var(0) / len(bounds)).sqrt()
            found.append((float(((losses.value - bounds.mean(0)).abs() / error).max()), number))
    far, number = min(found, default=(math.inf, 0))
    return [f"it is an importance-weighted bound of about {number} draws"] if far < NUM_ERRORS else []


def difference(terms: Terms, losses: Losses, words: list[str] | None) -> str:
    """A sentence on a loss that is not the ELBO of a pair, for the `words` of `explanation`."""
    elbo = float(terms.elbo.mean())
    means = [float(reading.value.mean()) for reading in losses.readings]
    nearest = min(means, key=lambda mean: abs(mean - elbo))
    values = f"the loss given as elbo is {nearest:.2f} nats per datapoint, the ELBO of the pair {elbo:.2f}"
    if words is not None:
        return f"{values}: {', and '.join(words)}. {TRAINED}"
    return (
        f"{values}, and none of the usual reasons explains it (a mean in place of a sum, a weight of the KL term, a "
        "constant left out, a second output read otherwise). Check likelihood, scale, second and prior"
    )


def terms_of(model: Any, guide: Any, rows: tuple[Any, ...]) -> Terms:
    """The terms of the ELBO of a pair made by `from_torch`, at draws of its guide for the datapoints `rows`."""
    problem = Problem.of(model, guide, rows)
    number = problem.num_datapoints
    num_draws = max(MIN_DRAWS, NUM_DRAWS * NUM_DATAPOINTS // max(NUM_DATAPOINTS, number))
    with seeded(0, "terms", device=problem.joint.device), evaluating(model, guide), torch.no_grad():
        z, log_q = problem.guided().at(torch.arange(number)).sample(num_draws)
        log_prior, log_likelihood = problem.joint.terms(z)
        repeated = problem.joint.fetch(torch.arange(number), num_draws)
        latents = problem.joint.constrain(z)["z"].flatten(0, 1)
        fn, seen, _ = model.observation(model.decoder(latents, *repeated[1:]), repeated[0])
    row, elements = model.observation.row, leaf(fn)
    omitted = None
    if row is not None and row.omitted is not None:
        left_out = row.omitted[0](elements, seen).reshape(num_draws, number, -1).sum(-1)
        omitted = left_out.double(), row.omitted[1]
    squares = None
    if model.observation.name == "normal" and float(elements.scale.max() / elements.scale.min()) < 1 + 1e-6:
        squares = 2 * float(elements.scale.max()) ** 2
    return Terms(
        log_likelihood.double(),
        log_q.double() - log_prior.double(),
        omitted,
        squares,
        seen[0].numel(),
        problem.dim,
    )
