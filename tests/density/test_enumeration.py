"""Discrete latents are summed out exactly: log p(x, z) equals sums over states made by hand."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import config_enumerate
from pyro.ops.indexing import Vindex
from torch import Tensor
from torch.nn.functional import logsigmoid

from pyrogaps import IndexedData, InputError, JointDensity
from pyrogaps.capture import GradientEvaluator
from pyrogaps.density.simulate import simulate
from tests.discrete_pairs import MOVE, STEPS, ragged_chain

pytestmark = pytest.mark.usefixtures("double")

N = 5
WEIGHTS, MEANS = (0.2, 0.5, 0.3), (-1.0, 0.5, 3.0)


def normal(mean: Any, scale: float, value: Tensor) -> Tensor:
    return dist.Normal(torch.as_tensor(mean), scale).log_prob(value)


def agree(joint: JointDensity, z: Tensor, expected: Tensor) -> None:
    """log p(x, z) is `expected`, at all datapoints, at some of them in another order, and when it is recorded."""
    torch.testing.assert_close(joint(z), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(sum(joint.terms(z)), expected, rtol=1e-9, atol=1e-9)
    everyone = torch.arange(joint.num_datapoints)
    recorded = GradientEvaluator(joint)
    orders = [everyone] if joint.plate is None else [everyone, everyone.flip(0), everyone[[1, 1, 0]]]
    for rows in orders:
        point = z[:, rows].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(joint(point, rows).sum(), point)
        bound = recorded.bind(rows, len(z))
        values, gradients = bound(z[:, rows])
        torch.testing.assert_close(values[0], expected[:, rows], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(gradients[0], gradient, rtol=1e-9, atol=1e-9)
        moved = z[:, rows] + 0.3  # values of the record elsewhere
        torch.testing.assert_close(bound.values(moved)[0], joint(moved, rows), rtol=1e-9, atol=1e-9)
    assert recorded.mode == "captured"


# Mixtures.


def mixture(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        k = pyro.sample("k", dist.Categorical(torch.tensor(WEIGHTS)))
        pyro.sample("x", dist.Normal(torch.tensor(MEANS)[k] + z, 0.5), obs=x)


def by_hand(x: Tensor, z: Tensor) -> Tensor:
    states = [math.log(w) + normal(m + z[..., 0], 0.5, x) for w, m in zip(WEIGHTS, MEANS, strict=True)]
    return torch.stack(states).logsumexp(0) + normal(0.0, 1.0, z[..., 0])


@pytest.mark.parametrize(
    "annotate",
    [lambda model: model, config_enumerate, lambda model: config_enumerate(model, "parallel", expand=True)],
    ids=["plain", "sequential", "parallel"],
)
def test_mixture(annotate: Callable[..., Any]) -> None:
    x, z = torch.randn(N), torch.randn(4, N, 1)
    joint = JointDensity(annotate(mixture), x)
    assert joint.dim == 1
    assert list(joint.enumerated) == ["k"]
    assert joint.enumerated["k"].cardinality == 3
    assert joint.enumerated["k"].shape == ()
    agree(joint, z, by_hand(x, z))
    torch.testing.assert_close(joint.terms(z)[0], normal(0.0, 1.0, z[..., 0]))


def test_mixture_whose_component_shapes_the_latent() -> None:
    """p(z) is the mixture itself, and its draws follow it."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.tensor(WEIGHTS)))
            z = pyro.sample("z", dist.Normal(torch.tensor(MEANS)[k], 0.3))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x, z = torch.randn(N), torch.randn(4, N, 1)
    joint = JointDensity(model, x)
    prior = torch.stack(
        [math.log(w) + normal(m, 0.3, z[..., 0]) for w, m in zip(WEIGHTS, MEANS, strict=True)]
    ).logsumexp(0)
    agree(joint, z, prior + normal(z[..., 0], 1.0, x))
    torch.testing.assert_close(joint.terms(z)[0], prior)
    draws = joint.sample_prior(20_000)
    variance = sum(w * (m**2 + 0.09) for w, m in zip(WEIGHTS, MEANS, strict=True))
    mean = sum(w * m for w, m in zip(WEIGHTS, MEANS, strict=True))
    error = math.sqrt((variance - mean**2) / draws.numel())
    assert abs(float(draws.mean()) - mean) < 4 * error


