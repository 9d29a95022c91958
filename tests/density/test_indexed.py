"""Ragged sequences fetched by index: a small deep Markov model with masks and packed recurrent networks."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from pyrogaps import AIS, GuideDensity, IndexedData, InputError, JointDensity, Problem, Refinement, decompose, elbo

pytestmark = pytest.mark.usefixtures("double")

LENGTHS = torch.tensor([4, 2, 5, 1, 3, 5])


def sequences() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.bernoulli(torch.full((int(length), 3), 0.4), generator=generator) for length in LENGTHS]


def padded(total: int) -> IndexedData:
    """Sequences, reversed ones packed, and lengths, padded to `total` steps, in the order of the indices."""
    x, backwards = torch.zeros(6, total, 3), torch.zeros(6, total, 3)
    for n, sequence in enumerate(sequences()):
        x[n, : len(sequence)], backwards[n, : len(sequence)] = sequence, sequence.flip(0)

    def fetch(indices: Tensor) -> tuple[Tensor, PackedSequence, Tensor]:
        packed = pack_padded_sequence(backwards[indices], LENGTHS[indices], batch_first=True, enforce_sorted=False)
        return x[indices], packed, LENGTHS[indices]

    return IndexedData(6, fetch)


class DMM(nn.Module):
    """As Pyro's example: `z_t` given `z_{t-1}` by networks, a guide that reads the future, masks on the padding."""

    def __init__(self, z_dim: int = 2, hidden: int = 4) -> None:
        super().__init__()
        self.transition, self.emission = nn.Linear(z_dim, z_dim), nn.Linear(z_dim, 3)
        self.rnn = nn.GRU(3, hidden, batch_first=True)
        self.combine, self.loc, self.scale = (
            nn.Linear(z_dim, hidden),
            nn.Linear(hidden, z_dim),
            nn.Linear(hidden, z_dim),
        )
        self.z_0 = nn.Parameter(torch.zeros(z_dim))
        self.h_0 = nn.Parameter(torch.zeros(1, 1, hidden))

    def steps(self, x: Tensor, lengths: Tensor, step: Callable[[int, Tensor, Tensor], Tensor]) -> None:
        z = self.z_0.expand(len(x), -1)
        for t in range(1, x.shape[1] + 1):
            keep = (t <= lengths)[:, None]
            z = step(t, z, keep)

    def model(self, x: Tensor, backwards: PackedSequence, lengths: Tensor) -> None:
        pyro.module("dmm", self)

        def step(t: int, z: Tensor, keep: Tensor) -> Tensor:
            loc = self.transition(z).tanh()
            z = pyro.sample(f"z_{t}", dist.Normal(loc, 0.8 * torch.ones_like(loc)).mask(keep).to_event(1))
            pyro.sample(f"obs_x_{t}", dist.Bernoulli(logits=self.emission(z)).mask(keep).to_event(1), obs=x[:, t - 1])
            return z

        with pyro.plate("x_minibatch", len(x)):
            self.steps(x, lengths, step)

    def guide(self, x: Tensor, backwards: PackedSequence, lengths: Tensor) -> None:
        pyro.module("dmm", self)
        output, _ = self.rnn(backwards, self.h_0.expand(1, len(x), -1).contiguous())
        reversed_states, _ = pad_packed_sequence(output, batch_first=True, total_length=x.shape[1])
        # Un-reverse every sequence within its own length.
        position = (lengths[:, None] - 1 - torch.arange(x.shape[1])).clamp(min=0)
        states = reversed_states.gather(1, position[..., None].expand(-1, -1, reversed_states.shape[-1]))

        def step(t: int, z: Tensor, keep: Tensor) -> Tensor:
            hidden = 0.5 * (self.combine(z).tanh() + states[:, t - 1])
            site = dist.Normal(self.loc(hidden), nn.functional.softplus(self.scale(hidden)))
            return pyro.sample(f"z_{t}", site.mask(keep).to_event(1))

        with pyro.plate("x_minibatch", len(x)):
            self.steps(x, lengths, step)


def by_hand(dmm: DMM, z: Tensor) -> Tensor:
    """log p(x, z) of `z` `(S, 6, T, 2)`, sequence by sequence."""
    columns = []
    for n, sequence in enumerate(sequences()):
        state, total = dmm.z_0.expand(len(z), -1), torch.zeros(len(z))
        for t, x in enumerate(sequence):
            total = total + dist.Normal(dmm.transition(state).tanh(), 0.8).log_prob(z[:, n, t]).sum(-1)
            state = z[:, n, t]
            total = total + dist.Bernoulli(logits=dmm.emission(state)).log_prob(x).sum(-1)
        columns.append(total)
    return torch.stack(columns, 1)


def test_joint_density_of_ragged_sequences() -> None:
    dmm, z = DMM(), torch.randn(3, 6, 5, 2)
    joint = JointDensity(dmm.model, padded(5))
    assert (joint.plate, joint.dim) == ("x_minibatch", 10)
    torch.testing.assert_close(joint(z.flatten(2)), by_hand(dmm, z))
    active = torch.arange(5) < LENGTHS[:, None]
    assert torch.equal(joint.active(torch.arange(6)), active.repeat_interleave(2, 1))


def test_padding_does_not_change_log_densities() -> None:
    dmm, z = DMM(), torch.randn(3, 6, 8, 2)
    short, long = JointDensity(dmm.model, padded(5)), JointDensity(dmm.model, padded(8))
    torch.testing.assert_close(short(z[:, :, :5].flatten(2)), long(z.flatten(2)))
    guides = GuideDensity(dmm.guide, None, short), GuideDensity(dmm.guide, None, long)
    torch.testing.assert_close(guides[0].log_prob(z[:, :, :5].flatten(2)), guides[1].log_prob(z.flatten(2)))


def test_the_recurrent_guide_scores_what_it_draws() -> None:
    dmm = DMM()
    density = GuideDensity(dmm.guide, padded(5), dmm.model)
    for indices in (torch.arange(6), torch.tensor([3, 2, 2, 0])):
        z, log_q = density.sample(4, indices)
        torch.testing.assert_close(density.log_prob(z, indices), log_q)
        assert (z == 0).any() and torch.isfinite(log_q).all()


@pytest.mark.parametrize("kind", ["own", "auto"])
def test_padding_does_not_change_the_elbo(kind: str) -> None:
    dmm = DMM()
    results = []
    for total in (5, 8):
        data = padded(total)
        guide: Any = dmm.guide
        if kind == "auto":
            guide = AutoNormal(dmm.model, init_scale=0.7)
            guide(*data.fetch(torch.arange(6)))
            with torch.no_grad():
                for parameter in guide.locs.parameters():
                    parameter.fill_(0.3)
        results.append(elbo(dmm.model, guide, data, num_particles=1000))
    error = (results[0].mcse.square() + results[1].mcse.square()).sqrt()
    assert ((results[0].value - results[1].value).abs() < 4.5 * error).all()


@pytest.mark.usefixtures("brief_check")
def test_training_and_decomposing() -> None:
    dmm, data = DMM(), padded(5)
    svi = SVI(dmm.model, dmm.guide, Adam({"lr": 0.01}), Trace_ELBO())
    for _ in range(3):
        svi.step(*data.fetch(torch.arange(6)))
    ledger = decompose(
        Problem.of(dmm.model, dmm.guide, data, mode="eager"),
        families={"mean-field": AutoNormal},
        num_particles=10,
        progress=False,
        refinement=Refinement(num_steps=2, num_particles=2, num_selection=2),
        evidence=AIS(num_chains=2, num_temperatures=2, num_leapfrog=1),
    )
    assert ledger.provenance["own_family"] == "structured"
    for name in ("elbo", "log_evidence", "elbo_refined"):
        assert torch.isfinite(torch.from_numpy(ledger.per_datapoint[name].values)).all()


def test_a_fetch_that_sorts_by_length_is_refused() -> None:
    data = padded(5)

    def fetch(indices: Tensor) -> tuple[Any, ...]:
        return data.fetch(indices[LENGTHS[indices].argsort(descending=True)])

    with pytest.raises(InputError, match=r"fetch\(indices\) must keep the order"):
        JointDensity(DMM().model, IndexedData(6, fetch))


def test_a_fetch_that_pads_each_batch_to_its_own_length_is_refused() -> None:
    data = padded(5)

    def fetch(indices: Tensor) -> tuple[Any, ...]:
        x, packed, lengths = data.fetch(indices)
        return x[:, : int(lengths.max())], packed, lengths

    with pytest.raises(InputError, match="Pad ragged data to one length"):
        JointDensity(DMM().model, IndexedData(6, fetch))


def test_arguments_that_are_not_tensors() -> None:
    x = torch.randn(6)

    def model(batch: dict[str, Tensor], scale: float, name: str) -> None:
        with pyro.plate(name, len(batch["x"])):
            z = pyro.sample("z", dist.Normal(0.0, scale))
            pyro.sample("x", dist.Normal(z, 1.0), obs=batch["x"])

    joint = JointDensity(model, IndexedData(6, lambda indices: ({"x": x[indices]}, 2.0, "rows")))
    z = torch.randn(2, 6, 1)
    expected = dist.Normal(0.0, 2.0).log_prob(z[..., 0]) + dist.Normal(z[..., 0], 1.0).log_prob(x)
    torch.testing.assert_close(joint(z), expected)
    with pytest.raises(InputError, match="data: argument 0 contains NaN or infinite"):
        JointDensity(model, IndexedData(6, lambda indices: ({"x": x[indices] / 0}, 2.0, "rows")))


def test_masked_steps_by_handler_give_the_same() -> None:
    def model(x: Tensor, packed: Any, lengths: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = torch.zeros(len(x))
            for t in range(x.shape[1]):
                with poutine.mask(mask=t < lengths):
                    z = pyro.sample(f"z_{t}", dist.Normal(0.9 * z, 1.0))
                    pyro.sample(f"x_{t}", dist.Normal(z, 1.0).expand_by([]), obs=x[:, t, 0])

    z = torch.randn(2, 6, 8)
    short, long = JointDensity(model, padded(5)), JointDensity(model, padded(8))
    torch.testing.assert_close(short(z[..., :5]), long(z))
