"""`calibrate`: simulation-based calibration of a guide or of its refined posterior."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated, Any, Literal

from torch import Tensor

from pyrogaps.calibration.calibration import Calibration
from pyrogaps.calibration.ranks import rank_chunk
from pyrogaps.calibration.records import Evaluated, per_simulated, shapes_of
from pyrogaps.calibration.simulated import simulated_data
from pyrogaps.calibration.subject import guide_name, subject_of
from pyrogaps.density import Data
from pyrogaps.density.draws import Posterior
from pyrogaps.density.runs import Program
from pyrogaps.density.shared import datapoints_needed
from pyrogaps.density.simulate import ToData
from pyrogaps.errors import InputError
from pyrogaps.guard import guarded
from pyrogaps.problem import Problem
from pyrogaps.refine import OwnFamily, Refinement, Refiner, is_family
from pyrogaps.refine.families import Family
from pyrogaps.run import Run
from pyrogaps.settings import Count, Plate, Seed, Several, checked, within
from pyrogaps.streams import Chunk

MIN_DRAWS = 100
WHOLE_REMEDY = (
    "Simulate whole data sets with Problem.of(model, None, data, False).simulated(seed), and fit the guide to each"
)


@guarded
@checked()
def calibrate(
    model: Program | Problem,
    guide: Any = None,
    data: Data | None = None,
    *,
    posterior: Literal["amortized", "refined"] = "amortized",
    refinement: Refinement | None = None,
    num_simulated: Several = 512,
    num_draws: Annotated[int, within(f"of at least {MIN_DRAWS}")] = 1000,
    to_data: ToData | None = None,
    plate: Plate = None,
    batch_size: Count = 64,
    seed: Seed = 0,
    progress: bool = True,
) -> Calibration:
    r"""Check a posterior's intervals on data drawn from the model: simulation-based calibration.

    $$z_n \sim p(z), \quad x_n \sim p(x \mid z_n), \quad z_{n1}, \dots, z_{nL} \sim q(z \mid x_n), \qquad
      r_{nd} = \#\{l : z_{nld} < z_{nd}\}$$

    The latent $z_n$ behind a simulated datapoint is an exact draw from its posterior. If q is that posterior, the rank
    of $z_n$ among L draws from q is uniform on 0 .. L, in every coordinate d of the unconstrained space, and central
    intervals of q contain the truth at their nominal rate. Ranks pile up at both ends where q is too narrow, in the
    middle where it is too wide, and at one end where it is shifted. Coordinates under a False mask are left out.

    Uniform ranks are necessary for q to be exact, but not sufficient: the prior has them in every coordinate. Hence
    $\log p(x_n, z)$ is ranked too, among at most 128 of the draws, which detects a posterior that ignores the data
    (Modrák et al. 2023, arXiv:2211.02383). The check holds for data from the *model* only.

    Args:
        model, plate: as for `JointDensity`, or a `Problem` in place of model, guide and data; the model needs a data
            plate.
        guide: a module or function, as for `GuideDensity`. For "refined" also an autoguide, of which a fresh one is
            fitted, or a family as for `refine`.
        data: gives the shape of the simulated data, and all quantities that the model does not draw: those of evenly
            spaced datapoints, or of all datapoints in turn where `num_simulated` is larger.
        posterior: the posterior to check, the guide's output ("amortized") or its own family fitted to each simulated
            datapoint, as `refine` does ("refined").
        refinement: settings of the refinement.
        num_simulated: N, number of datapoints to simulate: coverage of 95% is measured to 1% with 512 in one dimension.
        num_draws: L, at least 100; intervals end at draws, so their probabilities are resolved to 1 / L.
        to_data: a function from drawn values by observed site to the model's arguments, where these do not follow.
        batch_size: datapoints in memory at once; it does not change the result.
        seed: seed of all random numbers.
        progress: whether to show a progress bar once the call has taken two seconds.

    Returns:
        A `Calibration`: print it, or take `.summary()`, `.coverage()`, `.ranks`, `.to_datatree()`; `plot_calibration`
        draws it.

    Raises:
        InputError: for an argument out of range, a model without a data plate or that cannot be simulated (see
            `Problem.simulated`), and a guide that holds parameters for each datapoint, naming the argument or site.

    Source: Talts et al. (2018), arXiv:1804.06788.

    Example:
        >>> import torch, pyrogaps as pg
        >>> from pyrogaps.guides.amortized import AmortizedNormal
        >>> from pyrogaps.models.linear_gaussian import LinearGaussian
        >>> model, guide, x = LinearGaussian.random(4, 2), AmortizedNormal(4, 2, (8,)), torch.randn(6, 4)
        >>> calibration = pg.calibrate(model, guide, x, num_simulated=100, num_draws=100)
        >>> str(calibration).split(":")[0]
        'Calibration of the amortized posterior (AmortizedNormal)'
    """
    if refinement is not None and posterior == "amortized":
        raise InputError("refinement: the amortized posterior is not refined. Pass posterior='refined' too")
    if isinstance(model, Problem):
        guide, plain = model.guide, Problem.of(model, guide, data, plate).with_guide(None)
    else:
        with datapoints_needed(f"calibrate draws datapoints. {WHOLE_REMEDY}"):
            plain = Problem.without_guide(model, None if is_family(guide) else guide, data, plate)
    joint = plain.joint
    if joint.plate is None:
        raise InputError(
            f"plate: calibrate needs a data plate, but here the whole data set is one datapoint. {WHOLE_REMEDY}"
        )
    problem, family = subject_of(guide, plain, refined=posterior == "refined")
    run = Run(seed, batch_size, progress)
    simulated, truth = simulated_data(joint, num_simulated, run.stream("simulate"), to_data)
    problem, drawn = problem.over(simulated), joint.over(simulated)
    settings = (refinement or Refinement()) if posterior == "refined" else None
    posterior_of = _posterior_of(problem, family, settings)

    def measure(chunk: Chunk, run: Run) -> Evaluated:
        fitted, converged = posterior_of(chunk, run)
        return rank_chunk(drawn, fitted, chunk, truth, num_draws, run), converged

    parts = run.map_shown(measure, drawn, "calibration")
    provenance = {
        "posterior": posterior,
        "guide": guide_name(guide),
        "num_draws": num_draws,
        "seed": seed,
        "shapes": shapes_of(joint),
        "refinement": None if settings is None else asdict(settings),
    }
    return Calibration(per_simulated(joint, parts, truth), provenance)


Fitted = tuple[Posterior, Tensor | None]


def _posterior_of(
    problem: Problem, family: OwnFamily | Family | None, refinement: Refinement | None
) -> Callable[[Chunk, Run], Fitted]:
    """A function from a chunk to its posterior and, where refined, whether that converged."""
    if refinement is None:
        guide = problem.guided()
        return lambda chunk, run: (guide, None)
    assert family is not None
    refiner = Refiner(family, refinement).over(problem)

    def refined(chunk: Chunk, run: Run) -> Fitted:
        posterior, progress = refiner.fit(problem, chunk, run)
        return posterior, progress.converged

    return refined
