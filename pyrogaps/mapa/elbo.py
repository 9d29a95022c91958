"""`MAPA_ELBO`: the bound that trains a model against a posterior known before training."""

import math

from torch import Tensor

from pyrogaps.mapa.empiricalized import EmpiricalizedModel
from pyrogaps.mapa.explainers import explainers
from pyrogaps.mapa.indexed import IndexedELBO
from pyrogaps.mapa.posterior import MapaPosterior


class MAPA_ELBO(IndexedELBO):
    r"""A lower bound of the empiricalized model's log-likelihood, for `pyro.infer.SVI`, by a posterior that is fixed.

    $$\mathcal L = \frac1B \sum_n \mathbb E_{i_1..i_S} \log \frac1N \Big\{ \sum_{k \in K_n} p_\theta(x_n | h_\phi(x_k))
      + \sum_s w_s \, p_\theta(x_n | h_\phi(x_{i_s})) \Big\}
      \le \frac1B \sum_n \log \frac1N \sum_i p_\theta(x_n | h_\phi(x_i))$$

    in nats per datapoint. K_n are the K most probable explanations of x_n under the posterior q(.|x_n); the others are
    drawn from q~, which is q without K_n, renormalised. With replacement w_s = 1 / (S q~(i_s|x_n)); without, w_s is
    that of `log_weights_without_replacement`, of no more variance. Either way the braces are unbiased, and the bound
    rises with S and with K; with q the empiricalized model's own posterior and S > 0 it is tight. No gradient flows
    through q~. With K = 1 and S = 0 it is an autoencoder's reconstruction log-likelihood less log N. A posterior that
    keeps M < N neighbours has q~ = 0 elsewhere: the bound leaves them out and is a lower bound all the same. The
    model's prior plays no part.

    Hand it to `SVI(model, encoder, optim, loss=MAPA_ELBO(posterior, ...))` and call `svi.step(indices)` with a batch
    of indices, `(B,)`: the rows are fetched from the posterior's data. Or to `pyrogaps.train(model, encoder, data,
    objective=...)`, with the posterior's data. `model` is a Pyro model with a data plate,
    `encoder`, h, a guide whose sites are Deltas (see `EmpiricalizedModel`). Steps return the loss -L. Each datapoint
    that takes part in a step, once or often, is encoded and decoded once.

    Args:
        posterior: of `mapa_posterior`; its data are the training data.
        num_top: K.
        num_samples: S.
        replacement: whether the S are drawn with replacement.
        plate: the data plate's name, where it cannot be found.

    Attributes:
        num_encoded, num_decoded: datapoints encoded and decoded in all steps and evaluations so far.
        num_scored: datapoints of all batches so far; `num_decoded / num_scored` are the passes per point.

    Raises:
        InputError: for K + S < 1, K or S that the M neighbours do not suffice for, indices that are empty, out of range
            or no whole numbers, and for what `EmpiricalizedModel` refuses, at the first step.
        FloatingPointError: where a loss is not finite, before any gradient is taken.

    Source: Y. Yacoby et al. (AABI 2024, arXiv:2403.08941).
    """

    pairing = EmpiricalizedModel

    def __init__(
        self,
        posterior: MapaPosterior,
        *,
        num_top: int = 1,
        num_samples: int = 0,
        replacement: bool = True,
        plate: str | None = None,
    ) -> None:
        super().__init__(posterior, num_top, num_samples, plate)
        self.replacement = replacement
        if not replacement:
            self._check_without_replacement()

    def draw_bounds(self, joint: EmpiricalizedModel, indices: Tensor) -> tuple[Tensor, int]:
        """One draw of the bound for each of `indices`, `(B,)`, and how many rows were encoded and decoded for it."""
        columns, log_weights = explainers(
            self.posterior, indices, self.num_top, self.num_samples, replacement=self.replacement
        )
        log_likelihood, passes = joint.log_likelihood(indices, columns)
        # Weights may be of any size; in double precision their logarithms lose nothing that matters.
        terms = log_likelihood.double() + log_weights.to(log_likelihood.device)
        return terms.logsumexp(1) - math.log(self.posterior.num_datapoints), passes
