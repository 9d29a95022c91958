r"""What drawing explanations without replacement brings: variance of the inner estimate, and the bound.

All from a table of log p(x_n | z_i), in which the sum that the bound's braces estimate is exact. With replacement their
variance is known in closed form. Without, it follows from the weights W_i = p(D | i first) / p(D) of a drawn set D:

$$E\big[(\sum_{s \in D} W_s f_s)^2\big] = \sum_i f_i \, E\big[\sum_{s \in D} W_s f_s \,\big|\, i \text{ first}\big].$$

Each i is drawn as it counts in the variance with replacement, the rest of D after it. Plain draws would not do: where q
is narrow, most of the variance is in explanations that are hardly ever drawn.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pyro
import torch
from torch import Tensor

import pyrogaps as pg
from benchmarks.mapa_costs.pair import Pair
from benchmarks.mapa_costs.settings import BATCH_SIZE, Settings
from pyrogaps.datasets import Digits
from pyrogaps.mapa import EmpiricalizedModel, MapaPosterior, explainers, log_weights_without_replacement
from pyrogaps.models.synthetic import SyntheticData
from pyrogaps.streams import seeded

TITLE = "The inner estimate with and without replacement, K = 1: relative variance, bias in standard errors; L in nats"
COLUMNS = (
    *("data", "S", "variance with", "without", "without / with", "5%", "95%", "median ratio"),
    *("bias with", "bias without", "L with", "L without", "gain", "+-", "log-likelihood"),
)
NUM_TOP, NUM_SAMPLES, NUM_RESAMPLES = 1, (3, 10, 30), 1000
# Of these numbers of epochs and of alphas, 0.6 comes nearest to the true posterior.
ALPHA, NUM_EPOCHS = 0.6, 20


@dataclass(frozen=True)
class Case:
    """A dense posterior, and log p(x_n | z_i) `(N, N)`."""

    name: str
    posterior: MapaPosterior
    log_likelihood: Tensor

    @property
    def exact(self) -> Tensor:
        """log sum_i p(x_n | z_i), `(N,)`."""
        return self.log_likelihood.logsumexp(1)

    def rest(self) -> tuple[Tensor, Tensor]:
        """log q~ and the log of the share in the exact sum, of all but the K most probable, `(N, N - K)` both."""
        log_q = self.posterior.log_q[:, NUM_TOP:].log_softmax(1)
        shares = self.log_likelihood - self.exact[:, None]
        return log_q, shares.gather(1, self.posterior.indices[:, NUM_TOP:].long())


@dataclass(frozen=True)
class Draws:
    """Of one way to draw: the inner estimate's variance `(N,)` in units of the exact sum, and draws of it `(R, N)`."""

    variance: Tensor
    log_estimates: Tensor
    exact: Tensor

    def bias(self) -> float:
        """Mean error of the draws in standard errors. These come from `variance`: few draws show too little of it."""
        error = ((self.log_estimates - self.exact).exp() - 1).mean()
        return float(error / self.variance.mean().div(self.log_estimates.numel()).sqrt())

    def bounds(self) -> Tensor:
        """L of every draw, `(R,)`."""
        return self.log_estimates.mean(1) - math.log(len(self.exact))


def rows(settings: Settings) -> Iterator[list[object]]:
    """A line for every data set and S."""
    with seeded(settings.seed, "replacement"):
        for case in cases(settings):
            for number in NUM_SAMPLES:
                with torch.no_grad():
                    yield _row(case, number, settings.num_draws)


def cases(settings: Settings) -> Iterator[Case]:
    """Figure-8 with the true decoder and latents, and digits with networks trained for a moment."""
    number = 60 if settings.quick else 500
    data = SyntheticData("figure-8", number, 1, 1, settings.seed)
    for factor in (1, 2):
        posterior = pg.mapa_posterior(data.train, "gaussian", bandwidth=factor * float(data.truth.variance))
        joint = EmpiricalizedModel(data.truth, data.latents["train"], posterior.data)
        yield Case(f"figure-8, bandwidth {factor} x variance", posterior, table(joint, number))
    posterior = pg.mapa_posterior(Digits(num_train=number, num_test=1).train, "bernoulli", bandwidth=ALPHA)
    pair = trained(posterior)
    joint = EmpiricalizedModel(pair.model, pair.guide, posterior.data)
    yield Case(f"digits, alpha {ALPHA}", posterior, table(joint, number))


