"""The deep Markov model, and what it shares with the other models of sequences: lengths, masks, refusals."""

from typing import Any

import pyro
import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Normal
from torch.nn.functional import softplus

from pyrogaps import InputError, JointDensity, elbo, train
from pyrogaps.capture import GradientEvaluator
from pyrogaps.density.simulate import simulate
from pyrogaps.guides.sequential import StructuredNormal
from pyrogaps.models.dmm import MIN_SCALE, DeepMarkovModel
from pyrogaps.models.pendulum import Pendulum

LENGTHS = torch.tensor([4, 2, 5, 1])


def notes(number: int = 4, steps: int = 5, seed: int = 1) -> Tensor:
    return torch.bernoulli(torch.full((number, steps, 3), 0.4), generator=torch.Generator().manual_seed(seed))


def small(dtype: torch.dtype = torch.float64) -> DeepMarkovModel:
    """Every weight stirred, so that nothing is at its start."""
    model = DeepMarkovModel(3, 2, 6, 7).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def gated_by_hand(model: DeepMarkovModel, z: Tensor) -> tuple[Tensor, Tensor]:
    """The transition as it is written in arXiv:1609.09869 and in Pyro's example, one network at a time."""
    gated = model.gated
    hidden = gated.gate.in_features
    of_gate, of_proposal = ((z @ w.T + b).relu() for w, b in zip(
        gated.inner.weight.split(hidden), gated.inner.bias.split(hidden), strict=True
    ))  # fmt: skip
    gate, proposed = gated.gate(of_gate).sigmoid(), gated.proposal(of_proposal)
    return (1 - gate) * gated.linear(z) + gate * proposed, softplus(gated.scale(proposed.relu())) + MIN_SCALE


def by_hand(model: DeepMarkovModel, z: Tensor, x: Tensor, lengths: Tensor) -> Tensor:
    """log p(x, z) of `z` `(S, N, T, 2)`, sequence by sequence."""
    columns = []
    for n, length in enumerate(lengths.tolist()):
        state, total = model.z_0.expand(len(z), -1), torch.zeros(len(z), dtype=z.dtype)
        for t in range(length):
            total = total + Normal(*gated_by_hand(model, state)).log_prob(z[:, n, t]).sum(-1)
            state = z[:, n, t]
            total = total + Bernoulli(logits=model.emitter(state)).log_prob(x[n, t]).sum(-1)
        columns.append(total)
    return torch.stack(columns, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_joint_of_ragged_sequences(dtype: torch.dtype) -> None:
    model, x, z = small(dtype), notes().to(dtype), torch.randn(3, 4, 5, 2, dtype=dtype)
    joint = JointDensity(model, (x, LENGTHS))
    assert (joint.plate, joint.dim) == ("data", 10)
    assert [*joint.sites, *joint.observed] == [f"{kind}_{t}" for kind in "zx" for t in range(1, 6)]
    torch.testing.assert_close(joint(z.flatten(2)), by_hand(model, z, x, LENGTHS))
    assert torch.equal(joint.active(torch.arange(4)), (torch.arange(5) < LENGTHS[:, None]).repeat_interleave(2, 1))


def test_without_lengths_every_step_counts() -> None:
    model, x, z = small(), notes().double(), torch.randn(3, 4, 10).double()
    alone, told = JointDensity(model, x), JointDensity(model, (x, torch.full((4,), 5)))
    torch.testing.assert_close(alone(z), told(z))
    assert alone.active(torch.arange(4)) is None


def test_what_lies_beyond_a_length_changes_nothing() -> None:
    model, x, z = small(), notes().double(), torch.randn(3, 4, 8, 2).double()
    short = JointDensity(model, (x, LENGTHS))
    other = torch.where((torch.arange(5) < LENGTHS[:, None])[..., None], x, 1 - x)
    longer = torch.cat([other, notes(4, 3, seed=2).double()], 1)
    for data in (other, longer):
        steps = data.shape[1]
        torch.testing.assert_close(
            JointDensity(model, (data, LENGTHS))(z[:, :, :steps].flatten(2)), short(z[:, :, :5].flatten(2))
        )


def test_order_of_sequences_does_not_matter() -> None:
    model, x, z = small(), notes().double(), torch.randn(3, 4, 10).double()
    rows = torch.tensor([2, 0, 3, 1])
    joint, turned = JointDensity(model, (x, LENGTHS)), JointDensity(model, (x[rows], LENGTHS[rows]))
    torch.testing.assert_close(turned(z[:, rows]), joint(z)[:, rows])
    torch.testing.assert_close(joint(z[:, rows[:2]], rows[:2]), joint(z)[:, rows[:2]])


def test_transition_starts_near_the_identity() -> None:
    gated = DeepMarkovModel(3, 2, 6, 7).gated
    z = torch.randn(4, 2)
    torch.testing.assert_close(gated.linear(z), z)


def test_captured_gradients_are_those_of_eager_runs() -> None:
    """Lengths are data of the recording: a second batch of other lengths is right too. A warning would be an error."""
    joint = JointDensity(small(), (notes(8).double(), torch.tensor([4, 2, 5, 1, 5, 5, 3, 2])))
    captured, eager = GradientEvaluator(joint), GradientEvaluator(joint, "eager")
    for indices in torch.arange(8).split(4):
        z = torch.randn(2, 4, 10).double()
        left, right = captured.bind(indices, 2)(z), eager.bind(indices, 2)(z)
        torch.testing.assert_close(left[0], right[0])
        torch.testing.assert_close(left[1], right[1])
    assert captured.mode == "captured"


def test_simulates_data_of_the_same_lengths() -> None:
    """`simulate` itself checks that what it drew scores as it was drawn."""
    model = small()
    (x, lengths), z = simulate(JointDensity(model, (notes(200).double(), LENGTHS.repeat(50))))
    assert torch.equal(lengths, LENGTHS.repeat(50)) and z.shape == (200, 10)
    assert set(x.unique().tolist()) == {0.0, 1.0}
    kept = (torch.arange(5) < lengths[:, None]).repeat_interleave(2, 1)
    assert (z[~kept] == 0).all() and (z[kept] != 0).all()


def test_training_raises_the_bound() -> None:
    x, lengths = notes(40), torch.randint(1, 6, (40,))
    model, guide = DeepMarkovModel(3, 2, 6, 7), StructuredNormal(3, 2, 8)
    before = elbo(model, guide, (x, lengths), num_particles=50).value.mean()
    train(model, guide, (x, lengths), num_epochs=30, batch_size=20, learning_rate=0.01, progress=False)
    assert float(elbo(model, guide, (x, lengths), num_particles=50).value.mean()) > float(before) + 1
    assert all(bool((p.grad is None) or p.grad.isfinite().all()) for p in model.parameters())


MODELS = [lambda: DeepMarkovModel(3, 2, 4, 4), lambda: Pendulum(), lambda: StructuredNormal(3, 2, 4)]


@pytest.mark.parametrize("build", MODELS, ids=["dmm", "pendulum", "guide"])
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((torch.zeros(4, 5, 7),), "x must have shape"),
        ((torch.zeros(4, 5),), "x must have shape"),
        ((torch.zeros(4, 0, 3),), "has no time steps"),
        ((torch.zeros(0, 5, 3),), "has no time steps"),
        ((torch.zeros(4, 5, 3), torch.tensor([4, 0, 5, 1])), r"lengths must be from 1 to 5.*Leave out empty sequences"),
        ((torch.zeros(4, 5, 3), torch.tensor([4, 2, 6, 1])), r"lengths must be from 1 to 5.*Pad x to the longest"),
        ((torch.zeros(4, 5, 3), torch.tensor([4, 2, 5])), r"lengths must have shape \(4,\)"),
        ((torch.zeros(4, 5, 3), torch.tensor([[4], [2], [5], [1]])), r"lengths must have shape \(4,\)"),
        ((torch.zeros(4, 5, 3), torch.tensor([4.0, 2.0, 5.0, 1.0])), r"tensor of integers, got torch\.float32"),
        ((torch.zeros(4, 5, 3), torch.tensor([True] * 4)), r"tensor of integers, got torch\.bool"),
        ((torch.zeros(4, 5, 3), [4, 2, 5, 1]), "tensor of integers, got list"),
    ],
)
def test_wrong_sequences_are_refused(build: Any, arguments: tuple[Any, ...], said: str) -> None:
    program, (x, *rest) = build(), arguments
    fits = x.dim() == 3 and x.shape[-1] == 3
    with pytest.raises(InputError, match=f"^{type(program).__name__}: .*{said}") as caught:
        program(x[..., : program.data_dim] if fits else x, *rest)
    assert "\n" not in str(caught.value)


def test_lengths_are_looked_at_under_validation_alone() -> None:
    with pyro.validation_enabled(False):
        small()(notes().double(), torch.tensor([4, 2, 6, 1]))


def test_dimensions_are_positive() -> None:
    with pytest.raises(InputError, match=r"DeepMarkovModel: .* must be at least 1, got 3, 0, 6 and 7"):
        DeepMarkovModel(3, 0, 6, 7)
