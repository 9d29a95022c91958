"""Plates: nested ones on either side of the data plate, subsampled ones, scales, and Pyro's bound under them."""

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import RenyiELBO
from torch import Tensor

from pyrogaps import InputError, JointDensity, elbo, iwae

pytestmark = pytest.mark.usefixtures("double")


def log_normal(value: Tensor, loc: Tensor | float, scale: float) -> Tensor:
    return dist.Normal(loc, scale).log_prob(value)


def test_plate_inside_the_data_plate() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2):
            m = pyro.sample("m", dist.Normal(0.0, 1.0))
            with pyro.plate("features", x.shape[1], dim=-1):
                z = pyro.sample("z", dist.Gamma(2.0, 1.0))
                pyro.sample("x", dist.Normal(m, z), obs=x)

    x, z = torch.randn(5, 3), torch.randn(4, 5, 4)
    joint = JointDensity(model, x, plate="data")
    m, u = z[..., :1], z[..., 1:]
    expected = log_normal(m, 0.0, 1.0)[..., 0]
    expected += (dist.Gamma(2.0, 1.0).log_prob(u.exp()) + u + dist.Normal(m, u.exp()).log_prob(x)).sum(-1)
    torch.testing.assert_close(joint(z), expected)
    values = joint.constrain(z)
    assert values["m"].shape == (4, 5, 1) and values["z"].shape == (4, 5, 3)
    torch.testing.assert_close(values["z"], u.exp())
    assert JointDensity(model, x).plate == "data"  # the only one around every site


def test_plate_outside_the_data_plate() -> None:
    def model(x: Tensor) -> None:
        data = pyro.plate("data", len(x), dim=-1)
        with data:
            m = pyro.sample("m", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("features", 3, dim=-2), data:
            z = pyro.sample("z", dist.Normal(m.sum(-1), 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x.T)

    x, z = torch.randn(5, 3), torch.randn(4, 5, 5)
    joint = JointDensity(model, x)
    m, u = z[..., :2], z[..., 2:]
    expected = log_normal(m, 0.0, 1.0).sum(-1) + log_normal(u, m.sum(-1, keepdim=True), 1.0).sum(-1)
    expected += log_normal(x, u, 0.5).sum(-1)
    torch.testing.assert_close(joint(z), expected)
    torch.testing.assert_close(joint.constrain(z)["z"], u)


def test_plates_on_both_sides_with_events() -> None:
    def model(x: Tensor) -> None:  # x: (N, 2, 3, 4), rows in the middle
        with pyro.plate("outer", 2, dim=-3), pyro.plate("data", len(x), dim=-2), pyro.plate("inner", 3, dim=-1):
            z = pyro.sample("z", dist.Dirichlet(torch.ones(5)))
            pyro.sample("x", dist.Normal(z[..., :4], 0.1).to_event(1), obs=x.movedim(0, 1))

    x, z = torch.rand(4, 2, 3, 4), torch.randn(3, 4, 2 * 3 * 4)
    joint = JointDensity(model, x, plate="data")
    simplex = torch.distributions.biject_to(torch.distributions.constraints.simplex)
    u = z.reshape(3, 4, 2, 3, 4)
    value = simplex(u)
    expected = dist.Dirichlet(torch.ones(5)).log_prob(value) + simplex.log_abs_det_jacobian(u, value)
    expected += log_normal(x, value[..., :4], 0.1).sum(-1)
    torch.testing.assert_close(joint(z), expected.sum((-1, -2)))
    torch.testing.assert_close(joint.constrain(z)["z"], value)


def test_sequential_inner_plate() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            for t in pyro.plate("time", x.shape[1]):
                pyro.sample(f"x{t}", dist.Normal(z, 1.0), obs=x[:, t])

    x, z = torch.randn(5, 3), torch.randn(2, 5, 1)
    expected = log_normal(z, 0.0, 1.0)[..., 0] + log_normal(x, z, 1.0).sum(-1)
    torch.testing.assert_close(JointDensity(model, x, "data")(z), expected)
    torch.testing.assert_close(JointDensity(model, x)(z), expected)


def conjugate(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def subsample_size(x: Tensor) -> None:
    with pyro.plate("data", len(x), subsample_size=2) as rows:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])


def subsample_call(x: Tensor) -> None:
    with pyro.plate("data", len(x), subsample_size=2, dim=-1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=pyro.subsample(x, event_dim=0))


def minibatch(x: Tensor) -> None:
    with pyro.plate("data", 1000, subsample_size=len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def minibatch_by_tensor(x: Tensor) -> None:
    with pyro.plate("data", 1000, subsample=torch.arange(len(x)) + 3):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def scaled(x: Tensor) -> None:
    with pyro.plate("data", len(x)), poutine.scale(scale=0.1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0), infer={"baseline": {}})
        with poutine.scale(scale=torch.tensor(7.0)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def without_size(x: Tensor) -> None:
    with pyro.plate("data"):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def tensor_size(x: Tensor) -> None:
    with pyro.plate("data", torch.tensor(len(x))):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@pytest.mark.parametrize(
    "model",
    [subsample_size, subsample_call, minibatch, minibatch_by_tensor, scaled, without_size, tensor_size],
    ids=lambda model: model.__name__,
)
def test_subsampling_and_scales_do_not_enter(model: Callable[[Tensor], None]) -> None:
    for number in (8, 1, 3):
        x, z = torch.randn(number), torch.randn(3, number, 1)
        expected = log_normal(z[..., 0], 0.0, 1.0) + log_normal(x, z[..., 0], 1.0)
        torch.testing.assert_close(JointDensity(model, x)(z), expected)
        few = torch.tensor([number - 1, 0])
        torch.testing.assert_close(JointDensity(model, x)(z[:, few], few), expected[:, few])


def test_minibatch_of_parameters_by_index() -> None:
    x, offsets = torch.randn(6), torch.randn(6)

    def model(x: Tensor, rows: Tensor) -> None:
        offset = pyro.param("offset", lambda: offsets.clone())
        with pyro.plate("data", 6, subsample=rows):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + offset[rows], 1.0), obs=x)

    joint, z = JointDensity(model, (x, torch.arange(6))), torch.randn(2, 6, 1)
    expected = log_normal(z[..., 0], 0.0, 1.0) + log_normal(x, z[..., 0] + offsets, 1.0)
    torch.testing.assert_close(joint(z), expected)
    order = torch.tensor([4, 1, 1, 0])
    torch.testing.assert_close(joint(z[:, order], order), expected[:, order])


