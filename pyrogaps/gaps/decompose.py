"""`decompose`: the inference gap of a model and a guide on some data, and its parts."""

import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from pyrogaps import memory, ranks
from pyrogaps.ais import AIS
from pyrogaps.conditioning import Conditioning, conditioning_measure, declared
from pyrogaps.density import Data
from pyrogaps.density.runs import Program
from pyrogaps.errors import InputError
from pyrogaps.escalation import Escalation, LadderCheck
from pyrogaps.gaps.amortization import with_split
from pyrogaps.gaps.assemble import assemble
from pyrogaps.gaps.certificate import Certificate
from pyrogaps.gaps.certify import certify, check_certifiable
from pyrogaps.gaps.compiling import Compile, chosen_mode
from pyrogaps.gaps.ledger import OWN, GapLedger
from pyrogaps.gaps.parts import chunk_size
from pyrogaps.gaps.retrain import Split
from pyrogaps.gaps.sizes import sizes_of
from pyrogaps.gaps.work import Work, run_chunks
from pyrogaps.problem import Plate, Problem
from pyrogaps.refine import Refinement, own_family
from pyrogaps.refine.families import Family
from pyrogaps.streams import derive_seed

QUANTITIES = {
    "elbo": ("Monte Carlo ELBO of the guide", "unbiased"),
    "iwae": ("importance weights of the guide", "lower bound of log p(x)"),
    "log_evidence": ("AIS", "lower bound of log p(x)"),
    "elbo_refined": ("Monte Carlo ELBO of the refined guide", "lower bound of L[q*]"),
    "approximation_gap": ("log p(x) - L[q*]", "estimate (either way)"),
    "family_approximation_gap": ("log p(x) - L[q*]", "estimate (either way)"),
    "amortization_gap": ("L[q*] - L[q]", "lower bound of the gap"),
    "inference_gap": ("log p(x) - L[q]", "lower bound of the gap"),
}


