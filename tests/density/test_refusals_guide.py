"""What `GuideDensity` cannot answer for it refuses in one line that names the culprit and the remedy."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoStructured,
)
from pyro.optim import Adam
from torch import Tensor, nn
from torch.distributions import constraints

from pyrogaps import GuideDensity, InputError

X = torch.tensor([0.3, 1.2, 0.8, 2.0, 0.4])


def model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, rate), obs=x)


def vector_model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)


def sites(x: Tensor, rate: Any = None, z: Any = None) -> None:
    """The good guide, but for what a test puts in its place."""
    with pyro.plate("data", len(x)):
        pyro.sample("rate", rate or dist.Gamma(2.0, 1.0))
        pyro.sample("z", z or dist.Normal(x, 0.5))


def refused(
    guide: Callable[..., Any], *words: str, model: Callable[..., Any] = model, data: Any = X, plate: Any = None
) -> None:
    """`GuideDensity` raises an `InputError` of one line that holds all of `words`."""
    with pytest.raises(InputError) as caught:
        GuideDensity(guide, data, model, plate)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def trained(guide: Any, model: Callable[..., Any] = model, data: Any = X, steps: int = 2) -> Any:
    svi = SVI(model, guide, Adam({"lr": 0.01}), Trace_ELBO())
    for _ in range(steps):
        svi.step(data)
    return guide


def test_the_good_guide_passes() -> None:
    GuideDensity(sites, X, model)


# Sites.


def test_latent_missing_from_the_guide() -> None:
    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 0.5))

    refused(guide, "site 'rate'", "latent in the model", "missing from the guide", "pyro.sample")


def test_guide_site_missing_from_the_model() -> None:
    def guide(x: Tensor) -> None:
        sites(x)
        with pyro.plate("data", len(x)):
            pyro.sample("extra", dist.Normal(0.0, 1.0))

    refused(guide, "site 'extra'", "in the guide but not in the model", "is_auxiliary")


def test_auxiliary_site_without_augment() -> None:
    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            v = pyro.sample("v", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        sites(x, z=dist.Normal(x + v, 0.5))

    refused(guide, "site 'v'", "auxiliary", "augment(model)")


def test_guide_samples_an_observed_site() -> None:
    def guide(x: Tensor) -> None:
        sites(x)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0))

    refused(guide, "site 'x'", "observed in the model", "Remove it")


def test_the_model_as_its_guide() -> None:
    def guide(x: Tensor) -> None:
        sites(x)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    refused(guide, "site 'x'", "observed in the guide", "pass the guide where this is the model")


def test_observed_site_in_the_guide() -> None:
    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("rate", dist.Gamma(2.0, 1.0))
            pyro.sample("z", dist.Normal(x, 0.5), obs=x)

    refused(guide, "site 'z'", "observed in the guide", "obs=")


def test_guide_outside_the_data_plate() -> None:
    def guide(x: Tensor) -> None:
        pyro.sample("rate", dist.Gamma(2.0, 1.0).expand([len(x)]))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 0.5))

    refused(guide, "site 'rate'", "outside the data plate 'data' in the guide", "pyro.plate('data', ...)")


def test_guide_with_another_plate_name() -> None:
    def guide(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("rate", dist.Gamma(2.0, 1.0))
            pyro.sample("z", dist.Normal(x, 0.5))

    refused(guide, "site 'rate'", "outside the data plate 'data' in the guide")


def test_guide_without_sites() -> None:
    refused(lambda x: None, "site 'rate'", "missing from the guide")


def test_discrete_in_the_guide() -> None:
    def guide(x: Tensor) -> None:
        sites(x, rate=dist.Poisson(torch.tensor(2.0)))

    refused(guide, "site 'rate'", "discrete in the guide")


# Deltas and joint autoguides.


def test_auto_delta() -> None:
    refused(trained(AutoDelta(model)), "site 'rate'", "Delta", "no density", "AutoNormal instead of AutoDelta")


def test_hand_written_delta() -> None:
    def guide(x: Tensor) -> None:
        sites(x, z=dist.Delta(x))

    refused(guide, "site 'z'", "Delta", "no density")


def test_hand_written_delta_over_an_event() -> None:
    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(x[:, None].expand(-1, 3), event_dim=1))

    refused(guide, "site 'z'", "Delta", model=vector_model)


def test_joint_autoguides_under_a_data_plate() -> None:
    flat = [AutoMultivariateNormal, AutoDiagonalNormal, AutoLowRankMultivariateNormal, AutoIAFNormal]
    for kind in flat:
        pyro.clear_param_store()
        guide = trained(kind(model))
        refused(guide, f"{kind.__name__} is one joint distribution", "AutoNormal", "AutoLocalMultivariateNormal")
    pyro.clear_param_store()
    laplace = trained(AutoLaplaceApproximation(model))
    refused(laplace, "AutoLaplaceApproximation", "AutoNormal", "AutoLocalMultivariateNormal")
    refused(laplace.laplace_approximation(X), "AutoMultivariateNormal is one joint distribution", "AutoNormal")


def test_auto_guide_list_with_a_flat_part() -> None:
    guide = AutoGuideList(model)
    guide.append(AutoNormal(pyro.poutine.block(model, expose=["z"])))
    guide.append(AutoDiagonalNormal(pyro.poutine.block(model, expose=["rate"])))
    refused(trained(guide), "AutoDiagonalNormal is one joint distribution", "AutoNormal")


def test_auto_structured() -> None:
    guide = AutoStructured(model, conditionals="normal", dependencies={})
    refused(trained(guide), "AutoStructured", "AutoNormal")


def test_autoguide_that_was_never_run() -> None:
    refused(AutoNormal(model), "AutoNormal", "never been run", "Train it")


def test_autoguide_list_that_was_never_run() -> None:
    guide = AutoGuideList(model)
    guide.append(AutoNormal(pyro.poutine.block(model, expose=["z"])))
    guide.append(AutoNormal(pyro.poutine.block(model, expose=["rate"])))
    refused(guide, "AutoGuideList", "never been run")


def test_autoguide_trained_on_other_data() -> None:
    refused(trained(AutoNormal(model), data=torch.rand(7)), "plate 'data'", "size 7", "these data", data=X)


# Supports and shapes.


@pytest.mark.parametrize(
    ("fn", "word"),
    [
        (dist.Normal(1.0, 0.1), "the real line"),
        (dist.Beta(2.0, 2.0), "(0, 1)"),
        (dist.Uniform(0.0, 4.0), "(0, 4)"),
        (dist.Pareto(torch.tensor(1.0), torch.tensor(3.0)), "the reals above 1"),
    ],
)
def test_supports_that_differ(fn: Any, word: str) -> None:
    refused(lambda x: sites(x, rate=fn), "site 'rate'", "support", word, "differs from the model's", "transform")


def test_supports_that_agree_after_a_transform() -> None:
    log_normal = dist.TransformedDistribution(dist.Normal(0.0, 1.0), [torch.distributions.transforms.ExpTransform()])
    for fn in (dist.LogNormal(0.0, 1.0), dist.HalfNormal(1.0), dist.Exponential(1.0), log_normal):
        GuideDensity(lambda x, fn=fn: sites(x, rate=fn), X, model)


def test_shapes_that_differ() -> None:
    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    refused(guide, "site 'z'", "shape (6, 2)", "(3,) per datapoint", "plates and to_event", model=vector_model)


def test_scalar_for_a_vector() -> None:
    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    refused(guide, "site 'z'", "shape", "(3,) per datapoint", model=vector_model)


def test_the_shape_of_a_simplex_is_that_of_its_values() -> None:
    def shares(x: Tensor) -> None:
        with pyro.plate("data", len(x)), pyro.plate("parts", 2, dim=-2):
            z = pyro.sample("z", dist.Dirichlet(torch.ones(4)))
            pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=x.expand(2, -1))

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)), pyro.plate("parts", 2, dim=-2):
            pyro.sample("z", dist.Dirichlet(torch.ones(3)))

    refused(guide, "site 'z'", "the simplex of 3", "the simplex of 4", model=shares, plate="data")


def test_vector_transposed() -> None:
    def square(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))
            pyro.sample("x", dist.Normal(z.sum((-1, -2)), 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(3, 2), 1.0).to_event(2))

    refused(guide, "site 'z'", "shape", "(2, 3) per datapoint", model=square)


# Plates and rows.


def test_guide_with_another_hard_coded_size() -> None:
    def guide(x: Tensor) -> None:
        with pyro.plate("data", 7):
            pyro.sample("rate", dist.Gamma(2.0, 1.0))
            pyro.sample("z", dist.Normal(0.0, 0.5))

    refused(guide, "plate 'data'", "size 7")


def test_per_datapoint_parameters_that_are_not_selected() -> None:
    def guide(x: Tensor) -> None:
        loc = pyro.param("loc", lambda: torch.arange(5.0))
        with pyro.plate("data", len(x)):
            pyro.sample("rate", dist.Gamma(2.0, 1.0))
            pyro.sample("z", dist.Normal(loc, 0.5))

    refused(guide, "guide", "other numbers of its rows", "loc[rows]", "event_dim")


def test_per_datapoint_parameters_selected_by_position() -> None:
    """The rows of a plate of the size of the data are the datapoints, also where only some are asked for."""

    def guide(x: Tensor) -> None:
        loc = pyro.param("loc", lambda: torch.arange(5.0))
        with pyro.plate("data", len(x)) as rows:
            pyro.sample("rate", dist.Gamma(2.0, 1.0))
            pyro.sample("z", dist.Normal(loc[rows], 0.5))

    z = torch.zeros(1, 2, 2)
    log_q = GuideDensity(guide, X, model).log_prob(z, torch.tensor([4, 1]))
    by_hand = dist.Normal(torch.tensor([4.0, 1.0]), 0.5).log_prob(torch.zeros(2))
    torch.testing.assert_close(log_q[0] - by_hand, dist.Gamma(2.0, 1.0).log_prob(torch.ones(2)))


def test_parameters_for_each_datapoint_without_rows() -> None:
    def guide(x: Tensor) -> None:
        loc = torch.arange(5.0)
        with pyro.plate("data", len(x)):
            pyro.sample("rate", dist.Gamma(2.0, 1.0))
            pyro.sample("z", dist.Normal(loc, 0.5))

    refused(guide, "guide", "rows", "torch.arange(N)")


def test_guide_with_dependence_between_rows() -> None:
    def guide(x: Tensor) -> None:
        sites(x, z=dist.Normal((x - x.mean()) / x.std(), 0.5))

    refused(guide, "guide", "rows", "batch statistics")


def test_sequential_guide_with_dependence_between_rows() -> None:
    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
            pyro.sample("z", dist.Normal(x + rate.mean(), 0.5))

    refused(guide, "guide", "rows", "batch statistics")


# Parameters.


def test_guide_parameter_not_finite() -> None:
    class Guide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Linear(1, 2)

        def forward(self, x: Tensor) -> None:
            loc, scale = self.encoder(x[:, None]).exp().unbind(-1)
            sites(x, z=dist.Normal(loc, scale))

    guide = Guide()
    with torch.no_grad():
        guide.encoder.weight[1] = float("inf")
    refused(guide, "parameter 'encoder.weight'", "NaN or infinite")
    refused(guide.forward, "parameter 'encoder.weight'", "NaN or infinite")


def test_guide_parameter_of_the_store_not_finite() -> None:
    def guide(x: Tensor) -> None:
        scale = pyro.param("scale", torch.tensor(0.5), constraint=constraints.positive)
        sites(x, z=dist.Normal(x, scale))

    trained(guide)
    with torch.no_grad():
        pyro.param("scale").unconstrained().fill_(float("nan"))
    refused(guide, "parameter 'scale'", "NaN or infinite")


def test_data_are_needed_to_read_a_model() -> None:
    refused(sites, "data: missing", data=None)
