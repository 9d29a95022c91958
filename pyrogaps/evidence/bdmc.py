"""`bdmc`: log p(x) between two bounds, on data simulated from the model."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from pyrogaps.density import Data, GuideDensity
from pyrogaps.density.draws import Posterior
from pyrogaps.density.runs import Program
from pyrogaps.density.simulate import ToData
from pyrogaps.errors import InputError
from pyrogaps.evidence.ais import AIS, Initial
from pyrogaps.evidence.protocol import Evidence, Measured, Measurement
from pyrogaps.evidence.simulated_bounds import SimulatedBounds
from pyrogaps.guard import guarded
from pyrogaps.log_weights import Estimate, log_mean_exp_estimate
from pyrogaps.problem import Problem, Simulated
from pyrogaps.refine import Refinement, Refiner, is_family, own_family
from pyrogaps.run import Run
from pyrogaps.settings import Count, Plate, Seed, checked
from pyrogaps.streams import Chunk


@dataclass(frozen=True, repr=False)
class Sandwich(SimulatedBounds):
    """The result of `bdmc`: the evidence that gave `forward` is certified within its `width`.

    `data` are the simulated data, `z` `(N, dim)` their exact posterior draws. `reverse` has no error per datapoint: its
    chains share their start, so that their spread understates it.
    """

    forward: Estimate
    reverse: Estimate
    data: Any
    z: Tensor


@guarded
@checked()
def bdmc(
    model: Program | Problem,
    data: Data | None = None,
    *,
    guide_or_family: Any = AutoNormal,
    settings: Evidence | None = None,
    initial: Initial | None = None,
    refinement: Refinement | None = None,
    to_data: ToData | None = None,
    plate: Plate = None,
    batch_size: Count = 64,
    seed: Seed = 0,
    progress: bool = True,
) -> Sandwich:
    """Bidirectional Monte Carlo: bound log p(x) from both sides on data simulated from the model.

    The latent behind a simulated datapoint is an exact posterior draw; AIS run in reverse from it gives
    E[1/w] = 1/p(x), so -log-mean-exp(-log w) is an upper bound in expectation. Every reverse chain of a datapoint
    starts at that one draw.

    Args:
        model, plate: as for `JointDensity`; or a `Problem`, whose guide, where it has one, anchors the paths.
        data: what to simulate in the shape of.
        guide_or_family: what anchors the paths, refined on the simulated data; not used from the prior. The width
            holds only for the anchor it was measured with: to certify an evidence, give the guide it was measured with.
        settings: the evidence to certify, such as `Ladder()`; by default `AIS()`. Upper bounds are by AIS in reverse,
            with the same settings where it is an AIS.
        initial, refinement, batch_size, seed, progress: as for `ais`; `initial` is for an AIS alone.
        to_data: from drawn values by observed site to the model's arguments, where that is not plain.

    Raises:
        InputError: where the model cannot be simulated (see `Problem.simulated`), and for `initial` beside an evidence
            that is no AIS.

    Source: Grosse, Ghahramani and Adams (2015), arXiv:1511.02543.

    Example:
        >>> import torch, pyrogaps as pg
        >>> from pyrogaps.guides.amortized import AmortizedNormal
        >>> from pyrogaps.models.linear_gaussian import LinearGaussian
        >>> model, guide, x = LinearGaussian.random(4, 2), AmortizedNormal(4, 2, (8,)), torch.randn(6, 4)
        >>> short = pg.AIS(num_chains=8, num_temperatures=20)
        >>> sandwich = pg.bdmc(model, x, guide_or_family=guide, settings=short)
        >>> bool(abs(sandwich.width) < 0.5)
        True
    """
    evidence = settings or AIS()
    if initial is not None:
        if not isinstance(evidence, AIS):
            raise InputError(f"initial: it is for AIS, and settings is a {type(evidence).__name__}. Leave it out")
        evidence = replace(evidence, initial=initial)
    unused = (isinstance(evidence, AIS) and evidence.initial == "prior") or is_family(guide_or_family)
    guide = None if is_family(guide_or_family) else guide_or_family
    given = (Problem.without_guide if unused else Problem.of)(model, guide, data, plate)
    if not given.dim:
        raise InputError(
            "bdmc: all latents are discrete and summed out, so log p(x) is exact and needs no bounds. Use log_evidence"
        )
    simulated = given.simulated(seed, to_data)
    problem, refiner = simulated.problem, None
    if isinstance(evidence, AIS) and evidence.initial != "prior" and problem.posterior is None:
        evidence = replace(evidence, initial="refined")  # a family has nothing but its refined guides
        refiner = Refiner(guide_or_family, refinement or Refinement())
    elif isinstance(problem.posterior, GuideDensity):
        refiner = Refiner(own_family(problem.posterior), refinement or Refinement())
    run = Run(seed, batch_size, progress)
    lower, upper = two_sided(simulated, evidence.prepare(problem, run, refiner), refiner, run)
    return Sandwich(lower.value, upper.value, lower, upper, simulated.data, simulated.z)


def two_sided(
    simulated: Simulated, measurement: Measurement, refiner: Refiner | None, run: Run
) -> tuple[Estimate, Estimate]:
    """log p(x) of simulated data by a measurement, and its upper bound by the `reverse` of its evidence, from the
    latents behind them.
    """
    problem, z, reverse = simulated.problem, simulated.z, measurement.evidence.reverse or AIS()
    below, above = measurement.over(problem, run), reverse.prepare(problem, run)
    needed = measurement.evidence.needs_refined or reverse.needs_refined

    def measure(chunk: Chunk, run: Run) -> tuple[Measured, Tensor]:
        refined: Posterior | None = None
        if needed and refiner is not None:
            refined, _ = refiner.fit(problem, chunk, run)
        exact = z[chunk.start : chunk.stop]
        measured, negative_log_weights = below.two_sided(chunk, refined, exact, above)
        return measured, negative_log_weights.cpu()

    parts = run.map_shown(measure, problem.joint, "log p(x) from both sides")
    inverse = log_mean_exp_estimate(torch.cat([part for _, part in parts], -1))
    unknown = torch.full_like(inverse.mcse, torch.nan)
    upper = replace(inverse, value=-inverse.value, mcse=unknown, direction="upper bound", log_weights=None)
    return measurement.estimate([measured for measured, _ in parts]), upper
