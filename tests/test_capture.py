"""Captured and compiled gradients are the eager ones: on every chunk, for every parameter value, or not used at all."""

import warnings
from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pyrogaps.capture import BoundDensity, GradientEvaluator
from pyrogaps.capture.graphs import record, reuse_memory
from pyrogaps.capture.halves import halves
from pyrogaps.density import JointDensity
from pyrogaps.models.vae import VAE
from pyrogaps.problem import Problem
from tests.references import anisotropic, counts, draws_of, gamma_poisson

CHUNKS = [range(64), range(64, 128), range(128, 150)]  # the second has other data, the last is short


def masked(x: Tensor) -> None:
    """Missing values, negative, are masked out of the likelihood: the mask is data too."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=x.dtype), 1.0).to_event(1))
        mean = torch.cat([z, z.prod(-1, keepdim=True)], -1)
        pyro.sample("x", dist.Normal(mean, 0.5).mask(x > 0).to_event(1), obs=x)


def cases() -> dict[str, tuple[Callable[..., object], Tensor]]:
    generator = torch.Generator().manual_seed(0)
    linear = anisotropic(6, 3)
    vae = VAE(10, 3, (7,)).double()
    pixels = torch.bernoulli(torch.rand(150, 10, generator=generator), generator=generator).double()
    return {
        "linear": (linear, draws_of(linear, 150)[0]),
        "vae": (vae, pixels),
        "gamma": (gamma_poisson, counts(150).double()),
        "masked": (masked, torch.randn(150, 3, generator=generator, dtype=torch.float64)),
    }


@pytest.fixture
def double() -> None:
    torch.set_default_dtype(torch.float64)


def both(evaluator: GradientEvaluator, chunk: range, num_particles: int = 3) -> tuple[Tensor, ...]:
    indices = torch.tensor(chunk)
    z = torch.randn(num_particles, len(indices), evaluator.joint.dim, generator=torch.Generator().manual_seed(1))
    bound = evaluator.bind(indices, num_particles)
    z = z.to(evaluator.joint.dtype)
    values, gradients = bound(z)
    for whole, alone in zip((*values, *gradients), (*bound.values(z), *bound.gradients(z)), strict=True):
        torch.testing.assert_close(alone, whole)
    return (*values, *gradients)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("name", ["linear", "vae", "gamma", "masked"])
def test_captured_equals_eager_on_every_chunk(name: str, split: bool) -> None:
    model, x = cases()[name]
    joint = JointDensity(model, x)
    captured, eager = GradientEvaluator(joint, "captured", split), GradientEvaluator(joint, "eager", split)
    for chunk in CHUNKS:
        left, right = both(captured, chunk), both(eager, chunk)
        assert captured.mode == "captured"
        assert len(left) == (4 if split else 2)
        for captured_part, eager_part in zip(left, right, strict=True):
            torch.testing.assert_close(captured_part, eager_part, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("name", ["linear", "gamma"])
def test_gradients_are_those_of_the_density(name: str) -> None:
    """Against central differences of the joint density itself."""
    model, x = cases()[name]
    joint = JointDensity(model, x[:3])
    z = torch.randn(2, 3, joint.dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (value,), (gradient,) = GradientEvaluator(joint).bind(torch.arange(3), 2)(z)
    torch.testing.assert_close(value, joint(z).detach(), rtol=1e-12, atol=1e-12)
    for k in range(joint.dim):
        step = torch.zeros(joint.dim, dtype=torch.float64)
        step[k] = 1e-5
        numeric = (joint(z + step) - joint(z - step)).detach() / 2e-5
        torch.testing.assert_close(gradient[..., k], numeric, rtol=1e-6, atol=1e-6)


def test_compiled_equals_eager_in_single_precision() -> None:
    model, x = cases()["linear"]
    model, x = model.float(), x.float()
    joint = JointDensity(model, x)
    compiled, eager = GradientEvaluator(joint, "compiled"), GradientEvaluator(joint, "eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        for chunk in CHUNKS:
            left, right = both(compiled, chunk), both(eager, chunk)
            assert compiled.mode == "compiled"
            for compiled_part, eager_part in zip(left, right, strict=True):
                torch.testing.assert_close(compiled_part, eager_part, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("double")
def test_parameters_changed_in_place_are_seen() -> None:
    model, x = cases()["vae"]
    assert isinstance(model, nn.Module)
    joint = JointDensity(model, x)
    captured, eager = GradientEvaluator(joint), GradientEvaluator(joint, "eager")
    before = both(captured, CHUNKS[0])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    after, expected = both(captured, CHUNKS[0]), both(eager, CHUNKS[0])
    assert float((after[0] - before[0]).abs().min()) > 1e-3
    for captured_part, eager_part in zip(after, expected, strict=True):
        torch.testing.assert_close(captured_part, eager_part, rtol=1e-10, atol=1e-10)


def turned(x: Tensor) -> None:
    """Logits that do not lie in order in memory."""
    weight = torch.linspace(-1, 1, 48, dtype=x.dtype).reshape(3, 16)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(3, dtype=x.dtype), 1.0).to_event(1))
        logits = (z @ weight).reshape(-1, 4, 4).transpose(1, 2)
        pyro.sample("x", dist.Bernoulli(logits=logits).to_event(2), obs=x)


@pytest.mark.usefixtures("double")
def test_logits_in_any_order_are_captured() -> None:
    joint = JointDensity(turned, torch.bernoulli(torch.full((150, 4, 4), 0.3)))
    captured, eager = GradientEvaluator(joint), GradientEvaluator(joint, "eager")
    left, right = both(captured, CHUNKS[0]), both(eager, CHUNKS[0])
    assert captured.mode == "captured"
    torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-10)


def branching(x: Tensor) -> None:
    """Control flow that depends on the latent's value."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
        scale = 2.0 if float(z.detach().abs().max()) > 1e6 else 1.0
        pyro.sample("x", dist.Normal(z, scale), obs=x)


