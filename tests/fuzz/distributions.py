"""The distributions of random programs, one row each; see `tests.fuzz.programs`."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import softplus


def positive(location: Tensor) -> Tensor:
    return 0.2 + softplus(location)


def transformed(base: Any, *steps: Any) -> Any:
    return dist.TransformedDistribution(base, list(steps))


def mixture(u: Tensor) -> Any:
    components = dist.Normal(torch.stack([u - 1.0, u + 1.0], -1), 0.7)
    return dist.MixtureSameFamily(dist.Categorical(logits=torch.zeros_like(components.loc)), components)


SIGMOID, EXP = dist.transforms.SigmoidTransform(), dist.transforms.ExpTransform()
AFFINE = dist.transforms.AffineTransform

# Of a location `(*batch)`: a distribution of that batch shape.
SCALARS: dict[str, Callable[[Tensor], Any]] = {
    "normal": lambda u: dist.Normal(u, torch.ones_like(u)),
    "laplace": lambda u: dist.Laplace(u, torch.ones_like(u)),
    "student": lambda u: dist.StudentT(torch.full_like(u, 5.0), u, torch.ones_like(u)),
    "lognormal": lambda u: dist.LogNormal(0.3 * u, 0.5 * torch.ones_like(u)),
    "gamma": lambda u: dist.Gamma(1.0 + positive(u), torch.ones_like(u)),
    "exponential": lambda u: dist.Exponential(positive(u)),
    "halfnormal": lambda u: dist.HalfNormal(positive(u)),
    "half cauchy": lambda u: dist.HalfCauchy(positive(u)),
    "beta": lambda u: dist.Beta(1.0 + positive(u), 2.0 * torch.ones_like(u)),
    "kumaraswamy": lambda u: dist.Kumaraswamy(1.0 + positive(u), 2.0 * torch.ones_like(u)),
    "uniform": lambda u: dist.Uniform(torch.full_like(u, -1.0), torch.full_like(u, 2.0)),
    "pareto": lambda u: dist.Pareto(torch.full_like(u, 1.5), 3.0 * torch.ones_like(u)),
    "inverse gamma": lambda u: dist.InverseGamma(2.0 + positive(u), torch.ones_like(u)),
    "chi2": lambda u: dist.Chi2(1.0 + positive(u)),
    "weibull": lambda u: dist.Weibull(positive(u), 2.0 * torch.ones_like(u)),
    "gumbel": lambda u: dist.Gumbel(u, torch.ones_like(u)),
    "soft laplace": lambda u: dist.SoftLaplace(u, torch.ones_like(u)),
    "von mises": lambda u: dist.VonMises(u, torch.ones_like(u)),
    "mixture": mixture,
    "shifted": lambda u: transformed(dist.Normal(u, torch.ones_like(u)), AFFINE(0.5, 2.0)),
    "sigmoid normal": lambda u: transformed(dist.Normal(u, torch.ones_like(u)), SIGMOID),
    "interval normal": lambda u: transformed(dist.Normal(u, torch.ones_like(u)), SIGMOID, AFFINE(1.0, -3.0)),
    "moving uniform": lambda u: dist.Uniform(u - 1.0, u + 2.0),
    "moving exponential": lambda u: transformed(dist.Exponential(torch.ones_like(u)), AFFINE(u, 0.7)),
}
# Of a location `(*batch, *event)`.
VECTORS: dict[str, Callable[[Tensor], Any]] = {
    "independent": lambda u: dist.Normal(u, 1.0).to_event(1),
    "multivariate": lambda u: dist.MultivariateNormal(u, torch.eye(u.shape[-1], dtype=u.dtype)),
    "low rank normal": lambda u: dist.LowRankMultivariateNormal(u, 0.5 * torch.ones_like(u)[..., None], u * 0 + 1.0),
    "dirichlet": lambda u: dist.Dirichlet(1.0 + positive(u)),
    "independent gamma": lambda u: dist.Gamma(1.0 + positive(u), 1.0).to_event(1),
    "matrix normal": lambda u: dist.Normal(u, 1.0).to_event(2),
    "correlation cholesky": lambda u: dist.LKJCholesky(u.shape[-1], 1.0 + positive(u[..., 0, 0])),
}
# Of a location `(*batch)`, perhaps with dimensions of other discrete latents: with finitely many values.
DISCRETE: dict[str, Callable[[Tensor], Any]] = {
    "coin": lambda u: dist.Bernoulli(logits=u),
    "three": lambda u: dist.Categorical(logits=torch.stack([u, -u, 0.5 + 0 * u], -1)),
    "counts": lambda u: dist.Binomial(2, logits=u),
}
MATRICES = {"matrix normal", "correlation cholesky"}
# Their bounds are the location, so that it must follow the data alone, in model and guide.
MOVING = {"moving uniform", "moving exponential"}
# Their guides are Normals in unconstrained space: a member of the family has no gradient, or nothing to learn.
NO_OWN_FAMILY = {"uniform", "pareto", "von mises", "mixture", "correlation cholesky", *MOVING}
# Where torch declares another support than the true one, on which Pyro's autoguides rely.
TRUE_SUPPORTS: dict[str, Callable[[Any], Any]] = {
    "von mises": lambda fn: constraints.interval(-math.pi, math.pi),
    "interval normal": lambda fn: constraints.interval(-2.0, 1.0),
    "moving exponential": lambda fn: constraints.greater_than(fn.transforms[0].loc),
}


@dataclass(frozen=True)
class Likelihood:
    """Data `(N, width)` made from standard normal numbers, and their distribution given a location `(*batch)`."""

    data: Callable[[Tensor], Tensor]
    of: Callable[[Tensor], Any]
    event_dim: int = 0
    counts: bool = False  # whether data may be integers


def shares(x: Tensor) -> Tensor:
    """Five counts, in the first and the last category."""
    first = (2.0 * x[:, :1]).abs().round().clamp(max=5.0)
    return torch.full_like(first, 5.0) if x.shape[1] == 1 else torch.cat([first, 0 * x[:, 2:], 5.0 - first], 1)


LIKELIHOODS: dict[str, Likelihood] = {
    "normal": Likelihood(lambda x: x, lambda u: dist.Normal(u, 0.8)),
    "laplace": Likelihood(lambda x: x, lambda u: dist.Laplace(u, 1.0)),
    "student": Likelihood(lambda x: x, lambda u: dist.StudentT(4.0, u, 1.0)),
    "bernoulli": Likelihood(lambda x: (x > 0).to(x.dtype), lambda u: dist.Bernoulli(logits=u)),
    "poisson": Likelihood(lambda x: x.abs().round(), lambda u: dist.Poisson(0.1 + softplus(u)), counts=True),
    "gamma": Likelihood(lambda x: x.abs() + 0.1, lambda u: dist.Gamma(0.5 + softplus(u), 1.0)),
    "beta": Likelihood(lambda x: x.sigmoid(), lambda u: dist.Beta(0.5 + softplus(u), torch.ones_like(u))),
    "von mises": Likelihood(lambda x: x.clamp(-3.0, 3.0), lambda u: dist.VonMises(u, 2.0)),
    "binomial": Likelihood(lambda x: x.abs().round().clamp(max=4.0), lambda u: dist.Binomial(4, logits=u), counts=True),
    "negative binomial": Likelihood(
        lambda x: x.abs().round(), lambda u: dist.NegativeBinomial(3.0, logits=u - 1.0), counts=True
    ),
    "zero inflated": Likelihood(
        lambda x: x.abs().round(), lambda u: dist.ZeroInflatedPoisson(0.1 + softplus(u), gate=0.2 + 0 * u)
    ),
    "categorical": Likelihood(
        lambda x: ((x > 0) * 1 + (x > 1) * 1).to(x.dtype),
        lambda u: dist.Categorical(logits=torch.stack([u, -u, 0 * u], -1)),
        counts=True,
    ),
    "multinomial": Likelihood(shares, lambda u: dist.Multinomial(5, logits=u.cumsum(-1)), event_dim=1, counts=True),
    "multivariate": Likelihood(
        lambda x: x, lambda u: dist.MultivariateNormal(u, torch.eye(u.shape[-1], dtype=u.dtype)), event_dim=1
    ),
}
