"""State-space models with actions: densities against dense algebra, gaps against guides, and what is refused."""

import math
from typing import Any

import pyro
import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

import pyrogaps as pg
from pyrogaps import InputError
from pyrogaps.guides.controlled import ControlledNormal, LinearStructuredNormal
from pyrogaps.models.controlled import ControlledDeep, ControlledLinear, actions_before

A, B, C = [[0.9, 0.4], [-0.3, 0.7]], [[0.2], [1.0]], [[1.0, -0.3]]


@pytest.fixture(autouse=True)
def double(clean_state: None) -> None:
    """`clean_state` restores the default dtype."""
    torch.set_default_dtype(torch.float64)


def linear() -> ControlledLinear:
    return ControlledLinear(A, B, C, [0.3, 0.6], 0.5, [1.2, 0.7])


def drawn(number: int = 6, steps: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    u = torch.randn(number, steps, 1, generator=torch.Generator().manual_seed(3))
    return *linear().simulate(u, seed=4), u


def dense(model: ControlledLinear, u: Tensor) -> tuple[Tensor, MultivariateNormal]:
    """Means `(N, T d)` of z and the Normal of x `(N, T D)`, written out by hand, state by state."""
    steps, d = u.shape[1], model.latent_dim
    mean, means, noise = torch.zeros(len(u), d), [], torch.zeros(steps * d, steps * d)
    for t in range(steps):
        mean = mean @ model.A.T + u[:, t - 1] @ model.B.T if t else mean
        means.append(mean)
        scale = model.transition_scale if t else model.initial_scale
        noise[t * d : (t + 1) * d, t * d : (t + 1) * d] = scale.square().diag()
    chain = torch.eye(steps * d) - torch.kron(torch.eye(steps).roll(1, 0).tril(-1), model.A)
    z, H = torch.linalg.inv(chain) @ noise @ torch.linalg.inv(chain).T, torch.kron(torch.eye(steps), model.C)
    means = torch.cat(means, 1)
    variance = model.emission_scale.square().repeat(steps).diag()
    return means, MultivariateNormal(means @ H.T, H @ z @ H.T + variance)


def test_evidence_and_response_are_those_of_the_joint_normal() -> None:
    model, (x, _, u) = linear(), drawn()
    means, evidence = dense(model, u)
    torch.testing.assert_close(model.response(u).flatten(1), means)
    torch.testing.assert_close(model.log_evidence(x, u), evidence.log_prob(x.flatten(1)))


def test_joint_density_by_hand() -> None:
    model, (x, z, u) = linear(), drawn()
    joint = pg.JointDensity(model, (x, u))
    before = z[:, :-1] @ model.A.T + u[:, :-1] @ model.B.T
    normal = torch.distributions.Normal
    expected = normal(0.0, model.initial_scale).log_prob(z[:, 0]).sum(-1)
    expected = expected + normal(before, model.transition_scale).log_prob(z[:, 1:]).sum((-2, -1))
    expected = expected + normal(z @ model.C.T, 0.5).log_prob(x).sum((-2, -1))
    torch.testing.assert_close(joint(z.flatten(1)[None])[0], expected)


def test_the_last_action_has_no_effect_and_the_others_do() -> None:
    model, (x, _, u) = linear(), drawn()
    before = model.log_evidence(x, u)
    for t in range(5):
        other = u.clone()
        other[:, t] += 1
        assert bool((model.log_evidence(x, other) == before).all()) == (t == 4)
    assert torch.equal(actions_before(u)[:, 1:], u[:, :-1]) and not actions_before(u)[:, 0].any()


def test_simulation_follows_the_actions_and_its_seed() -> None:
    model, number = linear(), 20000
    u = torch.tensor([1.0, -2.0, 0.5]).expand(number, 3)[..., None]
    x, z = model.simulate(u, seed=1)
    error = x.std(0) / number**0.5
    assert bool(((x.mean(0) - model.response(u)[0] @ model.C.T).abs() < 4 * error).all())
    assert torch.equal(model.simulate(u, seed=1)[1], z)
    assert not torch.equal(model.simulate(u, seed=2)[1], z)


@pytest.mark.parametrize("lookahead", [0, 1, 3, math.inf])
def test_gap_of_the_best_guide_is_the_closed_form(lookahead: float) -> None:
    """Actions that the guide is shown, as far as it is shown the data, change nothing of the gap without them."""
    model, number, steps = linear(), 500, 6
    guide = LinearStructuredNormal.best(model, steps, lookahead)
    x, _ = model.simulate(u := torch.randn(number, steps, 1), seed=7)
    gap = model.log_evidence(x, u) - pg.elbo(model, guide, (x, u), num_particles=20, progress=False).value
    exact = float(model.conditioning_gap(steps, lookahead))
    assert abs(float(gap.mean()) - exact) < 4 * float(gap.std()) / number**0.5 + 1e-9
    assert bool((guide.weight * (1 - guide.mask) == 0).all())
    if lookahead == math.inf:
        assert float(gap.abs().max()) < 1e-9


def test_many_systems_are_many_models() -> None:
    many = ControlledLinear(
        torch.stack([torch.tensor(A), 0.5 * torch.tensor(A)]),
        torch.tensor(B).expand(2, 2, 1),
        torch.tensor(C).expand(2, 1, 2),
        torch.tensor([[0.3, 0.6], [0.2, 0.1]]),
        0.5,
    )
    u = torch.randn(4, 5, 2, 1)
    x, z = many.simulate(u)
    whole = pg.JointDensity(many, (x, u))(z.flatten(1)[None])[0]
    parts = [
        pg.JointDensity(many.system(k), (x[:, :, k], u[:, :, k]))(z[:, :, k].flatten(1)[None])[0] for k in range(2)
    ]
    torch.testing.assert_close(whole, sum(parts))
    guide = LinearStructuredNormal(1, 1, 2, 5, 0, systems=(2,))
    assert guide(x, u).shape == (4, 5, 2, 2)
    with pytest.raises(InputError, match=r"holds \(2,\) systems\. Take one of them with system\(index\)\."):
        many.log_evidence(x, u)


@pytest.mark.parametrize("lookahead", [0, 1, 3, math.inf])
@pytest.mark.parametrize("kind", [LinearStructuredNormal, ControlledNormal])
def test_guides_see_no_further_than_they_say(kind: type, lookahead: float) -> None:
    """Factors up to step t stay as they are when later observations, and the actions that led there, change."""
    steps = 6
    guide = kind(1, 1, 2, steps if kind is LinearStructuredNormal else 8, lookahead)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x, _, u = drawn(1, steps)
    z = pyro.poutine.trace(guide).get_trace(x, u)

    def means(x: Tensor, u: Tensor) -> Tensor:
        trace = pyro.poutine.trace(pyro.poutine.replay(guide, trace=z)).get_trace(x, u)
        factors = [trace.nodes[f"z_{t + 1}"]["fn"] for t in range(steps)]
        return torch.stack([getattr(fn, "base_dist", fn).loc[0] for fn in factors])

    before = means(x, u)
    for s in range(steps):
        x_later, u_later = x.clone(), u.clone()
        x_later[:, s] += 1
        u_later[:, s] += 1
        sees_x = (means(x_later, u) != before).any(-1).nonzero().flatten().tolist()
        sees_u = (means(x, u_later) != before).any(-1).nonzero().flatten().tolist()
        first = 0 if lookahead == math.inf else max(0, s - int(lookahead))
        last = s if lookahead == math.inf else steps - 1
        assert sees_x == [*range(first, last + 1)]
        first = 0 if lookahead == math.inf else max(0, s + 1 - int(lookahead))
        last = min(s + 1, steps - 1) if lookahead == math.inf else steps - 1
        assert sees_u == ([] if s == steps - 1 else [*range(first, last + 1)])


@pytest.mark.usefixtures("brief_check")
def test_deep_model_trains_and_the_ledger_takes_the_pair() -> None:
    x, _, u = drawn(8, 4)
    model, guide = ControlledDeep(1, 1, 2, 8, 8), ControlledNormal(1, 1, 2, 8, lookahead=0)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    brief: dict[str, Any] = {"num_epochs": 1, "mode": "eager", "progress": False}
    pg.train(model, guide, (x, u), batch_size=4, **brief)
    assert not any(map(torch.equal, before, model.parameters()))
    assert model(x, u).shape == (8, 4, 2)
    ledger = pg.decompose(
        pg.Problem.of(model, guide, (x[:2], u[:2]), mode="eager"),
        reference=pg.reference_guide(model, guide, (x, u), **brief),
        evidence=pg.AIS(2, 2, num_leapfrog=2),
        refinement=pg.Refinement(num_steps=2, num_selection=4),
        num_particles=10,
        referee=False,
        progress=False,
    )
    assert "conditioning_gap" in ledger.per_datapoint


def with_nan(part: Tensor) -> Tensor:
    part = part.clone()
    part[2, 3] = math.nan
    return part


MISTAKES = [
    (lambda x, u: (x, u[:, :-1]), r"u has 4 steps, but x has 5\. Pass one action for each observation"),
    (lambda x, u: (x, u[:-1]), r"u has 5 sequences, but x has 6\."),
    (lambda x, u: (x, u.long()), r"u must be a floating-point tensor of actions, got torch\.int64\. Convert it with"),
    (lambda x, u: (x.bool(), u), r"x must be a floating-point tensor of observations, got torch\.bool\."),
    (lambda x, u: (x, u.tolist()), r"u must be a floating-point tensor of actions, got a list\."),
    (lambda x, u: (x, u[..., 0]), r"u must have shape \(N, T, 1\), got \(6, 5\)$"),
    (lambda x, u: (x, torch.cat([u, u], -1)), r"u must have shape \(N, T, 1\), got \(6, 5, 2\)$"),
    (lambda x, u: (torch.cat([x, x], -1), u), r"x must have shape \(N, T, 1\), got \(6, 5, 2\)$"),
    (lambda x, u: (x[:, :0], u[:, :0]), r"x of shape \(6, 0, 1\) has no time steps\. Leave out empty sequences\."),
    (lambda x, u: (x, with_nan(u)), r"u is NaN or infinite at sequence 2, step 3, counted from 0\. Leave out"),
    (lambda x, u: (with_nan(x), u), r"x is NaN or infinite at sequence 2, step 3, counted from 0\. Leave out"),
]


@pytest.mark.parametrize(("change", "message"), MISTAKES)
def test_bad_observations_and_actions_are_one_line(change: object, message: str) -> None:
    assert callable(change)
    x, _, u = drawn()
    for program in (
        linear(),
        linear().log_evidence,
        ControlledDeep(1, 1),
        LinearStructuredNormal(1, 1, 2, 5),
        ControlledNormal(1, 1),
    ):
        with pytest.raises(InputError, match=message) as caught:
            program(*change(x, u))
        assert "\n" not in str(caught.value)


def test_the_remedy_for_integers_works() -> None:
    x, _, u = drawn()
    actions = u.long()
    assert linear()(x, torch.as_tensor(actions, dtype=torch.get_default_dtype())).shape == (6, 5, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((A, [[0.2]], C), r"action must have shape \(2, 1\), got \(1, 1\)"),
        ((A, B, [[1.0]]), r"emission must have shape \(1, 2\), got \(1, 1\)"),
        (([[0.9, 0.4]], B, C), r"transition must have shape \(2, 2\), got \(1, 2\)"),
        ((torch.zeros(2), B, C), r"transition must be a matrix"),
        ((A, [[math.nan], [1.0]], C), r"action must be a matrix of finite numbers"),
        ((A, B, C, 0.0), r"transition_scale must be positive"),
        ((A, B, C, [1.0, 1.0, 1.0]), r"transition_scale must be one number or have shape \(2,\), got \(3,\)"),
    ],
)
def test_bad_matrices_are_named(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ControlledLinear(*arguments)  # type: ignore[arg-type]


def test_smallest_emission_scale() -> None:
    model = ControlledLinear(A, B, C, 0.3, 0.5, learn=True, min_emission_scale=0.1)
    torch.testing.assert_close(model.emission_scale, torch.tensor([0.5]))
    with torch.no_grad():
        model.log_v.fill_(-100)
    torch.testing.assert_close(model.emission_scale, torch.tensor([0.1]))
    with pytest.raises(InputError, match=r"emission_scale must be above its minimum, 0\.1"):
        ControlledLinear(A, B, C, 0.3, 0.1, min_emission_scale=0.1)


def test_bad_settings_are_named() -> None:
    with pytest.raises(InputError, match="steps must be at least 1, got 0"):
        LinearStructuredNormal(1, 1, 2, 0)
    with pytest.raises(InputError, match="lookahead must be 0"):
        LinearStructuredNormal(1, 1, 2, 5, -1)
    with pytest.raises(InputError, match="must be at least 1"):
        ControlledDeep(1, 0)
    x, _, u = drawn()
    with pytest.raises(InputError, match="x has 5 steps, but the guide is for 4"):
        LinearStructuredNormal(1, 1, 2, 4)(x, u)