def trained(posterior: MapaPosterior) -> Pair:
    """Decoder and encoder after some epochs of MAPA."""
    pyro.clear_param_store()
    x = posterior.data.fetch(torch.arange(posterior.num_datapoints))[0]
    pair = Pair(pg.MAPA_ELBO(posterior, num_top=NUM_TOP, num_samples=9), x)
    with pyro.validation_enabled(False):
        for _ in range(NUM_EPOCHS):
            for indices in torch.randperm(len(x)).split(BATCH_SIZE):
                pair.svi.step(indices)
    return pair


def table(joint: EmpiricalizedModel, number: int) -> Tensor:
    """log p(x_n | z_i), `(N, N)`, double precision."""
    everyone = torch.arange(number)
    with torch.no_grad():
        return joint.log_likelihood(everyone, everyone.expand(number, -1))[0].double()


def _row(case: Case, number: int, num_draws: int) -> list[object]:
    log_q, log_share = case.rest()
    variances = variance_with(log_q, log_share, number), variance_without(log_q, log_share, number, num_draws)
    ways = zip(variances, (True, False), strict=True)
    one, other = (Draws(v, log_estimates(case, number, way, num_draws), case.exact) for v, way in ways)
    some = torch.randint(len(log_q), (NUM_RESAMPLES, len(log_q)))
    ratios = other.variance[some].mean(1) / one.variance[some].mean(1)
    low, high = ratios.quantile(torch.tensor([0.05, 0.95]).to(ratios)).tolist()
    means = [float(part.variance.mean()) for part in (one, other)]
    median = float((other.variance / one.variance).median())
    gain = other.bounds() - one.bounds()
    bounds = [float(one.bounds().mean()), float(other.bounds().mean()), float(gain.mean())]
    whole = float(case.exact.mean()) - math.log(len(log_q))
    error = float(gain.std() / num_draws**0.5)
    ratio = [means[1] / means[0], low, high, median]
    return [case.name, number, *means, *ratio, one.bias(), other.bias(), *bounds, error, whole]


def log_estimates(case: Case, number: int, replacement: bool, num_draws: int) -> Tensor:
    """Draws of the log of the braces but for their 1 / N, `(R, N)`."""
    parts = []
    for indices in torch.arange(len(case.log_likelihood)).repeat(num_draws).split(BATCH_SIZE):
        columns, log_weights = explainers(case.posterior, indices, NUM_TOP, number, replacement=replacement)
        parts.append((case.log_likelihood[indices].gather(1, columns) + log_weights).logsumexp(1))
    return torch.cat(parts).reshape(num_draws, -1)


def variance_with(log_q: Tensor, log_share: Tensor, number: int) -> Tensor:
    """Relative variance `(N,)` of the estimate with `number` draws with replacement, exact."""
    return ((2 * log_share - log_q).exp().sum(1) - log_share.exp().sum(1).square()) / number


def variance_without(log_q: Tensor, log_share: Tensor, number: int, num_draws: int) -> Tensor:
    """Relative variance `(N,)` of the estimate with `number` draws without replacement, unbiased."""
    parts = zip(log_q.split(BATCH_SIZE), log_share.split(BATCH_SIZE), strict=True)
    return torch.cat([sum(_excess(*part, number) for _ in range(num_draws)) / num_draws for part in parts])


def _excess(log_q: Tensor, log_share: Tensor, number: int) -> Tensor:
    """One draw of the second moment, less the square of the mean."""
    # Half by share: by the variance alone, what all but q = p leaves out would be drawn too seldom.
    log_r = torch.logaddexp(log_share.log_softmax(1), (2 * log_share - log_q).log_softmax(1)) - math.log(2)
    first = log_r.exp().multinomial(1)
    keys = log_q - torch.empty_like(log_q).exponential_().log()
    drawn = keys.scatter(1, first, torch.inf).topk(number, 1).indices
    log_rest = log_q.scatter(1, drawn, -torch.inf).logsumexp(1)
    log_weights = log_weights_without_replacement(log_q.gather(1, drawn), log_rest)
    estimate = (log_weights + log_share.gather(1, drawn)).exp().sum(1)
    importance = (log_share - log_r).gather(1, first).exp()[:, 0]
    return importance * (estimate - log_share.exp().sum(1))
