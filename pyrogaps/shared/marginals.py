r"""log p(x_n | theta) of all datapoints at many draws of theta, between a lower and an upper estimate.

For each theta and datapoint a Gaussian is fitted to the curvature of log p(x_n, z | theta) and widened; K draws from it
give independent weights with $E[w] = p(x_n | theta)$. Their log-mean-exp is a lower bound in expectation, coupled
chains of the same weights give an upper one, see `two_sided`. Weights are independent across datapoints and draws of
theta, so that the product over datapoints of their means is unbiased for p(x | theta).
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyrogaps.bounds import refuse_nan
from pyrogaps.capture import BoundDensity, GradientEvaluator
from pyrogaps.density.hierarchy import Hierarchy
from pyrogaps.evidence.climb import widening
from pyrogaps.gaussians import Gaussian, anchor_of, settled_by_curvature
from pyrogaps.gaussians.curvature import NUM_PASSES
from pyrogaps.log_weights import effective_sample_size, log_mean_exp
from pyrogaps.problem import Problem
from pyrogaps.run import Run
from pyrogaps.streams import BLOCK, Chunk, chunks
from pyrogaps.two_sided import two_sided

Values = dict[str, Tensor]
# Weights for each datapoint and draw of theta: as many as a pilot asks for, within these.
MIN_WEIGHTS, MAX_WEIGHTS, PILOT_WEIGHTS = 16, 2048, 64
MAX_POINTS = 64  # of a datapoint at once
# Fresh weights where chains have not met, times K.
MAX_FRESH = 64


@dataclass(frozen=True)
class Marginals:
    """log p(x | theta), summed over datapoints, by `num_weights` weights for each.

    Attributes:
        hierarchy: the model of the datapoints given theta.
        evaluator: of log p(x_n, z | theta) at some theta.
        references: for each chunk of datapoints, Gaussians at some theta, where fits begin.
        num_weights: K; 0 where there are no local latents left, so that log p(x_n | theta) is known.
    """

    hierarchy: Hierarchy
    evaluator: GradientEvaluator
    references: list[tuple[Chunk, Gaussian | None]]
    num_weights: int
    run: Run

    @classmethod
    def of(cls, hierarchy: Hierarchy, local: Problem, values: Values, run: Run) -> "Marginals":
        """Those of `local`, the problem of the datapoints given the theta of `values`, before a pilot."""
        known = {name: values[name] for name in hierarchy.names}
        evaluator = GradientEvaluator(local.joint.over(hierarchy.at(known)), local.mode, quiet=True)
        pieces, references = chunks(local.num_datapoints, BLOCK), []
        with run.random_state_kept(local.joint):
            for chunk in pieces:
                references.append((chunk, anchor_of(local, chunk, run).gaussian if local.dim else None))
        return cls(hierarchy, evaluator, references, PILOT_WEIGHTS if local.dim else 0, run)

    @property
    def cost(self) -> int:
        """Evaluations for each draw of theta."""
        each = 2 * NUM_PASSES * self.evaluator.joint.dim + max(self.num_weights, 1)
        return each * self.evaluator.joint.num_datapoints

    def piloted(self, values: list[Values], variance: float) -> "Marginals":
        """With as many weights as bring the variance of log p(x | theta) down to `variance`, by a pilot at `values`."""
        if not self.num_weights:
            return self
        weights = torch.cat([self._weights(values, place, "pilot")[0] for place in range(len(self.references))], -1)
        relative = self.num_weights / effective_sample_size(weights) - 1
        needed = float(relative.nan_to_num(nan=torch.inf).sum(-1).mean()) / variance
        number = MIN_WEIGHTS
        while number < min(needed, MAX_WEIGHTS):
            number *= 2
        return Marginals(self.hierarchy, self.evaluator, self.references, number, self.run)

    def __call__(self, values: list[Values], block: int) -> tuple[Tensor, Tensor]:
        """Lower and upper estimates of log p(x | theta) `(T,)` at the T draws `values`, with numbers of a block."""
        lower = torch.zeros(len(values), dtype=torch.float64)
        upper = torch.zeros_like(lower)
        for place in range(len(self.references)):
            low, high = self._exact(values, place) if not self.num_weights else self._bounded(values, place, block)
            lower, upper = lower + low.sum(1).cpu(), upper + high.sum(1).cpu()
        return lower, upper

    def _exact(self, values: list[Values], place: int) -> tuple[Tensor, Tensor]:
        chunk, joint = self.references[place][0], self.evaluator.joint
        z = joint.zeros(len(chunk))[None]
        parts = [joint.over(self.hierarchy.at(self._known(each)))(z, chunk.indices)[0] for each in values]
        exact = refuse_nan(torch.stack(parts).double(), chunk.indices)
        return exact, exact

    def _bounded(self, values: list[Values], place: int, block: int) -> tuple[Tensor, Tensor]:
        """Lower and upper estimates `(T, B)` for the datapoints of a chunk."""
        weights, proposals = self._weights(values, place, f"{block}")
        number, width = len(values), weights.shape[-1]
        generator = self._generator(f"chains {block}", place)
        calls = iter(range(1 << 30))

        def uniforms(rows: int) -> Tensor:
            drawn = torch.rand(rows, number * width, generator=generator, dtype=torch.float64, device=generator.device)
            return drawn.to(weights.device)

        def more(positions: Tensor, rows: int) -> Tensor:
            fresh = torch.empty(rows, len(positions), dtype=torch.float64, device=weights.device)
            noise = self._generator(f"fresh {block} {next(calls)}", place)
            draws = positions.cpu() // width
            for draw in draws.unique().tolist():
                mine = (draws == draw).nonzero()[:, 0]
                drawn = proposals[draw].weights(rows, noise)
                fresh[:, mine] = drawn[:, positions.cpu()[mine] % width]
            return fresh

        bounds = two_sided(weights.flatten(1), uniforms, more, max_fresh=MAX_FRESH * len(weights))
        return log_mean_exp(weights), bounds.upper.reshape(number, width)

    def _weights(self, values: list[Values], place: int, name: str) -> tuple[Tensor, list["Proposal"]]:
        """Log-weights `(K, T, B)` for the datapoints of a chunk, and where they come from."""
        chunk, reference = self.references[place]
        assert reference is not None
        joint, noise = self.evaluator.joint, self._generator(f"weights {name}", place)
        count, dim = self.num_weights, joint.dim
        points = [min(number, MAX_POINTS) for number in (2 * dim, count)]
        bound = [self.evaluator.bind(chunk.indices, each, whole=True, checked=place > 0) for each in points]
        data = [self.hierarchy.data.fetch(chunk.indices.repeat(each)) for each in points]
        proposals = []
        for each in values:
            known = self._known(each)
            slopes, heights = (b.on((*args, known)) for b, args in zip(bound, data, strict=True))
            fit = settled_by_curvature(reference, partial(_gradients, slopes, reference.loc))
            proposals.append(Proposal(fit.gaussian.widened(widening(dim)), heights, chunk))
        return torch.stack([proposal.weights(count, noise) for proposal in proposals], 1), proposals

    def _known(self, values: Values) -> Values:
        return {name: values[name] for name in self.hierarchy.names}

    def _generator(self, name: str, place: int) -> torch.Generator:
        generator = torch.Generator(self.evaluator.joint.device)
        stream = self.run.derived("shared", name).stream("local weights")
        return generator.manual_seed(stream.seed_of(place))


def _gradients(density: BoundDensity, others: Tensor, positions: Tensor, z: Tensor) -> Tensor:
    """Gradients at `z` `(S, M, dim)` of the datapoints at `positions`; those of the chunk are always run together."""
    positions = positions.to(z.device)
    points = others.expand(len(z), *others.shape).clone()
    points[:, positions] = z
    return density.gradients(points)[0][:, positions]


@dataclass(frozen=True)
class Proposal:
    """Gaussians at the datapoints of a chunk given one theta, and the density that their draws are scored with."""

    gaussian: Gaussian
    density: BoundDensity
    chunk: Chunk

    def weights(self, number: int, generator: torch.Generator) -> Tensor:
        """log p(x_n, z | theta) - log q(z) `(number, B)` of fresh draws, in double precision."""
        loc = self.gaussian.loc
        noise: Any = torch.randn(number, *loc.shape, generator=generator, dtype=loc.dtype, device=loc.device)
        z = self.gaussian.draw(noise)
        weights = self.density.values(z)[-1].double() - self.gaussian.log_density(z)[0].double()
        return refuse_nan(weights, self.chunk.indices)
