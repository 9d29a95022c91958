"""`IWAE_ELBO`: values and gradients against quadrature over the guide's noise, plates, and what is refused.

The expected bound of K particles is an integral over K draws of standard Normal noise, smooth enough for Gauss-Hermite
quadrature to give it, and by automatic differentiation its gradient, to rounding.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions.testing.fakes import NonreparameterizedNormal
from pyro.infer import SVI, RenyiELBO, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from torch import Tensor, nn

from pyrogaps import IWAE_ELBO, InputError
from pyrogaps.guides.auxiliary_flows import AmortizedAuxiliaryFlow, AutoLocalAuxiliaryFlow
from pyrogaps.models.linear_gaussian import LinearGaussian
from tests.references import WrongEncoder, anisotropic, draws_of

Pair = tuple[Any, Any, Tensor, Callable[[Tensor], Tensor]]


@pytest.fixture(autouse=True)
def _double() -> None:
    torch.set_default_dtype(torch.float64)


def normal(value: Tensor, mean: Tensor | float, scale: Tensor | float) -> Tensor:
    return torch.distributions.Normal(mean, scale).log_prob(value)


# --- Two pairs, each with log w as a function of the noise behind the guide's draws -----------------------------


def linear(normal_kind: Any = dist.Normal) -> Pair:
    """One latent, three observed: the guide is wrong in mean and scale."""
    model, guide = anisotropic(3, 1), WrongEncoder(anisotropic(3, 1), width=1.3)
    x, _ = draws_of(model, 4)

    def log_weight(noise: Tensor) -> Tensor:
        mean, scale = guide.parameters_of(x)
        z = mean + scale * noise[..., None]  # noise (*, 1), z (*, n, 1)
        log_p = normal(z, 0.0, model.prior_scale).sum(-1)
        log_p = log_p + normal(x, z @ model.weight.T + model.bias, model.noise_scale).sum(-1)
        return log_p - normal(z, mean, scale).sum(-1)

    if normal_kind is not dist.Normal:

        def forward(x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", normal_kind(*guide.parameters_of(x)).to_event(1))

        guide.forward = forward  # type: ignore[method-assign]
    return model, guide, x, log_weight


class Chain(nn.Module):
    """z1 ~ N(0, 1), z2 ~ N(a z1, 1), x ~ N(z2, s); the guide draws z2 given z1. Model and guide share nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.s = nn.Parameter(torch.tensor(0.8)), nn.Parameter(torch.tensor(0.6))
        self.q = nn.Parameter(torch.tensor([0.4, 0.8, 0.5, 0.5, 0.7]))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(torch.zeros_like(x), 1.0))
            z2 = pyro.sample("z2", dist.Normal(self.a * z1, 1.0))
            pyro.sample("x", dist.Normal(z2, self.s), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(self.q[0] * x, self.q[1]))
            pyro.sample("z2", dist.Normal(self.q[2] * x + self.q[3] * z1, self.q[4]))


def chain() -> Pair:
    both, x = Chain(), torch.tensor([-1.0, 0.5, 2.5])

    def log_weight(noise: Tensor) -> Tensor:
        q = both.q
        z1 = q[0] * x + q[1] * noise[..., :1]
        z2 = q[2] * x + q[3] * z1 + q[4] * noise[..., 1:]
        log_p = normal(z1, 0.0, 1.0) + normal(z2, both.a * z1, 1.0) + normal(x, z2, both.s)
        return log_p - normal(z1, q[0] * x, q[1]) - normal(z2, q[2] * x + q[3] * z1, q[4])

    return both.model, both.guide, x, log_weight


def parameters_of(pair: Pair) -> list[Tensor]:
    modules = [part if isinstance(part, nn.Module) else part.__self__ for part in pair[:2]]
    return list(dict.fromkeys(value for module in modules for value in module.parameters()))


