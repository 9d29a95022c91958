"""`decompose`: the inference gap of a model and a guide on some data, and its parts."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pyrogaps import memory, processes
from pyrogaps.chunk_cache import chunk_size
from pyrogaps.conditioning import Conditioning, conditioning_measure, declared
from pyrogaps.density import Data
from pyrogaps.density.runs import Program
from pyrogaps.errors import InputError
from pyrogaps.evidence import AIS, Evidence
from pyrogaps.gaps.amortization import with_split
from pyrogaps.gaps.assemble import assemble, with_gaps
from pyrogaps.gaps.certificate import Certificate
from pyrogaps.gaps.certify import certify, check_certifiable
from pyrogaps.gaps.ledger import GapLedger
from pyrogaps.gaps.measure import OWN, Measure, reached
from pyrogaps.gaps.retrain import Split
from pyrogaps.gaps.sizes import sizes_of
from pyrogaps.gaps.terms import TERMS, Term
from pyrogaps.guard import guarded
from pyrogaps.problem import Problem
from pyrogaps.refine import OwnFamily, Refinement, Refiner, own_family
from pyrogaps.refine.families import Family
from pyrogaps.run import Run
from pyrogaps.settings import Count, File, Plate, Seed, Several, checked

QUANTITIES = {
    "elbo": ("Monte Carlo ELBO of the guide", "unbiased"),
    "iwae": ("importance weights of the guide", "lower bound of log p(x)"),
    "elbo_refined": ("Monte Carlo ELBO of the refined guide", "lower bound of L[q*]"),
    "family_approximation_gap": ("log p(x) - L[q*]", "estimate (either way)"),
}


@guarded
@checked()
def decompose(
    model: Program | Problem,
    guide: Program | None = None,
    data: Data | None = None,
    *,
    families: Mapping[str, Family] | None = None,
    evidence: Evidence | None = None,
    refinement: Refinement | None = None,
    conditioning: Conditioning | None = None,
    reference: Program | None = None,
    split: Split | None = None,
    certificate: Certificate | None = None,
    terms: Sequence[Term] = TERMS,
    num_particles: Several = 1000,
    plate: Plate = None,
    batch_size: Count | None = None,
    max_memory: memory.Bytes | None = None,
    compile: bool = False,
    seed: Seed = 0,
    progress: bool = True,
    cache: File | None = None,
) -> GapLedger:
    r"""Measure how far a guide is from the truth on every datapoint, and whose fault that is.

    $$\log p(x_n) - \mathcal L[q](x_n) =
      \underbrace{\log p(x_n) - \mathcal L[q^*](x_n)}_{\text{approximation}} +
      \underbrace{\mathcal L[q^*](x_n) - \mathcal L[q](x_n)}_{\text{amortization}}$$

    A guide that is not shown all of x says so: by `conditions`, a boolean mask over the model's first argument (True
    where it is shown) or a function from the model's arguments to masks, or, for a sequence, by `lookahead` = k, where
    the factor of step t is shown the data up to step t + k. Between L[q*] and L[q] then stands q*_C, the best of the
    family that is shown no more than that, and the amortization gap is L[q*_C] - L[q]:

    $$\text{conditioning gap} = \mathcal L[q^*](x_n) - \mathcal L[q^*_C](x_n)$$

    With `split`, which has the data that the guide was trained on, a copy of the guide is trained on for the frozen
    model until it improves no more, $\hat\phi$, and the amortization gap has three children, means over data sets:

    $$A_{eval}(\phi) = \underbrace{A_{train}(\hat\phi)}_{\text{capacity}} +
      \underbrace{L_{train}[q_{\hat\phi}] - L_{train}[q_\phi]}_{\text{optimization}} +
      \underbrace{A_{eval}(\phi) - A_{train}(\phi)}_{\text{generalization}}, \quad
      A_D(\phi) = \frac{1}{|D|} \sum_{n \in D} \mathcal L[q^*_C](x_n) - \mathcal L[q_\phi](x_n)$$

    Every estimate uses draws of its own. log p(x) and L[q*] are bounded from below, so gaps are understated where AIS
    or the refinement fell short: see the directions in the ledger.

    Args:
        model: a Pyro model, called with the arguments that `data` gives; or a `Problem`, in place of model, guide and
            data.
        guide: a Pyro guide for it, trained.
        data: a tensor or array, or a tuple of them, whose first axis is the data plate, or an `IndexedData`.
        families: further families, `name -> family(model) -> guide`, each refined per datapoint, beside the tree.
        evidence: how log p(x) is measured: `AIS(...)`, with the same settings for all datapoints; `Ladder(...)`, which
            measures each to a stated standard error; or another `Evidence`. None: `AIS()`.
        refinement: settings of the per-datapoint refinement.
        conditioning: settings of the shared posterior that measures the conditioning gap of `conditions`.
        reference: for a `lookahead`, a guide with the same one, trained as well as can be for this model
            (`SimulatedData`): its ELBO takes the place of L[q*_C]. Without it the gap stays in the amortization gap.
        split: the training data, and how to train the guide on; None leaves the amortization gap whole.
        certificate: what to spend on finding out how wrong the bounds can be; None spends nothing.
        terms: the gaps of the tree; `TERMS + (mine,)` adds one.
        num_particles: draws for each ELBO and for the IWAE bound.
        plate: the data plate's name, see `JointDensity`.
        batch_size: datapoints worked on at once, in whole blocks of 64; it changes the ledger in rounding alone. None
            takes what suits the model, the same on every machine.
        max_memory: what this process may use, in bytes or as in "4GiB"; None: four fifths of what the machine has left.
            Memory does not grow with the number of datapoints or temperatures, and of draws and chains the log-weights
            alone are held, a chunk at a time.
        compile: whether to give the recorded density to `torch.compile`. It pays in long runs of models with many
            elementwise operations; compiling takes about 20 s, and results differ in their last digits.
        seed: of all the randomness.
        progress: whether to show a progress bar.
        cache: a folder for finished chunks; a run that was stopped continues there.

    Returns:
        A `GapLedger`; `print` it, plot it with `plot_gaps`, or take `.per_datapoint` and `.to_datatree()`.

    Raises:
        InputError: in one line that names the site, argument or family, for anything that has no gap per datapoint.
    """
    if OWN in (further := dict(families or {})):
        raise InputError(f"families: '{OWN}' is the name of the guide's own family. Choose another")
    evidence = AIS() if evidence is None else evidence
    problem = Problem.of(model, guide, data, plate)
    problem = problem.compiled() if compile else problem
    folder = None if cache is None else Path(cache)
    kept = processes.first(lambda: chunk_size(folder, problem.num_datapoints))
    sizes = sizes_of(problem.joint, evidence, num_particles, batch_size, max_memory, kept)
    run = Run(seed, sizes.batch_size, progress, folder)

    def bounds_of(problem: Problem, run: Run) -> Measure:
        refiner = Refiner(own_family(problem.guide_density()), refinement or Refinement())
        annealing = evidence if isinstance(evidence, AIS) else AIS()
        conditioned = conditioning_measure(
            problem, conditioning or Conditioning(), annealing, refiner, num_particles, run, reference
        )
        return Measure(problem, refiner, {}, None, conditioned, num_particles)

    with memory.limited(sizes.working_set):
        # What cannot be split or certified is refused before hours of work.
        if split is not None and problem.plate is None:
            raise InputError("split: the model has no data plate, so its guide is not amortized. Leave split out")
        bounds, on_training, training = bounds_of(problem, run), run.derived("training data"), None
        if certificate is not None:
            check_certifiable(bounds)
        if split is not None:
            there = Problem.of(problem.model, problem.guide, split.measured()[0], problem.plate, problem.mode)
            training = bounds_of(there, on_training)
        measure = replace(bounds, families=further, evidence=evidence.prepare(problem, run, bounds.refiner))
        provenance = _provenance(measure, run)
        results = run.map_kept(measure, problem.joint, provenance, measure.fingerprint, measure.num_stages, reached)
        ledger = assemble(results, measure, provenance, terms, run)
        if split is not None and training is not None:
            ledger = with_gaps(with_split(ledger, split, training, on_training), terms)
        if certificate is not None:
            ledger = replace(ledger, certificate=certify(measure, ledger.per_datapoint, certificate, run))
    return ledger


def _provenance(measure: Measure, run: Run) -> dict[str, Any]:
    """What was measured and by what, as plain values."""
    problem, conditioned = measure.problem, measure.conditioned
    estimators = QUANTITIES | ({} if conditioned is None else conditioned.quantities)
    quantities = {
        name: {"estimator": estimator, "direction": direction} for name, (estimator, direction) in estimators.items()
    }
    assert measure.evidence is not None
    log_evidence = {"estimator": measure.evidence.estimator, "direction": measure.evidence.direction}
    own = measure.refiner.family
    return {
        "quantities": {**quantities, "log_evidence": log_evidence},
        "own_family": own.kind if isinstance(own, OwnFamily) else None,
        "amortized": isinstance(own, OwnFamily) and own.amortized and problem.num_datapoints > 1,
        "evidence": measure.evidence.describe(),
        "refinement": asdict(measure.refiner.settings),
        "families": {name: getattr(family, "__name__", repr(family)) for name, family in measure.families.items()},
        "num_particles": measure.num_particles,
        "num_datapoints": problem.num_datapoints,
        "dim": problem.dim,
        "plate": problem.plate,
        "mode": problem.mode,
        "shown": None if (shown := declared(problem.guide)) is None else str(shown),
        "conditioning": None if conditioned is None else conditioned.settings,
        "unnormalised_likelihood": list(problem.joint.unnormalised),
        "seed": run.seed,
        "dtype": str(problem.joint.dtype).removeprefix("torch."),
        "device": problem.joint.device.type,
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("pyrogaps", "pyro-ppl", "torch", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions
