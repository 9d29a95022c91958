"""What is measured of each chunk of datapoints: the guide's bounds, refinements, evidence."""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pyrogaps import memory, ranks
from pyrogaps.ais import AIS, anchor, anchored_path, prior_path, run_path, run_pilot
from pyrogaps.bounds import chunk_log_weights
from pyrogaps.capture import GradientEvaluator
from pyrogaps.conditioning import ConditioningMeasure
from pyrogaps.density.draws import Posterior, probe
from pyrogaps.escalation import Escalation, LadderCheck, checked, climb_chunk, escalated
from pyrogaps.gaps.ledger import OWN
from pyrogaps.gaps.parts import Arrays, Parts
from pyrogaps.log_weights import Estimate, log_mean_exp_estimate, mean_estimate
from pyrogaps.problem import Problem
from pyrogaps.refine import OwnFamily, Refinement, refine_chunk
from pyrogaps.refine.families import Family
from pyrogaps.refine.own import start_of
from pyrogaps.streams import Chunk, chunks, seeded

BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"


class Work:
    """What is done for each chunk, in order: the guide's ELBO, refinements, evidence."""

    bar: Any

    def __init__(
        self,
        problem: Problem,
        own: OwnFamily,
        further: dict[str, Family],
        evidence: AIS | Escalation,
        refinement: Refinement,
        num_particles: int,
        seed: int,
    ) -> None:
        self.problem, self.own, self.further = problem, own, further
        self.evidence, self.refinement, self.num_particles, self.seed = evidence, refinement, num_particles, seed
        self.evaluator = GradientEvaluator(problem.joint, evidence.mode)
        # A guide with auxiliary variables and a local family of its own has a density of its own too.
        same = problem.scored is problem.joint
        self.scorer = self.evaluator if same else GradientEvaluator(problem.scored, evidence.mode)
        self.prior_evaluator = GradientEvaluator(problem.joint, evidence.mode, split=True)
        self.conditioned: ConditioningMeasure | None = None
        self.lowest_rung = 0
        self._started = 0
        self._finished: list[np.ndarray[Any, Any]] = []

    @property
    def posterior(self) -> Posterior:
        """The guide as it is."""
        return self.problem.guided()

    @property
    def num_stages(self) -> int:
        return 3 + len(self.further) + (self.conditioned is not None)

    def measure(self, chunk: Chunk) -> Arrays:
        """All columns of the ledger for a chunk."""
        arrays, own = self.bounds(chunk)
        self.stage("log p(x)")
        found = self._escalated(own, chunk) if isinstance(self.evidence, Escalation) else self._annealed(own, chunk)
        return {**arrays, **as_arrays(found)}

    def check_ladder(self, batch_size: int) -> LadderCheck | str | None:
        """Of an escalation, which rungs can be trusted, by simulated data; its measurements then start there."""
        if not isinstance(self.evidence, Escalation):
            return None
        check = checked(self.problem, self.own, self.evidence, self.refinement, batch_size, self.seed)
        if isinstance(check, LadderCheck):
            self.lowest_rung = check.lowest
        return check

    def _escalated(self, own: Posterior, chunk: Chunk) -> dict[str, Any]:
        """log p(x) by what each datapoint takes."""
        assert isinstance(self.evidence, Escalation)
        estimate = escalated(climb_chunk(self.evaluator, own, chunk, self.evidence, self.seed, self.lowest_rung))
        return {
            **columns("log_evidence", estimate),
            "log_evidence_ess": estimate.ess,
            "log_evidence_draws": estimate.num_draws,
            "log_evidence_method": estimate.method,
            "log_evidence_temperatures": estimate.num_temperatures,
            "log_evidence_evaluations": estimate.num_evaluations,
            "acceptance": estimate.acceptance,
        }

    def bounds(self, chunk: Chunk) -> tuple[Arrays, Posterior]:
        """The columns of a chunk but for log p(x), and the refined guide of its own family."""
        self.stage("ELBO of the guide")
        guide = chunk_log_weights(self.scorer, self.posterior, chunk, self.num_particles, self.seed, "elbo")
        elbo, iwae = mean_estimate(guide), log_mean_exp_estimate(guide)
        self.stage("refining the guide's own family")
        refined, proposals, converged, kept, traces = [], [], [], [], []
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
                self.evaluator, posterior, chunk, self.num_particles, self.seed, f"refined {name}"
            )
            refined.append(mean_estimate(weights))
            proposals.append(log_mean_exp_estimate(weights))
            converged.append(how.converged)
            kept.append(how.kept_start)
            traces.append(how.trace)
        if self.conditioned is not None:
            self.stage(self.conditioned.stage)
        shared = {} if self.conditioned is None else self.conditioned.arrays(chunk)
        arrays = {
            **columns("elbo", elbo),
            **columns("iwae", iwae),
            **shared,
            "khat": iwae.khat,
            "ess": iwae.ess,
            "elbo_refined": torch.stack([estimate.value for estimate in refined], 1),
            "elbo_refined_mcse": torch.stack([estimate.mcse for estimate in refined], 1),
            "khat_refined": torch.stack([estimate.khat for estimate in proposals if estimate.khat is not None], 1),
            "ess_refined": torch.stack([estimate.ess for estimate in proposals if estimate.ess is not None], 1),
            "converged": torch.stack(converged, 1),
            "kept_start": torch.stack(kept, 1),
            "refined_elbo": torch.stack(traces),
        }
        return as_arrays(arrays), own

    def _annealed(self, own: Posterior, chunk: Chunk) -> dict[str, Any]:
        """log p(x) by AIS from where its settings say."""
        settings = self.evidence
        assert isinstance(settings, AIS)
        if settings.initial == "prior":
            path, evaluator = prior_path(self.prior_evaluator, chunk, self.seed), self.prior_evaluator
        else:
            posterior = own if settings.initial == "refined" else self.posterior
            start = anchor(self.problem.joint, posterior, chunk, settings.widen, self.seed)
            path, evaluator = anchored_path(self.evaluator, start, chunk, self.seed), self.evaluator
        tuning = run_pilot(path, evaluator, chunk, settings, self.seed)
        ran = run_path(path, tuning, evaluator, chunk, settings, self.seed)
        estimate = log_mean_exp_estimate(ran.log_weights, acceptance=ran.acceptance)
        return {
            **columns("log_evidence", estimate),
            "log_evidence_ess": estimate.ess,
            "log_evidence_draws": torch.full((len(chunk),), settings.num_chains),
            "acceptance": estimate.acceptance,
            "acceptance_by_temperature": ran.acceptance_by_temperature,
            "ess_by_temperature": ran.ess_by_temperature,
            "inverse_temperature": tuning.inverse_temperatures[1:].mean(1),
        }

    def probe(self, chunk: Chunk) -> Tensor:
        """Numbers that change with the data and the parameters that a chunk's columns rest on."""
        own = probe(self.posterior, self.problem.scored, chunk)
        return own if self.conditioned is None else torch.cat([own, self.conditioned.probe(chunk)])

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
        # On training data there is no evidence: the refined bound stands in its place.
        reached = result.get("log_evidence", result["elbo_refined"][:, 0])
        self._finished.append(np.stack([result["elbo"], reached]))
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