def test_far_components_do_not_underflow() -> None:
    """Factors of one state that differ by more than an exponent's range: log p stays finite, in single precision."""
    torch.set_default_dtype(torch.float32)

    def model(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            k = pyro.sample("k", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(k, 0.01), obs=x)
            pyro.sample("y", dist.Normal(z - k, 0.01), obs=y)

    x, y = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    z = torch.zeros(1, 2, 1)
    states = [math.log(0.5) + normal(k, 0.01, x) + normal(z[..., 0] - k, 0.01, y) for k in (0.0, 1.0)]
    expected = torch.stack(states).logsumexp(0) + normal(0.0, 1.0, z[..., 0])
    assert (expected < -4000).all()
    torch.testing.assert_close(JointDensity(model, (x, y))(z), expected, rtol=1e-5, atol=1e-5)


def test_component_that_selects_among_latents() -> None:
    """A mixture that selects other sites: y chooses which of three latents is seen."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            k = pyro.sample("k", dist.Categorical(torch.tensor(WEIGHTS)))
            pyro.sample("x", dist.Normal(Vindex(z)[..., k], 0.5), obs=x)

    x, z = torch.randn(N), torch.randn(4, N, 3)
    states = [math.log(w) + normal(z[..., k], 0.5, x) for k, w in enumerate(WEIGHTS)]
    agree(JointDensity(model, x), z, torch.stack(states).logsumexp(0) + normal(0.0, 1.0, z).sum(-1))


def test_several_sites_and_supports() -> None:
    """Bernoulli, Binomial, one-hot and an event of Bernoulli variables, linked by one likelihood."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            a = pyro.sample("a", dist.Bernoulli(logits=z))
            b = pyro.sample("b", dist.Binomial(2, 0.3 + 0.4 * a))
            c = pyro.sample("c", dist.OneHotCategorical(torch.tensor([0.1, 0.6, 0.3])))
            d = pyro.sample("d", dist.Bernoulli(torch.tensor([0.2, 0.9])).to_event(1))
            mean = z + a + b * (c * torch.arange(3.0)).sum(-1) + (d * torch.tensor([0.3, 2.0])).sum(-1)
            pyro.sample("x", dist.Normal(mean, 0.5), obs=x)

    x, z = torch.randn(N), torch.randn(4, N, 1)
    u, states = z[..., 0], []
    for a, b, c, d, e in itertools.product((0, 1), (0, 1, 2), (0, 1, 2), (0, 1), (0, 1)):
        prior = logsigmoid(u if a else -u) + dist.Binomial(2, torch.tensor(0.3 + 0.4 * a)).log_prob(torch.tensor(b))
        prior = prior + math.log((0.1, 0.6, 0.3)[c] * (0.8, 0.2)[d] * (0.1, 0.9)[e])
        states.append(prior + normal(u + a + b * c + 0.3 * d + 2.0 * e, 0.5, x))
    joint = JointDensity(model, x)
    agree(joint, z, torch.stack(states).logsumexp(0) + normal(0.0, 1.0, u))
    assert {name: site.cardinality for name, site in joint.enumerated.items()} == {"a": 2, "b": 3, "c": 3, "d": 4}
    assert joint.enumerated["d"].event_shape == (2,)


# Chains.


def forward(y: Tensor, lengths: Tensor, z: Tensor) -> Tensor:
    """log p(y, z) `(S, N)` by the forward algorithm."""
    a = z[..., 0]
    messages = MOVE[0].log() + normal(STEPS + a[..., None], 1.0, y[:, :1])
    for t in range(1, y.shape[1]):
        step = (messages[..., None] + MOVE.log()).logsumexp(-2) + normal(STEPS + a[..., None], 1.0, y[:, t, None])
        messages = torch.where((t < lengths)[:, None], step, messages)
    return messages.logsumexp(-1) + normal(0.0, 1.0, a)


def test_ragged_chain_by_the_forward_algorithm() -> None:
    """Masked steps count as one state: a plain sum over them would add log 2 for each."""
    y, lengths, z = torch.randn(N, 4), torch.tensor([4, 3, 2, 4, 1]), torch.randn(3, N, 1)
    agree(JointDensity(ragged_chain, (y, lengths)), z, forward(y, lengths, z))


def test_long_chain() -> None:
    """60 steps of 2 states: 2^60 joint states, and no more than 2 x 2 at a time."""
    y, lengths, z = torch.randn(3, 60), torch.tensor([60, 31, 2]), torch.randn(2, 3, 1)
    joint = JointDensity(ragged_chain, (y, lengths))
    torch.testing.assert_close(joint(z), forward(y, lengths, z), rtol=1e-9, atol=1e-9)


def test_chain_with_impossible_moves_has_finite_gradients() -> None:
    """Left to right: some states cannot be reached, and their logarithms are -infinity."""
    move = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5], [0.0, 0.0, 1.0]])

    def model(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            a, k = pyro.sample("z", dist.Normal(0.0, 1.0)), torch.tensor(0)
            for t in pyro.markov(range(3)):
                logits = torch.where(move[k] > 0, move[k].clamp(min=1e-9).log(), -math.inf)
                k = pyro.sample(f"k{t}", dist.Categorical(logits=logits))
                pyro.sample(f"y{t}", dist.Normal(k + a, 0.5), obs=y[:, t])

    y, z = torch.randn(N, 3), torch.randn(3, N, 1)
    states = []
    for path in itertools.product(range(3), repeat=3):
        weight = math.prod(float(move[i, j]) for i, j in itertools.pairwise((0, *path)))
        if weight:
            emitted = sum(normal(k + z[..., 0], 0.5, y[:, t]) for t, k in enumerate(path))
            states.append(math.log(weight) + emitted)
    agree(JointDensity(model, y), z, torch.stack(states).logsumexp(0) + normal(0.0, 1.0, z[..., 0]))


def test_chain_of_second_order() -> None:
    def model(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            a = pyro.sample("z", dist.Normal(0.0, 1.0))
            before, last = torch.tensor(0.0), torch.tensor(1.0)
            for t in pyro.markov(range(4), history=2):
                k = pyro.sample(f"k{t}", dist.Bernoulli(0.2 + 0.5 * last - 0.1 * before))
                pyro.sample(f"y{t}", dist.Normal(k + a, 0.7), obs=y[:, t])
                before, last = last, k

    y, z = torch.randn(N, 4), torch.randn(3, N, 1)
    states = []
    for path in itertools.product((0, 1), repeat=4):
        total = torch.zeros(3, N)
        for t, (before, last, k) in enumerate(zip((0, 1, *path), (1, *path), path, strict=False)):
            p = 0.2 + 0.5 * last - 0.1 * before
            total = total + math.log(p if k else 1 - p) + normal(k + z[..., 0], 0.7, y[:, t])
        states.append(total)
    agree(JointDensity(model, y), z, torch.stack(states).logsumexp(0) + normal(0.0, 1.0, z[..., 0]))


def test_chain_that_looks_back_further_than_it_says() -> None:
    def model(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            a = pyro.sample("z", dist.Normal(0.0, 1.0))
            past = [torch.tensor(0.0), torch.tensor(1.0)]
            for t in pyro.markov(range(4)):
                past.append(pyro.sample(f"k{t}", dist.Bernoulli(0.2 + 0.5 * past[-1] - 0.1 * past[-2])))
                pyro.sample(f"y{t}", dist.Normal(past[-1] + a, 0.7), obs=y[:, t])

    with pytest.raises(InputError, match="history="):
        JointDensity(model, torch.randn(N, 4))


# Plates inside the data plate, and masks.


def test_nested_plate() -> None:
    """Elements of an inner plate have a component each; the whole has one of its own."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            c = pyro.sample("c", dist.Bernoulli(0.3))
            with pyro.plate("parts", 3, dim=-1):
                k = pyro.sample("k", dist.Categorical(torch.tensor([[0.5, 0.2, 0.3], [0.1, 0.1, 0.8]])[c.long()]))
                pyro.sample("x", dist.Normal(torch.tensor(MEANS)[k] * (1 + c) + z, 0.5), obs=x)

    x, z = torch.randn(N, 3), torch.randn(4, N, 1)
    totals = []
    for c, weights in enumerate(([0.5, 0.2, 0.3], [0.1, 0.1, 0.8])):
        parts = [math.log(w) + normal(m * (1 + c) + z, 0.5, x) for w, m in zip(weights, MEANS, strict=True)]
        totals.append(math.log((0.7, 0.3)[c]) + torch.stack(parts).logsumexp(0).sum(-1))
    joint = JointDensity(model, x, plate="data")
    assert joint.enumerated["k"].shape == (3,)
    agree(joint, z, torch.stack(totals).logsumexp(0) + normal(0.0, 1.0, z[..., 0]))


KEEP = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 0, 1], [0, 0, 0]]).bool()


@pytest.mark.parametrize("inside", [False, True], ids=["handler", "distribution"])
def test_masked_elements_of_a_nested_plate(inside: bool) -> None:
    def model(x: Tensor, keep: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("parts", 3, dim=-1), pyro.poutine.mask(mask=True if inside else keep):
                fn, seen = dist.Categorical(torch.tensor(WEIGHTS)), keep if inside else True
                k = pyro.sample("k", fn.expand(keep.shape).mask(seen))
                pyro.sample("x", dist.Normal(torch.tensor(MEANS)[k] + z, 0.5).mask(seen), obs=x)

    x, z = torch.randn(N, 3), torch.randn(4, N, 1)
    parts = [math.log(w) + normal(m + z, 0.5, x) for w, m in zip(WEIGHTS, MEANS, strict=True)]
    expected = (torch.stack(parts).logsumexp(0) * KEEP).sum(-1) + normal(0.0, 1.0, z[..., 0])
    agree(JointDensity(model, (x, KEEP), plate="data"), z, expected)


def test_masked_part_of_an_event() -> None:
    """What is masked has its own probabilities, because x depends on it."""

    def model(x: Tensor, keep: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            k = pyro.sample("k", dist.Bernoulli(torch.full((len(x), 3), 0.3)).mask(keep).to_event(1))
            pyro.sample("x", dist.Normal(k.sum(-1) + z, 0.5), obs=x)

    x, z = torch.randn(N), torch.randn(4, N, 1)
    states = []
    for k in itertools.product((0, 1), repeat=3):
        prior = torch.tensor([0.3 if e else 0.7 for e in k]).log().sum()
        states.append(prior + normal(sum(k) + z[..., 0], 0.5, x))
    agree(JointDensity(model, (x, KEEP)), z, torch.stack(states).logsumexp(0) + normal(0.0, 1.0, z[..., 0]))


def test_masked_states_that_later_states_depend_on() -> None:
    """An animal is alive when it is first caught, although no state before counts."""
    start = torch.tensor([0, 1, 2, 0, 1])

    def model(x: Tensor, start: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            alive = torch.ones(len(x))
            for t in pyro.markov(range(4)):
                with pyro.poutine.mask(mask=t > start):
                    alive = pyro.sample(f"alive{t}", dist.Bernoulli(torch.where(t > start, 0.8 * alive, 1.0)))
                    pyro.sample(f"x{t}", dist.Normal(alive + z, 0.5), obs=x[:, t])

    x, z = torch.randn(N, 4), torch.randn(3, N, 1)
    expected = normal(0.0, 1.0, z[..., 0])
    for n in range(N):
        paths = []
        for last in range(int(start[n]), 4):  # the last step at which it lives
            prior = (last - int(start[n])) * math.log(0.8) + (math.log(0.2) if last < 3 else 0.0)
            seen = [normal(float(t <= last) + z[:, n, 0], 0.5, x[n, t]) for t in range(int(start[n]) + 1, 4)]
            paths.append(prior + sum(seen))
        expected[:, n] += torch.stack(paths).logsumexp(0)
    agree(JointDensity(model, (x, start)), z, expected)


def test_classes_known_for_some() -> None:
    """Semi-supervised: unlabelled datapoints are summed over classes, labelled ones have theirs."""
    means = torch.tensor([[0.0, 1.0], [2.0, -1.0], [0.5, 0.5]])
    labels = torch.tensor([0, 2, 1, 0, 2])
    known = torch.tensor([True, False, True, False, False])

    def model(x: Tensor, y: Tensor, known: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            k = pyro.sample("y", dist.Categorical(torch.tensor(WEIGHTS)), obs=y, obs_mask=known)
            pyro.sample("x", dist.Normal(means[k] + z, 0.5).to_event(1), obs=x)

    x, z = torch.randn(N, 2), torch.randn(4, N, 2)
    states = torch.stack([math.log(w) + normal(means[k] + z, 0.5, x).sum(-1) for k, w in enumerate(WEIGHTS)])
    chosen = states.gather(0, labels.expand(1, 4, N))[0]
    expected = torch.where(known, chosen, states.logsumexp(0)) + normal(0.0, 1.0, z).sum(-1)
    agree(JointDensity(model, (x, labels, known)), z, expected)


def test_small_topic_model_by_brute_force() -> None:
    """Latent Dirichlet allocation given its topics: one topic for every word, topic shares for every document."""
    topics = torch.tensor([[0.5, 0.3, 0.1, 0.1], [0.1, 0.1, 0.2, 0.6]])
    words = torch.tensor([[0, 1, 3], [2, 2, 3], [0, 0, 0]])

    def model(words: Tensor) -> None:
        with pyro.plate("documents", len(words), dim=-1):
            shares = pyro.sample("shares", dist.Dirichlet(torch.tensor([0.7, 1.3])))
            with pyro.plate("words", words.shape[1], dim=-2):
                topic = pyro.sample("topic", dist.Categorical(shares))
                pyro.sample("word", dist.Categorical(topics[topic]), obs=words.T)

    joint = JointDensity(model, words, plate="documents")
    z = torch.randn(4, 3, 1)
    shares = joint.constrain(z)["shares"]
    jacobian = torch.distributions.biject_to(dist.constraints.simplex).log_abs_det_jacobian(z, shares)
    prior = dist.Dirichlet(torch.tensor([0.7, 1.3])).log_prob(shares) + jacobian
    states = []
    for path in itertools.product((0, 1), repeat=3):
        states.append(sum((shares[..., k] * topics[k][words[:, t]]).log() for t, k in enumerate(path)))
    agree(joint, z, prior + torch.stack(states).logsumexp(0))


# Forms of plates and data.


def test_subsampled_data_plate() -> None:
    x, z = torch.randn(40), torch.randn(3, 40, 1)

    def model(x: Tensor) -> None:
        with pyro.plate("data", 40, subsample_size=10, subsample=None) as rows:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            k = pyro.sample("k", dist.Categorical(torch.tensor(WEIGHTS)))
            pyro.sample("x", dist.Normal(torch.tensor(MEANS)[k] + z, 0.5), obs=x[rows] if len(x) == 40 else x)

    def minibatch(x: Tensor) -> None:
        with pyro.plate("data", 40, subsample=torch.arange(len(x))):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            k = pyro.sample("k", dist.Categorical(torch.tensor(WEIGHTS)))
            pyro.sample("x", dist.Normal(torch.tensor(MEANS)[k] + z, 0.5), obs=x)

    torch.testing.assert_close(JointDensity(minibatch, x)(z), by_hand(x, z))


def test_indexed_data() -> None:
    x, z = torch.randn(N), torch.randn(3, N, 1)
    agree(JointDensity(mixture, IndexedData(N, lambda rows: (x[rows],))), z, by_hand(x, z))


@pytest.mark.parametrize("vectorized", [True, False], ids=["together", "one by one"])
def test_whole_data_set_as_one_datapoint(vectorized: bool) -> None:
    """Shared discrete and continuous latents beside local ones, all of one datapoint."""

    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        c = pyro.sample("c", dist.Bernoulli(0.3))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.tensor(WEIGHTS)))
            mean = torch.tensor(MEANS)[k] * (1 + c)
            mean = mean + (z if vectorized else z.reshape(()))
            pyro.sample("x", dist.Normal(mean, 0.5), obs=x)

    x, z = torch.randn(N), torch.randn(4, 1, 1)
    totals = []
    for c in (0, 1):
        parts = [math.log(w) + normal(m * (1 + c) + z[..., 0], 0.5, x) for w, m in zip(WEIGHTS, MEANS, strict=True)]
        totals.append(math.log((0.7, 0.3)[c]) + torch.stack(parts).logsumexp(0).sum(-1))
    joint = JointDensity(model, x, plate=False)
    assert joint.structure.vectorized == vectorized
    agree(joint, z, (torch.stack(totals).logsumexp(0) + normal(0.0, 1.0, z[..., 0, 0]))[:, None])


def test_elements_outside_any_plate() -> None:
    """Independent elements of a batch shape without a plate are summed one by one."""

    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        k = pyro.sample("k", dist.Bernoulli(torch.tensor([0.1, 0.5, 0.8])))
        pyro.sample("x", dist.Normal(k + z, 0.5), obs=x)

    x, z = torch.randn(3), torch.randn(4, 1, 1)
    p = torch.tensor([0.1, 0.5, 0.8])
    parts = [(p if k else 1 - p).log() + normal(k + z[..., 0], 0.5, x) for k in (0, 1)]
    expected = torch.stack(parts).logsumexp(0).sum(-1) + normal(0.0, 1.0, z[:, 0, 0])
    agree(JointDensity(model, x), z, expected[:, None])


# Draws.


def test_simulated_data_follow_the_mixture() -> None:
    """Discrete latents are drawn, and drawing gives the score that scoring again does."""
    joint = JointDensity(mixture, torch.randn(4000))
    data, z = simulate(joint)
    assert z.shape == (4000, 1)
    mean = sum(w * m for w, m in zip(WEIGHTS, MEANS, strict=True))
    variance = sum(w * m**2 for w, m in zip(WEIGHTS, MEANS, strict=True)) - mean**2 + 0.25
    assert abs(float((data - z[:, 0]).mean()) - mean) < 4 * math.sqrt(variance / 4000)
    assert abs(float((data - z[:, 0]).var() / variance) - 1) < 4 * math.sqrt(2 / 4000)


def test_simulated_chain_and_whole_data_set() -> None:
    y, lengths = torch.randn(N, 4), torch.tensor([4, 3, 2, 4, 1])
    (data, _), z = simulate(JointDensity(ragged_chain, (y, lengths)))
    assert data.shape == (N, 4)
    assert z.shape == (N, 1)

    def whole(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.tensor(WEIGHTS)))
            pyro.sample("x", dist.Normal(torch.tensor(MEANS)[k] + z, 0.5), obs=x)

    data, z = simulate(JointDensity(whole, torch.randn(N), plate=False))
    assert data.shape == (N,)
    assert z.shape == (1, 1)


# Refusals.


def refused(model: Callable[..., Any], data: Any, *words: str, plate: Any = None) -> None:
    with pytest.raises(InputError) as caught:
        JointDensity(model, data, plate)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def with_latent(fn: Any, use: Callable[[Tensor], Tensor]) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", fn)
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + use(k), 1.0), obs=x)

    return model


def test_infinitely_many_values() -> None:
    for fn in (dist.Poisson(torch.tensor(3.0)), dist.Geometric(torch.tensor(0.5))):
        refused(with_latent(fn, lambda k: k), torch.randn(N), "site 'k'", type(fn).__name__, "Truncate")


def test_too_large_an_event() -> None:
    fn = dist.Bernoulli(torch.full((40,), 0.5)).to_event(1)
    refused(with_latent(fn, lambda k: k.sum(-1)), torch.randn(N), "site 'k'", "2^40", "plate")


def test_too_many_joint_states() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            total = z
            for t in range(12):
                total = total + pyro.sample(f"k{t}", dist.Categorical(torch.ones(8)))
            pyro.sample("x", dist.Normal(total, 1.0), obs=x)

    refused(model, torch.randn(N), "site 'k0'", "joint states", "GB")


def test_values_that_are_read_across_elements() -> None:
    """Under enumeration a sum over a plate's elements is another value: found by running single states."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("parts", 3, dim=-2):
                k = pyro.sample("k", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(z + k.sum(-2), 1.0), obs=x)

    refused(model, torch.randn(N), "enumerated", plate="data")


def test_support_that_depends_on_a_discrete_latent() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.3))
            z = pyro.sample("z", dist.Uniform(0.0, 1.0 + k))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    refused(model, torch.randn(N), "site 'z'", "support")


def test_discrete_latent_outside_the_data_plate() -> None:
    def model(x: Tensor) -> None:
        c = pyro.sample("c", dist.Bernoulli(0.3))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + c, 1.0), obs=x)

    x = torch.randn(N)
    refused(model, x, "site 'c'", "plate=False", plate="data")
    assert list(JointDensity(model, x, plate=False).enumerated) == ["c"]