def test_data_dependent_control_flow_falls_back_with_a_warning() -> None:
    x = torch.randn(150)
    joint = JointDensity(branching, x)
    evaluator = GradientEvaluator(joint)
    with pytest.warns(
        UserWarning,
        match=r"model: cannot be captured, because of line \d+ of test_capture.py, `scale = .*A branch reads a value",
    ):
        left = both(evaluator, CHUNKS[0])
    assert evaluator.mode == "eager"
    for captured_part, eager_part in zip(left, both(GradientEvaluator(joint, "eager"), CHUNKS[0]), strict=True):
        torch.testing.assert_close(captured_part, eager_part)


def numpy_inside(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
        pyro.sample("x", dist.Normal(z + torch.from_numpy(np.sin(z.detach().numpy())), 1.0), obs=x)


def one_hot_inside(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        k = torch.nn.functional.one_hot((x > 0).long(), num_classes=2)
        pyro.sample("x", dist.Normal((k * z).sum(-1), 1.0), obs=x)


def unit_vectors_inside(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal((torch.eye(2)[(x > 0).long()] * z).sum(-1), 1.0), obs=x)


def only_states(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.4, 0.6])))
        pyro.sample("x", dist.Normal(2.0 * k, 1.0), obs=x)


def of_states(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("k", dist.Categorical(torch.stack([torch.zeros_like(x), x], -1).softmax(-1)))


def test_densities_of_states_alone_are_recorded() -> None:
    """Their gradient is zero, which is no reason to leave them to Pyro with a warning."""
    x = torch.randn(5)
    problem = Problem.of(only_states, of_states, x)
    z = problem.guided().at(torch.arange(5)).sample(3)[0]
    value, gradient = problem.scorer.bind(torch.arange(5), 3)(z)
    assert problem.scorer.mode == "captured"
    torch.testing.assert_close(value[-1], problem.scored(z))
    assert not gradient[-1].any()


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (numpy_inside, "outside torch (NumPy"),
        (
            one_hot_inside,
            "`k = torch.nn.functional.one_hot((x > 0).long(), num_classes=2)`. F.one_hot reads the values",
        ),
    ],
)
def test_why_a_model_is_not_recorded(program: Callable[[Tensor], None], words: str) -> None:
    """Values that were computed by NumPy became constants of the record, and its densities were wrong."""
    joint = JointDensity(program, torch.randn(20))
    evaluator = GradientEvaluator(joint)
    z = torch.randn(3, 20, joint.dim)
    with pytest.warns(UserWarning, match="model: cannot be captured") as warned:
        value = evaluator(z, torch.arange(20))
    evaluator.over(joint)(z[:2], torch.arange(20))  # without another warning, which would be an error
    torch.testing.assert_close(value, joint(z))
    assert len(warned) == 1
    message = str(warned[0].message)
    assert warned[0].filename == __file__  # of the line to blame, or of the call, and never of the library
    assert words in message and "several times slower" in message and "tracing" not in message