def exact(pair: Pair, num_particles: int, dim: int, order: int) -> tuple[Tensor, Tensor]:
    """The expected bound, summed over datapoints, and its gradient, by quadrature over the noise."""
    points, weights = (torch.from_numpy(part) for part in np.polynomial.hermite_e.hermegauss(order))
    weights = weights / weights.sum()
    number = num_particles * dim
    noise = torch.cartesian_prod(*[points] * number).reshape(-1, num_particles, dim)
    mass = torch.cartesian_prod(*[weights] * number).reshape(-1, number).prod(-1)
    bounds = pair[3](noise).logsumexp(1) - math.log(num_particles)
    value = mass @ bounds.sum(-1)
    gradient = torch.autograd.grad(value, parameters_of(pair))
    return value.detach(), torch.cat([part.flatten() for part in gradient])


def estimates(pair: Pair, loss: IWAE_ELBO, repeats: int, copies: int = 20) -> Iterator[Tensor]:
    """Draws of the bound and its gradient, in one vector: each a mean over independent copies of the data set."""
    parameters, x = parameters_of(pair), torch.cat([pair[2]] * copies)
    for _ in range(repeats):
        for value in parameters:
            value.grad = None
        bound = -loss.loss_and_grads(pair[0], pair[1], x)
        gradient = [torch.zeros_like(value) if value.grad is None else -value.grad for value in parameters]
        yield torch.cat([torch.tensor([bound]), *(part.flatten() for part in gradient)]) / copies


def assert_unbiased(pair: Pair, loss: IWAE_ELBO, expected: tuple[Tensor, Tensor], repeats: int = 60) -> None:
    """Value and every derivative within four standard errors."""
    draws = torch.stack(list(estimates(pair, loss, repeats)))
    error = draws.std(0) / math.sqrt(repeats)
    off = (draws.mean(0) - torch.cat([expected[0][None], expected[1]])).abs()
    assert (off < 4 * error + 1e-9).all(), (off / error).tolist()
    # The derivatives are known well enough for the comparison to mean something.
    assert error.norm() < 0.15 * expected[1].norm()


LINEAR, CHAIN = exact(linear(), 2, 1, 60), exact(chain(), 2, 2, 18)


@pytest.mark.parametrize("doubly", [False, True])
@pytest.mark.parametrize("vectorized", [False, True])
def test_value_and_gradient_of_a_linear_model(doubly: bool, vectorized: bool) -> None:
    loss = IWAE_ELBO(2, doubly_reparametrised=doubly, vectorize_particles=vectorized)
    assert_unbiased(linear(), loss, LINEAR)


@pytest.mark.parametrize("doubly", [False, True])
def test_value_and_gradient_where_later_draws_depend_on_earlier_ones(doubly: bool) -> None:
    assert_unbiased(chain(), IWAE_ELBO(2, doubly_reparametrised=doubly), CHAIN)


def test_gradient_without_reparametrisation() -> None:
    assert_unbiased(linear(NonreparameterizedNormal), IWAE_ELBO(2), LINEAR, 120)


@pytest.mark.parametrize("kind", [dist.Normal, NonreparameterizedNormal])
def test_one_particle_is_the_elbo(kind: Any) -> None:
    pair = linear(kind)
    model, guide, x, _ = pair
    mean, scale = guide.parameters_of(x)
    value = model.elbo(x, mean, scale=scale).sum()
    expected = exact(linear(), 1, 1, 60)
    torch.testing.assert_close(expected[0], value.detach())
    assert_unbiased(pair, IWAE_ELBO(1), expected, 240)
    if kind is dist.Normal:
        assert_unbiased(pair, IWAE_ELBO(1, doubly_reparametrised=True), expected)


def test_doubly_reparametrised_gradients_vary_less_for_many_particles() -> None:
    """Those of the guide: the share of their variance falls as K grows, where the ordinary signal drowns."""
    pair = linear()
    guides = [value.numel() for value in pair[1].parameters()]
    ratios = []
    for number in (1, 64):
        variances = []
        for doubly in (False, True):
            loss = IWAE_ELBO(number, doubly_reparametrised=doubly, vectorize_particles=True)
            draws = torch.stack(list(estimates(pair, loss, 150, copies=1)))
            variances.append(draws[:, -sum(guides) :].var(0).sum())
        ratios.append(float(variances[1] / variances[0]))
    assert ratios[1] < 0.01
    assert ratios[1] < ratios[0]


