"""The VAE's decoder half as a Pyro model."""

import pytest
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.distributions import Bernoulli, Normal

from pyrogaps.errors import InputError
from pyrogaps.models.vae import VAE


def trace_of(model: VAE, x: Tensor, z: Tensor | None = None):  # type: ignore[no-untyped-def]
    program = model if z is None else poutine.condition(model, data={"z": z})
    trace = poutine.trace(program).get_trace(x)
    trace.compute_log_prob()
    return trace


def binary(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)).round()


def test_bernoulli_log_joint() -> None:
    torch.manual_seed(0)
    model, x, z = VAE(), binary(5, 64), torch.randn(5, 8)
    trace = trace_of(model, x, z)
    torch.testing.assert_close(trace.nodes["z"]["log_prob"], Normal(0, 1).log_prob(z).sum(-1))
    expected = Bernoulli(logits=model.decoder(z)).log_prob(x).sum(-1)
    torch.testing.assert_close(trace.nodes["x"]["log_prob"], expected)
    assert [frame.name for frame in trace.nodes["x"]["cond_indep_stack"]] == ["data"]


def test_event_shape_does_not_matter() -> None:
    torch.manual_seed(0)
    model, x, z = VAE(), binary(5, 64), torch.randn(5, 8)
    flat, square = trace_of(model, x, z).nodes["x"], trace_of(model, x.reshape(5, 1, 8, 8), z).nodes["x"]
    torch.testing.assert_close(flat["log_prob"], square["log_prob"])
    assert square["fn"].event_shape == (1, 8, 8)


@pytest.mark.parametrize(("noise", "trained"), [("fixed", 0), ("learned", 1), ("per_pixel", 6)])
def test_gaussian_log_likelihood(noise: str, trained: int) -> None:
    torch.manual_seed(0)
    model = VAE(6, 2, [], likelihood="gaussian", noise=noise, noise_scale=0.3)  # type: ignore[arg-type]
    x, z = torch.randn(4, 2, 3), torch.randn(4, 2)
    expected = Normal(model.decoder(z), 0.3).log_prob(x.reshape(4, 6)).sum(-1)
    torch.testing.assert_close(trace_of(model, x, z).nodes["x"]["log_prob"], expected)
    assert (model.log_noise_scale.numel() if model.log_noise_scale.requires_grad else 0) == trained


@pytest.mark.parametrize(("hidden", "linear"), [([], 1), ([7], 2), ([7, 5, 3], 4)])
def test_depth_and_activation(hidden: list[int], linear: int) -> None:
    layers = list(VAE(6, 2, hidden, activation="Tanh").decoder)
    assert sum(isinstance(layer, nn.Linear) for layer in layers) == linear
    assert sum(isinstance(layer, nn.Tanh) for layer in layers) == linear - 1


def test_double_precision_and_byte_images() -> None:
    model = VAE(6, 2).double()
    trace = trace_of(model, binary(3, 6).to(torch.uint8))
    assert trace.nodes["z"]["value"].dtype == torch.float64
    assert trace.nodes["x"]["log_prob"].dtype == torch.float64


def test_more_dimensions_on_the_left() -> None:
    torch.manual_seed(0)
    model, x, z = VAE(6, 2), binary(4, 6), torch.randn(3, 4, 2)
    together = trace_of(model, x, z).nodes["x"]["log_prob"]
    torch.testing.assert_close(together[1], trace_of(model, x, z[1]).nodes["x"]["log_prob"])


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"likelihood": "poisson"}, "likelihood"),
        ({"likelihood": "gaussian", "noise": "loud"}, "noise"),
        ({"likelihood": "gaussian", "noise_scale": 0.0}, "noise_scale"),
        ({"activation": "Elu"}, "activation"),
        ({"activation": "functional"}, "activation"),
        ({"hidden": [5, 0]}, "sizes"),
    ],
)
def test_bad_settings_are_named(arguments: dict[str, object], word: str) -> None:
    with pytest.raises(InputError, match=word):
        VAE(**arguments)  # type: ignore[arg-type]


def test_wrong_size_of_data() -> None:
    with pytest.raises(InputError, match="data_dim is 64, but a datapoint has 6"):
        VAE()(binary(2, 6))
