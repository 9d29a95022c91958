"""Models learned with guides of every lookahead, all data sets at once, and what their controllers cost."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.control.bound import Moments, evidence, gap, true_moments
from benchmarks.control.climb import maximise
from benchmarks.control.settings import COST, MIN_EMISSION_SCALE, STEPS, Setting
from pyrogaps.models.controlled import ControlledLinear
from pyrogaps.models.lqg import LinearSystem, best_controller, expected_cost, regret

LOOKAHEADS = (0, 1, 3, math.inf)


@dataclass(frozen=True)
class Row:
    """A model, its data set ("infinite": as many trajectories as there could be) and its controller; nats a trajectory.

    `regret` is relative to the least cost there can be; `model_loss` is the KL divergence of the model from the truth;
    `gap` is the conditioning gap of the guide under its own model, `gap_at_truth` that under the true one; `slope` is
    the largest derivative of the bound where the search ended.
    """

    setting: str
    data_set: str
    lookahead: float
    least_cost: float
    regret: float
    model_loss: float
    bound: float
    gap: float
    gap_at_truth: float
    emission_scale: float
    slope: float


def rows(setting: Setting, num_sets: int, num_steps: int, seed: int) -> list[Row]:
    """Four models for every data set, and for the limit of infinitely many data where there is one true system."""
    truths = setting.truths(num_sets, seed)
    exact = torch.stack([true_moments(truth, STEPS) for truth in truths])
    second = torch.stack([data_moments(truth, setting, seed + n) for n, truth in enumerate(truths)])
    names = [str(n) for n in range(num_sets)]
    if not setting.random:
        truths, names = [*truths, truths[0]], [*names, "infinite"]
        exact, second = (torch.cat([part, exact[:1]]) for part in (exact, second))
    found = []
    for lookahead, (model, bound, slope) in learned(second, setting.latent_dim, num_steps).items():
        for n, (name, truth) in enumerate(zip(names, truths, strict=True)):
            one, limit = model.system(n), Moments(exact[n], STEPS, 1, 1)
            system = LinearSystem.of(truth)
            least = expected_cost(system, best_controller(system, COST), COST)
            found.append(
                Row(
                    setting.name,
                    name,
                    lookahead,
                    least,
                    regret(system, LinearSystem.of(one), COST) / least,
                    float(evidence(truth, limit) - evidence(one, limit)),
                    float(bound[n]),
                    float(one.conditioning_gap(STEPS, lookahead)),
                    float(truth.conditioning_gap(STEPS, lookahead)),
                    float(one.emission_scale),
                    float(slope[n]),
                )
            )
    return found


def data_moments(truth: ControlledLinear, setting: Setting, seed: int) -> Tensor:
    """Second moments of a data set whose actions are standard Normal, `(n, n)`."""
    x, u = data_set(truth, setting, seed)
    return Moments.of(x, u).second


def data_set(truth: ControlledLinear, setting: Setting, seed: int) -> tuple[Tensor, Tensor]:
    """Trajectories of the truth under random actions, `(N, T, 1)` each."""
    generator = torch.Generator().manual_seed(1000 + seed)
    u = torch.randn(setting.num_trajectories, STEPS, 1, generator=generator, dtype=torch.float64)
    x, _ = truth.simulate(u, seed=2000 + seed)
    return x, u


def learned(second: Tensor, latent_dim: int, num_steps: int) -> dict[float, tuple[ControlledLinear, Tensor, Tensor]]:
    """The models of all data sets with moments `second` `(B, n, n)`, their bounds and slopes `(B,)`, by lookahead.

    The smoothers' models are learned first, and the others start from them, so that each ends at a higher bound of its
    own than the smoother's model has.
    """
    moments = Moments(second, STEPS, 1, 1)
    smoothed = start(moments, latent_dim)
    best = smoothed, *maximise(smoothed, lambda: evidence(smoothed, moments), num_steps)
    shorter = LOOKAHEADS[:-1]
    repeated = Moments(second.repeat(len(shorter), 1, 1), STEPS, 1, 1)
    left = torch.cat([moments.left(lookahead) for lookahead in shorter], 1)
    others = ControlledLinear(
        *(
            value.detach().repeat(len(shorter), *[1] * (value.dim() - 1))
            for value in (
                smoothed.A,
                smoothed.B,
                smoothed.C,
                smoothed.transition_scale,
                smoothed.emission_scale.clamp(min=1.01 * MIN_EMISSION_SCALE),
                smoothed.initial_scale,
            )
        ),
        learn=True,
        min_emission_scale=MIN_EMISSION_SCALE,
    )
    bound, slope = maximise(others, lambda: evidence(others, repeated) - gap(others, repeated, left), num_steps)
    found = {}
    for k, lookahead in enumerate(shorter):
        rows = slice(k * len(second), (k + 1) * len(second))
        part = others.system(rows)
        found[lookahead] = part, bound[rows], slope[rows]
    return {**found, math.inf: best}


def start(moments: Moments, latent_dim: int) -> ControlledLinear:
    """A chain that forgets slowly, reaches and shows a little of everything, and has the outputs' scale."""
    number = len(moments.second)
    variances = moments.second.diagonal(dim1=-2, dim2=-1)[:, : moments.steps]
    scale = variances.mean(1, keepdim=True).sqrt()
    spread = torch.linspace(1.0, 0.5, latent_dim, dtype=torch.float64)
    A = torch.diag(0.9 * spread ** (1 / 3)) + 0.1 * torch.ones(latent_dim, latent_dim).double().triu(1)
    return ControlledLinear(
        A.expand(number, -1, -1),
        0.3 * spread[:, None].expand(number, -1, 1),
        scale[..., None] * spread,
        0.3,
        0.5 * scale,
        learn=True,
        min_emission_scale=MIN_EMISSION_SCALE,
    )