# --- Plates -----------------------------------------------------------------------------------------------------


def subsampled(x: Tensor) -> None:
    with pyro.plate("data", len(x), subsample_size=2) as index:
        z = pyro.sample("z", dist.Normal(torch.zeros_like(x[index]), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])


def subsampled_guide(x: Tensor) -> None:
    slope = pyro.param("slope", torch.tensor(0.4))
    with pyro.plate("data", len(x), subsample_size=2) as index:
        pyro.sample("z", dist.Normal(slope * x[index], 0.9))


@pytest.mark.parametrize("vectorized", [False, True])
@pytest.mark.parametrize("doubly", [False, True])
def test_a_subsampled_plate_is_scaled_outside_the_logarithm(vectorized: bool, doubly: bool) -> None:
    """Pyro's own loss takes the weights to the power N / n = 4: its "bound" exceeds the evidence."""
    x = 2 * torch.randn(8, generator=torch.Generator().manual_seed(0))
    slope = torch.tensor(0.4, requires_grad=True)
    points, weights = (torch.from_numpy(part) for part in np.polynomial.hermite_e.hermegauss(60))
    z = slope * x + 0.9 * torch.cartesian_prod(points, points)[..., None]
    log_weights = normal(z, 0.0, 1.0) + normal(x, z, 1.0) - normal(z, slope * x, 0.9)
    mass = torch.cartesian_prod(weights, weights).prod(-1) / weights.sum() ** 2
    expected = mass @ (log_weights.logsumexp(1) - math.log(2)).sum(-1)
    (derivative,) = torch.autograd.grad(expected, slope)
    loss = IWAE_ELBO(2, doubly_reparametrised=doubly, vectorize_particles=vectorized)
    draws = []
    for _ in range(200):
        pyro.get_param_store().clear()
        value = -loss.loss_and_grads(subsampled, subsampled_guide, x)
        draws.append((value, -float(pyro.param("slope").grad)))
    found = torch.tensor(draws)
    error = found.std(0) / math.sqrt(len(found))
    expected = expected.detach()
    assert abs(float(found[:, 0].mean() - expected)) < 4 * float(error[0])
    assert abs(float(found[:, 1].mean() - derivative)) < 4 * float(error[1])
    evidence = float(normal(x, 0.0, math.sqrt(2)).sum())
    assert expected < evidence
    if not (vectorized or doubly):
        theirs = [-RenyiELBO(alpha=0, num_particles=20).loss(subsampled, subsampled_guide, x) for _ in range(49)]
        assert np.mean(theirs) > evidence + 4 * np.std(theirs) / 7


def nested(x: Tensor) -> None:
    """Each datapoint has a latent for itself and one for each of its columns."""
    with pyro.plate("data", len(x), dim=-2):
        shift = pyro.sample("shift", dist.Normal(torch.zeros(len(x), 1), 1.0))
        with pyro.plate("columns", x.shape[1], dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
            pyro.sample("x", dist.Normal(z + shift, 0.5), obs=x)


def nested_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x), dim=-2):
        pyro.sample("shift", dist.Normal(0.5 * x.mean(1, keepdim=True), 0.6))
        with pyro.plate("columns", x.shape[1], dim=-1):
            pyro.sample("z", dist.Normal(0.4 * x, 0.7))


@pytest.mark.parametrize("doubly", [False, True])
@pytest.mark.parametrize("vectorized", [False, True])
def test_plates_within_the_data_plate_are_summed(vectorized: bool, doubly: bool) -> None:
    x = torch.tensor([[1.0, -0.5, 0.3], [0.0, 2.0, 1.0]])
    torch.manual_seed(0)
    loss = IWAE_ELBO(60, doubly_reparametrised=doubly, vectorize_particles=vectorized, plate="data")
    values = torch.tensor([-loss.loss(nested, nested_guide, x) for _ in range(10)])
    covariance = torch.eye(3) * 1.25 + 1
    evidence = dist.MultivariateNormal(torch.zeros(3), covariance).log_prob(x).sum()
    # The bias of the logarithm, half the variance, is that small.
    error = values.std() / math.sqrt(10)
    assert abs(float(values.mean() + values.var() / 2 - evidence)) < 4 * float(error)
    assert error < 0.3
    assert loss.loss_and_grads(nested, nested_guide, x) > 0


def test_whole_data_set_as_one_datapoint() -> None:
    """Global latents have one weight for all of the data; `plate=False` says so."""
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))

    def model(x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("mean", dist.Normal(x.sum(0) / 6, 6**-0.5).to_event(1))

    covariance = torch.eye(5) + 1
    evidence = float(dist.MultivariateNormal(torch.zeros(5), covariance).log_prob(x.T).sum())
    for vectorized in (False, True):
        loss = IWAE_ELBO(3, plate=False, vectorize_particles=vectorized)
        assert -loss.loss(model, guide, x) == pytest.approx(evidence)
    with pytest.raises(InputError, match="no plate encloses every site"):
        IWAE_ELBO(3).loss(model, guide, x)

    def minibatch(x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", 50, subsample_size=len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)

    with pytest.raises(InputError, match="site 'x': the plate 'data' is subsampled within a datapoint"):
        IWAE_ELBO(3, plate=False).loss(minibatch, guide, x)


def test_masks_and_the_exact_posterior() -> None:
    """A masked datapoint weighs nothing, and with the exact posterior each draw of the bound is the evidence."""
    x = torch.tensor([1.0, -2.0, 0.5])
    mask = torch.tensor([True, False, True])

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)), poutine.mask(mask=mask):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)), poutine.mask(mask=mask):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    evidence = float(normal(x[mask], 0.0, math.sqrt(2)).sum())
    assert -IWAE_ELBO(3).loss(model, guide, x) == pytest.approx(evidence)
    assert -IWAE_ELBO(3, doubly_reparametrised=True).loss_and_grads(model, guide, x) == pytest.approx(evidence)


# --- With SVI and other guides ----------------------------------------------------------------------------------


@pytest.mark.parametrize("doubly", [False, True])
def test_svi_trains_with_it(doubly: bool) -> None:
    def guide(x: Tensor) -> None:
        slope = pyro.param("slope", torch.zeros(()))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(slope * x, 0.7))

    def model(x: Tensor) -> None:
        shift = pyro.param("shift", torch.tensor(2.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
            pyro.sample("x", dist.Normal(z + shift, 1.0), obs=x)

    x = torch.randn(40, generator=torch.Generator().manual_seed(0))
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), loss=IWAE_ELBO(5, doubly, vectorize_particles=True))
    for _ in range(150):
        svi.step(x)
    assert abs(float(pyro.param("slope").detach()) - 0.5) < 0.2
    assert abs(float(pyro.param("shift").detach() - x.mean())) < 0.3
    assert svi.evaluate_loss(x) > 0


@pytest.mark.parametrize("doubly", [False, True])
def test_autoguides_and_auxiliary_variables(doubly: bool) -> None:
    model = LinearGaussian.random(4, 2)
    x, _ = draws_of(model, 6)
    normals, flow = AutoNormal(model), AmortizedAuxiliaryFlow(4, 2, [5], flow_hidden=4)
    evidence = float(model.log_evidence(x).sum().detach())
    for program, guide in ((model, normals), (flow.augment(model), flow)):
        guide(x)
        loss = IWAE_ELBO(8, doubly_reparametrised=doubly)
        values = [-loss.loss_and_grads(program, guide, x) for _ in range(9)]
        assert np.mean(values) < evidence + 4 * np.std(values) / 3
        assert all(value.grad is not None for value in guide.parameters())


