"""`Problem`: programs are read once, and a problem takes the place of model, guide and data."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyrogaps as pg
from pyrogaps.density import IndexedData
from pyrogaps.guides.amortized import AmortizedNormal
from pyrogaps.guides.auxiliary_flows import AmortizedAuxiliaryFlow
from pyrogaps.models.linear_gaussian import LinearGaussian

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
SMALL: dict[str, Any] = {
    "refinement": pg.Refinement(num_steps=20),
    "evidence": pg.AIS(num_chains=4, num_temperatures=5),
    "num_particles": 50,
    "progress": False,
}


class Counted(torch.nn.Module):
    """A program that counts its runs; what else it has is that of the program."""

    def __init__(self, program: Any) -> None:
        super().__init__()
        self.program, self.runs = program, 0

    def forward(self, *args: Any) -> Any:
        self.runs += 1
        return self.program(*args)


@pytest.fixture
def pair() -> tuple[Counted, Counted]:
    torch.manual_seed(0)
    return Counted(LinearGaussian.random(4, 2)), Counted(AmortizedNormal(4, 2, (8,)))


@pytest.mark.usefixtures("brief_check")
def test_a_problem_takes_the_place_of_its_parts(pair: tuple[Counted, Counted]) -> None:
    problem = pg.Problem.of(*pair, X)
    assert pg.Problem.of(problem) is problem
    settings = pg.Refinement(num_steps=20)
    for function, options in (
        (pg.elbo, {}), (pg.iwae, {}), (pg.ais, {"refinement": settings}), (pg.log_evidence, {"refinement": settings}),
    ):  # fmt: skip
        found, expected = function(problem, **options).value, function(*pair, X, **options).value
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    for found, expected in zip(
        pg.refine(problem, settings=settings).sample(3), pg.refine(*pair, X, settings=settings).sample(3), strict=True
    ):
        assert found.shape == expected.shape
    ledger, same = pg.decompose(problem, **SMALL), pg.decompose(*pair, X, **SMALL)
    assert ledger.per_datapoint.identical(same.per_datapoint)
    sandwich, again = (
        pg.bdmc(*args, settings=SMALL["evidence"], refinement=settings) for args in ((problem,), (pair[0], X))
    )
    assert sandwich.data.shape == again.data.shape == X.shape
    assert pg.to_datatree(problem.model, problem.guide, X, num_draws=5)["posterior"]


def test_a_problem_is_passed_alone(pair: tuple[Counted, Counted]) -> None:
    problem = pg.Problem.of(*pair, X)
    with pytest.raises(pg.InputError, match="Do not pass them separately"):
        pg.elbo(problem, pair[1])
    with pytest.raises(pg.InputError, match="data: missing"):
        pg.elbo(LinearGaussian.random(4, 2), pair[1])
    with pytest.raises(pg.InputError, match="missing 1 required positional argument: 'x'"):
        pg.elbo(*pair)  # of any number of arguments, so perhaps of none
    with pytest.raises(pg.InputError, match="guide: missing"):
        pg.elbo(pair[0], None, X)


def test_over_and_with_guide_run_nothing_again(pair: tuple[Counted, Counted]) -> None:
    model, guide = pair
    problem = pg.Problem.of(model, guide, X)
    runs = model.runs, guide.runs
    other = torch.randn(7, 4)
    moved = problem.over(IndexedData(7, lambda indices: (other[indices],)))
    assert moved.with_guide(None).posterior is None
    assert (model.runs, guide.runs) == runs
    torch.testing.assert_close(pg.elbo(moved).value, pg.elbo(model, guide, other).value, rtol=0, atol=0)
    simulated, data, z = problem.simulated(0)
    assert data.shape == X.shape
    assert z.shape == (3, 2)
    assert simulated.num_datapoints == 3
    torch.testing.assert_close(pg.elbo(simulated).value, pg.elbo(model, guide, data).value, rtol=0, atol=0)


def test_a_guide_with_parameters_for_each_datapoint_stays_with_its_data() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide, x = pyro.infer.autoguide.AutoNormal(model), torch.randn(5)
    guide(x)
    problem = pg.Problem.of(model, guide, x)
    with pytest.raises(pg.InputError, match="parameters for 5 datapoints, but the data have 3"):
        problem.over(IndexedData(3, lambda indices: (x[indices],)))
    refined = pg.refine(problem, settings=pg.Refinement(num_steps=20))
    with pytest.raises(pg.InputError, match="fits only the data it was refined on"):
        problem.with_guide(refined).over(problem.joint.data)


def test_without_its_auxiliary_guide_a_model_is_its_own() -> None:
    torch.manual_seed(0)
    model = LinearGaussian.random(4, 2)
    guide = AmortizedAuxiliaryFlow(4, 2, (8,), flow_hidden=4)
    problem = pg.Problem.of(model, guide, X)
    assert problem.joint.model is model
    assert "v" in problem.scored.sites
    assert "v" not in problem.joint.sites

    class Plain(AmortizedAuxiliaryFlow):
        local_family = None

    problem = pg.Problem.of(model, Plain(4, 2, (8,), flow_hidden=4), X)
    assert problem.joint is problem.scored
    plain = problem.with_guide(None)
    assert plain.joint.model is model
    assert "v" not in plain.joint.sites


# Runs of the model and of the guide, with three datapoints at default settings but for their length. Two of the model
# record the shape in which the anchor takes its gradients, one draws from the prior, where other starts begin,
# and one reads what is observed; those of the guide find what it sets to values, and give its moments, for the data and
# for what a certificate refines again.
RUNS = {"elbo": (8, 8), "plain": (18, 11), "certificate": (29, 14)}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.usefixtures("brief_check")
def test_programs_are_run_a_few_times(pair: tuple[Counted, Counted], name: str) -> None:
    model, guide = pair
    if name == "elbo":
        pg.elbo(model, guide, X, num_particles=50)
    else:
        certificate = pg.Certificate(2, 2, 2) if name == "certificate" else None
        pg.decompose(model, guide, X, certificate=certificate, **SMALL)
    assert model.runs <= RUNS[name][0]
    assert guide.runs <= RUNS[name][1]
