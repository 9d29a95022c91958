"""What `JointDensity` cannot answer for it refuses in one line that names the culprit and the remedy."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn
from torch.distributions.relaxed_categorical import ExpRelaxedCategorical as TorchExpRelaxedCategorical

from pyrogaps import IndexedData, InputError, JointDensity

X = torch.tensor([0.3, -1.2, 0.8, 2.0, -0.4])


def normal(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def refused(model: Callable[..., Any], data: Any, *words: str, plate: Any = None) -> None:
    """`JointDensity` raises an `InputError` of one line that holds all of `words`."""
    with pytest.raises(InputError) as caught:
        JointDensity(model, data, plate)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


# Sites.


def global_latent(x: Tensor) -> None:
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(m, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@pytest.mark.parametrize("plate", [None, "data"])
def test_latent_outside_the_data_plate(plate: str | None) -> None:
    words = ("site 'm'", "outside the data plate 'data'", "shared by all datapoints", "decompose", "plate=False")
    refused(global_latent, X, *words, plate=plate)


def test_two_plates_of_all_sites_ask_for_the_plate() -> None:
    def model(x: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("one", 1, dim=-2), pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(m, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[None])

    refused(model, X, "no plate encloses every site", "data", "outside any plate: m", "plate=", "plate=False")


def test_observed_site_outside_the_data_plate() -> None:
    def model(x: Tensor) -> None:
        normal(x)
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(1.0))

    refused(model, X, "site 'y'", "observed outside the data plate 'data'", plate="data")


def test_factor_outside_the_data_plate() -> None:
    def model(x: Tensor) -> None:
        normal(x)
        pyro.factor("penalty", torch.tensor(-1.0))

    refused(model, X, "site 'penalty'", "outside the data plate", plate="data")


def test_delta_latent_in_the_model() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Delta(torch.tensor(0.5)))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    refused(model, X, "site 'z'", "Delta", "pyro.deterministic")


def test_no_latent_site() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    refused(model, X, "no latent")


def test_no_observed_site() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0))

    refused(model, X, "no observed", "obs=")


def test_no_observed_site_in_nested_plates() -> None:
    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)), pyro.plate("parts", 2, dim=-2):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    refused(guide, X, "no observed", "swapped")


def test_no_site_at_all() -> None:
    refused(lambda x: None, X, "no latent")


def test_latent_for_some_inputs_only() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            if (x > 1.9).any():
                z = z + pyro.sample("w", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    refused(model, X, "site 'w'", "only for some datapoints", "mask")


def test_a_latent_of_another_shape_for_some_inputs() -> None:
    def model(x: Tensor) -> None:
        size = 2 if bool((x > 1.9).any()) else 1
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(size), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    refused(model, X, "site 'z'", "shape", "Pad")


# Plates.


def test_hard_coded_plate_size() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", 5):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    refused(model, X, "plate 'data'", "has size 5", "len(x)")


def test_hard_coded_plate_size_with_a_wrong_size() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", 7):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    refused(model, X, "plate 'data'", "has size 7")


def test_hard_coded_plate_with_subsampling() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", 5, subsample_size=2) as rows:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

    refused(model, X, "plate 'data'", "has size 5")


def test_several_candidate_plates() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("features", 3, dim=-1), pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    refused(model, torch.randn(5, 3), "several plates", "data, features", "plate=")


def test_wrong_plate_name() -> None:
    refused(normal, X, "no plate named 'rows'", "data", plate="rows")


def test_plate_named_where_the_model_has_none() -> None:
    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    refused(model, X, "no plate named 'data'", plate="data")


@pytest.mark.parametrize("plate", ["data", None])
def test_sequential_plate(plate: str | None) -> None:
    def model(x: Tensor) -> None:
        for n in pyro.plate("data", len(x)):
            z = pyro.sample(f"z{n}", dist.Normal(0.0, 1.0))
            pyro.sample(f"x{n}", dist.Normal(z, 1.0), obs=x[n])

    refused(model, X, "data plate 'data'", "loops over", "with pyro.plate", plate=plate)


def test_subsampled_plate_as_one_datapoint() -> None:
    def model(x: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), subsample_size=2) as rows:
            pyro.sample("x", dist.Normal(m, 1.0), obs=x[rows])

    refused(model, X, "plate 'data' is subsampled", "plate=False", plate=False)


# Data.


def test_counts_below_zero() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Poisson(z.exp()), obs=x)

    refused(
        model,
        torch.tensor([1.0, 2.0, -1.0]),
        "site 'x'",
        "outside the support",
        "Poisson",
        "Transform",
        "validate_args=False",
    )


def test_grey_values_under_a_bernoulli() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Bernoulli(logits=z[:, None].expand(-1, 4)).to_event(1), obs=x)

    refused(model, torch.full((3, 4), 0.5), "site 'x'", "outside the support", "Bernoulli")


def test_data_outside_the_support_far_from_the_first_rows() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Exponential(z.exp()), obs=x)

    x = torch.ones(1000)
    x[700] = -3.0
    refused(model, x, "site 'x'", "outside the support", "Exponential")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_data_not_finite(bad: float) -> None:
    x = X.clone()
    x[3] = bad
    refused(normal, x, "data:", "argument 0", "NaN or infinite", "impute")


def test_second_argument_not_finite() -> None:
    def model(x: Tensor, offset: Tensor) -> None:
        normal(x - offset)

    refused(model, (X, X / 0), "data:", "argument 1", "NaN or infinite")


@pytest.mark.parametrize("data", [torch.zeros(0), torch.zeros(0, 3)])
def test_empty_data(data: Any) -> None:
    refused(normal, data, "data:", "no datapoints")


def test_tensors_of_unequal_lengths() -> None:
    refused(lambda x, y: normal(x), (X, X[:3]), "data:", "different lengths", "[5, 3]")


@pytest.mark.parametrize("data", ["digits.npz", object(), (X, {1, 2}), {"x": object()}])
def test_data_of_another_kind(data: Any) -> None:
    refused(normal, data, "data:", "tensor", "IndexedData")


@pytest.mark.parametrize("data", [None, ()])
def test_no_data(data: Any) -> None:
    refused(normal, data, "data: missing")


def test_fetch_that_forgets_the_order() -> None:
    lengths = torch.tensor([2, 5, 1, 4, 3])

    def fetch(indices: Tensor) -> tuple[Tensor]:
        return (X[indices[lengths[indices].argsort(descending=True)]],)

    refused(normal, IndexedData(5, fetch), "fetch(indices)", "keep the order")


def test_fetch_that_sorts_when_few_lengths_differ() -> None:
    lengths = torch.full((200,), 7)
    lengths[[31, 77, 130]] = torch.tensor([3, 9, 5])
    x = torch.randn(200)

    def fetch(indices: Tensor) -> tuple[Tensor]:
        return (x[indices[lengths[indices].argsort(descending=True, stable=True)]],)

    refused(normal, IndexedData(200, fetch), "fetch(indices)", "keep the order")


def test_fetch_that_returns_too_few_rows() -> None:
    refused(normal, IndexedData(5, lambda indices: (X[indices.unique()],)), "plate 'data'", "fetch(indices)")


def test_dependence_between_rows() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=(x - x.mean()) / x.std())

    refused(model, X, "rows", "batch statistics")


def test_dependence_between_latents_of_rows() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z - z.mean(), 1.0), obs=x)

    refused(model, X, "rows", "batch statistics")


def test_dependence_on_the_position_in_the_batch() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.arange(len(x)) * 1.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    refused(model, X, "order", "rows")


def test_ragged_latents() -> None:
    lengths = [2, 3, 4, 3, 2]

    def fetch(indices: Tensor) -> tuple[Tensor]:
        return (torch.zeros(len(indices), max(lengths[n] for n in indices.tolist())),)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    refused(model, IndexedData(5, fetch), "shape", "pad", "mask")


# Parameters.


def test_module_parameter_not_finite() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = nn.Linear(1, 1)

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(self.decoder(z[:, None])[:, 0], 1.0), obs=x)

    model = Model()
    with torch.no_grad():
        model.decoder.bias.fill_(float("nan"))
    refused(model, X, "parameter 'decoder.bias'", "NaN or infinite")


def test_param_store_not_finite() -> None:
    def model(x: Tensor) -> None:
        scale = pyro.param("noise", torch.tensor(1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, scale), obs=x)

    pyro.param("noise", torch.tensor(1.0))
    with torch.no_grad():
        pyro.param("noise").fill_(float("inf"))
    refused(model, X, "parameter 'noise'", "NaN or infinite")


def test_points_of_a_wrong_shape() -> None:
    joint = JointDensity(normal, X)
    for z in (torch.zeros(5, 1), torch.zeros(2, 4, 1), torch.zeros(2, 5, 2), torch.zeros(5)):
        with pytest.raises(InputError, match=r"z: expected shape \(S, 5, 1\), got "):
            joint(z)


def test_model_that_raises_is_named_with_its_own_error() -> None:
    def model(x: Tensor) -> None:
        raise KeyError("a user's own mistake")

    with pytest.raises(
        InputError, match=r"model failed: KeyError: .*a user's own mistake.*test_refusals_model"
    ) as told:
        JointDensity(model, X)
    assert isinstance(told.value.__cause__, KeyError)


def test_data_of_another_dtype_names_the_remedy() -> None:
    layer = torch.nn.Linear(3, 2)

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(layer(x), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), 1.0).expand([len(x), 3]).to_event(1), obs=x)

    refused(model, torch.randn(5, 3, dtype=torch.float64), "model failed", "dtype", "x.float()")


class ExpRelaxedCategorical(TorchExpRelaxedCategorical, TorchDistributionMixin):
    """As torch's, which declares all of R^K where its draws have one dimension less."""


def test_a_latent_on_a_surface_is_refused_with_its_image_that_has_a_density() -> None:
    def model(x: Tensor, kind: Any = ExpRelaxedCategorical) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", kind(torch.tensor(0.5), logits=torch.zeros(len(x), 3)))
            pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=x)

    refused(model, X, "site 'z': ExpRelaxedCategorical has no density", "use RelaxedOneHotCategorical")
    assert JointDensity(lambda x: model(x, dist.RelaxedOneHotCategorical), X).dim == 2


def test_points_of_another_shape_are_refused_with_a_remedy() -> None:
    joint = JointDensity(normal, X)
    with pytest.raises(InputError, match=r"z: expected shape \(S, 5, 1\), got \(5, 1\).*sample_prior"):
        joint(torch.zeros(5, 1))
    rows = torch.tensor([1, 3])
    assert joint(joint.sample_prior(4, rows), rows).shape == (4, 2)