def columns(name: str, estimate: Estimate) -> dict[str, Tensor]:
    """An estimate and its Monte Carlo error, as columns of the ledger."""
    return {name: estimate.value, f"{name}_mcse": estimate.mcse}


def as_arrays(tensors: dict[str, Any]) -> Arrays:
    """The tensors there are, as arrays."""
    return {name: value.detach().cpu().numpy() for name, value in tensors.items() if value is not None}


def run_chunks(
    work: Work,
    measure: Callable[[Work, Chunk], Arrays],
    provenance: dict[str, Any],
    batch_size: int,
    progress: bool,
    cache: str | os.PathLike[str] | None,
) -> list[tuple[Chunk, Arrays]]:
    """What `measure` finds on every chunk; finished ones are kept in the folder `cache`, for settings as they are."""
    joint = work.problem.joint
    parts = Parts(cache, provenance)
    pieces = chunks(joint.num_datapoints, batch_size)
    # Processes share what is left to do evenly, whoever did the rest.
    done = ranks.first(lambda: parts.present(pieces))
    order = sorted(pieces, key=lambda chunk: chunk in done)
    own, shown = len(order[ranks.rank() :: ranks.world_size()]), progress and ranks.rank() == 0
    with (
        seeded(work.seed, "unused", device=joint.device),
        tqdm(total=own * work.num_stages, disable=not shown, dynamic_ncols=True, bar_format=BAR) as bar,
    ):
        work.bar = bar

        def one(chunk: Chunk) -> tuple[Chunk, Arrays]:
            result = parts.get(chunk, work.probe, lambda: measure(work, chunk))
            work.finish(result)
            memory.give_back()
            return chunk, result

        return sorted(ranks.divided(one, order), key=lambda found: found[0].start)
