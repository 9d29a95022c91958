"""Likelihoods by name: how each is made from the output of a decoder, and what to do about data that it cannot have.

A new likelihood is one row of `LIKELIHOODS`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyrogaps.likelihoods.discretised_logistic import DiscretisedLogistic


@dataclass(frozen=True)
class Output:
    """A kind of decoder output: the numbers by which a likelihood has its first parameter.

    Attributes:
        noun: such numbers.
        contradicted: whether values, of latents far and near, cannot be of this kind, or only by a rare accident.
        reason: what such values are like.
        likelier: the kind that they probably are of.
    """

    noun: str
    contradicted: Callable[[Tensor], bool]
    reason: str
    likelier: str


def _all_within(low: float, high: float) -> Callable[[Tensor], bool]:
    return lambda values: bool(((values >= low) & (values <= high)).all())


def _some_outside(low: float, high: float) -> Callable[[Tensor], bool]:
    return lambda values: bool(((values < low) | (values > high)).any())


OUTPUTS = {
    "logits": Output(
        "logits", _all_within(0, 1), "every output lies in [0, 1], as after a sigmoid or softmax", "probabilities"
    ),
    "probabilities": Output("probabilities", _some_outside(0, 1), "some outputs lie outside [0, 1]", "logits"),
    "rate": Output("rates", _some_outside(0, torch.inf), "some outputs are negative", "log_rate"),
    "log_rate": Output(
        "logarithms", _all_within(0, torch.inf), "no output is negative, as after a softplus or exp", "rate"
    ),
}
PROBABILITIES, RATES = ("logits", "probabilities"), ("rate", "log_rate")


@dataclass(frozen=True)
class Likelihood:
    """p(x | z) of independent elements, made from a decoder's output.

    Attributes:
        build: the distribution of elements from the decoder's output, its kind, and the second parameter or None.
        outputs: the kinds of output that it takes; the first is the default, unless one `must_be_said`. None for
            likelihoods whose output is their location.
        second: the name of the second parameter; empty where there is none.
        over_classes: whether the output has a last axis more than the data, of classes.
        remedy: what to do about data outside its support.
        omitted: the part of log p(x | z), of a distribution and x, that losses often leave out, and its name.
    """

    build: Callable[[Tensor, str, Any], dist.TorchDistribution]
    outputs: tuple[str, ...] = ()
    must_be_said: bool = False
    second: str = ""
    over_classes: bool = False
    remedy: str = ""
    omitted: tuple[Callable[[Any, Tensor], Tensor], str] | None = None


def _by_probability(value: Tensor, kind: str) -> dict[str, Any]:
    return {"logits" if kind == "logits" else "probs": value}


def _mean(value: Tensor, kind: str) -> Tensor:
    return value if kind == "rate" else value.exp()


def _negative_binomial(value: Tensor, kind: str, dispersion: Tensor) -> dist.TorchDistribution:
    """Mean m and variance m + m^2 / dispersion."""
    log_mean = value if kind == "log_rate" else value.clamp(min=torch.finfo(value.dtype).tiny).log()
    fn: dist.TorchDistribution = dist.NegativeBinomial(dispersion, logits=log_mean - dispersion.log())
    return fn


def _at_location(fn: Any, x: Tensor) -> Tensor:
    """log p at the location of a symmetric density: minus its log-normaliser."""
    log_prob: Tensor = fn.log_prob(fn.loc)
    return log_prob


def _above_cross_entropy(fn: Any, x: Tensor) -> Tensor:
    log_prob: Tensor = fn.log_prob(x) - dist.Bernoulli(logits=fn.logits, validate_args=False).log_prob(x)
    return log_prob


NORMALISER = "the log-normaliser"
COUNTS = (
    "Pass whole counts, from before they were normalised or their logarithms taken, or pass likelihood='normal' and "
    "a decoder of means"
)
LIKELIHOODS = {
    "bernoulli": Likelihood(
        lambda value, kind, _: dist.Bernoulli(**_by_probability(value, kind)),
        PROBABILITIES,
        remedy="Make them zeros and ones, as in (x > 0.5).float(); or pass likelihood='continuous-bernoulli', a "
        "density of values in [0, 1], or likelihood='binary-cross-entropy', which scores them as that loss does",
    ),
    # As the loss of that name: a Bernoulli that scores values between 0 and 1 too, of which it is no distribution.
    "binary-cross-entropy": Likelihood(
        lambda value, kind, _: dist.Bernoulli(**_by_probability(value, kind), validate_args=False), PROBABILITIES
    ),
    "continuous-bernoulli": Likelihood(
        lambda value, kind, _: dist.ContinuousBernoulli(**_by_probability(value, kind)),
        PROBABILITIES,
        remedy="Bring them into [0, 1], as in x / x.max(), or pass likelihood='normal'",
        omitted=(_above_cross_entropy, NORMALISER),
    ),
    "normal": Likelihood(
        lambda value, _, scale: dist.Normal(value, scale), second="scale", omitted=(_at_location, NORMALISER)
    ),
    "laplace": Likelihood(
        lambda value, _, scale: dist.Laplace(value, scale), second="scale", omitted=(_at_location, NORMALISER)
    ),
    "discretised-logistic": Likelihood(
        lambda value, _, scale: DiscretisedLogistic(value, scale),
        second="scale",
        remedy="Pass grey values k / 255, as ToTensor() makes them, or pass likelihood='normal'",
    ),
    "categorical": Likelihood(
        lambda value, kind, _: dist.Categorical(**_by_probability(value, kind)),
        PROBABILITIES,
        over_classes=True,
        remedy="Pass the numbers of classes, from 0, and a decoder with an output for each class",
    ),
    "poisson": Likelihood(
        lambda value, kind, _: dist.Poisson(_mean(value, kind)),
        RATES,
        must_be_said=True,
        remedy=COUNTS,
        omitted=(lambda fn, x: -torch.lgamma(x + 1), "log x!"),
    ),
    "negative-binomial": Likelihood(_negative_binomial, RATES, must_be_said=True, second="dispersion", remedy=COUNTS),
}