def decompose(
    model: Program | Problem,
    guide: Program | None = None,
    data: Data | None = None,
    *,
    families: Mapping[str, Family] | None = None,
    evidence: AIS | Escalation | Literal["auto"] | None = None,
    refinement: Refinement | None = None,
    conditioning: Conditioning | None = None,
    reference: Program | None = None,
    split: Split | None = None,
    certificate: Certificate | None = None,
    num_particles: int = 1000,
    plate: Plate = None,
    batch_size: int | None = None,
    max_memory: int | str | None = None,
    compile: Compile = "auto",
    seed: int = 0,
    progress: bool = True,
    cache: str | os.PathLike[str] | None = None,
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
        data: a tensor, a tuple of tensors whose first axis is the data plate, or an `IndexedData`.
        families: further families, `name -> family(model) -> guide`, each refined per datapoint, beside the tree.
        evidence: settings of AIS, alike for all datapoints; or an `Escalation`, "auto" for its defaults, which gives
            each what it takes to know log p(x) to a stated standard error.
        refinement: settings of the per-datapoint refinement.
        conditioning: settings of the shared posterior that measures the conditioning gap of `conditions`.
        reference: for a `lookahead`, a guide with the same one, trained as well as can be for this model
            (`SimulatedData`): its ELBO takes the place of L[q*_C]. Without it the gap stays in the amortization gap.
        split: the training data, and how to train the guide on; None leaves the amortization gap whole.
        certificate: what to spend on finding out how wrong the bounds can be; None spends nothing.
        num_particles: draws for each ELBO and for the IWAE bound.
        plate: the data plate's name, see `JointDensity`.
        batch_size: datapoints worked on at once, in whole blocks of 64; it changes the ledger in rounding alone. None
            takes what suits the model, the same on every machine.
        max_memory: what this process may use, in bytes or as in "4GiB"; None: four fifths of what the machine has left.
            Memory does not grow with the number of datapoints or temperatures, and of draws and chains the log-weights
            alone are held, a chunk at a time.
        compile: "on" gives the recorded density to `torch.compile`, "auto" does where the run is long enough.
        seed: of all the randomness.
        progress: whether to show a progress bar.
        cache: a folder for finished chunks; a run that was stopped continues there.

    Returns:
        A `GapLedger`; `print` it, plot it with `plot_gaps`, or take `.per_datapoint` and `.to_datatree()`.

    Raises:
        InputError: in one line that names the site, argument or family, for anything that has no gap per datapoint.
    """
    further, how = _checked(families), _evidence(evidence)
    if num_particles < 2:
        raise InputError(f"num_particles: must be at least 2, got {num_particles}")

    problem = Problem.of(model, guide, data, plate)
    joint = problem.joint
    kept = ranks.first(lambda: chunk_size(cache, joint.num_datapoints))
    sizes = sizes_of(joint, how, num_particles, batch_size, max_memory, kept)
    refining, number = refinement or Refinement(), 1 + len(further)
    how = replace(how, mode=chosen_mode(compile, how, refining, number, num_particles, joint))

    def work_on(problem: Problem, families: dict[str, Family], stream: int) -> Work:
        density = problem.guide_density()
        settings = how, refining, num_particles, stream
        work = Work(problem, own_family(density), families, *settings)
        chosen = conditioning or Conditioning()
        anneal = how if isinstance(how, AIS) else AIS(mode=how.mode)
        work.conditioned = conditioning_measure(density, work.evaluator, chosen, anneal, *settings[1:], reference)
        return work

    with memory.limited(sizes.working_set):
        work = work_on(problem, further, seed)
        # What cannot be split is refused before hours of work.
        if split is not None and joint.plate is None:
            raise InputError("split: the model has no data plate, so its guide is not amortized; leave split out")
        if certificate is not None:
            check_certifiable(work)
        training = None
        if split is not None:
            there = Problem.of(problem.model, problem.guide, split.measured()[0], joint.plate)
            training = work_on(there, {}, derive_seed(seed, "training data"))
        provenance = _provenance(work, work.check_ladder(sizes.batch_size))
        results = run_chunks(work, Work.measure, provenance, sizes.batch_size, progress, cache)
        ledger = assemble(results, [OWN, *further], provenance, joint.caller_data)
        if split is not None and training is not None:
            ledger = with_split(ledger, split, training, sizes.batch_size, progress, cache)
        if certificate is not None:
            ledger = replace(ledger, certificate=certify(work, ledger.per_datapoint, certificate, sizes.batch_size))
    return ledger


def _checked(families: Mapping[str, Family] | None) -> dict[str, Family]:
    families = dict(families or {})
    for name, family in families.items():
        if name == OWN:
            raise InputError(f"families: '{OWN}' is the name of the guide's own family; choose another")
        if not callable(family):
            raise InputError(
                f"families: '{name}' must be a callable family(model) -> guide, got {type(family).__name__}"
            )
    return families


def _evidence(evidence: AIS | Escalation | Literal["auto"] | None) -> AIS | Escalation:
    if evidence is None or evidence == "auto":
        return AIS() if evidence is None else Escalation()
    if not isinstance(evidence, AIS | Escalation):
        raise InputError(f"evidence: must be AIS(...), Escalation(...) or 'auto', got {evidence!r}")
    return evidence


def _provenance(work: Work, check: LadderCheck | str | None) -> dict[str, Any]:
    told = QUANTITIES | ({} if work.conditioned is None else work.conditioned.quantities)
    quantities = {name: {"estimator": how, "direction": which} for name, (how, which) in told.items()}
    if isinstance(work.evidence, AIS):
        where = "distribution" if work.evidence.initial == "prior" else "guide"
        quantities["log_evidence"]["estimator"] = f"AIS from the {work.evidence.initial} {where}"
    else:
        quantities["log_evidence"]["estimator"] = "importance sampling or AIS from the refined guide"
    return {
        "quantities": quantities,
        "own_family": work.own.kind,
        "evidence": asdict(work.evidence),
        "ladder": _told(check),
        "refinement": asdict(work.refinement),
        "families": {name: getattr(family, "__name__", repr(family)) for name, family in work.further.items()},
        "num_particles": work.num_particles,
        "num_datapoints": work.problem.joint.num_datapoints,
        "dim": work.problem.joint.dim,
        "plate": work.problem.joint.plate,
        "shown": None if (shown := declared(work.problem.guide)) is None else str(shown),
        "conditioning": None if work.conditioned is None else work.conditioned.settings,
        "unnormalised_likelihood": list(work.problem.joint.unnormalised),
        "seed": work.seed,
        "dtype": str(work.problem.joint.dtype).removeprefix("torch."),
        "device": work.problem.joint.device.type,
        "versions": _versions(),
    }


def _told(check: LadderCheck | str | None) -> dict[str, Any] | str | None:
    """The check of an escalation's ladder, or why there is none, as plain values."""
    if not isinstance(check, LadderCheck):
        return check
    number = len(check.upper)
    return {"lowest": check.lowest, "width": check.width, "width_mcse": check.width_mcse, "num_simulated": number}


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("pyrogaps", "pyro-ppl", "torch", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions
