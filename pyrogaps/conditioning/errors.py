r"""The Monte Carlo error of L[q*_C]: by how much it would change with other completions.

q is fitted to K completions with log densities $g_k(z) = \log p(C_n, \bar C_k, z)$. Each of them shifts
log q by $(g_k - \bar g) / K$. To first order in 1 / K,

$$\mathrm{Var}(\mathcal L[\hat q](x_n)) =
  \frac 1K \mathrm{Var}_k \, \mathrm{Cov}_q(\log p(x_n, z), g_k(z) - \bar g(z))$$

$$\mathbb E[\mathcal L[\hat q](x_n)] - \mathcal L[q^*_C](x_n) = -\frac 1{2K} \mathbb E_k \mathrm{Var}_q(g_k - \bar g)$$

This is exact for Gaussians, where the bias is that of a chi-squared variable: it varies by at most sqrt(2) times its
mean, which it reaches where all completions shift q in one direction. K counts independent completions. Those drawn
from copies of one latent, which resampling makes, are not: their number is the effective sample size of the latents.

A family that cannot follow every such shift, or a noisy refinement, makes another error; the difference of two halves
of the completions has that error too. One difference does not measure it; the differences of a block of datapoints
do.
"""

from dataclasses import dataclass

import torch
from scipy import special  # type: ignore[import-untyped]
from torch import Tensor

from pyrogaps.capture import GradientEvaluator
from pyrogaps.conditioning.completions import Completions
from pyrogaps.density.draws import BlockedGuide, Posterior
from pyrogaps.log_weights import Estimate
from pyrogaps.streams import Chunk, Stream

NUM_DRAWS = 128
NUM_COMPLETIONS = 16
FACTORS = torch.logspace(0, 4, 81, dtype=torch.float64)
# The variance that so many draws and completions of two halves give has itself a relative variance of
# 4 / NUM_DRAWS + 1 / (NUM_COMPLETIONS - 1), that of 20 degrees of freedom. Normal intervals of the stated error then
# cover as often as Student's t would of the estimated one.
DEGREES = 2 / (4 / NUM_DRAWS + 1 / (NUM_COMPLETIONS - 1))
STUDENT = float(special.stdtrit(DEGREES, 0.975) / special.ndtri(0.975))


@dataclass(frozen=True)
class FitError:
    """What independent completions do to L[q](x_n): its `variance` in nats squared, and how much too low it is on
    average, `bias` in nats; `(B,)` each.
    """

    variance: Tensor
    bias: Tensor


def completions_error(
    evaluator: GradientEvaluator,
    guide: Posterior,
    completions: Completions,
    which: Tensor,
    block: Chunk,
    stream: Stream,
) -> FitError:
    """The error of L[q](x_n) that comes from the completions `which` that q is fitted to.

    It is estimated from a few of them, evenly spaced, and from draws of q.
    """
    some = which[torch.linspace(0, len(which) - 1, min(NUM_COMPLETIONS, len(which))).round().long()]
    with torch.no_grad():
        z, _ = BlockedGuide(guide, block).sample(NUM_DRAWS, stream)
        density = evaluator.bind(block.indices, NUM_DRAWS, whole=True)
        (at_data,) = density.values(z)
        each = torch.stack([density.on(completions.rows(k.expand(NUM_DRAWS))).values(z)[0] for k in some]).double()
    shift = each - each.mean(0)
    shift = shift - shift.mean(1, keepdim=True)
    misfit = at_data.double() - each.mean(0)
    covariance = (shift * (misfit - misfit.mean(0))).mean(1)
    bias = shift.square().mean((0, 1)) * len(some) / (len(some) - 1) / (2 * len(which))
    return FitError(covariance.var(0) / len(which), bias)


def mean_of_halves(first: Estimate, second: Estimate, errors: list[FitError], ess: Tensor, number: int) -> Estimate:
    """The mean of the estimates of two halves, its error that of the completions, of the refinements and of the draws.

    `errors` are the halves' errors from completions, of which `ess` of `number` are independent. The mean varies by
    half the variance of a half, and is as much too low as each. The halves' differences, half of which have the same
    variance, correct both parts where they are too small: that of completions on the whole, and that of draws
    datapoint by datapoint, because the noise of a refinement has the form of its draws.
    """
    measured = ((first.value - second.value) / 2).square()
    draws = (first.mcse.square() + second.mcse.square()) / 4
    copies = number / ess.to(draws.device)
    biases = torch.stack([error.bias for error in errors]) * copies
    variances = torch.stack([error.variance for error in errors]) * copies + 2 * biases.square()
    fitted = STUDENT**2 * (variances.mean(0) / len(errors) + biases.mean(0).square())
    total = (measured.sum() / (fitted + draws).sum()).nan_to_num(1.0).clamp(min=1.0)
    factors = FACTORS.to(draws)[:, None]
    ratios = (measured / (total * fitted + factors * draws)).nan_to_num(0.0).mean(1)
    enough = (ratios <= 1).nonzero()
    factor = FACTORS[int(enough[0]) if len(enough) else -1]
    return Estimate((first.value + second.value) / 2, (total * fitted + factor * draws).sqrt(), "lower bound")


def mean_over_completions(log_weights: Tensor, number: int) -> Estimate:
    """The mean of log-weights `(S, B)`; draw s uses the completion s modulo `number`.

    Draws with the same completion are not independent, so the completions are what the error counts.
    """
    weights = log_weights.double()
    turn = torch.arange(len(weights), device=weights.device) % number
    count = min(number, len(weights))
    sums = weights.new_zeros(count, *weights.shape[1:]).index_add_(0, turn, weights - weights.mean(0))
    mcse = (sums.square().sum(0) * count / max(count - 1, 1)).sqrt() / len(weights)
    return Estimate(weights.mean(0), mcse, "lower bound")
