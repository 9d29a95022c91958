"""A hidden Markov model of chorales with neural emissions: enumerated states, ragged sequences, a plate of tones."""

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDelta
from torch import Tensor, nn

from tests.pyro_programs.pairs import Pair, assert_same, elbo_of, fixed

SEQUENCES, STEPS, TONES, STATES = 5, 4, 3, 2
LENGTHS = torch.tensor([4, 2, 3, 4, 1])


class Emissions(nn.Module):
    """Logits of the tones from the state and the tones before."""

    def __init__(self) -> None:
        super().__init__()
        self.from_state, self.from_tones, self.out = nn.Linear(STATES, 6), nn.Linear(TONES, 6), nn.Linear(6, TONES)

    def forward(self, state: Tensor, tones: Tensor) -> Tensor:
        one_hot = torch.eye(STATES)[state.squeeze(-1)]
        return self.out(torch.relu(self.from_state(one_hot) + self.from_tones(tones)))


class NeuralHMM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emissions = Emissions()

    def forward(self, sequences: Tensor, lengths: Tensor, batch_size: int | None = None) -> None:
        pyro.module("emissions", self.emissions)
        moves = pyro.sample("moves", dist.Dirichlet(0.9 * torch.eye(STATES) + 0.1).to_event(1))
        every_tone = pyro.plate("tones", TONES, dim=-1)
        with pyro.plate("sequences", len(sequences), batch_size, dim=-2) as batch:
            lengths = lengths[batch]
            state: Tensor | int = 0
            tones = torch.zeros(len(batch), TONES)
            for t in pyro.markov(range(STEPS)):
                with poutine.mask(mask=(t < lengths)[:, None]):
                    state = pyro.sample(f"state_{t}", dist.Categorical(moves[state]), infer={"enumerate": "parallel"})
                    with every_tone:
                        logits = self.emissions(state, tones)
                        tones = pyro.sample(f"tones_{t}", dist.Bernoulli(logits=logits), obs=sequences[batch, t])


def test_ledger(mode: Any) -> None:
    hmm, moves = NeuralHMM(), torch.tensor([[0.8, 0.2], [0.3, 0.7]])
    sequences = (torch.rand(SEQUENCES, STEPS, TONES) < 0.4).float()
    guide = AutoDelta(poutine.block(hmm, expose=["moves"]), init_loc_fn=lambda site: moves)
    guide(sequences, LENGTHS)
    twin = (fixed(hmm, {"moves": moves}), lambda *args: None)
    pair = Pair(hmm, guide, (sequences, LENGTHS), SEQUENCES, plate="sequences", clean=twin, nesting=2)
    ledger = pair.ledger(mode)
    assert_same(elbo_of(ledger), pair.elbo_of_pyro())
    assert "moves" in str(ledger)
