"""`decompose`: the inference gap of a model and a guide on some data, and its parts."""

import os
import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pyrogaps.ais import AIS, anchor, anchored_path, prior_path, run_path, run_pilot
from pyrogaps.anneal import AnnealResult, Tuning
from pyrogaps.bounds import Plate, chunk_log_weights, densities, over_chunks
from pyrogaps.capture import GradientEvaluator
from pyrogaps.conditioning import Conditioning, ConditioningMeasure, conditioning_measure, declared
from pyrogaps.density import Data, GuideDensity, JointDensity
from pyrogaps.density.draws import Posterior
from pyrogaps.density.runs import Program
from pyrogaps.errors import InputError
from pyrogaps.gaps.assemble import assemble
from pyrogaps.gaps.ledger import OWN, GapLedger
from pyrogaps.gaps.parts import Arrays, Parts, Score
from pyrogaps.log_weights import Estimate, log_mean_exp_estimate, mean_estimate
from pyrogaps.refine import OwnFamily, Refinement, own_family, refine_chunk
from pyrogaps.refine.families import Family
from pyrogaps.refine.own import start_of
from pyrogaps.streams import BLOCK, Chunk, chunks

BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"

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
    model: Program,
    guide: Program,
    data: Data,
    *,
    families: Mapping[str, Family] | None = None,
    evidence: AIS | None = None,
    refinement: Refinement | None = None,
    conditioning: Conditioning | None = None,
    reference: Program | None = None,
    num_particles: int = 1000,
    plate: Plate = None,
    batch_size: int = BLOCK,
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

    Every estimate uses draws of its own. log p(x) and L[q*] are bounded from below, so gaps are understated where AIS
    or the refinement fell short: see the directions in the ledger.

    Args:
        model: a Pyro model, called with the arguments that `data` gives.
        guide: a Pyro guide for it, trained.
        data: a tensor, a tuple of tensors whose first axis is the data plate, or an `IndexedData`.
        families: further families, `name -> family(model) -> guide`, each refined per datapoint, beside the tree.
        evidence: settings of AIS.
        refinement: settings of the per-datapoint refinement.
        conditioning: settings of the shared posterior that measures the conditioning gap of `conditions`.
        reference: for a `lookahead`, a guide with the same one, trained as well as can be for this model
            (`SimulatedData`): its ELBO takes the place of L[q*_C]. Without it the gap stays in the amortization gap.
        num_particles: draws for each ELBO and for the IWAE bound.
        plate: the data plate's name, see `JointDensity`.
        batch_size: datapoints held at once, in whole blocks of 64; it does not change the ledger.
        seed: of all the randomness.
        progress: whether to show a progress bar.
        cache: a folder for finished chunks; a run that was stopped continues there.

    Returns:
        A `GapLedger`; `print` it, plot it with `plot_gaps`, or take `.per_datapoint` and `.to_datatree()`.

    Raises:
        InputError: in one line that names the site, argument or family, for anything that has no gap per datapoint.
    """
    evidence, refinement = evidence or AIS(), refinement or Refinement()
    further = _checked(families)
    if num_particles < 2:
        raise InputError(f"num_particles: must be at least 2, got {num_particles}")
    joint, density = densities(model, guide, data, plate)
    work = _Work(joint, density, own_family(density), further, evidence, refinement, num_particles, seed)
    work.conditioned = conditioning_measure(
        density, work.evaluator, conditioning or Conditioning(), evidence, refinement, num_particles, seed, reference
    )
    provenance = work.provenance(plate)
    parts = Parts(cache, {**provenance, "batch_size": batch_size})
    scores: list[Score] = [joint, density.log_prob, *([] if work.conditioned is None else [work.conditioned.score])]
    number = len(chunks(joint.num_datapoints, batch_size))
    with tqdm(total=number * work.num_stages, disable=not progress, dynamic_ncols=True, bar_format=BAR) as bar:
        work.bar = bar

        def one(chunk: Chunk) -> tuple[Chunk, Arrays]:
            result = parts.get(chunk, joint, scores, lambda: work.measure(chunk))
            work.finish(result)
            return chunk, result

        results = over_chunks(one, joint, batch_size, seed)
    return assemble(results, [OWN, *further], provenance, data)


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


class _Work:
    """What is done for each chunk, in order: the guide's ELBO, refinements, evidence."""

    bar: Any

    def __init__(
        self,
        joint: JointDensity,
        density: GuideDensity,
        own: OwnFamily,
        further: dict[str, Family],
        evidence: AIS,
        refinement: Refinement,
        num_particles: int,
        seed: int,
    ) -> None:
        self.joint, self.density, self.own, self.further = joint, density, own, further
        self.evidence, self.refinement, self.num_particles, self.seed = evidence, refinement, num_particles, seed
        self.evaluator = GradientEvaluator(joint, evidence.mode)
        self.prior_evaluator = GradientEvaluator(joint, evidence.mode, split=True)
        self.conditioned: ConditioningMeasure | None = None
        self._started = 0
        self._finished: list[np.ndarray[Any, Any]] = []

    @property
    def num_stages(self) -> int:
        return 3 + len(self.further) + (self.conditioned is not None)

    def measure(self, chunk: Chunk) -> Arrays:
        self.stage("ELBO of the guide")
        guide = chunk_log_weights(self.density.joint, self.density, chunk, self.num_particles, self.seed, "elbo")
        elbo, iwae = mean_estimate(guide), log_mean_exp_estimate(guide)
        self.stage("refining the guide's own family")
        refined, converged, kept, traces = [], [], [], []
        start = None
        families: dict[str, OwnFamily | Family] = {OWN: self.own, **self.further}
        for name, family in families.items():
            if name != OWN:
                self.stage(f"refining {name}")
            posterior, how = refine_chunk(
                family, self.evaluator, chunk, self.refinement, self.seed, name, start, self.report
            )
            if name == OWN:
                own, start = posterior, start_of(posterior, chunk, self.seed)
            weights = chunk_log_weights(
                self.joint, posterior, chunk, self.num_particles, self.seed, f"refined {name}", chunk.start
            )
            refined.append(mean_estimate(weights))
            converged.append(how.converged)
            kept.append(how.kept_start)
            traces.append(how.trace)
        if self.conditioned is not None:
            self.stage(self.conditioned.stage)
        shared = {} if self.conditioned is None else self.conditioned.arrays(chunk)
        self.stage("AIS")
        annealed, tuning = self.annealed(own, chunk)
        log_evidence = log_mean_exp_estimate(annealed.log_weights, acceptance=annealed.acceptance)
        arrays = {
            **_columns("elbo", elbo),
            **_columns("iwae", iwae),
            **shared,
            "khat": iwae.khat,
            "ess": iwae.ess,
            **_columns("log_evidence", log_evidence),
            "log_evidence_ess": log_evidence.ess,
            "acceptance": log_evidence.acceptance,
            "elbo_refined": torch.stack([estimate.value for estimate in refined], 1),
            "elbo_refined_mcse": torch.stack([estimate.mcse for estimate in refined], 1),
            "converged": torch.stack(converged, 1),
            "kept_start": torch.stack(kept, 1),
            "refined_elbo": torch.stack(traces),
            "acceptance_by_temperature": annealed.acceptance_by_temperature,
            "ess_by_temperature": annealed.ess_by_temperature,
            "inverse_temperature": tuning.inverse_temperatures[1:].mean(1),
        }
        return {name: value.detach().cpu().numpy() for name, value in arrays.items() if value is not None}

    def annealed(self, own: Posterior, chunk: Chunk) -> tuple[AnnealResult, Tuning]:
        """AIS of a chunk from where its settings say, and how the pilot tuned it."""
        if self.evidence.initial == "prior":
            path, evaluator = prior_path(self.prior_evaluator, chunk, self.seed), self.prior_evaluator
        else:
            refined = self.evidence.initial == "refined"
            posterior, offset = (own, chunk.start) if refined else (self.density, 0)
            start = anchor(self.joint, posterior, chunk, self.evidence.widen, self.seed, offset)
            path, evaluator = anchored_path(self.evaluator, start, chunk, self.seed), self.evaluator
        tuning = run_pilot(path, evaluator, chunk, self.evidence, self.seed)
        return run_path(path, tuning, evaluator, chunk, self.evidence, self.seed), tuning

    def stage(self, name: str) -> None:
        """Say what is being done; the stages before it are finished."""
        self._advance_to(self._started)
        self._started += 1
        self.bar.set_description_str(name)

    def report(self, fraction: float, elbo: Tensor) -> None:
        """Move the bar within a refinement, and show the bound it has reached."""
        self.bar.set_postfix_str(f"{self._bounds()}ELBO {float(elbo.mean()):.2f} nats", refresh=False)
        self.bar.update(fraction)

    def finish(self, result: Arrays) -> None:
        """A chunk is done: the bounds so far, beside the bar."""
        self._finished.append(np.stack([result["elbo"], result["log_evidence"]]))
        self.bar.set_postfix_str(self._bounds() + "nats", refresh=False)
        self._started = len(self._finished) * self.num_stages
        self._advance_to(self._started)

    def _advance_to(self, position: float) -> None:
        self.bar.update(position - self.bar.n)

    def _bounds(self) -> str:
        if not self._finished:
            return ""
        elbo, log_evidence = np.concatenate(self._finished, 1).mean(1)
        return f"L[q] {elbo:.2f}, log p(x) {log_evidence:.2f} "

    def provenance(self, plate: Plate) -> dict[str, Any]:
        evidence = asdict(self.evidence)
        told = QUANTITIES | ({} if self.conditioned is None else self.conditioned.quantities)
        quantities = {name: {"estimator": how, "direction": which} for name, (how, which) in told.items()}
        quantities["log_evidence"]["estimator"] = f"AIS from the {self.evidence.initial} " + (
            "distribution" if self.evidence.initial == "prior" else "guide"
        )
        return {
            "quantities": quantities,
            "own_family": self.own.kind,
            "evidence": evidence,
            "refinement": asdict(self.refinement),
            "families": {name: getattr(family, "__name__", repr(family)) for name, family in self.further.items()},
            "num_particles": self.num_particles,
            "num_datapoints": self.joint.num_datapoints,
            "dim": self.joint.dim,
            "plate": self.joint.plate,
            "shown": None if (shown := declared(self.density.guide)) is None else str(shown),
            "conditioning": None if self.conditioned is None else self.conditioned.settings,
            "unnormalised_likelihood": list(self.joint.unnormalised),
            "seed": self.seed,
            "dtype": str(self.joint.dtype).removeprefix("torch."),
            "device": self.joint.device.type,
            "versions": _versions(),
        }


def _columns(name: str, estimate: Estimate) -> dict[str, Tensor]:
    return {name: estimate.value, f"{name}_mcse": estimate.mcse}


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("pyrogaps", "pyro-ppl", "torch", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions
