"""Kind (c) and the choice of kind: guides that nobody designed for refinement, `local_family`, and what is refused."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import Tensor, nn

from pyrogaps import GuideDensity, InputError, JointDensity, Refinement, elbo, refine
from pyrogaps.guides.local import AutoLocalMultivariateNormal
from pyrogaps.refine import own_family
from pyrogaps.refine.finetune import FinetunedGuide
from tests.references import WrongEncoder, anisotropic, assert_exact, draws_of

LINEAR = anisotropic(6, 2)


def split(x: Tensor) -> None:
    """The linear model in two dimensions, its latents as two scalar sites."""
    one = torch.ones((), dtype=x.dtype)
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Normal(0 * one, LINEAR.prior_scale[0]))
        b = pyro.sample("b", dist.Normal(0 * one, LINEAR.prior_scale[1]))
        mean = torch.stack([a, b], -1) @ LINEAR.weight.T + LINEAR.bias
        pyro.sample("x", dist.Normal(mean, LINEAR.noise_scale).to_event(1), obs=x)


class Structured(nn.Module):
    """q(a | x) q(b | a, x) by two small networks: b's location depends on a's draw. It can hold the exact posterior."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 2).double(), nn.Linear(7, 2).double()
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.mul_(0.3)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            loc, raw = self.first(x).unbind(-1)
            a = pyro.sample("a", dist.Normal(loc, raw.exp()))
            loc, raw = self.second(torch.cat([x, a[..., None]], -1)).unbind(-1)
            pyro.sample("b", dist.Normal(loc, raw.exp()))


def kind_of(model: Any, guide: Any, x: Tensor) -> str:
    return own_family(GuideDensity(guide, None, JointDensity(model, x))).kind


def test_a_structured_guide_finds_a_correlated_posterior() -> None:
    """Residuals at its sites: the mean-field gap, which independent sites would leave, is gone."""
    x, _ = draws_of(LINEAR, 3)
    guide = Structured()
    assert kind_of(split, guide, x) == "structured"
    weights = {name: value.clone() for name, value in guide.state_dict().items()}
    refined = refine(split, guide, x, referee=False)
    bound = elbo(split, refined, x)
    assert_exact(bound.value, bound.mcse, LINEAR.log_evidence(x))
    assert float(LINEAR.approximation_gap().detach()) > 4 * float(bound.mcse.max())
    assert all(torch.equal(weights[name], value) for name, value in guide.state_dict().items())
    assert all(parameter.requires_grad for parameter in guide.parameters())


class Recurrent(nn.Module):
    """Asks its parameters for their dtype, as many modules do, and reads x with a recurrent network."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn, self.heads = nn.GRU(1, 3, batch_first=True).double(), nn.Linear(3, 4).double()

    def forward(self, x: Tensor) -> None:
        states = self.rnn(x.to(next(self.parameters()).dtype)[..., None])[0]
        first, second, raw_first, raw_second = self.heads(states[:, -1]).unbind(-1)
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(first, raw_first.exp()))
            pyro.sample("b", dist.Normal(second + 0.1 * a, raw_second.exp()))


def test_every_weight_of_a_recurrent_guide_is_fine_tuned() -> None:
    x, _ = draws_of(LINEAR, 2)
    guide = Recurrent()
    density = GuideDensity(guide, x, split)
    tuned = FinetunedGuide(density, density.joint, torch.arange(2))
    assert len(tuned.parameters) == len(list(guide.parameters()))
    z, log_q = tuned.at(torch.arange(2)).sample(3)
    gradients = torch.autograd.grad(z.sum() + log_q.sum(), tuned.parameters)
    assert all(bool((gradient.flatten(1) != 0).any(1).all()) for gradient in gradients)
    assert [parameter.shape for parameter in guide.parameters()] == [copies.shape[1:] for copies in tuned.parameters]


def test_weights_in_the_param_store_count_too() -> None:
    """A guide that is a function, its parameters in Pyro's store, which are put back."""
    x, _ = draws_of(LINEAR, 2)

    def guide(x: Tensor) -> None:
        slope = pyro.param("slope", torch.tensor(0.0, dtype=torch.float64))
        locs = pyro.param("locs", torch.zeros(2, dtype=torch.float64))
        scales = pyro.param("scales", torch.full((2,), 0.5, dtype=torch.float64), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(locs[0].expand(len(x)), scales[0]))
            pyro.sample("b", dist.Normal(locs[1] + slope * a, scales[1]))

    guide(x)
    assert kind_of(split, guide, x) == "structured"
    refined = refine(split, guide, x, referee=False)
    bound = elbo(split, refined, x)
    assert_exact(bound.value, bound.mcse, LINEAR.log_evidence(x))
    assert torch.equal(pyro.param("locs").detach(), torch.zeros(2).double())
    assert float(pyro.param("slope").detach()) == 0.0


