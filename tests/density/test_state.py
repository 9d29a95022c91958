"""Evaluation leaves no trace of itself: parameters, gradients, modes, randomness, settings and the param store."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam
from torch import Tensor, nn
from torch.distributions import constraints

from pyrogaps import (
    AIS,
    GuideDensity,
    InputError,
    JointDensity,
    Problem,
    Refinement,
    Retraining,
    Split,
    Training,
    decompose,
    elbo,
    refine,
)
from pyrogaps.density.copies import copied
from pyrogaps.density.simulate import simulate

pytestmark = pytest.mark.usefixtures("brief_check")

X = torch.linspace(-1.0, 1.0, 5)[:, None].repeat(1, 3)


class Model(nn.Module):
    """With a buffer, dropout and batch normalisation, so that its mode matters."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3))
        self.register_buffer("shift", torch.tensor(0.1))
        self.frozen = nn.Parameter(torch.tensor(1.0), requires_grad=False)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z) + self.shift, self.frozen).to_event(1), obs=x)


class Guide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 4))

    def forward(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        loc, log_scale = self.encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def function_guide(x: Tensor) -> None:
    loc = pyro.param("loc", torch.zeros(2))
    scale = pyro.param("scale", torch.ones(2), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc + x[:, :2], scale).to_event(1))


QUICK: dict[str, Any] = {
    "num_particles": 10,
    "refinement": Refinement(num_steps=4, num_selection=8),
    "evidence": AIS(num_chains=4, num_temperatures=2, num_leapfrog=1),
    "progress": False,
}

WORK: dict[str, Callable[[Any, Any], Any]] = {
    "JointDensity": lambda model, guide: JointDensity(model, X)(torch.randn(1, 5, 2)),
    "GuideDensity": lambda model, guide: GuideDensity(guide, X, model).log_prob(torch.randn(1, 5, 2)),
    "elbo": lambda model, guide: elbo(model, guide, X, num_particles=10),
    "refine": lambda model, guide: refine(model, guide, X, settings=QUICK["refinement"]),
    "family": lambda model, guide: refine(model, AutoNormal, X, settings=QUICK["refinement"]),
    "decompose": lambda model, guide: decompose(model, guide, X, families={"normal": AutoNormal}, **QUICK),
    "simulate": lambda model, guide: simulate(JointDensity(model, X)),
}
DRAWS = ("JointDensity", "GuideDensity", "simulate")  # drawn from the caller's generator on purpose


def snapshot(*modules: nn.Module) -> list[Any]:
    """Everything that must not change, as comparable values."""
    store = pyro.get_param_store()
    tensors = [value for module in modules for value in (*module.parameters(), *module.buffers())]
    return [
        [value.detach().clone() for value in tensors],
        [None if value.grad is None else value.grad.clone() for value in tensors],
        [value.requires_grad for value in tensors],
        [sub.training for module in modules for sub in module.modules()],
        {name: store[name].detach().clone() for name in store},
        {name: store._constraints[name] for name in store},
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        dist.Distribution._validate_args if hasattr(dist.Distribution, "_validate_args") else None,
        torch.distributions.Distribution._Distribution__validate_args
        if hasattr(torch.distributions.Distribution, "_Distribution__validate_args")
        else torch.distributions.Distribution._validate_args,
        len(pyro.poutine.runtime._PYRO_STACK),
        pyro.poutine.subsample_messenger.SubsampleMessenger._subsample,
        pyro.poutine.subsample_messenger.SubsampleMessenger._process_message,
    ]


def same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return isinstance(right, Tensor) and torch.equal(left, right)
    if isinstance(left, list):
        return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    return bool(left == right)


@contextmanager
def untouched(*modules: nn.Module, random_state: bool = True) -> Iterator[None]:
    before, state = snapshot(*modules), torch.get_rng_state()
    try:
        yield
    finally:
        for left, right in zip(before, snapshot(*modules), strict=True):
            assert same(left, right), (left, right)
        if random_state:
            assert torch.equal(state, torch.get_rng_state())


def trained_pair() -> tuple[Model, Guide]:
    model, guide = Model(), Guide()
    svi = SVI(model, guide, Adam({"lr": 0.1}), Trace_ELBO())
    for _ in range(2):
        svi.step(X)
    for parameter in (*model.parameters(), *guide.parameters()):
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, 0.25)
    model.decoder[2].eval()  # a mixture of modes
    return model, guide


@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize("work", WORK)
def test_state_is_put_back(work: str, validate: bool) -> None:
    model, guide = trained_pair()
    pyro.param("somebody else's", torch.tensor(3.0))
    pyro.enable_validation(validate)
    with untouched(model, guide, random_state=work not in DRAWS):
        WORK[work](model, guide)


