"""`MAPA_ELBO`, and `IndexedELBO`, its base class: bounds whose steps take indices of datapoints."""

import math
from typing import Any

import torch
from pyro.infer import ELBO
from torch import Tensor

from pyrogaps.density.data import check_indices
from pyrogaps.density.runs import Program
from pyrogaps.errors import InputError, counted
from pyrogaps.mapa.empiricalized import EmpiricalizedModel
from pyrogaps.mapa.explainers import explainers
from pyrogaps.mapa.paired import Paired
from pyrogaps.mapa.posterior import MapaPosterior
from pyrogaps.settings import Name, Whole, checked


class IndexedELBO(ELBO):
    """A loss whose steps take a batch of indices, `(B,)`, and return the negative mean of a bound over it, nats.

    Steps fetch the rows from the posterior's data. A subclass computes its bound in `draw_bounds`, for a model and an
    encoder that the class `pairing` has checked once. `MAPA_ELBO` describes arguments, attributes and errors.
    """

    pairing: type[Paired]

    def __init__(self, posterior: MapaPosterior, num_top: int, num_samples: int, plate: str | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.name = type(self).__name__
        self.posterior, self.num_top, self.num_samples = posterior, num_top, num_samples
        self._check_sizes()
        self.plate = plate
        self.reset_counts()
        self._programs: tuple[Program, Program] | None = None

    @property
    def num_datapoints(self) -> int:
        """N, the number of datapoints of the posterior's data."""
        return self.posterior.num_datapoints

    @property
    def device(self) -> torch.device:
        """The device of the posterior and its data."""
        return self.posterior.indices.device

    def __repr__(self) -> str:
        kept = (
            f"{self.posterior.num_neighbours} of {counted(self.num_datapoints, 'datapoint')} by {self.posterior.kernel}"
        )
        names = ("num_top", "num_samples", "replacement", "num_draws")
        options = [f"{name}={getattr(self, name)}" for name in names if hasattr(self, name)]
        return f"{self.name}({kept}, {', '.join(options)})"

    def reset_counts(self) -> None:
        """Set all counts of passes to 0."""
        self.num_encoded = self.num_decoded = self.num_scored = 0

    def draw_bounds(self, joint: Any, indices: Tensor) -> tuple[Tensor, int]:
        """One draw of the bound for each of `indices`, `(B,)`, and the number of rows encoded and decoded for it."""
        raise NotImplementedError

    def bounds(self, model: Program, encoder: Program, indices: Tensor) -> Tensor:
        """One draw of the bound for each of the datapoints `indices` `(B,)`: shape `(B,)`, nats, differentiable."""
        check_indices(indices, self.num_datapoints)
        indices = indices.long().to(self.device)
        values, passes = self.draw_bounds(self._paired(model, encoder), indices)
        self.num_encoded += passes
        self.num_decoded += passes
        self.num_scored += len(indices)
        return values

    def minibatches(self, batch_size: int) -> list[Tensor]:
        """One pass over the data, in random order, in batches of indices; the last may be short."""
        return list(torch.randperm(self.num_datapoints, device="cpu").split(batch_size))

    def differentiable_loss(self, model: Program, guide: Program, *args: Any) -> Tensor:
        """-L of one batch of indices, the only argument."""
        if len(args) != 1 or not isinstance(args[0], Tensor):
            raise InputError(
                f"{self.name}: pass only a batch of indices to each step, such as torch.arange(100). The objective "
                "fetches the data itself"
            )
        return -self.bounds(model, guide, args[0]).mean()

    def loss(self, model: Program, guide: Program, *args: Any) -> float:
        """-L of one batch of indices, without gradients."""
        with torch.no_grad():
            return self.differentiable_loss(model, guide, *args).item()

    def loss_and_grads(self, model: Program, guide: Program, *args: Any) -> float:
        """-L of one batch of indices; the gradient is accumulated in the parameters."""
        loss = self.differentiable_loss(model, guide, *args)
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the bound is {-value}. Lower the learning rate, or limit the scales of the distributions"
            )
        if loss.requires_grad:
            loss.backward()
        return value

    def _get_trace(self, model: Program, guide: Program, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError(f"{self.name} scores pairs of datapoints, which a single trace cannot hold")

    def _paired(self, model: Program, encoder: Program) -> Paired:
        """The checked pair of `model` and `encoder`, made at the first call."""
        if self._programs is None or self._programs[0] is not model or self._programs[1] is not encoder:
            self._joint = self.pairing(model, encoder, self.posterior.data, self.plate)
            self._programs = model, encoder
        return self._joint

    def _check_sizes(self) -> None:
        if self.num_top + self.num_samples < 1:
            raise InputError(f"{self.name}: num_top and num_samples are both 0. Raise one of them")
        number, kept = self.posterior.num_neighbours, self._kept()
        if self.num_top > number:
            raise InputError(f"{self.name}: num_top={self.num_top}, but there are only {number} {kept}. Lower num_top")
        if self.num_samples and self.num_top == number:
            raise InputError(
                f"{self.name}: num_top={self.num_top} already includes all {number} {kept}, so none remain to draw. "
                "Set num_samples=0"
            )

    def _check_without_replacement(self) -> None:
        number = self.posterior.num_neighbours
        if self.num_samples > number - self.num_top:
            raise InputError(
                f"{self.name}: num_samples={self.num_samples} is too large to draw without replacement. Lower it to "
                f"{number - self.num_top}, because num_top={self.num_top} leaves no more of the {number} {self._kept()}"
            )

    def _kept(self) -> str:
        """A noun for the datapoints of a row of the posterior."""
        sparse = self.posterior.num_neighbours < self.posterior.num_datapoints
        return "neighbours that the posterior keeps per datapoint" if sparse else "datapoints"


@checked("MAPA_ELBO")
class MAPA_ELBO(IndexedELBO):
    r"""A lower bound of the empiricalized model's log-likelihood under a fixed posterior, for `pyro.infer.SVI`.

    $$\mathcal L = \frac1B \sum_n \mathbb E_{i_1..i_S} \log \frac1N \Big\{ \sum_{k \in K_n} p_\theta(x_n | h_\phi(x_k))
      + \sum_s w_s \, p_\theta(x_n | h_\phi(x_{i_s})) \Big\}
      \le \frac1B \sum_n \log \frac1N \sum_i p_\theta(x_n | h_\phi(x_i))$$

    in nats per datapoint. K_n are the K most probable explanations of x_n under the posterior q(.|x_n). The S others
    are drawn from q~, which is q without K_n, renormalised. With replacement, w_s = 1 / (S q~(i_s|x_n)). Without
    replacement, `log_weights_without_replacement` gives w_s, and the variance is never larger. Either way the term in
    braces is unbiased, and the bound rises with S and with K. With S > 0 it is tight if q is the empiricalized model's
    own posterior. With K = 1 and S = 0 it is an autoencoder's reconstruction log-likelihood minus log N.

    No gradient flows through q~. A posterior that keeps M < N neighbours has q~ = 0 for all others; the bound leaves
    them out and remains a lower bound. The model's prior is not used.

    Pass it to `SVI(model, encoder, optim, loss=MAPA_ELBO(posterior, ...))` and call `svi.step(indices)` with a batch
    of indices, `(B,)`; the step fetches the rows from the posterior's data. Or pass it to `pyrogaps.train(model,
    encoder, data, objective=...)`, where data are the posterior's. `model` is a Pyro model with a data plate;
    `encoder`, h, is a guide whose sites are Deltas (see `EmpiricalizedModel`). Steps return the loss -L. A step encodes
    and decodes each datapoint once, however many others it explains.

    Args:
        posterior: from `mapa_posterior`; its data are the training data.
        num_top: K.
        num_samples: S.
        replacement: whether the S are drawn with replacement.
        plate: the data plate's name, where it cannot be found.

    Attributes:
        num_encoded, num_decoded: datapoints encoded and decoded in all steps and evaluations so far.
        num_scored: datapoints of all batches so far; `num_decoded / num_scored` is the number of passes per datapoint.

    Raises:
        InputError: for K + S < 1; for K or S larger than the M neighbours allow; for indices that are empty, out of
            range or no whole numbers; and, at the first step, for programs that `EmpiricalizedModel` refuses.
        FloatingPointError: where a loss is not finite, before any gradient is taken.

    Source: Y. Yacoby et al. (AABI 2024, arXiv:2403.08941).

    Example:
        >>> import torch, pyrogaps as pg
        >>> from pyrogaps.guides.delta import AmortizedDelta
        >>> from pyrogaps.models.linear_gaussian import LinearGaussian
        >>> model, encoder, x = LinearGaussian.random(4, 2), AmortizedDelta(4, 2, (8,)), torch.randn(20, 4)
        >>> bound = pg.MAPA_ELBO(pg.mapa_posterior(x, "gaussian", bandwidth=1.0), num_top=1, num_samples=3)
        >>> pg.train(model, encoder, x, objective=bound, num_epochs=2, progress=False).num_epochs
        2
    """

    pairing = EmpiricalizedModel

    def __init__(
        self,
        posterior: MapaPosterior,
        *,
        num_top: Whole = 1,
        num_samples: Whole = 0,
        replacement: bool = True,
        plate: Name | None = None,
    ) -> None:
        super().__init__(posterior, num_top, num_samples, plate)
        self.replacement = replacement
        if not replacement:
            self._check_without_replacement()

    def draw_bounds(self, joint: EmpiricalizedModel, indices: Tensor) -> tuple[Tensor, int]:
        """One draw of the bound for each of `indices`, `(B,)`, and the number of rows encoded and decoded for it."""
        columns, log_weights = explainers(
            self.posterior, indices, self.num_top, self.num_samples, replacement=self.replacement
        )
        log_likelihood, passes = joint.log_likelihood(indices, columns)
        # Weights vary over many orders of magnitude; in double precision their logarithms lose no digits that matter.
        terms = log_likelihood.double() + log_weights.to(log_likelihood.device)
        return terms.logsumexp(1) - math.log(self.posterior.num_datapoints), passes