def test_never_below_its_start() -> None:
    x, _ = draws_of(LINEAR, 3)
    guide = Structured()
    refined = refine(split, guide, x, settings=Refinement(num_steps=15, learning_rate=50.0))
    before, after = elbo(split, guide, x), elbo(split, refined, x, seed=1)
    assert float(((before.value - after.value) / torch.hypot(before.mcse, after.mcse)).max()) < 4


@pytest.mark.usefixtures("brief_check")
def test_neighbours_change_nothing() -> None:
    x, _ = draws_of(LINEAR, 70)
    settings = Refinement(num_steps=3, num_selection=16)
    values = [
        elbo(split, refine(split, Structured(), x, settings=settings, batch_size=size), x, num_particles=10).value
        for size in (64, 128)
    ]
    torch.testing.assert_close(values[0], values[1], rtol=1e-9, atol=1e-9)


class Bringing(Structured):
    """A guide class with a batched family of its own."""

    def local_family(self, model: Any) -> Any:
        return AutoLocalMultivariateNormal(model)


def test_a_guide_can_bring_its_family() -> None:
    x, _ = draws_of(LINEAR, 3)
    assert kind_of(split, Bringing(), x) == "local_family"
    refined = refine(split, Bringing(), x)
    bound = elbo(split, refined, x)
    assert_exact(bound.value, bound.mcse, LINEAR.log_evidence(x))


def test_kinds() -> None:
    x, _ = draws_of(LINEAR, 3)
    auto = AutoNormal(LINEAR)
    auto(x)
    assert kind_of(LINEAR, auto, x) == "autoguide"
    assert kind_of(LINEAR, WrongEncoder(LINEAR), x) == "freed"


def test_a_family_can_be_a_function() -> None:
    x, _ = draws_of(LINEAR, 3)

    def narrow(model: Any) -> AutoNormal:
        return AutoNormal(model, init_scale=0.01)

    refined = refine(LINEAR, narrow, x)
    bound = elbo(LINEAR, refined, x, num_particles=4000)
    assert_exact((LINEAR.log_evidence(x) - bound.value).detach(), bound.mcse, LINEAR.approximation_gap())


def test_families_that_share_parameters_are_refused() -> None:
    x, _ = draws_of(LINEAR, 4)
    with pytest.raises(
        InputError, match=r"AutoMultivariateNormal: .*(shared|not local)|joint|local under the data plate"
    ):
        refine(LINEAR, AutoMultivariateNormal, x)

    class Shared(nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.loc = nn.Parameter(torch.zeros(2, dtype=torch.float64))

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(self.loc, 1.0).to_event(1).expand([len(x)]))

    with pytest.raises(InputError, match=r"family Shared: parameter 'loc' is shared by datapoints.*Use AutoNormal"):
        refine(LINEAR, Shared, x)


def test_families_that_return_functions_are_refused() -> None:
    x, _ = draws_of(LINEAR, 4)

    def family(model: Any) -> Any:
        return lambda x: None

    with pytest.raises(InputError, match=r"family family: family\(model\) must return a guide that is an nn.Module"):
        refine(LINEAR, family, x)


@pytest.mark.filterwarnings("ignore:guide. it is refined datapoint by datapoint")  # on a slow machine
def test_guides_without_gradients_of_their_draws_are_refused() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.VonMises(torch.zeros((), dtype=x.dtype), 1.0))
            pyro.sample("x", dist.Normal(z.cos(), 1.0), obs=x)

    class Circular(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.VonMises(self.weight * x, 2.0))

    with pytest.raises(InputError, match="no reparameterised gradient"):
        refine(model, Circular(), torch.randn(3, dtype=torch.float64))


def test_a_dependent_guide_without_parameters_is_refused() -> None:
    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(torch.zeros(len(x)).double(), 1.0))
            pyro.sample("b", dist.Normal(a, 1.0))

    with pytest.raises(InputError, match="it has no learned parameters"):
        refine(split, guide, draws_of(LINEAR, 3)[0])


def test_a_guide_whose_parameters_were_never_made_names_them_and_the_remedy_works() -> None:
    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(pyro.param("weight", torch.tensor(0.5).double()) * x[:, 0], 1.0))
            pyro.sample("b", dist.Normal(a, 1.0))

    x = draws_of(LINEAR, 3)[0]
    with pytest.raises(InputError, match=r"not in Pyro's param store \(weight\)"):
        refine(split, guide, x)
    guide(x)
    refine(split, guide, x, settings=Refinement(num_steps=2))