def test_what_to_write_instead_is_recorded() -> None:
    evaluator = GradientEvaluator(JointDensity(unit_vectors_inside, torch.randn(20)))
    evaluator(torch.randn(3, 20, 2), torch.arange(20))
    assert evaluator.mode == "captured"


def test_a_record_that_no_longer_holds_is_found_out() -> None:
    """What a model computes from neither its arguments nor its parameters is frozen in the record; a bind checks it."""
    spread = [1.0]

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
            pyro.sample("x", dist.Normal(z, torch.tensor(spread[0])), obs=x)

    joint = JointDensity(model, torch.randn(150))
    evaluator = GradientEvaluator(joint)
    both(evaluator, CHUNKS[0])
    assert evaluator.mode == "captured"
    spread[0] = 2.0
    with pytest.warns(UserWarning, match="gives other values than Pyro"):
        left = both(evaluator, CHUNKS[1])
    for captured_part, eager_part in zip(left, both(GradientEvaluator(joint, "eager"), CHUNKS[1]), strict=True):
        torch.testing.assert_close(captured_part, eager_part)


def test_counts_evaluations() -> None:
    evaluator = GradientEvaluator(JointDensity(*cases()["gamma"]))
    bound = evaluator.bind(torch.arange(22), 5)
    z = torch.zeros(5, 22, 1)
    bound(z)
    bound.gradients(z)
    bound.values(z)
    assert (evaluator.num_gradients, evaluator.num_values) == (2 * 22 * 5, 22 * 5)


class Counted(nn.Module):
    """Counts whose normaliser depends on data and on a parameter alone."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            weight = torch.lgamma(x + self.rate.exp())
            pyro.sample("x", dist.Normal(z * weight, 1.0).to_event(1), obs=x)


def operations(graph: nn.Module) -> list[str]:
    return [str(node.target) for node in graph.graph.nodes if node.op.startswith("call")]  # type: ignore[union-attr]


def test_what_depends_on_data_alone_is_computed_once() -> None:
    """And again after a parameter was changed, in place or behind autograd's back."""
    model, x = Counted(), torch.rand(4, 3)
    joint, rows = JointDensity(model, x), torch.arange(4)
    evaluator, z = GradientEvaluator(joint), torch.randn(5, 4, 3)
    bound = evaluator.bind(rows, 5)
    (graph,) = evaluator._graphs.values()
    assert "aten.lgamma.default" in operations(graph._of_data)
    for part in (graph.both, graph.values, graph.gradients):
        assert not [name for name in operations(part) if "lgamma" in name]

    def agree(bound: BoundDensity) -> None:
        (expected,), (slope,) = GradientEvaluator(joint, "eager").bind(rows, 5)(z)
        (value,), (gradient,) = bound(z)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(gradient, slope)

    agree(bound)
    with torch.no_grad():
        model.rate += 1.0
    agree(bound)
    model.rate.data += 1.0  # which counts as no change
    agree(evaluator.bind(rows, 5))
    other = torch.rand(4, 3)
    evaluator = GradientEvaluator(joint)
    bound = evaluator.bind(rows, 5, whole=True).on((other.repeat(5, 1),))
    joint = JointDensity(model, other)
    agree(bound)


def test_results_belong_to_the_caller() -> None:
    """What does not depend on the point is computed once, and returned in new memory every time."""

    def function(point: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return point + x, torch.exp(x)

    early, late = halves(record(function, torch.randn(4), torch.randn(4)), slice(1), 0)
    point, x = torch.randn(4), torch.randn(4)
    kept = early(x)
    late(point, *kept)[1].add_(1.0)
    torch.testing.assert_close(late(point, *kept), function(point, x))


def test_equal_operations_are_recorded_once() -> None:
    def function(x: Tensor) -> Tensor:
        return (torch.exp(x) + 0.0) * (1.0 * torch.exp(x))

    graph = record(function, torch.randn(4))
    names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert names == ["aten.exp.default", "aten.mul.Tensor"]
    x = torch.randn(4)
    torch.testing.assert_close(reuse_memory(graph)(x), function(x))


def test_what_is_written_to_is_recorded_as_it_is() -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        copy, first, second = x + 0.0, torch.exp(x), torch.exp(x)
        before = torch.tanh(copy)
        copy.mul_(2.0)
        second.add_(1.0)
        return before, torch.tanh(copy), first, second, x * copy

    x = torch.randn(4)
    given = x.clone()
    torch.testing.assert_close(reuse_memory(record(function, torch.randn(4)))(x), function(given))
    assert torch.equal(x, given)
