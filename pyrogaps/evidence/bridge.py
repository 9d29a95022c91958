r"""`Bridge`: log p(x) by bridge sampling between a fitted Gaussian and annealed chains.

With draws $z_1, \dots, z_{n_1}$ of a Gaussian g, and others $z'_1, \dots, z'_{n_2}$ of the posterior that carry
normalised weights W, the optimal bridge (Meng and Wong, 1996, Statistica Sinica 6, 831-860) has the evidence r as its
fixed point:

$$r = \frac{\frac1{n_1} \sum_i \ell_i / (s_2 \ell_i + s_1 r)}{\sum_j W_j / (s_2 \ell'_j + s_1 r)}, \quad
  \ell = p(x, z) / g(z), \quad s_k = n_k / (n_1 + n_2)$$

Here the second draws are the ends of AIS chains, W their self-normalised weights, and $n_2$ the effective sample size
of these. No term exceeds $1 / s_2$ or $1 / s_1$, so that one far draw cannot decide the result, as it can in importance
sampling. As a ratio of means, the result is consistent but biased, in either direction. It is not a bound.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, NamedTuple

import numpy as np
import torch
from scipy import stats  # type: ignore[import-untyped]
from torch import Tensor

from pyrogaps.capture.slots import Slots
from pyrogaps.density.draws import Posterior
from pyrogaps.errors import counted
from pyrogaps.evidence.ais import Temperatures
from pyrogaps.evidence.climb import widening
from pyrogaps.evidence.importance import Sampler
from pyrogaps.evidence.ladder_settings import LadderSettings
from pyrogaps.evidence.protocol import Columns, Evidence, Measured, Measurement, joined
from pyrogaps.evidence.reliability import enough_trusted, number_unreliable
from pyrogaps.evidence.rungs import Annealer
from pyrogaps.evidence.tails import vouched
from pyrogaps.gaussians import Curvature, anchor_of
from pyrogaps.log_weights import (
    MAX_MCSE,
    MIN_DRAWS,
    Estimate,
    effective_sample_size,
    normalised,
    rounding_error,
    that_count,
)
from pyrogaps.problem import Problem
from pyrogaps.refine import Refiner
from pyrogaps.run import Run
from pyrogaps.settings import Count, Probability, checked, within
from pyrogaps.streams import Chunk

Draws = Annotated[int, within("of at least 16 and at most 1000000")]
# The step lengths change little along the path: a short pilot knows them.
PILOT_TEMPERATURES = 8
HALVINGS = 64  # of the bracket of log r, which leave the rounding of double precision


@checked("evidence")
@dataclass(frozen=True)
class Bridge(Evidence):
    """log p(x) by bridge sampling, with the same settings for every datapoint.

    It combines draws of the Gaussian with the curvature of log p(x, z), as in `Ladder`, with the weighted ends of AIS
    chains from that Gaussian. The result is an estimate, not a bound. It can have a smaller
    error than either the draws or the chains alone. A mode that no chain has reached is missing from it.

    Args:
        num_draws: draws of the Gaussian, each one evaluation of log p(x, z) without its gradient.
        num_chains: AIS chains, rounded up to a multiple of 16.
        num_temperatures, num_leapfrog: temperatures of a chain; leapfrog steps per transition.
        target_acceptance: acceptance rate to which a pilot run tunes step sizes. Its chains are not used.

    Raises `InputError` for a setting out of range.

    Example:
        >>> import torch, pyrogaps as pg
        >>> from pyrogaps.guides.amortized import AmortizedNormal
        >>> from pyrogaps.models.linear_gaussian import LinearGaussian
        >>> model, guide, x = LinearGaussian.random(4, 2), AmortizedNormal(4, 2, (8,)), torch.randn(6, 4)
        >>> estimate = pg.log_evidence(model, guide, x, evidence=pg.Bridge(num_draws=256), referee=False)
        >>> estimate.direction
        'estimate'
    """

    num_draws: Draws = 1024
    num_chains: Draws = 64
    num_temperatures: Temperatures = 16
    num_leapfrog: Count = 1
    target_acceptance: Probability = 0.8

    more: ClassVar[str] = "Raise num_temperatures of Bridge"

    @property
    def num_chains_at_once(self) -> int:
        return self.num_chains

    def prepare(self, problem: Problem, run: Run, refine: Refiner | None = None) -> "BridgeMeasurement":
        return BridgeMeasurement(self, problem, run)


class Bridged(NamedTuple):
    """Bridge estimates for M datapoints, `(M,)` each: log r in nats, its standard error, the degrees of freedom of that
    error, and the effective sample size of the weighted draws.

    Where one draw has all the weight, no error can be told and the value may be anything, above log p(x) too. There, as
    where no weight is above zero, the value is -infinity and the error NaN: the datapoint has no estimate.
    """

    value: Tensor
    mcse: Tensor
    degrees: Tensor
    ess: Tensor


def bridged(drawn: Tensor, ends: Tensor, log_weights: Tensor) -> Bridged:
    r"""The optimal bridge between two sets of log ratios $\log p(x, z) - \log g(z)$.

    With $u = \log \ell + \log (s_2 / s_1) - \log r$ the fixed point solves
    $s_1 \frac1{n_1} \sum_i \sigma(u_i) = s_2 \sum_j W_j \sigma(-u'_j)$. The left side falls in r and the right side
    rises, so bisection always finds it. Its relative mean-square error (Frühwirth-Schnatter, 2004,
    doi:10.1111/j.1368-423X.2004.00125.x) is the sum of those of the two means. That of the weighted mean is
    $\sum_j W_j^2 (\sigma(-u'_j) - \bar\sigma)^2 / \bar\sigma^2$.

    Args:
        drawn: log ratios `(S, M)` at draws of g.
        ends: log ratios `(T, M)` at weighted draws of the posterior.
        log_weights: log-weights `(T, M)` of these draws.
    """
    weights, ess = normalised(log_weights), effective_sample_size(log_weights)
    number = len(drawn)
    odds = (ess / number).log()
    finite = torch.cat([drawn, ends])
    low = torch.where(finite > -torch.inf, finite, torch.inf).amin(0) - float(np.log(number))
    high = finite.amax(0)
    for _ in range(HALVINGS):
        value = 0.5 * (low + high)
        at_draws, at_ends = torch.sigmoid(drawn + odds - value), torch.sigmoid(value - odds - ends)
        above = number * at_draws.mean(0) < ess * (weights * at_ends).sum(0)
        low, high = torch.where(above, low, value), torch.where(above, value, high)
    first = at_draws.var(0) / at_draws.mean(0).square() / number
    mean = (weights * at_ends).sum(0)
    second = (weights * (at_ends - mean)).square().sum(0) / mean.square() * ess / (ess - 1)
    # Welch and Satterthwaite's, of a sum of two variances.
    degrees = (first + second).square() / (first.square() / (number - 1) + second.square() / (ess - 1))
    known = (log_weights > -torch.inf).any(0) & (drawn > -torch.inf).any(0) & torch.isfinite(first + second)
    return Bridged(
        torch.where(known, value, -torch.inf),
        torch.where(known, (first + second).sqrt(), torch.nan),
        torch.nan_to_num(degrees, nan=1.0, posinf=float(number)).clamp(min=1.0),
        ess,
    )


@dataclass(frozen=True, repr=False)
class BridgeEstimate(Estimate):
    """An `Estimate` by bridge sampling. It is not a mean of weights, and may be too high or too low.

    Attributes:
        degrees: `(N,)`, the degrees of freedom of `mcse`.
        num_evaluations: `(N,)`, of log p(x, z) or its gradient, the pilot and the Gaussian included.
    """

    degrees: Tensor = field(default_factory=lambda: torch.empty(0))
    num_evaluations: Tensor = field(default_factory=lambda: torch.empty(0))

    def interval(self, probability: float = 0.95) -> tuple[Tensor, Tensor]:
        """A central confidence interval, `(N,)` each, by Student's t; `reliable` says where to trust it."""
        quantile = torch.from_numpy(np.asarray(stats.t.ppf(0.5 + probability / 2, self.degrees.cpu().numpy())))
        error = self.mcse * quantile.to(self.mcse)
        return self.value - error, self.value + error

    @property
    def examined(self) -> bool:
        """True: every datapoint is judged."""
        return True

    @property
    def reliable(self) -> Tensor:
        """Whether `interval` has its nominal coverage, `(N,)`.

        The Gaussian must have the measured curvature in every direction and the posterior light tails (`vouched`), the
        standard error be 0.2 nats or less, and the chains' weights have an effective sample size of 16 or more. The
        terms of a bridge are bounded, but neither the draws nor the chains reach heavy tails. A
        mode that no draw has reached is missed, unless other starts find it (`doubted`).
        """
        assert self.ess is not None
        assert self.vouched is not None
        reliable = torch.isfinite(self.value) & (self.mcse <= MAX_MCSE)
        reliable = reliable & (self.ess >= MIN_DRAWS) & self.vouched.bool()
        return reliable if self.doubted is None else reliable & ~self.doubted.to(reliable.device)


@dataclass(frozen=True)
class BridgeMeasurement(Measurement):
    """log p(x_n) by bridge sampling."""

    evidence: Bridge
    direction = "estimate of log p(x) (either way)"

    @property
    def estimator(self) -> str:
        return "bridge sampling"

    def measure(self, chunk: Chunk, refined: Posterior | None = None) -> Measured:
        anchor = anchor_of(self.problem, chunk, self.run)
        parts = [self._block(anchor.within(chunk, block), block) for block in chunk.blocks()]
        columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        low, high = (estimate := _estimate(columns)).interval()
        columns |= {"low": low, "high": high, "reliable": estimate.reliable}
        named = {f"log_evidence_{name}".removesuffix("_"): column for name, column in columns.items()}
        return Measured({**named, "acceptance": named.pop("log_evidence_acceptance")})

    def _block(self, anchor: Curvature, block: Chunk) -> dict[str, Tensor]:
        """Columns of a block of at most 64 datapoints, `(B,)` each."""
        settings, slots, run = self.evidence, Slots(self.problem.evaluator, block), self.run.derived("bridge")
        start, everyone = anchor.gaussian.widened(widening(slots.dim)), torch.arange(len(block))
        moves = LadderSettings(num_leapfrog=settings.num_leapfrog, target_acceptance=settings.target_acceptance)
        annealer, length = Annealer(slots, start, moves, run), settings.num_temperatures
        nearest = torch.arange(length) * PILOT_TEMPERATURES // length
        steps = annealer.pilot(everyone, PILOT_TEMPERATURES).steps[nearest]
        ran = annealer.anneal(everyone, settings.num_chains, steps, "chains")
        ends = slots.values(everyone, ran.ends).double() - start.log_density(ran.ends)[0].double()
        drawn = Sampler(slots, start, run).log_weights(everyone, settings.num_draws, "draws")
        result, number = bridged(drawn, ends, ran.log_weights), len(ends)
        rounding = rounding_error(that_count(drawn).to(start.loc.dtype), start.peak[None])
        light, looked = vouched(slots, anchor)
        spent = anchor.num_gradients + annealer.pilot_cost(PILOT_TEMPERATURES) + settings.num_draws
        return {
            "": result.value,
            "mcse": result.mcse.maximum(rounding),
            "ess": result.ess,
            "degrees": result.degrees,
            "draws": torch.full((len(block),), number),
            "evaluations": looked + spent + number * (annealer.cost(length) + 1),
            "vouched": light,
            "acceptance": ran.acceptance.to(result.value.device),
        }

    def notes(self, columns: Columns) -> list[str]:
        errors, costs = columns["log_evidence_mcse"], columns["log_evidence_evaluations"]
        share = (columns["log_evidence_ess"] / columns["log_evidence_draws"]).mean()
        return [
            f"log p(x) by bridge sampling, an estimate and not a bound; {costs.mean():,.0f} evaluations per datapoint; "
            f"effective sample size {share:.0%} of the chains, mean acceptance rate {columns['acceptance'].mean():.2f}",
            f"standard error of log p(x): median {np.median(errors):.3f}, 90th percentile "
            f"{np.quantile(errors, 0.9):.3f}",
        ]

    def cautions(self, columns: Columns) -> list[str]:
        number, unreliable = len(columns["log_evidence"]), number_unreliable(columns)
        if enough_trusted(number - unreliable, number):
            return []
        return [
            f"log p(x), and the gaps measured from it, cannot be trusted for {unreliable:,} of "
            f"{counted(number, 'datapoint')}: their posteriors have tails heavier than Gaussian, or the weights of the "
            "chains are too uneven. Raise num_temperatures of Bridge; if that does not help, use Ladder"
        ]

    def estimate(self, parts: Sequence[Measured]) -> BridgeEstimate:
        return _estimate({name.removeprefix("log_evidence_"): column for name, column in joined(parts).items()})


def _estimate(columns: dict[str, Tensor]) -> BridgeEstimate:
    value = columns[""] if "" in columns else columns["log_evidence"]
    return BridgeEstimate(
        value,
        columns["mcse"],
        "estimate",
        ess=columns["ess"],
        acceptance=columns["acceptance"],
        vouched=columns["vouched"],
        degrees=columns["degrees"],
        num_evaluations=columns["evaluations"],
    )
