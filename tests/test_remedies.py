"""A refusal's remedy works for the program that was refused: applied as it says, the program is accepted."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as transforms
import pytest
import torch
from pyro.infer.reparam import ProjectedNormalReparam
from torch import Tensor, nn
from torch.distributions import biject_to, constraints

import pyrogaps as pg

X = torch.tensor([0.3, 1.2, 0.8, 2.0, 0.4])
PAIRS = torch.stack([X, -X], -1)


def model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 0.8))


def drawing(make: Callable[[Tensor], Any], name: str = "z") -> Callable[[Tensor], None]:
    """A guide that draws one site from `make(x)`."""

    def drawn(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample(name, make(x))

    return drawn


def latent(prior: Any, mean: Callable[[Tensor], Tensor] = lambda z: z) -> Callable[[Tensor], None]:
    """A model with one latent from `prior`."""

    def program(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(mean(z), 1.0), obs=x)

    return program


def two_plates(x: Tensor) -> None:
    with pyro.plate("outer", 2, dim=-2), pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x.expand(2, -1))


def two_plates_guide(x: Tensor) -> None:
    with pyro.plate("outer", 2, dim=-2), pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.Normal(x / 2, 0.8))


def loops(x: Tensor) -> None:
    for n in pyro.plate("data", len(x)):
        z = pyro.sample(f"z{n}", dist.Normal(0.0, 1.0))
        pyro.sample(f"x{n}", dist.Normal(z, 1.0), obs=x[n])


def hard_coded(x: Tensor) -> None:
    with pyro.plate("data", 5):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def plateless(x: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
    pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


HOLES = PAIRS.where(PAIRS < 1, math.nan)
SEEN = HOLES.isfinite()
MASKED = np.ma.masked_array(PAIRS.numpy(), mask=~SEEN.numpy())


def seen_alone(x: Tensor, seen: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z[..., None], 1.0).mask(seen).to_event(1), obs=x)


def guide_of_seen(x: Tensor, seen: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x.mean(-1) / 2, 0.8))


def subsampled(x: Tensor) -> None:
    with pyro.plate("data", len(x), subsample_size=2) as rows:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])


def subsampled_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x), subsample_size=2) as rows:
        pyro.sample("z", dist.Normal(x[rows] / 2, 0.8))


OUTSIDE = pyro.plate("data", 5)


def plate_from_outside(x: Tensor) -> None:
    with OUTSIDE:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def deltas(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        twice = pyro.sample("twice", dist.Delta(2 * z))
        pyro.sample("x", dist.Normal(twice, 1.0), obs=x)


def deterministic(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(pyro.deterministic("twice", 2 * z), 1.0), obs=x)


def parameters_of_rows(x: Tensor) -> None:
    loc = pyro.param("loc", lambda: X / 2)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc, 0.8))


def indexed_parameters(x: Tensor, rows: Tensor) -> None:
    loc = pyro.param("loc", lambda: X / 2)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc[rows], 0.8))


def parameters_in_the_plate(x: Tensor) -> None:
    with pyro.plate("data", 5):
        loc = pyro.param("loc", lambda: X / 2, event_dim=0)
        pyro.sample("z", dist.Normal(loc, 0.8))


class Dropout(nn.Module):
    def __init__(self, *, only_in_training: bool) -> None:
        super().__init__()
        self.only_in_training, self.log_scale = only_in_training, nn.Parameter(torch.tensor(-0.2))

    def forward(self, x: Tensor) -> None:
        x = nn.functional.dropout(x, 0.5, training=self.training or not self.only_in_training)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, self.log_scale.exp()))


class BatchStatistics(nn.Module):
    def __init__(self, *, across_rows: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(5) if across_rows else nn.BatchNorm1d(1)

    def forward(self, x: Tensor) -> None:
        x = x - x.mean() if isinstance(self.norm, nn.LayerNorm) else self.norm(x[:, None])[:, 0]
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.8))


def sphere(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.ProjectedNormal(torch.tensor([1.0, 0.0])))
        pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=x)


def two_sites(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(a.sum(-1) + b, 1.0), obs=x)


def two_sites_guide(x: Tensor, *, flow: Any) -> None:
    with pyro.plate("data", len(x)):
        base = dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1)
        pyro.sample("a", dist.TransformedDistribution(base, [flow]))
        pyro.sample("b", dist.Normal(x / 2, 0.8))


def only_some_rows(x: Tensor, *, padded: bool) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        mean = z
        if padded or (x > 1).any():
            with pyro.poutine.mask(mask=x > 1):
                mean = z + torch.where(x > 1, pyro.sample("w", dist.Normal(0.0, 1.0)), torch.zeros(()))
        pyro.sample("x", dist.Normal(mean, 1.0), obs=x)


def only_some_rows_guide(x: Tensor) -> None:
    guide(x)
    with pyro.plate("data", len(x)), pyro.poutine.mask(mask=x > 1):
        pyro.sample("w", dist.Normal(0.0, 0.8))


def computed(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x.log())


def given_back(values: dict[str, Tensor]) -> Tensor:
    return values["x"].exp()


def matrices(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        correlations = pyro.sample("z", dist.LKJCholesky(2, 1.0))
        scales = pyro.sample("scales", dist.LogNormal(torch.zeros(2), 1.0).to_event(1))
        factor = scales[..., None] * correlations
        pyro.sample("x", dist.Normal((factor @ factor.mT).sum((-1, -2)), 1.0), obs=x)


def matrices_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.LKJCholesky(2, 1.0))
        pyro.sample("scales", dist.LogNormal(torch.zeros(len(x), 2), 0.5).to_event(1))


def elbo(model: Any, guide: Any, data: Any = X, **options: Any) -> Tensor:
    return pg.elbo(model, guide, data, num_particles=20, **options).value


def without_warnings(function: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    """A call in which torch may warn of its own sampler."""

    def call() -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function(*args)

    return call


@dataclass(frozen=True)
class Case:
    """What is refused, what the refusal says, and each of the remedies that it names, applied."""

    refused: Callable[[], Any]
    words: tuple[str, ...]
    remedied: list[Callable[[], Any]] = field(default_factory=list)


def transformed(constraint: Any) -> Callable[[Tensor], Any]:
    return lambda x: dist.TransformedDistribution(dist.Normal(x / 2, 0.8), [biject_to(constraint)])


def on_support(prior: Any, words: str, constraint: Any, *usual: Any) -> Case:
    """A guide on the line for a latent that has another support."""
    program = latent(prior)
    return Case(
        partial(elbo, program, guide),
        ("site 'z'", f"the guide's support, the real line, differs from the model's, {words}"),
        [partial(elbo, program, drawing(make)) for make in (*usual, transformed(constraint))],
    )


CASES = {
    "two plates around every site": Case(
        partial(elbo, two_plates, two_plates_guide),
        ("several plates", "plate="),
        [partial(elbo, two_plates, two_plates_guide, plate="data")],
    ),
    "a loop over the plate": Case(
        partial(elbo, loops, guide, plate="data"), ("loops over", "as a context"), [partial(elbo, model, guide)]
    ),
    "a plate of a hard-coded size": Case(
        partial(elbo, hard_coded, guide), ("has size 5", "len(x)"), [partial(elbo, model, guide)]
    ),
    "a plate in the guide alone": Case(
        partial(elbo, plateless, guide),
        ("plate 'data'", "the model has no plate", "plate=False"),
        [partial(elbo, model, guide), partial(elbo, plateless, guide, plate=False)],
    ),
    "values that are missing": Case(
        partial(elbo, model, guide, X.where(X < 1, math.nan)),
        ("argument 0 contains NaN", "x.where(seen, 0.0)", "seen = x.isfinite()", ".mask(seen)"),
        [partial(elbo, model, guide, X), partial(elbo, seen_alone, guide_of_seen, (HOLES.where(SEEN, 0.0), SEEN))],
    ),
    "an array with masked elements": Case(
        partial(elbo, seen_alone, guide_of_seen, MASKED),
        ("masked elements", "x.filled(0.0)", "seen = ~x.mask", ".mask(seen)"),
        [partial(elbo, seen_alone, guide_of_seen, (MASKED.filled(0.0), ~MASKED.mask))],
    ),
    "a subsampled plate without a data plate": Case(
        partial(elbo, subsampled, subsampled_guide, plate=False),
        ("is subsampled", "Remove the subsampling"),
        [partial(elbo, model, guide, plate=False)],
    ),
    "a plate from outside": Case(
        partial(elbo, plate_from_outside, guide, X[:4]),
        ("made outside", "Make it inside"),
        [partial(elbo, model, guide, X[:4])],
    ),
    "a Delta in the model": Case(
        partial(elbo, deltas, guide), ("'twice'", "pyro.deterministic"), [partial(elbo, deterministic, guide)]
    ),
    "no latent": Case(
        partial(elbo, pyro.condition(model, {"z": torch.tensor(0.0)}), guide),
        ("no latent", "nothing to infer"),
        [partial(elbo, model, guide)],
    ),
    "parameters of every datapoint": Case(
        partial(elbo, model, parameters_of_rows),
        ("loc[rows]", "event_dim=0"),
        [
            partial(elbo, lambda x, rows: model(x), indexed_parameters, (X, torch.arange(5))),
            partial(elbo, model, parameters_in_the_plate),
        ],
    ),
    "dropout in evaluation mode": Case(
        partial(elbo, model, Dropout(only_in_training=False)),
        ("random beyond its sample sites", "training=self.training"),
        [partial(elbo, model, Dropout(only_in_training=True))],
    ),
    "rows that depend on each other": Case(
        partial(elbo, model, BatchStatistics(across_rows=True)),
        ("changes with", "no batch statistics"),
        [partial(elbo, model, BatchStatistics(across_rows=False))],
    ),
    "a latent on the sphere": Case(
        partial(elbo, sphere, drawing(lambda x: dist.ProjectedNormal(torch.stack([x, -x], -1)))),
        ("'z'", "ProjectedNormalReparam", "_normal after its name"),
        [
            partial(
                elbo,
                pyro.poutine.reparam(sphere, {"z": ProjectedNormalReparam()}),
                drawing(lambda x: dist.Normal(torch.stack([x, -x], -1), 1.0).to_event(1), "z_normal"),
            )
        ],
    ),
    "a flow without an inverse beside another site": Case(
        partial(elbo, two_sites, partial(two_sites_guide, flow=transforms.planar(2))),
        ("'a'", "Planar", "has no inverse", "spline_coupling"),
        [partial(elbo, two_sites, partial(two_sites_guide, flow=transforms.spline_coupling(2)))],
    ),
    "a latent of some datapoints": Case(
        partial(elbo, partial(only_some_rows, padded=False), only_some_rows_guide),
        ("site 'w'", "only for some datapoints", "mask"),
        [partial(elbo, partial(only_some_rows, padded=True), only_some_rows_guide)],
    ),
    "a latent that the guide lacks": Case(
        partial(elbo, two_sites, drawing(lambda x: dist.Normal(x, 1.0), "b")),
        ("'a'", "missing from the guide"),
        [partial(elbo, two_sites, partial(two_sites_guide, flow=transforms.spline_coupling(2)))],
    ),
    "positive": on_support(
        dist.Gamma(2.0, 1.0), "the nonnegative reals", constraints.positive, lambda x: dist.LogNormal(x / 2, 0.8)
    ),
    "from 0 to 1": on_support(
        dist.Beta(2.0, 1.0), "(0, 1)", constraints.unit_interval, lambda x: dist.Beta(x + 1, 2.0)
    ),
    "an interval": on_support(dist.Uniform(-1.0, 3.0), "(-1, 3)", constraints.interval(-1, 3)),
    "angles": on_support(
        dist.VonMises(0.0, 1.0),
        "angles from -pi to pi",
        constraints.interval(-math.pi, math.pi),
        lambda x: dist.VonMises(x / 2, 1.0),
    ),
    "above a bound": on_support(dist.Pareto(1.0, 2.0), "the reals above 1", constraints.greater_than(1)),
    "a simplex": Case(
        partial(
            elbo,
            latent(dist.Dirichlet(torch.ones(3)), lambda z: z[..., 0]),
            drawing(lambda x: dist.Normal(torch.zeros(len(x), 3), 1.0).to_event(1)),
        ),
        ("the simplex of 3", "Dirichlet", "constraints.simplex"),
        [
            partial(elbo, latent(dist.Dirichlet(torch.ones(3)), lambda z: z[..., 0]), drawing(make))
            for make in (
                lambda x: dist.Dirichlet(torch.ones(len(x), 3)),
                lambda x: dist.TransformedDistribution(
                    dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1), [biject_to(constraints.simplex)]
                ),
            )
        ],
    ),
    "a vector of another length": Case(
        partial(elbo, latent(dist.Normal(torch.zeros(3), 1.0).to_event(1), lambda z: z.sum(-1)), guide),
        ("shape (", "(3,) per datapoint", "to_event"),
        [
            partial(
                elbo,
                latent(dist.Normal(torch.zeros(3), 1.0).to_event(1), lambda z: z.sum(-1)),
                drawing(lambda x: dist.Normal(torch.zeros(len(x), 3), 1.0).to_event(1)),
            )
        ],
    ),
    "data computed from arguments": Case(
        lambda: pg.Problem.of(computed, None, X).simulated(0),
        ("'x'", "to_data="),
        [lambda: pg.Problem.of(computed, None, X).simulated(0, given_back)],
    ),
    "an improper prior": Case(
        partial(elbo, latent(dist.ImproperUniform(constraints.real, (), ())), guide),
        ("'z'", "no normalised density", "a wide Normal"),
        [partial(elbo, latent(dist.Normal(0.0, 100.0)), guide)],
    ),
    "zeros of their own probability": Case(
        partial(elbo, latent(dist.ZeroInflatedDistribution(dist.Normal(0.0, 1.0), gate=torch.tensor(0.5))), guide),
        ("'z'", "a probability of their own", "Bernoulli"),
        [partial(elbo, model, guide)],
    ),
    "a Wishart": Case(
        without_warnings(
            elbo, latent(dist.Wishart(torch.tensor(20.0), torch.eye(2)), lambda z: z.sum((-1, -2))), matrices_guide
        ),
        ("'z'", "Wishart", "LKJCholesky", "positive scales"),
        [partial(elbo, matrices, matrices_guide)],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_remedy_of(name: str) -> None:
    case = CASES[name]
    with pytest.raises(pg.InputError) as caught:
        case.refused()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    for word in case.words:
        assert word in message, message
    assert case.remedied
    for remedied in case.remedied:
        pyro.clear_param_store()
        result = remedied()
        assert result is not None and (not isinstance(result, Tensor) or bool(torch.isfinite(result).all()))
