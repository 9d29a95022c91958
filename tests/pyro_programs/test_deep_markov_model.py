"""The deep Markov model: its guide reads packed sequences of several lengths backwards, then draws step by step."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tests.pyro_programs.pairs import Pair, assert_same, assert_same_draws, elbo_of

SEQUENCES, STEPS, NOTES, LATENT, HIDDEN = 6, 5, 3, 2, 4
LENGTHS = torch.tensor([5, 3, 4, 1, 5, 2])


class DMM(nn.Module):
    def __init__(self, rnn: type[nn.Module], annealing: float = 1.0) -> None:
        super().__init__()
        self.annealing = annealing
        self.emitter, self.transition = nn.Linear(LATENT, NOTES), nn.Linear(LATENT, 2 * LATENT)
        self.rnn = rnn(NOTES, HIDDEN, batch_first=True)
        self.combiner, self.heads = nn.Linear(LATENT, HIDDEN), nn.Linear(HIDDEN, 2 * LATENT)
        self.z_0, self.z_q_0 = nn.Parameter(torch.zeros(LATENT)), nn.Parameter(torch.zeros(LATENT))

    def model(self, x: Tensor, lengths: Tensor) -> None:
        pyro.module("dmm", self)
        z, mask = self.z_0.expand(len(x), LATENT), (torch.arange(STEPS) < lengths[:, None])[..., None]
        with pyro.plate("sequences", len(x)):
            for t in pyro.markov(range(STEPS)):
                loc, scale = self.transition(z).chunk(2, -1)
                with poutine.scale(scale=self.annealing):
                    fn = dist.Normal(loc, softplus(scale) + 0.1)
                    z = pyro.sample(f"z_{t}", fn.mask(mask[:, t]).to_event(1))
                emission = dist.Bernoulli(logits=self.emitter(z)).mask(mask[:, t])
                pyro.sample(f"x_{t}", emission.to_event(1), obs=x[:, t])

    def guide(self, x: Tensor, lengths: Tensor) -> None:
        pyro.module("dmm", self)
        hidden, mask = self.read_backwards(x, lengths), (torch.arange(STEPS) < lengths[:, None])[..., None]
        z = self.z_q_0.expand(len(x), LATENT)
        with pyro.plate("sequences", len(x)):
            for t in pyro.markov(range(STEPS)):
                loc, scale = self.heads(0.5 * (torch.tanh(self.combiner(z)) + hidden[:, t])).chunk(2, -1)
                with poutine.scale(scale=self.annealing):
                    fn = dist.Normal(loc, softplus(scale) + 0.1)
                    z = pyro.sample(f"z_{t}", fn.mask(mask[:, t]).to_event(1))

    def read_backwards(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Hidden states `(n, STEPS, HIDDEN)`, of x_t and what comes after it."""
        steps = torch.arange(STEPS)
        order = torch.where(steps < lengths[:, None], lengths[:, None] - 1 - steps, steps)  # its own inverse
        backwards = x.gather(1, order[..., None].expand(x.shape))
        packed = pack_padded_sequence(backwards, lengths, batch_first=True, enforce_sorted=False)
        hidden, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True, total_length=STEPS)
        return hidden.gather(1, order[..., None].expand(hidden.shape))


@pytest.mark.parametrize("rnn", [nn.LSTM, nn.GRU])
def test_ledger(rnn: type[nn.Module], mode: Any) -> None:
    dmm, x = DMM(rnn), (torch.rand(SEQUENCES, STEPS, NOTES) < 0.5).float()
    pair = Pair(dmm.model, dmm.guide, (x, LENGTHS), SEQUENCES, repeats=20)
    assert_same(elbo_of(pair.ledger(mode, 6000)), pair.elbo_of_pyro())
    assert_same_draws(pair)


def test_annealing_factor(mode: Any) -> None:
    dmm, twin = DMM(nn.GRU, annealing=0.3), DMM(nn.GRU)
    twin.load_state_dict(dmm.state_dict())
    x = (torch.rand(SEQUENCES, STEPS, NOTES) < 0.5).float()
    pair = Pair(dmm.model, dmm.guide, (x, LENGTHS), SEQUENCES, clean=(twin.model, twin.guide), repeats=20)
    ledger = pair.ledger(mode, 6000)
    assert_same(elbo_of(ledger), pair.elbo_of_pyro())
    assert "Note: The scale 0.3 at " in str(ledger)
