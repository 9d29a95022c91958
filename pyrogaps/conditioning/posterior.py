"""`shared_posterior`: the best guide that is shown only a part of x, per datapoint and without training."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyrogaps.conditioning.completions import has_rows
from pyrogaps.conditioning.conditions import Shown, declared
from pyrogaps.conditioning.leaks import check_no_leak
from pyrogaps.conditioning.settings import Conditioning
from pyrogaps.conditioning.shared import SharedBlock, sharing_of
from pyrogaps.density import Data, JointDensity
from pyrogaps.density.runs import Program, evaluating
from pyrogaps.errors import InputError
from pyrogaps.evidence import AIS
from pyrogaps.guard import guarded
from pyrogaps.log_weights import Estimate
from pyrogaps.problem import Problem
from pyrogaps.refine import RefinedGuide, Refinement, Refiner, own_family
from pyrogaps.run import Run
from pyrogaps.settings import Count, Plate, Seed, checked
from pyrogaps.streams import BLOCK, Chunk

MAX_ROWS = 8192


@dataclass(frozen=True, repr=False)
class SharedPosterior:
    r"""q*_C of every datapoint, fitted to two halves of the completions of what is shown.

    Attributes:
        elbo: L[q*_C](x_n) of the datapoints themselves, nats, the mean of the halves; `mcse` covers the completions.
        on_completions: the mean ELBO of either half's guide on the other half's completions.
        overfitting: ELBO of a half's guide on its own completions less that of the other guide, `(N,)`, nats.
        guides: the refined guides of the two halves.
        num_completions: number of completions, `(N,)`.
    """

    joint: JointDensity
    elbo: Estimate
    on_completions: Estimate
    overfitting: Tensor
    guides: tuple[RefinedGuide, RefinedGuide]
    num_completions: Tensor
    blocks: list[tuple[Chunk, SharedBlock]]

    def __repr__(self) -> str:
        return f"SharedPosterior(elbo={self.elbo}, on_completions={self.on_completions})"

    @guarded
    def completions(self, datapoint: int) -> tuple[tuple[Any, ...], Tensor]:
        """The model's arguments for the K completions of a datapoint, and the latents `(K, dim)` they come from."""
        block, shared = self._block_of(datapoint)
        position, drawn = datapoint - block.start, shared.completions
        number = len(block)
        args = tuple(arg[position::number] if has_rows(arg, len(drawn) * number) else arg for arg in drawn.args)
        return args, drawn.z[:, position]

    @guarded
    def log_density(self, z: Tensor, datapoint: int) -> Tensor:
        r"""log q_C(z) up to a constant, the mean of $\log p(C_n, \bar C_k, z)$ over completions: `(S, dim)` to `(S,)`.

        q_C is the renormalised product of the completions' posteriors, the optimum of all densities.
        """
        args, latents = self.completions(datapoint)
        number, parts = len(latents), []
        with evaluating(self.joint.model), torch.no_grad():
            for points in z.split(max(1, MAX_ROWS // number)):
                rows = torch.full((len(points) * number,), datapoint)
                repeated = tuple(
                    arg.repeat(len(points), *[1] * (arg.dim() - 1)) if has_rows(arg, number) else arg for arg in args
                )
                log_joint = self.joint.total(points.repeat_interleave(number, 0), repeated, rows)
                parts.append(log_joint.double().reshape(-1, number).mean(1))
        return torch.cat(parts)

    def _block_of(self, datapoint: int) -> tuple[Chunk, SharedBlock]:
        for block, shared in self.blocks:
            if block.start <= datapoint < block.stop:
                return block, shared
        raise InputError(f"datapoint: must be from 0 to {self.joint.num_datapoints - 1}, got {datapoint}")


@guarded
@checked()
def shared_posterior(
    model: Program | Problem,
    guide: Program | None = None,
    data: Data | None = None,
    *,
    settings: Conditioning | None = None,
    evidence: AIS | None = None,
    refinement: Refinement | None = None,
    num_particles: Count = 1000,
    plate: Plate = None,
    seed: Seed = 0,
    progress: bool = True,
) -> SharedPosterior:
    r"""Fit the best guide of a family that is shown only a part C of every datapoint, $x = (C, \bar C)$:

    $$q^*_C = \arg\max_{q \in Q} \mathbb E_{p(\bar C|C)}[\mathcal L[q](C, \bar C)]$$

    K completions of every datapoint are drawn from the model, and one q is refined for all of them; no network is
    trained. `.elbo` is a lower bound of L[q*_C](x_n), too low by about half of `.overfitting`.

    Args:
        model, guide, data, plate: as for `decompose`, or a `Problem` alone. The guide declares what it is shown by its
            attribute `conditions`: a boolean mask over the model's first argument, True where that is shown, or a
            function from its arguments to masks. The family is the guide's own.
        settings: number of completions, see `Conditioning`.
        evidence: settings of the AIS that draws latents given C, with one chain per completion.
        refinement: settings of the refinements.
        num_particles: draws for each ELBO.
        seed: seed of all random numbers.
        progress: whether to show a progress bar once the call has taken two seconds.

    Raises:
        InputError: where the guide uses data that it declares as not shown, where it declares a lookahead (its
            conditions differ between steps, so there is no single shared posterior), or where the model's likelihood
            does not factorise over shown and withheld data.

    Example:
        >>> import torch, pyrogaps as pg
        >>> from pyrogaps.guides.partial import PartialNormal
        >>> from pyrogaps.models.linear_gaussian import LinearGaussian
        >>> model, guide, x = LinearGaussian.random(4, 2), PartialNormal(4, 2, (8,), shown=2), torch.randn(3, 4)
        >>> small = {"settings": pg.Conditioning(4, 4), "evidence": pg.AIS(2, 4), "refinement": pg.Refinement(20)}
        >>> pg.shared_posterior(model, guide, x, **small).elbo.value.shape
        torch.Size([3])
    """
    given = model.guide if isinstance(model, Problem) else guide
    if given is None:
        raise InputError("guide: missing. Pass the guide, or a Problem with one")
    declaration = declared(given)
    if not isinstance(declaration, Shown):
        raise InputError(
            "guide: it must declare conditions, because without them, or with a lookahead, there is no single shared "
            "posterior. Set its attribute conditions to a boolean mask over the data, True where they are shown"
        )
    problem = Problem.of(model, guide, data, plate)
    joint, density = problem.joint, problem.guide_density()
    check_no_leak(density, declaration)
    run, refiner = Run(seed, BLOCK, progress), Refiner(own_family(density), refinement or Refinement())
    sharing = sharing_of(
        problem, declaration, evidence or AIS(), refiner, settings or Conditioning(), num_particles, run
    )
    blocks = run.map_shown(lambda block, run: (block, sharing.fit(block)), joint, "shared posterior", alone=True)
    chunks, shared = [block for block, _ in blocks], [fitted for _, fitted in blocks]
    guides = tuple(
        RefinedGuide(joint, chunks, [s.halves[half] for s in shared], [s.progress[half] for s in shared])
        for half in (0, 1)
    )
    return SharedPosterior(
        joint,
        _joined([s.elbo for s in shared]),
        _joined([s.on_completions for s in shared]),
        torch.cat([s.overfitting for s in shared]),
        (guides[0], guides[1]),
        torch.cat([torch.full((len(block),), len(s.completions)) for block, s in blocks]),
        blocks,
    )


def _joined(estimates: list[Estimate]) -> Estimate:
    return Estimate(
        torch.cat([e.value for e in estimates]), torch.cat([e.mcse for e in estimates]), estimates[0].direction
    )
