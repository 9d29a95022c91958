"""`decompose`: the inference gap of a model and a guide on some data, and its parts."""

import os
import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from tqdm import tqdm

from pyrogaps.ais import AIS, anchor, anchored_path, prior_path, run_path, run_pilot
from pyrogaps.anneal import AnnealResult, Tuning
from pyrogaps.bounds import Plate, chunk_log_weights, densities, over_chunks
from pyrogaps.capture import GradientEvaluator
from pyrogaps.density import Data, GuideDensity, JointDensity
from pyrogaps.density.draws import Posterior
from pyrogaps.density.runs import Program
from pyrogaps.errors import InputError
from pyrogaps.gaps.ledger import OWN, GapLedger
from pyrogaps.gaps.parts import Arrays, Parts
from pyrogaps.log_weights import Estimate, log_mean_exp_estimate, mean_estimate
from pyrogaps.refine import OwnFamily, Refinement, own_family, refine_chunk
from pyrogaps.refine.families import Family
from pyrogaps.refine.own import start_of
from pyrogaps.streams import BLOCK, Chunk, chunks

MAX_OBSERVED = 20_000_000
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

    Every estimate uses draws of its own. log p(x) and L[q*] are bounded from below, so gaps are understated where AIS
    or the refinement fell short: see the directions in the ledger.

    Args:
        model: a Pyro model, called with the arguments that `data` gives.
        guide: a Pyro guide for it, trained.
        data: a tensor, a tuple of tensors whose first axis is the data plate, or an `IndexedData`.
        families: further families, `name -> family(model) -> guide`, each refined per datapoint, beside the tree.
        evidence: settings of AIS.
        refinement: settings of the per-datapoint refinement.
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
    provenance = work.provenance(plate)
    parts = Parts(cache, {**provenance, "batch_size": batch_size})
    number = len(chunks(joint.num_datapoints, batch_size))
    with tqdm(total=number * work.num_stages, disable=not progress, dynamic_ncols=True, bar_format=BAR) as bar:
        work.bar = bar

        def one(chunk: Chunk) -> tuple[Chunk, Arrays]:
            result = parts.get(chunk, joint, density, lambda: work.measure(chunk))
            work.finish(result)
            return chunk, result

        results = over_chunks(one, joint, batch_size, seed)
    return _ledger(results, [OWN, *further], provenance, data)


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
        self.num_stages = 3 + len(further)
        self._started = 0
        self._finished: list[np.ndarray[Any, Any]] = []

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
        self.stage("AIS")
        annealed, tuning = self.annealed(own, chunk)
        log_evidence = log_mean_exp_estimate(annealed.log_weights, acceptance=annealed.acceptance)
        arrays = {
            **_columns("elbo", elbo),
            **_columns("iwae", iwae),
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
        quantities = {name: {"estimator": how, "direction": which} for name, (how, which) in QUANTITIES.items()}
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


def _ledger(
    results: list[tuple[Chunk, Arrays]], families: list[str], provenance: dict[str, Any], data: Data
) -> GapLedger:
    arrays = [result for _, result in results]
    weights = np.array([len(chunk) for chunk, _ in results], dtype=float)
    columns = {name: np.concatenate([a[name] for a in arrays]) for name in arrays[0] if not _is_trace(name)}
    traces = {
        name: np.average([a[name] for a in arrays], axis=0, weights=weights) for name in arrays[0] if _is_trace(name)
    }
    own, own_mcse = columns["elbo_refined"][:, 0], columns["elbo_refined_mcse"][:, 0]
    evidence, evidence_mcse = columns["log_evidence"], columns["log_evidence_mcse"]
    gaps = {
        "inference_gap": (evidence - columns["elbo"], np.hypot(evidence_mcse, columns["elbo_mcse"])),
        "approximation_gap": (evidence - own, np.hypot(evidence_mcse, own_mcse)),
        "amortization_gap": (own - columns["elbo"], np.hypot(own_mcse, columns["elbo_mcse"])),
        "family_approximation_gap": (
            evidence[:, None] - columns["elbo_refined"],
            np.hypot(evidence_mcse[:, None], columns["elbo_refined_mcse"]),
        ),
    }
    for name, (value, mcse) in gaps.items():
        columns[name], columns[f"{name}_mcse"] = value, mcse
    per_datapoint = xr.Dataset(
        {name: (("datapoint", "family")[: value.ndim], value) for name, value in columns.items()},
        coords={"datapoint": np.arange(provenance["num_datapoints"]), "family": families},
    )
    for variable in per_datapoint.data_vars:
        if str(variable).removesuffix("_mcse") in QUANTITIES:
            per_datapoint[variable].attrs["units"] = "nats"
    return GapLedger(per_datapoint, _traces(traces, families, provenance), _observed(data), provenance)


TRACES = ("refined_elbo", "acceptance_by_temperature", "ess_by_temperature", "inverse_temperature")


def _is_trace(name: str) -> bool:
    return name in TRACES


def _traces(traces: Arrays, families: list[str], provenance: dict[str, Any]) -> xr.Dataset:
    num_points = traces["refined_elbo"].shape[1]
    steps = (np.arange(num_points) + 0.5) * provenance["refinement"]["num_steps"] / num_points
    dims = {"refined_elbo": ("family", "refinement_step")}
    return xr.Dataset(
        {name: (dims.get(name, ("temperature",)), value) for name, value in traces.items()},
        coords={
            "family": families,
            "refinement_step": steps,
            "temperature": np.arange(1, len(traces["inverse_temperature"]) + 1),
        },
    )


def _observed(data: Data) -> xr.Dataset:
    """The data, where they are one tensor of moderate size: pictures show the datapoints that are explained worst."""
    tensor = data[0] if isinstance(data, tuple) and len(data) == 1 else data
    if not isinstance(tensor, Tensor) or tensor.numel() > MAX_OBSERVED or tensor.dim() == 0:
        return xr.Dataset()
    dims = ["datapoint", *[f"x_dim_{axis}" for axis in range(tensor.dim() - 1)]]
    return xr.Dataset({"x": (dims, tensor.detach().cpu().numpy())})