def test_subsampled_nested_plate_is_made_whole() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("features", 3, subsample_size=2, dim=-1) as columns:
                pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, columns])

    x, z = torch.randn(5, 3), torch.randn(2, 5, 1)
    expected = log_normal(z[..., 0], 0.0, 1.0) + log_normal(x, z, 1.0).sum(-1)
    torch.testing.assert_close(JointDensity(model, x, "data")(z), expected)


def test_plate_made_outside_the_program() -> None:
    x = torch.randn(5)
    data = pyro.plate("data", 5, dim=-1)

    def model(x: Tensor) -> None:
        with data:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(InputError, match=r"plate 'data' .* size 5.*Make it inside.*len\(x\)"):
        JointDensity(model, x)


def test_nested_plate_made_outside_the_program() -> None:
    features = pyro.plate("features", 3, dim=-1)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with features:
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x, z = torch.randn(5, 3), torch.randn(2, 5, 1)
    expected = log_normal(z[..., 0], 0.0, 1.0) + log_normal(x, z, 1.0).sum(-1)
    torch.testing.assert_close(JointDensity(model, x)(z), expected)


def test_iwae_under_a_subsampled_plate_where_renyi_is_wrong() -> None:
    """Pyro's `RenyiELBO` puts the plate's scale inside the logsumexp and exceeds log p(x); ours must not."""
    torch.manual_seed(3)
    x = torch.randn(8) * math.sqrt(2)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=2) as rows:
            pyro.sample("z", dist.Normal(x[rows] / 2, 1.0))

    log_evidence = log_normal(x, 0.0, math.sqrt(2)).sum()
    renyi = RenyiELBO(alpha=0, num_particles=1000, vectorize_particles=True, max_plate_nesting=1)
    theirs = torch.tensor([-renyi.loss(subsample_size, guide, x) for _ in range(40)])
    assert theirs.mean() - 4 * theirs.std() / math.sqrt(40) > log_evidence
    ours = iwae(subsample_size, guide, x, num_particles=1000)
    error = ours.mcse.square().sum().sqrt()
    assert (ours.value.sum() - log_evidence).abs() < 4 * error
    lower = elbo(subsample_size, guide, x, num_particles=1000)
    gap = 0.5 * (2.0 - 1.0 - math.log(2.0))  # KL from N(x/2, 1) to the posterior N(x/2, 1/2)
    assert (lower.value.sum() - (log_evidence - 8 * gap)).abs() < 4 * lower.mcse.square().sum().sqrt()


def test_parameters_selected_by_the_plate_of_a_minibatch() -> None:
    """Pyro's idiom: the plate keeps the data set's size, and its indices select what belongs to each datapoint."""
    x, offsets = torch.randn(6), torch.randn(6)

    def model(x: Tensor) -> None:
        offset = pyro.param("offset", lambda: offsets.clone())
        with pyro.plate("data", 6, subsample_size=len(x)) as rows:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + offset[rows], 1.0), obs=x)

    joint, z = JointDensity(model, x), torch.randn(2, 6, 1)
    expected = log_normal(z[..., 0], 0.0, 1.0) + log_normal(x, z[..., 0] + offsets, 1.0)
    for rows in (torch.arange(6), torch.tensor([5, 3, 0, 1, 4, 2]), torch.tensor([2, 2, 5]), torch.arange(18) % 6):
        torch.testing.assert_close(joint(z[:, rows], rows), expected[:, rows])