def test_settings_show_and_compare() -> None:
    assert IWAE_ELBO(5) == IWAE_ELBO(num_particles=5) != IWAE_ELBO(5, doubly_reparametrised=True)
    assert "num_particles=5, doubly_reparametrised=True" in repr(IWAE_ELBO(5, True))
    with pytest.raises(InputError, match=r"IWAE_ELBO\.num_particles: must be a whole number of at least 1, got 0"):
        IWAE_ELBO(0)


# --- What is refused --------------------------------------------------------------------------------------------


def model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 0.7))


def model_of_two(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
        y = pyro.sample("y", dist.Normal(torch.zeros_like(x), 1.0))
        pyro.sample("x", dist.Normal(z + y, 1.0), obs=x)


def outside(x: Tensor) -> None:
    with pyro.plate("others", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 0.7))


def more(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 0.7))
        pyro.sample("noise", dist.Normal(x, 0.7))


def pixels(x: Tensor) -> None:
    with pyro.plate("data", len(x), dim=-2):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 1), 1.0))
        with pyro.plate("pixels", 4, subsample_size=2, dim=-1) as index:
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, None].expand(-1, 4)[:, index])


def pixel_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x), dim=-2):
        pyro.sample("z", dist.Normal(x[:, None] / 2, 0.7))


def sequential(x: Tensor) -> None:
    for n in pyro.plate("data", len(x)):
        z = pyro.sample(f"z{n}", dist.Normal(0.0, 1.0))
        pyro.sample(f"x{n}", dist.Normal(z, 1.0), obs=x[n])


def sequential_guide(x: Tensor) -> None:
    for n in pyro.plate("data", len(x)):
        pyro.sample(f"z{n}", dist.Normal(x[n] / 2, 1.0))


@pytest.mark.parametrize(
    ("programs", "said"),
    [
        ((model, outside), "site 'z': latent outside the data plate 'data' in the guide"),
        ((model_of_two, guide), "site 'y': latent in the model but missing from the guide"),
        ((model, more), "site 'noise': in the guide but not in the model"),
        ((pixels, pixel_guide), "site 'x': the plate 'pixels' is subsampled within a datapoint"),
        ((sequential, sequential_guide), "loops over the data plate 'data'"),
        ((model, AutoMultivariateNormal), "site '_AutoMultivariateNormal_latent': latent outside the data plate"),
        ((model, AutoDelta), "site 'z': a Delta in the guide has no density"),
    ],
)
@pytest.mark.filterwarnings("ignore:Found")  # Pyro warns of some of these, and goes on
def test_pairs_without_a_weight_per_datapoint_are_refused(programs: tuple[Any, Any], said: str) -> None:
    first, second = programs
    second = second(first) if isinstance(second, type) else second
    with pytest.raises(InputError, match=said) as caught:
        IWAE_ELBO(2).loss_and_grads(first, second, torch.zeros(3))
    assert "\n" not in str(caught.value)


def test_draws_that_cannot_be_reparametrised_are_refused() -> None:
    doubly = IWAE_ELBO(2, doubly_reparametrised=True)

    def coin(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(0.5).expand([len(x)]))

    def coin_model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5).expand([len(x)]))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.zeros(3)
    with pytest.raises(InputError, match="site 'z': Bernoulli cannot be reparametrised"):
        doubly.loss_and_grads(coin_model, coin, x)
    assert math.isfinite(IWAE_ELBO(2).loss_and_grads(coin_model, coin, x))
    local = AutoLocalAuxiliaryFlow(model, num_steps=1, hidden=2)
    local(x)
    with pytest.raises(InputError, match=r"site '_local_latent': .*would not train its reverse model"):
        doubly.loss_and_grads(model, local, x)


def test_trace_elbo_is_what_it_stands_in_for() -> None:
    """With one particle and the same noise both give the same number, under a subsampled plate too."""
    x = torch.randn(8)
    for pair in ((model, guide), (subsampled, subsampled_guide)):
        torch.manual_seed(4)
        ours = IWAE_ELBO(1).loss(*pair, x)
        torch.manual_seed(4)
        assert Trace_ELBO().loss(*pair, x) == pytest.approx(ours)
