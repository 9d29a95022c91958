"""Draws of a record are those of the program, and so are their gradients; what cannot be recorded is called."""

from collections.abc import Callable, Iterator

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pyrogaps import elbo, refine
from pyrogaps.capture import RecordedDraws, draws
from pyrogaps.refine.settings import Refinement
from tests.refine.test_structured import PackedGuide, chain

CPU = torch.device("cpu")
LENGTHS = torch.tensor([3, 1, 2])
WEIGHT = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
RNN = nn.LSTM(3, 3, batch_first=True)
Program = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


@pytest.fixture(autouse=True)
def unvalidated() -> Iterator[None]:
    """Programs run like this inside the library: validation reads values."""
    with pyro.validation_enabled(False):
        yield


def network(loc: Tensor, log_scale: Tensor) -> tuple[Tensor, ...]:
    """Two levels of Normals, and log q as a function of the draws alone."""
    first = dist.Normal(loc, log_scale.exp()).rsample()
    second = dist.Normal(torch.tanh(first @ WEIGHT), 0.0 + 1.0 * log_scale.exp()).rsample()
    return second, dist.Normal(torch.tanh(first @ WEIGHT), log_scale.detach().exp()).log_prob(second).sum(-1)


def constants_read(loc: Tensor, log_scale: Tensor) -> tuple[Tensor, ...]:
    """Lengths that are computed from the data are read into Python, and a packed sequence is read once."""
    longest, rows = int((2 * LENGTHS).max()) // 2, WEIGHT.expand(len(LENGTHS), -1, -1)
    packed = nn.utils.rnn.pack_padded_sequence(rows, LENGTHS, batch_first=True, enforce_sorted=False)
    read = RNN.to(WEIGHT.dtype)(packed)[0]
    states, _ = nn.utils.rnn.pad_packed_sequence(read, batch_first=True, total_length=longest)
    z = dist.Normal(loc + states.sum(1), log_scale.exp()).rsample()
    return z, z.square().sum(-1)


def written_into_zeros(loc: Tensor, log_scale: Tensor) -> tuple[Tensor, ...]:
    z = torch.zeros(3, 3)
    for t in range(3):
        z[:, t] = dist.Normal(loc[:, t] + z.sum(-1), log_scale[:, t].exp()).rsample()
    return z, (z * loc).sum(-1)


def written_and_read(loc: Tensor, log_scale: Tensor) -> tuple[Tensor, ...]:
    """The same memory is read, changed and read again; equal terms of it are not equal."""
    z = dist.Normal(loc, log_scale.exp()).rsample()
    noise = torch.rand(3, 3)
    before = noise.exp() * z
    noise.mul_(2.0)
    after = noise.exp() * z
    return before, after.sum(-1)


def skewed(loc: Tensor, log_scale: Tensor) -> tuple[Tensor, ...]:
    z = dist.Gamma(loc.exp(), log_scale.exp()).rsample()
    return z, dist.Laplace(loc, log_scale.exp()).rsample().sum(-1)


def draws_read(loc: Tensor, log_scale: Tensor) -> tuple[Tensor, ...]:
    z = dist.Normal(loc, log_scale.exp()).rsample()
    return z, (z if float(z.detach().sum()) > 0 else -z).sum(-1)


def through_numpy(loc: Tensor, log_scale: Tensor) -> tuple[Tensor, ...]:
    z = dist.Normal(loc, log_scale.exp()).rsample()
    return z, (z * torch.from_numpy(loc.detach().numpy().copy())).sum(-1)


def counted(program: Program) -> tuple[RecordedDraws, list[int]]:
    calls = [0]

    def call(*parameters: Tensor) -> tuple[Tensor, ...]:
        calls[0] += 1
        return program(*parameters)

    return RecordedDraws(call, CPU), calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("program", [network, constants_read, written_into_zeros, written_and_read, skewed])
def test_a_replay_draws_what_a_call_does(program: Program, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_default_dtype(dtype)
    monkeypatch.setitem(globals(), "WEIGHT", WEIGHT.to(dtype))
    recorded, calls = counted(program)
    for step in range(draws.NUM_CALLS + 20):
        parameters = [(0.3 * torch.randn(3, 3)).requires_grad_() for _ in range(2)]
        before, results = calls[0], []
        for replayed in (True, False):
            torch.manual_seed(step)
            values = recorded(parameters) if replayed else program(*parameters)
            target = sum((value * torch.arange(1.0, value.numel() + 1).view_as(value)).sum() for value in values)
            gradients = torch.autograd.grad(target, parameters)
            results.append([*values, *gradients, torch.rand(2)])  # the generator is where it would be
        torch.testing.assert_close(*results)
        assert (calls[0] == before) == (step > draws.NUM_CALLS)


@pytest.mark.parametrize("program", [draws_read, through_numpy])
def test_what_cannot_be_recorded_is_called(program: Program) -> None:
    recorded, calls = counted(program)
    for step in range(draws.NUM_CALLS + 3):
        parameters = [(0.3 * torch.randn(3, 3)).requires_grad_() for _ in range(2)]
        before = calls[0]
        torch.manual_seed(step)
        values = recorded(parameters)
        torch.manual_seed(step)
        torch.testing.assert_close(values, program(*parameters))
        assert calls[0] > before


def test_making_a_record_leaves_the_generator_alone() -> None:
    recorded, _ = counted(network)
    parameters = [torch.zeros(3, 3), torch.zeros(3, 3)]
    for _ in range(draws.NUM_CALLS):
        recorded(parameters)
    numbers = []
    for function in (lambda: recorded(parameters), lambda: network(*parameters)):
        torch.manual_seed(0)
        function()
        numbers.append(torch.rand(3))
    assert torch.equal(*numbers)


class Counted(PackedGuide):
    """Counts its runs."""

    runs = 0

    def forward(self, x: Tensor, lengths: Tensor) -> None:
        self.runs += 1
        super().forward(x, lengths)


def test_a_refinement_from_a_record_is_that_through_pyro(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x, lengths = torch.randn(4, 3), torch.tensor([3, 1, 2, 3])
    settings, bounds, runs = Refinement(num_steps=60, num_selection=16), [], []
    for number in (5, 10_000):
        monkeypatch.setattr(draws, "NUM_CALLS", number)
        guide = Counted()
        refined = refine(chain, guide, (x, lengths), settings=settings, referee=False)
        bounds.append(elbo(chain, refined, (x, lengths), num_particles=100).value)
        runs.append(guide.runs)
    torch.testing.assert_close(*bounds, rtol=1e-4, atol=1e-4)
    assert runs[1] - runs[0] > 60
