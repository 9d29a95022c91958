"""`simulate` draws data and their latents from the model, in the shape of the model's arguments."""

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

from pyrogaps import IndexedData, InputError, JointDensity
from pyrogaps.density.simulate import simulate

pytestmark = pytest.mark.usefixtures("double")

N = 3000


def within(values: Tensor, mean: Tensor | float, widths: float = 4.5) -> None:
    """The mean over the first axis is `mean` within standard errors."""
    error = values.std(0) / math.sqrt(len(values))
    assert ((values.mean(0) - mean).abs() < widths * error).all()


def scores_as_drawn(model: Callable[..., Any], joint: JointDensity, data: Any, z: Tensor) -> None:
    """The simulated data set is a data set: the density of it at its own latents is that of the drawn trace."""
    again = JointDensity(model, data, joint.plate)(z[None])
    assert again.shape == (1, joint.num_datapoints) and torch.isfinite(again).all()


def normal(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Gamma(4.0, 2.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def test_one_site() -> None:
    joint = JointDensity(normal, torch.zeros(N))
    x, z = simulate(joint)
    assert isinstance(x, Tensor) and x.shape == (N,) and z.shape == (N, 1)
    latent = z[:, 0].exp()
    within(latent, 2.0)
    within((latent - 2.0) ** 2, 1.0)
    within(x - latent, 0.0)
    within((x - latent) ** 2, 0.25)
    within((x - latent) * latent, 0.0)
    scores_as_drawn(normal, joint, x, z)


def test_seeds() -> None:
    joint = JointDensity(normal, torch.zeros(20))
    torch.manual_seed(1)
    first = simulate(joint)
    second = simulate(joint)
    torch.manual_seed(1)
    third = simulate(joint)
    assert all(torch.equal(a, b) for a, b in zip(first, third, strict=True))
    assert not torch.equal(first[0], second[0])


def test_the_caller_s_data_are_not_written_to() -> None:
    x = torch.arange(20.0)
    joint = JointDensity(normal, x)
    simulate(joint)
    assert torch.equal(x, torch.arange(20.0))


def test_several_arguments_and_sites() -> None:
    def model(x: Tensor, y: Tensor, offset: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z[:, None] + offset, 0.5).to_event(1), obs=x)
            pyro.sample("y", dist.Poisson(z.exp()), obs=y)

    offset = torch.linspace(-3, 3, N * 2).reshape(N, 2)
    joint = JointDensity(model, (torch.zeros(N, 2), torch.ones(N), offset))
    data, z = simulate(joint)
    assert isinstance(data, tuple) and [value.shape for value in data] == [(N, 2), (N,), (N, 2)]
    assert torch.equal(data[2], offset)
    within(data[0] - z - offset, 0.0)
    assert (data[1] == data[1].round()).all()
    within(data[1] - z[:, 0].exp(), 0.0)
    scores_as_drawn(model, joint, data, z)


def views(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("first", dist.Normal(z, 1.0), obs=x[:, 0])
        pyro.sample("rest", dist.Normal(z[:, None], 2.0).expand([len(x), 2]).to_event(1), obs=x[:, 1:])


def reshaped(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        scale = torch.tensor([1.0, 2.0, 2.0])
        pyro.sample("x", dist.Normal(z[:, None], scale).to_event(1), obs=x.reshape(len(x), -1))


def transposed(x: Tensor) -> None:
    data = pyro.plate("data", len(x), dim=-1)
    with data:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("features", 3, dim=-2), data:
        pyro.sample("x", dist.Normal(z, torch.tensor([[1.0], [2.0], [2.0]])), obs=x.T)


@pytest.mark.parametrize("model", [views, reshaped, transposed], ids=lambda model: model.__name__)
def test_views_of_an_argument(model: Callable[[Tensor], None]) -> None:
    joint = JointDensity(model, torch.zeros(N, 3))
    x, z = simulate(joint)
    assert x.shape == (N, 3)
    residual = x - z
    within(residual, 0.0)
    within(residual**2, torch.tensor([1.0, 4.0, 4.0]))
    within(residual[:, 1] * residual[:, 2], 0.0)
    scores_as_drawn(model, joint, x, z)


def autoregressive(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(1.0, 0.5))
        before = torch.zeros(len(x))
        for t in range(x.shape[1]):
            pyro.sample(f"x{t}", dist.Normal(0.5 * before + z, 1.0), obs=x[:, t])
            before = x[:, t]


def test_autoregressive_likelihood() -> None:
    joint = JointDensity(autoregressive, torch.randn(N, 4) + 50.0)
    x, z = simulate(joint)
    before = torch.cat([torch.zeros(N, 1), x[:, :-1]], 1)
    noise = x - 0.5 * before - z
    within(noise, 0.0)
    within(noise**2, 1.0)
    within(noise[:, 1:] * noise[:, :-1], 0.0)
    within(noise[:, 1:] * before[:, 1:], 0.0)
    scores_as_drawn(autoregressive, joint, x, z)


def test_latents_that_depend_on_observations() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            pyro.sample("x0", dist.Normal(a, 1.0), obs=x[:, 0])
            b = pyro.sample("b", dist.Normal(x[:, 0], 0.3))
            pyro.sample("x1", dist.Normal(b, 1.0), obs=x[:, 1])

    joint = JointDensity(model, torch.full((N, 2), 9.0))
    x, z = simulate(joint)
    within(z[:, 1] - x[:, 0], 0.0)
    within((z[:, 1] - x[:, 0]) ** 2, 0.09)
    within(x[:, 0] ** 2, 2.0)
    scores_as_drawn(model, joint, x, z)


def test_a_pixel_by_pixel_likelihood_in_one_site_is_refused() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            left = torch.cat([torch.zeros(len(x), 1), x[:, :-1]], 1)
            pyro.sample("x", dist.Normal(z[:, None] + left, 1.0).to_event(1), obs=x)

    with pytest.raises(InputError, match=r"simulated data of site 'x' .*scored again.*to_data="):
        simulate(JointDensity(model, torch.randn(20, 3)))


def test_arguments_that_follow_from_the_data() -> None:
    """A second argument is computed from the first: only `to_data` can know."""

    def model(x: Tensor, total: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z[:, None], 1.0).expand([len(x), 2]).to_event(1), obs=x + 0 * total[:, None])

    x = torch.randn(20, 2) + 1.0
    joint = JointDensity(model, (x, x.sum(-1)))
    (drawn, total), z = simulate(joint, lambda values: (values["x"], values["x"].sum(-1)))
    torch.testing.assert_close(total, drawn.sum(-1))
    assert z.shape == (20, 1)


def test_transformed_observations_need_the_hook() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("log x", dist.Normal(z, 1.0), obs=x.log())

    joint = JointDensity(model, torch.rand(N) + 0.5)
    with pytest.raises(InputError, match=r"site 'log x': its observed value is not one of .*to_data="):
        simulate(joint)
    x, z = simulate(joint, lambda values: values["log x"].exp())
    within(x.log() - z[:, 0], 0.0)
    scores_as_drawn(model, joint, x, z)


def test_a_hook_that_forgets_an_argument_is_refused() -> None:
    def model(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    joint = JointDensity(model, (torch.randn(20), torch.randn(20)))
    with pytest.raises(InputError, match=r"to_data.*takes 2"):
        simulate(joint, lambda values: values["x"])
    with pytest.raises(InputError, match="when scored again"):
        simulate(joint, lambda values: (values["x"], torch.zeros(20)))


def test_two_arguments_with_the_same_values() -> None:
    """Where two arguments look alike, a value goes to the one that it is a view of, not to the first that is equal."""

    def model(y: Tensor, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.1), obs=x)
            pyro.sample("y", dist.Normal(z, 2.0), obs=y)

    joint = JointDensity(model, (torch.zeros(N), torch.zeros(N)))
    (y, x), z = simulate(joint)
    within((x - z[:, 0]) ** 2, 0.01)
    within((y - z[:, 0]) ** 2, 4.0)


def test_integer_data() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Categorical(logits=z), obs=x)

    joint = JointDensity(model, torch.zeros(N, dtype=torch.long))
    x, z = simulate(joint)
    assert x.dtype == torch.long
    within((x == 0).double() - z.softmax(-1)[:, 0], 0.0)
    scores_as_drawn(model, joint, x, z)


def test_bytes_as_pixels() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pixels = dist.Bernoulli(logits=z[:, None].expand(-1, 4)).to_event(1)
            pyro.sample("x", pixels, obs=x.reshape(-1, 4).to(z.dtype))

    template = torch.zeros(N, 2, 2, dtype=torch.uint8)
    template[:, 0] = 1
    joint = JointDensity(model, template)
    x, z = simulate(joint)
    assert x.dtype == torch.uint8 and x.shape == (N, 2, 2)
    within(x.flatten(1).double() - z.sigmoid(), 0.0)


def test_masked_sequences() -> None:
    keep = torch.arange(3) < torch.tensor([3, 1, 2, 0]).repeat(N // 4)[:, None]

    def model(x: Tensor, keep: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = torch.zeros(len(x))
            for t in range(3):
                with poutine.mask(mask=keep[:, t]):
                    z = pyro.sample(f"z{t}", dist.Normal(z, 1.0))
                    pyro.sample(f"x{t}", dist.Normal(z, 0.5), obs=x[:, t])

    joint = JointDensity(model, (torch.randn(N, 3), keep))
    (x, _), z = simulate(joint)
    assert (z[~keep] == 0).all() and (z[keep] != 0).all()
    within(((x - z) ** 2)[keep], 0.25)


def test_indexed_data_come_back_as_arguments() -> None:
    x = torch.randn(600)
    joint = JointDensity(normal, IndexedData(600, lambda indices: (x[indices],)))
    data, z = simulate(joint)
    assert isinstance(data, tuple) and data[0].shape == (600,) and z.shape == (600, 1)


def test_one_datapoint() -> None:
    def model(x: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(5.0, 2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(m, 0.5), obs=x)

    x, z = simulate(JointDensity(model, torch.zeros(N), plate=False))
    assert x.shape == (N,) and z.shape == (1, 1)
    within(x - z[0, 0], 0.0)


def test_factors_cannot_be_simulated() -> None:
    def model(x: Tensor) -> None:
        normal(x)
        with pyro.plate("data", len(x)):
            pyro.factor("tilt", x)

    with pytest.raises(InputError, match=r"site 'tilt': a pyro.factor cannot be simulated"):
        simulate(JointDensity(model, torch.zeros(5), plate="data"))


def test_imputed_observations() -> None:
    seen = torch.arange(N) % 2 == 0

    def model(x: Tensor, seen: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x, obs_mask=seen)

    (x, _), z = simulate(JointDensity(model, (torch.zeros(N), seen)))
    within((x[seen] - z[seen, 0]) ** 2, 0.25)
    within((z[~seen, 1] - z[~seen, 0]) ** 2, 0.25)


@pytest.mark.parametrize("latent", [torch.float32, torch.float64])
@pytest.mark.parametrize("observed", [torch.float32, torch.float64])
def test_mixed_precision(latent: torch.dtype, observed: torch.dtype) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(torch.tensor(2.0, dtype=latent), torch.tensor(1.0, dtype=latent)))
            pyro.sample("x", dist.Poisson(z), obs=x)

    joint = JointDensity(model, torch.ones(N, dtype=observed))
    x, z = simulate(joint)
    assert (x.dtype, z.dtype) == (observed, latent)
    within(x.double() - z[:, 0].double().exp(), 0.0)