@pytest.mark.parametrize("work", ["JointDensity", "GuideDensity", "elbo", "decompose"])
def test_state_is_put_back_after_a_refusal(work: str) -> None:
    model, _ = trained_pair()

    class Failing(Guide):
        def forward(self, x: Tensor) -> None:
            pyro.param("fresh", torch.tensor(1.0))
            super().forward(x)
            torch.set_default_dtype(torch.float64)
            raise InputError("no")

    class FailingModel(Model):
        def forward(self, x: Tensor) -> None:
            pyro.param("fresh", torch.tensor(1.0))
            super().forward(x)
            raise InputError("no")

    failing, failing_model = Failing(), FailingModel()
    with untouched(model, failing, random_state=work not in DRAWS), pytest.raises(InputError, match="no"):
        GuideDensity(failing, X, model) if work == "JointDensity" else WORK[work](model, failing)
    with untouched(failing_model, failing, random_state=work not in DRAWS), pytest.raises(InputError, match="no"):
        WORK[work](failing_model, failing)


def test_state_is_put_back_when_a_model_fails_midway() -> None:
    class Failing(Model):
        calls = 0

        def forward(self, x: Tensor) -> None:
            self.calls += 1
            if self.calls > 12:
                raise RuntimeError("out of luck")
            super().forward(x)

    model, guide = Failing(), Guide()
    with untouched(model, guide):
        problem = Problem.of(model, guide, X, mode="eager")
        with pytest.raises(InputError, match="model failed: RuntimeError: out of luck"):
            decompose(problem, **{**QUICK, "evidence": AIS(num_chains=4, num_temperatures=9)})


def test_a_trained_function_guide_is_read_from_the_caller_s_store() -> None:
    model = Model()
    pyro.param("loc", torch.zeros(2))
    pyro.param("scale", torch.ones(2), constraint=constraints.positive)
    with torch.no_grad():
        pyro.param("loc").copy_(torch.tensor([1.0, -2.0]))
        pyro.param("scale").unconstrained().copy_(torch.tensor([0.5, 0.25]).log())
    with untouched(model, random_state=False):
        z, log_q = GuideDensity(function_guide, X, model).sample(4)
        expected = dist.Normal(torch.tensor([1.0, -2.0]) + X[:, :2], torch.tensor([0.5, 0.25])).log_prob(z).sum(-1)
        torch.testing.assert_close(log_q, expected)
        decompose(model, function_guide, X, **QUICK)


def test_an_untrained_function_guide_leaves_no_parameters() -> None:
    model = Model()
    with untouched(model):
        elbo(model, function_guide, X, num_particles=10)
        decompose(model, function_guide, X, **QUICK)
    assert len(pyro.get_param_store()) == 0


def test_evaluation_is_in_evaluation_mode() -> None:
    model, guide = trained_pair()
    z = torch.randn(2, 5, 2)
    joint, density = JointDensity(model, X), GuideDensity(guide, X, model)
    first, second = (joint(z), density.log_prob(z)), (joint(z), density.log_prob(z))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    model.eval()
    torch.testing.assert_close(first[0], joint(z))


def test_same_seed_same_result_whatever_the_caller_s_random_state() -> None:
    model, guide = trained_pair()
    first = elbo(model, guide, X, num_particles=20, seed=7)
    torch.manual_seed(99)
    torch.rand(3)
    second = elbo(model, guide, X, num_particles=20, seed=7)
    other = elbo(model, guide, X, num_particles=20, seed=8)
    assert torch.equal(first.log_weights, second.log_weights)
    assert not torch.equal(first.log_weights, other.log_weights)


def test_programs_run_inside_a_caller_s_handler() -> None:
    """A caller's own trace must not be filled by, nor seed or block, an evaluation."""
    model, guide = trained_pair()
    expected = elbo(model, guide, X, num_particles=10)
    with pyro.poutine.seed(rng_seed=3), pyro.poutine.scale(scale=2.0):
        inside = elbo(model, guide, X, num_particles=10)
    assert torch.equal(expected.log_weights, inside.log_weights)


def test_an_autoguide_keeps_its_model_when_it_is_split(double: None) -> None:
    """Pyro clears it in the original when an autoguide is copied."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x[:, 0], 1.0))
            pyro.sample("x", dist.Normal(z[:, None].expand(x.shape), 1.0).to_event(1), obs=x)

    guide = AutoNormal(model)
    guide(X)
    before = guide.model
    split = Split(X, Retraining(Training(num_epochs=1), max_rounds=1, num_restarts=0))
    settings: dict[str, Any] = {"evidence": AIS(2, 2), "num_particles": 4, "progress": False}
    decompose(model, guide, X, split=split, refinement=Refinement(num_steps=2), **settings)
    assert before is not None
    assert guide.model is before
    assert copied(guide).model is before
