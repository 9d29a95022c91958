"""`log_evidence` and `ais`: log p(x) of every datapoint, by any evidence."""

from dataclasses import replace

from pyrogaps.density import Data, GuideDensity
from pyrogaps.density.draws import Posterior
from pyrogaps.density.runs import Program
from pyrogaps.evidence.ais import AIS, Initial
from pyrogaps.evidence.exact import prepared
from pyrogaps.evidence.ladder import Ladder
from pyrogaps.evidence.protocol import Evidence, Measured, checked_measured
from pyrogaps.evidence.referee import refereed
from pyrogaps.evidence.reliability import by_chance
from pyrogaps.guard import guarded
from pyrogaps.log_weights import Estimate
from pyrogaps.problem import Problem
from pyrogaps.refine import Refinement, Refiner, own_family
from pyrogaps.run import Run
from pyrogaps.settings import Count, Plate, Sample, Seed, checked
from pyrogaps.streams import Chunk


@guarded
@checked()
def log_evidence(
    model: Program | Problem,
    guide: Program | Posterior | None = None,
    data: Data | None = None,
    *,
    evidence: Evidence | None = None,
    refinement: Refinement | None = None,
    referee: Sample = 32,
    plate: Plate = None,
    batch_size: Count = 64,
    seed: Seed = 0,
    progress: bool = True,
) -> Estimate:
    r"""log p(x_n) of every datapoint.

    By default a `Ladder` of estimators is climbed, datapoint by datapoint, until one can be trusted: importance
    sampling from a Gaussian with the curvature of log p(x, z) about the guide; AIS from that Gaussian, as long as is
    needed. The guide is not refined. Each gives the log-mean-exp of weights with $\mathbb E[w] = p(x_n)$, a lower bound
    in expectation. Pilot draws decide on the estimator and on the number of draws; they are not used in the estimate.

    Args:
        model, guide, data, plate: as for `ais`, or a `Problem` alone. Without a guide (None) the Gaussian is fitted
            from the prior.
        evidence: how, `Ladder()` by default; or `AIS(...)`; or `Bridge(...)`, whose value is an estimate and no bound;
            or another `Evidence`.
        refinement: settings of the refinement, for an evidence that needs it.
        referee: how many datapoints are examined for modes that the estimator misses; False examines none. They are a
            random sample, or all if there are no more. Where an examined posterior has several modes, the ladder
            measures them all; and if any of the sample was measured too low without them, no datapoint outside the
            sample is `reliable`.
        batch_size: datapoints held at once; it does not change the result.
        seed: of all the randomness.
        progress: whether to show a progress bar once the call has taken two seconds.

    Returns:
        An `Estimate` in nats with `value` and `mcse` `(N,)`; of a ladder a `LadderEstimate`, with `method`,
        `num_draws` and `num_evaluations` `(N,)` besides.

    Raises:
        InputError: as `ais`.

    >>> import torch, pyrogaps as pg
    >>> from pyrogaps.guides.amortized import AmortizedNormal
    >>> from pyrogaps.models.vae import VAE
    >>> x = (torch.rand(3, 16) < 0.5).float()
    >>> pg.log_evidence(VAE(16, 2, [8]), AmortizedNormal(16, 2, [8]), x, evidence=pg.Ladder(tolerance=0.2)).value.shape
    torch.Size([3])
    """
    problem, run = Problem.of(model, guide, data, plate), Run(seed, batch_size, progress)
    return measured(problem, evidence or Ladder(), refinement, run, int(referee))


@guarded
@checked()
def ais(
    model: Program | Problem,
    guide: Program | Posterior | None = None,
    data: Data | None = None,
    *,
    settings: AIS | None = None,
    initial: Initial | None = None,
    refinement: Refinement | None = None,
    plate: Plate = None,
    batch_size: Count = 64,
    seed: Seed = 0,
    progress: bool = True,
) -> Estimate:
    r"""log p(x_n) of every datapoint by annealed importance sampling along

    $$\log f_b(z) = (1 - b) \log f_0(z) + b \log p(x_n, z), \quad 0 = b_0 < \dots < b_T = 1$$

    with one HMC transition per temperature. $\mathbb E[w] = p(x_n)$ exactly, whatever the step sizes and the number of
    temperatures, because they are set by a pilot run; the value, a log-mean-exp, is a lower bound in expectation.

    Args:
        model, guide, data, plate: as for `JointDensity` and `GuideDensity`, or a `Problem` alone; no guide is used with
            `initial="prior"`, and none is needed with `initial="curvature"`.
        settings: see `AIS`; `initial` overrides its field of that name.
        refinement: settings of the refinement that "refined" starts need.
        batch_size: datapoints held at once; it does not change the result.
        seed: of all the randomness.
        progress: whether to show a progress bar once the call has taken two seconds.

    Returns:
        An `Estimate` in nats with `value`, `mcse`, `ess`, `khat`, `acceptance` `(N,)` and `log_weights` `(S, N)`.

    Source: Neal (2001), arXiv:physics/9803008; Wu et al. (2017), arXiv:1611.04273.

    Example:
        >>> import torch, pyrogaps as pg
        >>> from pyrogaps.guides.amortized import AmortizedNormal
        >>> from pyrogaps.models.linear_gaussian import LinearGaussian
        >>> model, guide, x = LinearGaussian.random(4, 2), AmortizedNormal(4, 2, (8,)), torch.randn(6, 4)
        >>> pg.ais(model, guide, x, settings=pg.AIS(num_chains=8, num_temperatures=10)).value.shape
        torch.Size([6])
    """
    settings = settings or AIS()
    settings = settings if initial is None else replace(settings, initial=initial)
    unused = settings.initial == "prior" and not isinstance(model, Problem)
    problem = (Problem.without_guide if unused else Problem.of)(model, guide, data, plate)
    if settings.initial in ("refined", "guide"):
        problem.guided()
    return measured(problem, settings, refinement, Run(seed, batch_size, progress))


def measured(
    problem: Problem, evidence: Evidence, refinement: Refinement | None, run: Run, referee: int = 0
) -> Estimate:
    """log p(x_n) of every datapoint of a problem by an evidence. A guide that was refined already is taken as it is."""
    posterior, refiner = problem.posterior, None
    if evidence.needs_refined and isinstance(posterior, GuideDensity):
        refiner = Refiner(own_family(posterior), refinement or Refinement())
    measurement = prepared(evidence, problem, run, refiner)

    def measure(chunk: Chunk, run: Run) -> Measured:
        refined = posterior if refiner is None else refiner.fit(problem, chunk, run)[0]
        return checked_measured(measurement.measure(chunk, refined), measurement.evidence, chunk)

    parts, doubted = run.map_shown(measure, problem.joint, "log p(x)"), None
    if referee:
        parts, doubted = refereed(measurement, parts, referee, run)
    estimate = measurement.estimate(parts)
    lucky = by_chance(estimate.reliable)
    if lucky.any():
        doubted = lucky if doubted is None else doubted | lucky
    return replace(estimate, doubted=doubted)
