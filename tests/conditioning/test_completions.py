"""The density of what is shown, and draws of what is not, against dense Gaussian algebra and enumeration."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

import pyrogaps as pg
from pyrogaps.conditioning import Shown
from pyrogaps.conditioning.completions import Completions, completed
from pyrogaps.conditioning.latents import LatentsGiven, systematic
from pyrogaps.conditioning.partial import partially_observed
from pyrogaps.models.linear_gaussian import LinearGaussian
from pyrogaps.models.toy import MissingBit
from pyrogaps.refine.families import Start
from pyrogaps.run import Run
from pyrogaps.streams import Chunk, Stream, seeded

SHOWN = torch.tensor([True, False, True, False, False])


def pair(number: int) -> tuple[LinearGaussian, LinearGaussian, Tensor]:
    """A factor analysis with badly scaled loadings, the same model of the shown elements alone, and data."""
    weight = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weight = weight * torch.tensor([3.0, 1.0, 0.3, 2.0, 0.1], dtype=torch.float64)[:, None]
    noise = torch.tensor([0.5, 1.0, 0.2, 1.0, 0.3], dtype=torch.float64)
    whole = LinearGaussian(weight, 0.5, noise)
    x = (
        torch.randn(number, 2, dtype=torch.float64) @ weight.T
        + 0.5
        + noise * torch.randn(number, 5, dtype=torch.float64)
    )
    return whole, LinearGaussian(weight[SHOWN], 0.5, noise[SHOWN]), x


def test_density_of_what_is_shown() -> None:
    whole, part, x = pair(7)
    found = partially_observed(pg.JointDensity(whole, x), Shown(SHOWN))
    expected = pg.JointDensity(part, x[:, SHOWN])
    z = torch.randn(3, 7, 2, dtype=torch.float64)
    torch.testing.assert_close(found(z), expected(z))


def test_masks_of_their_own_for_every_datapoint() -> None:
    whole, _, x = pair(6)
    mask = torch.rand(6, 5) < 0.5
    mask[0] = True
    by_row = {tuple(row.tolist()): masked for row, masked in zip(x, mask, strict=True)}
    found = partially_observed(
        pg.JointDensity(whole, x), Shown(lambda x: torch.stack([by_row[tuple(row.tolist())] for row in x]))
    )
    z = torch.randn(2, 6, 2, dtype=torch.float64)
    for n in range(6):
        keep = mask[n]
        alone = LinearGaussian(whole.weight[keep], whole.bias[keep], whole.noise_scale[keep])
        assert keep.any()
        expected = pg.JointDensity(alone, x[n : n + 1, keep])(z[:, n : n + 1])
        torch.testing.assert_close(found(z)[:, n : n + 1], expected)


def test_completions_follow_the_model() -> None:
    """Mean, covariance and kept elements of 4,000 completions of each of 3 datapoints."""
    whole, part, x = pair(3)
    joint = pg.JointDensity(whole, x)
    partial = partially_observed(joint, Shown(SHOWN))
    chunk, number = Chunk(0, 3), 4000
    start = Start(torch.zeros(3, 2, dtype=torch.float64), torch.ones(3, 2, dtype=torch.float64), fitted=False)
    with seeded(0, "test"):
        latents = LatentsGiven(partial, pg.AIS(num_temperatures=20), pg.Refinement(num_steps=200), "captured")
        z, ess = latents.draw(chunk, start, number, Run(0))
        (values,) = completed(joint, partial, chunk, z, Stream(0, "complete"))
    values = values.reshape(number, 3, 5)
    assert torch.equal(values[..., SHOWN], x[:, SHOWN].expand(number, 3, 2))
    mean, covariance = part.posterior(x[:, SHOWN])
    hidden = ~SHOWN
    loadings = whole.weight[hidden]
    expected_mean = mean @ loadings.T + whole.bias[hidden]
    expected = loadings @ covariance @ loadings.T + whole.noise_scale[hidden].diag() ** 2
    error = (expected.diagonal() / ess.min()).sqrt()
    assert ess.min() > 0.2 * number
    assert ((values[..., hidden].mean(0) - expected_mean).abs() < 4 * error).all()
    for n in range(3):
        centred = values[:, n, hidden] - expected_mean[n]
        products = centred[:, :, None] * centred[:, None, :]
        spread = products.std(0) / ess.min().sqrt()
        assert ((products.mean(0) - expected).abs() < 4 * spread).all()


def test_modes_that_an_anchor_does_not_know() -> None:
    """Nothing is shown, and p(z) has two modes nine standard deviations apart: half of the draws are in either."""
    model = MissingBit(means=(-6.0, 6.0))
    x = torch.zeros(32)
    partial = partially_observed(pg.JointDensity(model, x), Shown(torch.tensor(False)))
    start = Start(torch.full((32, 1), -6.0), torch.ones(32, 1), fitted=False)
    latents = LatentsGiven(partial, pg.AIS(num_temperatures=10), pg.Refinement(num_steps=20), "captured")
    with seeded(0, "modes"):
        z, _ = latents.draw(Chunk(0, 32), start, 100, Run(0))
    share = (z > 0).double().mean()
    assert abs(share - 0.5) < 4 * (0.25 / 3200) ** 0.5


def test_completions_of_bits_keep_their_type() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Bernoulli(logits=z[:, None].expand(x.shape)).to_event(1), obs=x)

    x = torch.randint(0, 2, (4, 6)).float()
    joint = pg.JointDensity(model, x)
    shown = torch.arange(6) < 2
    partial = partially_observed(joint, Shown(shown))
    z = torch.full((500, 4, 1), 2.0)
    with seeded(0, "bits"):
        (values,) = completed(joint, partial, Chunk(0, 4), z, Stream(0, "complete"))
    values = values.reshape(500, 4, 6)
    assert values.dtype == x.dtype
    assert set(values.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(values[..., :2], x[:, :2].expand(500, 4, 2))
    p = torch.sigmoid(torch.tensor(2.0))
    error = (p * (1 - p) / 8000).sqrt()
    assert (values[..., 2:].mean() - p).abs() < 4 * error


def test_rows_are_those_of_the_completion() -> None:
    args = torch.arange(3 * 4).reshape(12, 1), "constant"
    drawn = Completions(args, torch.zeros(3, 4, 1), torch.ones(4))
    taken, constant = drawn.rows(torch.tensor([2, 0]))
    assert constant == "constant"
    assert taken.flatten().tolist() == [8, 9, 10, 11, 0, 1, 2, 3]


def test_systematic_resampling_is_unbiased() -> None:
    log_weights = torch.log(torch.tensor([[0.1], [0.6], [0.3]], dtype=torch.float64))
    with seeded(0, "resample"):
        counts = torch.stack([torch.bincount(systematic(log_weights, 5)[:, 0], minlength=3) for _ in range(2000)])
    expected = 5 * log_weights[:, 0].exp()
    error = counts.double().std(0) / 2000**0.5
    assert ((counts.double().mean(0) - expected).abs() < 4 * error + 1e-9).all()
    assert ((counts - expected).abs() < 1 + 1e-9).all()


def autoregressive(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        before = torch.nn.functional.pad(x[:, :-1], (1, 0))
        pyro.sample("x", dist.Normal(z[:, None] + 0.5 * before, 1.0).to_event(1), obs=x)


def correlated(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.MultivariateNormal(z[:, None].expand(x.shape), torch.eye(x.shape[1])), obs=x)


@pytest.mark.parametrize(
    ("model", "shown", "message"),
    [
        (autoregressive, [False, True, True], "depends on withheld data"),
        (correlated, [True, False, False], "MultivariateNormal cannot be observed in part"),
    ],
)
def test_likelihoods_that_do_not_factorise(model: Any, shown: list[bool], message: str) -> None:
    joint = pg.JointDensity(model, torch.randn(5, 3))
    with pytest.raises(pg.InputError, match=message):
        partially_observed(joint, Shown(torch.tensor(shown)))


def test_withheld_data_that_depend_on_each_other() -> None:
    x = torch.randn(5, 3)
    joint = pg.JointDensity(autoregressive, x)
    partial = partially_observed(joint, Shown(torch.tensor([True, False, False])))
    with seeded(0, "chain"), pytest.raises(pg.InputError, match="depends on other withheld data"):
        completed(joint, partial, Chunk(0, 5), torch.randn(3, 5, 1), Stream(0, "complete"))


def test_guides_without_conditions_are_told() -> None:
    with pytest.raises(pg.InputError, match="it must declare conditions"):
        pg.shared_posterior(LinearGaussian.random(), AutoNormal(LinearGaussian.random()), torch.randn(4, 8))


def test_both_modes_where_an_anchor_is_content_with_one() -> None:
    """C tells the distance of z from 0, and not its side."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("c", dist.Normal(z.abs(), 0.1), obs=x[:, 0])
            pyro.sample("s", dist.Normal(z, 0.5), obs=x[:, 1])

    x = torch.stack([torch.linspace(0.7, 1.3, 16), torch.zeros(16)], 1)
    partial = partially_observed(pg.JointDensity(model, x), Shown(torch.tensor([True, False])))
    start = Start(torch.ones(16, 1), 0.1 * torch.ones(16, 1), fitted=False)
    with seeded(0, "sides"):
        z, ess = LatentsGiven(partial, pg.AIS(), pg.Refinement(num_steps=50), "captured").draw(
            Chunk(0, 16), start, 128, Run(0)
        )
    share = (z[..., 0] < 0).double().mean(0)
    assert (share > 0.1).all()
    assert abs(share.mean() - 0.5) < 4 * (0.25 / ess.sum()) ** 0.5


def test_observations_that_cannot_be_put_back() -> None:
    def cast(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])
            pyro.sample("y", dist.Normal(z, 1.0), obs=(2 * x)[:, 1])

    def several(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])
            with pyro.plate("three", 3, dim=-2):
                pyro.sample("y", dist.Normal(z.expand(3, -1), 1.0), obs=x[:, 1])

    x = torch.randn(5, 2)
    for model, message in ((cast, "Convert the data before passing them"), (several, "but a draw has shape")):
        joint = pg.JointDensity(model, x, plate="data")
        partial = partially_observed(joint, Shown(torch.tensor([True, False])))
        with seeded(0, "cast"), pytest.raises(pg.InputError, match=message):
            completed(joint, partial, Chunk(0, 5), torch.randn(3, 5, 1), Stream(0, "complete"))
