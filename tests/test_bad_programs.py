"""Programs, shared latents, terms and indices that do not fit: one line each, and remedies that do not lead to another.

With `test_boundary.py`, `test_bad_data.py` and the many of `test_settings.py`: the inputs that were tried.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import (
    AutoGuideList,
    AutoIAFNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalMessenger,
)
from torch import Tensor, nn

import pyrogaps as pg
from pyrogaps.guides.amortized import AmortizedNormal
from tests import test_bad_data, test_boundary

X = torch.tensor([0.3, -1.2, 0.8, 2.0])
AIS = pg.AIS(num_chains=2, num_temperatures=3)
SMALL: dict[str, Any] = {
    "num_particles": 4,
    "refinement": pg.Refinement(num_steps=3, num_particles=2, num_selection=4),
    "evidence": AIS,
    "shared": pg.Shared(num_draws=2, max_draws=4, tolerance=5.0),
    "referee": False,
    "progress": False,
}


def model(x: Tensor) -> None:
    with pyro.plate("d", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x: Tensor) -> None:
    with pyro.plate("d", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 0.7))


def elbo(m: Any = model, g: Any = guide, data: Any = X, **settings: Any) -> Callable[[], Any]:
    return lambda: pg.elbo(m, g, data, num_particles=4, **settings)


def observing(obs: Callable[[Tensor], Any]) -> Callable[[], Any]:
    """A model that observes something made of its data."""

    def program(x: Tensor) -> None:
        with pyro.plate("d", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=obs(x))

    return elbo(program)


def masked(mask: Callable[[Tensor], Any]) -> Callable[[], Any]:
    def program(x: Tensor) -> None:
        with poutine.mask(mask=mask(x)):
            model(x)

    return elbo(program)


def plate(*args: Any, **options: Any) -> Callable[[], Any]:
    """A model in a plate with other arguments than the number of datapoints."""

    def program(x: Tensor) -> None:
        with pyro.plate("d", *args, **options):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return elbo(program)


# Discrete latents


def discrete(draw: Callable[[Tensor], Any], join: Callable[..., Any] = lambda z, k: z + k) -> Callable[[Tensor], None]:
    """A model with a discrete latent k, whose mean is `join(z, k)`."""

    def program(x: Tensor) -> None:
        with pyro.plate("d", len(x)):
            k = pyro.sample("k", draw(x))
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(join(z, k), 1.0), obs=x)

    return program


def drawing(draw: Callable[[Tensor], Any]) -> Callable[[Tensor], None]:
    """A guide for such a model that draws k too."""

    def program(x: Tensor) -> None:
        with pyro.plate("d", len(x)):
            pyro.sample("k", draw(x))
        guide(x)

    return program


three = discrete(lambda x: dist.Categorical(torch.ones(3)))
coin = discrete(lambda x: dist.Bernoulli(0.5))
ENUMERATED = ("discrete latents enumerated", "Vindex")


def looked_up(z: Tensor, k: Tensor) -> Tensor:
    return z + torch.stack([torch.arange(3.0)[int(value)] for value in k.reshape(-1)])


def all_discrete(x: Tensor) -> None:
    with pyro.plate("d", len(x)):
        k = pyro.sample("k", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(k, 1.0), obs=x)


def thirty(x: Tensor) -> None:
    with pyro.plate("d", len(x)):
        total = sum(pyro.sample(f"k{i}", dist.Bernoulli(0.5)) for i in range(30))
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z + total, 1.0), obs=x)


def masked_by_k(x: Tensor) -> None:
    with pyro.plate("d", len(x)):
        k = pyro.sample("k", dist.Bernoulli(0.5))
        with poutine.mask(mask=k.bool()):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


# Latents that datapoints share


def shared(x: Tensor) -> None:
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("d", len(x)):
        z = pyro.sample("z", dist.Normal(m, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def larger(x: Tensor) -> None:
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("d", 100, subsample_size=len(x)):
        z = pyro.sample("z", dist.Normal(m, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


class Guide(nn.Module):
    """Of `shared`, with its m drawn from `draw(location, x)`, outside of the data plate or inside."""

    def __init__(
        self, draw: Any = lambda m, x: dist.Normal(m, 0.7), *, inside: bool = False, local: bool = True
    ) -> None:
        super().__init__()
        self.m, self.slope = nn.Parameter(torch.tensor(0.1)), nn.Parameter(torch.tensor(0.5))
        self.draw, self.inside, self.local = draw, inside, local

    def forward(self, x: Tensor) -> None:
        if self.draw is not None and not self.inside:
            pyro.sample("m", self.draw(self.m, x))
        with pyro.plate("d", len(x)):
            if self.inside:
                pyro.sample("m", self.draw(self.m, x))
            if self.local:
                pyro.sample("z", dist.Normal(self.slope * x, 0.7))


def gaps(g: Any = None, m: Any = shared, data: Any = X, **settings: Any) -> Callable[[], Any]:
    return lambda: pg.decompose(m, Guide() if g is None else g, data, **{**SMALL, **settings})


def problem() -> pg.Problem:
    return pg.Problem.of(model, guide, X)


def mapa() -> Any:
    bound = pg.MAPA_IWAE_ELBO(pg.mapa_posterior(X[:, None], "gaussian", bandwidth=1.0))
    return bound.loss(lambda x: shared(x[:, 0]), lambda x: guide(x[:, 0]), torch.arange(4))


# Latents that guides set to values


def two(x: Tensor) -> None:
    with pyro.plate("d", len(x)):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        z = pyro.sample("z", dist.Normal(m, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def pointed(value: Callable[[Tensor], Any]) -> Callable[[Tensor], None]:
    def program(x: Tensor) -> None:
        with pyro.plate("d", len(x)):
            pyro.sample("m", dist.Delta(value(x)))
        guide(x)

    return program


class Pointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> None:
        pointed(lambda x: self.slope * x)(x)


def trained(autoguide: Any, data: Tensor = X) -> Any:
    pyro.clear_param_store()
    autoguide(data)
    return autoguide


OTHER_SIZE = ("site 'x'", "observed value has shape", "batch shape", "to_event")
WHOLE = ("site 'm'", "shared by all datapoints", "Problem.of(model, None, data, False).simulated(seed)")
MINE = pg.Term("mine", "mine", "inference_gapp", "mine", "exact", lambda columns: None)  # type: ignore[arg-type, return-value]

BAD: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    # What is observed
    "a list": (observing(lambda x: x.tolist()), ("site 'x'", "of type list", "torch.as_tensor")),
    "an array": (observing(lambda x: x.numpy()), ("site 'x'", "of type ndarray")),
    "a dictionary": (observing(lambda x: {"x": x}), ("site 'x'", "of type dict")),
    "a number": (observing(lambda x: 1.0), ("site 'x'", "of type float")),
    "a flag": (observing(lambda x: True), ("site 'x'", "of type bool")),
    "words": (observing(lambda x: "x"), ("site 'x'", "of type str")),
    "complex numbers": (observing(lambda x: x + 0j), ("site 'x'", "complex")),
    "NaN": (observing(lambda x: x / 0 * 0), ("site 'x'", "nan")),
    "a column": (observing(lambda x: x[:, None]), OTHER_SIZE),
    "half of the rows": (observing(lambda x: x[::2]), ("site 'x'", "size of tensor")),
    "data of a column": (elbo(data=X[:, None]), OTHER_SIZE),
    "data of two columns": (elbo(data=torch.stack([X, X], 1)), ("site 'x'", "size of tensor")),
    # Masks
    "a mask of numbers": (masked(lambda x: (x > 0).float()), ("model failed", "BoolTensor")),
    "a mask of words": (masked(lambda x: "yes"), ("model failed", "boolean")),
    "a mask of None": (masked(lambda x: None), ("model failed", "boolean")),
    "a mask in a list": (masked(lambda x: [True] * len(x)), ("model failed", "boolean")),
    "a mask of another length": (masked(lambda x: torch.ones(3).bool()), ("site 'z'", "mask has shape (3,)")),
    "a mask of pairs": (masked(lambda x: torch.ones(len(x), len(x)).bool()), ("site 'z'", "mask has shape")),
    "a random mask": (masked(lambda x: torch.rand(len(x)) > 0.5), ("model", "random")),
    "a mask of the batch": (masked(lambda x: x > x.mean()), ("other rows",)),
    "a mask of a discrete latent": (elbo(masked_by_k), ("site 'z'", "depends on a discrete latent")),
    # Plates
    "another size": (plate(3), ("plate 'd'", "size 3", "len(x)")),
    "a size of words": (plate("7"), ("plate 'd'", "size 7")),
    "no size": (plate(), ("site 'z'", "plate 'd'", "has no size", "len(x)")),
    "a dimension from the left": (plate(4, dim=0), ("model failed", "dim < 0")),
    "a dimension further left": (elbo(lambda x: model(x), data=X, plate="e"), ("no plate named 'e'", "are d")),
    "a plate of another name": (elbo(g=lambda x: in_plate("e", x)), ("site 'z'", "outside the data plate 'd'")),
    # Discrete latents
    "endless states": (elbo(discrete(lambda x: dist.Geometric(0.5))), ("site 'k'", "Geometric", "Truncate")),
    "states of several elements": (
        elbo(discrete(lambda x: dist.Multinomial(3, torch.ones(2)), lambda z, k: z + k[..., 0])),
        ("site 'k'", "Multinomial"),
    ),
    "states that differ": (elbo(discrete(lambda x: dist.Binomial(1.0 + torch.arange(len(x)), 0.5))), ("site 'k'",)),
    "a billion states": (elbo(discrete(lambda x: dist.Binomial(10**9, 0.5))), ("site 'k'", "joint states")),
    "thirty coins": (elbo(thirty), ("site 'k0'", "joint states", "pyro.markov")),
    "an event of coins": (
        elbo(discrete(lambda x: dist.Bernoulli(torch.full((20,), 0.5)).to_event(1), lambda z, k: z + k.sum(-1))),
        ("site 'k'", "2^20"),
    ),
    "states looked up in a loop": (elbo(discrete(lambda x: dist.Categorical(torch.ones(3)), looked_up)), ENUMERATED),
    "states beside z": (
        elbo(discrete(lambda x: dist.Bernoulli(0.5), lambda z, k: torch.stack([z, k]).sum(0))),
        ("model failed", "test_bad_programs.py", *ENUMERATED),
    ),
    "a mean over rows": (elbo(discrete(lambda x: dist.Bernoulli(0.5), lambda z, k: z + k.mean())), ENUMERATED),
    "more states in the guide": (elbo(coin, drawing(lambda x: dist.Categorical(torch.ones(3)))), ("3 states", "2")),
    "a continuous k": (elbo(coin, drawing(lambda x: dist.Normal(x, 1.0))), ("site 'k'", "continuous", "discrete")),
    "a relaxed k": (
        elbo(coin, drawing(lambda x: dist.RelaxedBernoulli(torch.tensor(0.5), torch.full((len(x),), 0.5)))),
        ("site 'k'", "continuous", "discrete"),
    ),
    "an endless k": (elbo(coin, drawing(lambda x: dist.Poisson(torch.ones(len(x))))), ("site 'k'", "Poisson")),
    "a NaN for k": (
        elbo(coin, drawing(lambda x: dist.Bernoulli(torch.full((len(x),), math.nan), validate_args=False))),
        ("guide failed",),
    ),
    "events of k": (
        elbo(coin, drawing(lambda x: dist.Bernoulli(torch.full((len(x), 2), 0.5)).to_event(1))),
        ("site 'k'", "shape"),
    ),
    "a grid of states": (lambda: pg.posterior_grid(all_discrete, {}, X), ("two latent dimensions", "discrete")),
    "a grid of one dimension": (lambda: pg.posterior_grid(three, {"q": guide}, X), ("two latent dimensions", "'z' 1")),
    "a sandwich of states": (lambda: pg.bdmc(all_discrete, X), ("bdmc", "exact", "log_evidence")),
    "an export of states": (lambda: pg.to_datatree(three, guide, X), ("site 'k'", "export")),
    "an objective for states": (
        lambda: pg.train(three, Guide(), X, objective=pyro.infer.TraceEnum_ELBO(), progress=False),
        ("TraceEnum_ELBO", "Use"),
    ),
    # Latents that datapoints share
    "shared by name": (gaps(plate="rows"), ("no plate named 'rows'", "are d")),
    "the site for the plate": (gaps(plate="m"), ("no plate named 'm'",)),
    "a dictionary of settings": (gaps(shared={"num_draws": 2}), ("shared: must be a Shared",)),
    "a class of settings": (gaps(shared=pg.Shared), ("shared: must be a Shared", "write Shared()")),
    "one draw": (lambda: pg.Shared(num_draws=1), ("shared.num_draws", "at least 2")),
    "a billion draws": (lambda: pg.Shared(num_draws=10**9), ("shared.num_draws", "at most 10000")),
    "a billion draws for bounds": (lambda: pg.Shared(max_draws=10**9), ("shared.max_draws", "at most 1000000")),
    "no tolerance": (lambda: pg.Shared(tolerance=0), ("shared.tolerance", "above 0")),
    "no evaluations": (lambda: pg.Shared(max_evaluations=0), ("shared.max_evaluations",)),
    "a misspelt setting": (lambda: pg.Shared(draws=3), ("'draws'", "'num_draws'")),  # type: ignore[call-arg]
    "a split": (gaps(split=pg.Split(X)), ("split", "'m'", "Leave it out")),
    "a certificate": (gaps(certificate=pg.Certificate()), ("certificate", "'m'", "Leave it out")),
    "a reference": (gaps(reference=Guide()), ("reference", "'m'", "Leave it out")),
    "no m": (gaps(Guide(None)), ("site 'm'", "missing from the guide")),
    "no z": (gaps(Guide(local=False)), ("site 'z'", "missing from the guide")),
    "m in the plate": (gaps(Guide(inside=True)), ("site 'm'", "inside the data plate 'd' in the guide", "outside")),
    "m of another shape": (gaps(Guide(lambda m, x: dist.Normal(m.expand(2), 1.0).to_event(1))), ("site 'm'", "shape")),
    "m of another support": (gaps(Guide(lambda m, x: dist.LogNormal(m, 0.7))), ("site 'm'", "support")),
    "a discrete m": (gaps(Guide(lambda m, x: dist.Bernoulli(logits=m))), ("site 'm'", "discrete")),
    "a NaN for m": (
        gaps(Guide(lambda m, x: dist.Normal(m * math.nan, 0.7, validate_args=False))),
        ("guide", "draw of site 'm'", "NaN"),
    ),
    "a random m": (gaps(Guide(lambda m, x: dist.Normal(m + torch.randn(()), 0.7))), ("guide", "random")),
    "an endless m": (gaps(m=lambda x: (pyro.sample("m", dist.Poisson(2.0)), model(x))), ("site 'm'", "Poisson")),
    "a larger plate": (gaps(m=larger), ("plate 'd'", "size is 100", "4 datapoints", "'m'")),
    "a larger plate, named": (gaps(m=larger, plate="d"), ("plate 'd'", "100")),
    "NaN for all": (gaps(data=X * math.nan), ("NaN",)),
    "no datapoints for all": (gaps(data=X[:0]), ("no datapoints",)),
    "a guide never run": (gaps(AutoNormal(shared)), ("AutoNormal", "never been run")),
    "a family of all": (gaps(families={"a": AutoMultivariateNormal}), ("family AutoMultivariateNormal", "not local")),
    "bounds of datapoints": (elbo(shared, Guide()), ("site 'm'", "decompose", "plate=False")),
    "calibrated datapoints": (lambda: pg.calibrate(shared, Guide(), X), WHOLE),
    "simulated datapoints": (lambda: pg.SimulatedData(shared, X), WHOLE),
    "a reference of datapoints": (lambda: pg.reference_guide(shared, Guide(), X, num_epochs=1), WHOLE),
    "a grid of all": (lambda: pg.posterior_grid(shared, {}, X), ("site 'm'", "pyro.param")),
    "MAPA of all": (mapa, ("site 'm'", "pyro.param")),
    # Point estimates and autoguides
    "a point of whole numbers": (elbo(two, pointed(lambda x: torch.zeros(len(x)).long())), ("site 'm'", "int64")),
    "a point that is NaN": (elbo(two, pointed(lambda x: x * math.nan)), ("site 'm'", "outside the support")),
    "a point by chance": (elbo(two, pointed(lambda x: torch.randn(len(x)))), ("site 'm'", "Delta is random")),
    "a point of other rows": (elbo(two, pointed(lambda x: x.mean().expand(len(x)))), ("site 'm'", "other rows")),
    "a point that is no tensor": (elbo(two, pointed(lambda x: 0.3)), ("guide failed", "float")),
    "a split of points": (
        lambda: pg.decompose(two, Pointed(), X, split=pg.Split(X), **SMALL),
        ("split", "point estimates of 'm'"),
    ),
    "a messenger never run": (elbo(two, AutoNormalMessenger(two)), ("AutoNormalMessenger", "never been run")),
    "a list of no guides": (elbo(two, AutoGuideList(two)), ("AutoGuideList", "never been run")),
    "a guide of another model": (lambda: pg.elbo(model, trained(AutoNormal(two)), X), ("site 'm'", "not in the model")),
    "a guide of fewer data": (lambda: pg.elbo(two, trained(AutoNormal(two), X[:3]), X), ("plate 'd'", "size 3")),
    # Terms
    "no terms": (gaps(guide, model, terms=[]), ("terms: there are none",)),
    "terms twice": (gaps(guide, model, terms=pg.TERMS + pg.TERMS), ("terms: two have the id",)),
    "a term without a parent": (gaps(guide, model, terms=(*pg.TERMS, MINE)), ("'inference_gapp'", "'inference_gap'?")),
    "terms of words": (gaps(guide, model, terms="all"), ("terms: must be a sequence",)),
    "a useless reference": (
        lambda: pg.decompose(model, test_bad_data.Net(), X, reference=guide, **SMALL),
        ("reference: has no effect", "no lookahead"),
    ),
    # Indices, points and counts
    "indices in a list": (lambda: problem().at([0, 1]), ("indices: expected", "a list")),  # type: ignore[arg-type]
    "indices of fractions": (lambda: problem().at(torch.tensor([0.5])), ("indices: expected", "float32")),
    "indices of flags": (lambda: problem().at(torch.ones(4).bool()), ("indices: expected", "bool")),
    "indices in a matrix": (lambda: problem().at(torch.tensor([[0, 1]])), ("indices: expected", "(1, 2)")),
    "no indices": (lambda: problem().at(torch.arange(0)), ("indices: expected", "(0,)")),
    "an index beyond the end": (lambda: problem().at(torch.tensor([9])), ("indices", "from 0 to N - 1 = 3")),
    "an index below 0": (lambda: problem().at(torch.tensor([-1])), ("indices", "from 0 to N - 1 = 3")),
    "a point beyond the end": (
        lambda: problem().joint(torch.zeros(1, 1, 1), torch.tensor([9])),
        ("indices", "from 0 to N - 1 = 3"),
    ),
    "points of None": (lambda: problem().joint(None), ("z: expected", "(S, 4, 1)")),  # type: ignore[arg-type]
    "points in an array": (lambda: problem().joint(np.zeros((1, 4, 1))), ("z: expected", "ndarray")),  # type: ignore[arg-type]
    "points of whole numbers": (lambda: problem().joint(torch.zeros(1, 4, 1).long()), ("z: expected", "int64")),
    "points of another width": (lambda: problem().joint(torch.zeros(1, 4, 2)), ("z: expected", "(1, 4, 2)")),
    "points for fewer": (lambda: problem().joint(torch.zeros(1, 3, 1)), ("z: expected", "(1, 3, 1)")),
    "values of another width": (lambda: problem().joint.constrain(torch.zeros(1, 4, 2)), ("z: expected",)),
    "scores of another width": (
        lambda: problem().guide_density().log_prob(torch.zeros(1, 4, 2)),
        ("z: expected", "(S, 4, 1)"),
    ),
    "no draws": (lambda: problem().guide_density().sample(0), ("num_particles", "at least 1")),
    "draws of words": (lambda: problem().joint.sample_prior("a"), ("num_particles", "'a'")),  # type: ignore[arg-type]
    "a seed of words": (lambda: problem().simulated("a"), ("seed", "'a'")),  # type: ignore[arg-type]
    "indices for MAPA": (
        lambda: pg.MAPA_ELBO(pg.mapa_posterior(X[:, None], "gaussian", bandwidth=1.0)).loss(model, guide, X),
        ("indices: expected", "float32"),
    ),
}


def in_plate(name: str, x: Tensor) -> None:
    with pyro.plate(name, len(x)):
        pyro.sample("z", dist.Normal(x, 1.0))


@pytest.mark.parametrize("name", BAD)
@pytest.mark.filterwarnings("ignore")
def test_a_bad_program_gets_one_line(name: str) -> None:
    call, words = BAD[name]
    with pytest.raises(pg.InputError) as refusal:
        call()
    line = str(refusal.value)
    assert "\n" not in line and len(line) < 700
    assert not [word for word in words if word not in line], line


def test_the_tables_are_long() -> None:
    """Those that are generated, in `test_settings.py`, come on top."""
    assert sum(len(table) for table in (BAD, test_bad_data.BAD, test_boundary.BAD)) >= 350


def test_remedies_for_shared_latents() -> None:
    """What is refused without `plate=False` runs with it; where it would not, the remedy is another."""
    drawn = pg.Problem.of(shared, None, X, False).simulated(0)
    assert drawn.data.shape == X.shape
    short = {"num_particles": 4, "plate": False}
    for value in (pg.elbo(shared, Guide(), X, **short).value, pg.iwae(shared, Guide(), X, **short).value):
        assert torch.isfinite(value).all()
    assert torch.isfinite(pg.ais(shared, Guide(), X, plate=False, settings=AIS).value).all()
    sandwich = pg.bdmc(shared, X, plate=False, settings=AIS, refinement=SMALL["refinement"])
    assert "nan" not in repr(sandwich)
    pyro.clear_param_store()

    def with_a_parameter(x: Tensor) -> None:
        m = pyro.param("m", torch.tensor(0.3))
        with pyro.plate("d", len(x)):
            z = pyro.sample("z", dist.Normal(m, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    assert torch.isfinite(pg.elbo(with_a_parameter, guide, X).value).all()


def test_states_of_another_dtype() -> None:
    """A Categorical of two states, whole numbers, stands for a Bernoulli, fractions: the same bound exactly."""
    q = torch.sigmoid(X)
    bernoulli = drawing(lambda x: dist.Bernoulli(torch.sigmoid(x)))
    categorical = drawing(lambda x: dist.Categorical(torch.stack([1 - torch.sigmoid(x), torch.sigmoid(x)], -1)))
    joint = pg.Problem.of(coin, bernoulli, X).scored
    z = torch.stack([torch.zeros(4), torch.ones(4)], -1)[None].flip(-1)  # k = 1, z = 0
    expected = dist.Bernoulli(q).log_prob(torch.ones(4)) + dist.Normal(X / 2, 0.7).log_prob(torch.zeros(4))
    for program in (bernoulli, categorical):
        found = pg.Problem.of(coin, program, X).guide_density()
        assert [*found.joint.sites] == [*joint.sites] == ["k", "z"]
        torch.testing.assert_close(found.log_prob(z)[0], expected)
        torch.testing.assert_close(found.joint(z), joint(z))


def test_shared_latents_leave_no_state() -> None:
    before = test_boundary.state()
    gaps()()
    assert test_boundary.state() == before


def test_a_plate_that_is_left_open_is_closed() -> None:
    """Pyro counts plates by name for the whole process."""

    def entering(x: Tensor) -> None:
        pyro.plate("d", len(x)).__enter__()
        pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(pg.InputError, match="entered and not left"):
        pg.elbo(entering, guide, X)
    with pyro.plate("d", 2):
        pyro.sample("y", dist.Normal(0.0, 1.0))
    assert torch.isfinite(pg.elbo(model, guide, X).value).all()


def test_a_family_whose_network_is_shared_is_refused_by_name() -> None:
    """The network is in Pyro's store under two names, whose removal ended in a KeyError."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    x = torch.randn(4, 2)
    guide = AmortizedNormal(2, 2, (4,))
    options: dict[str, Any] = {"num_particles": 20, "refinement": pg.Refinement(num_steps=5), "progress": False}
    with pytest.raises(pg.InputError, match=r"^family AutoIAFNormal: parameter '.*' is shared by datapoints"):
        pg.decompose(model, guide, x, families={"flow": AutoIAFNormal}, **options)
    assert not [name for name in pyro.get_param_store() if "IAF" in name]


def test_a_forgotten_event_is_explained() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    with pytest.raises(pg.InputError, match=r"inside plate\('data'\) at site z .*as in Normal\(loc, scale\).to_event"):
        pg.elbo(model, AmortizedNormal(3, 3, (4,)), torch.randn(5, 3))
