"""`IWAE_ELBO`: the importance-weighted bound of each datapoint as a loss for `pyro.infer.SVI`."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pyro.infer import ELBO
from pyro.infer.enum import get_importance_trace
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.messenger import unwrap
from pyro.util import warn_if_nan
from torch import Tensor

from pyrogaps.density.runs import Program
from pyrogaps.errors import InputError
from pyrogaps.objectives.gradients import CutDraws, doubly_reparametrised, score_surrogate
from pyrogaps.objectives.particles import SameSubsamples, read_particles
from pyrogaps.settings import Count, Plate, checked


@checked("IWAE_ELBO")
@dataclass
class IWAE_ELBO(ELBO):
    r"""The importance-weighted bound (Burda et al., arXiv:1509.00519) of every datapoint, summed over the data plate.

    $$\sum_n c \, \log \frac1K \sum_{k=1}^K \frac{p(x_n, z_{nk})}{q(z_{nk} | x_n)}, \quad z_{nk} \sim q(z | x_n),$$

    in nats; a lower bound of $\sum_n \log p(x_n)$ in expectation, which grows with K and equals the ELBO for K = 1. The
    plate's scale c = N / n (a plate of size N with n rows) stands outside the logarithm, so that the bound is unbiased
    under subsampling. (`pyro.infer.RenyiELBO` raises the weights to the power c and exceeds the evidence.) Plates
    inside the data plate are summed; a user's `poutine.scale` stays inside the logarithm.

    The loss is the negative bound. Its gradient is unbiased: by reparametrisation if the guide's distributions allow
    it, otherwise by the score function with leave-one-out baselines (VIMCO, arXiv:1602.06725).

    Args:
        num_particles: K.
        doubly_reparametrised: estimate the guide's gradient by Tucker et al.'s doubly reparametrised estimator
            (arXiv:1810.04152). It is unbiased too, and its signal-to-noise ratio does not fall as K grows. The model's
            gradient is unchanged. It costs a second backward pass through the model and needs a guide whose
            distributions can all be reparametrised and scored at any point.
        vectorize_particles: run all particles at once, in a plate left of all others, as Pyro's losses do; the model
            and the guide must support it. Otherwise they are run K times.
        plate: the data plate's name. None selects the only plate that encloses every site. With False, or a model
            without plates, the whole data set is one datapoint.

    Raises:
        InputError: at the first step, naming the site or plate: for latents or data outside the data plate, a plate
            subsampled within a datapoint, latents that model and guide do not share, a Delta in the guide, and, with
            `doubly_reparametrised`, distributions without reparametrisation.

    Use it as `SVI(model, guide, optimizer, loss=IWAE_ELBO(10))`, or as `pyrogaps.train(..., objective=IWAE_ELBO(10))`.

    Example:
        >>> import torch, pyrogaps as pg
        >>> from pyrogaps.guides.amortized import AmortizedNormal
        >>> from pyrogaps.models.linear_gaussian import LinearGaussian
        >>> model, guide, x = LinearGaussian.random(4, 2), AmortizedNormal(4, 2, (8,)), torch.randn(6, 4)
        >>> loss = pg.IWAE_ELBO(num_particles=5)
        >>> result = pg.train(model, guide, x, objective=loss, num_epochs=2, progress=False)
        >>> len(result.history["train_elbo"])
        2
    """

    num_particles: Count = 10
    doubly_reparametrised: bool = False
    vectorize_particles: bool = False
    plate: Plate = None

    # `pyrogaps.train` may record its steps: the loss is computed without reading a tensor's value.
    recordable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__init__(  # type: ignore[no-untyped-call]
            num_particles=self.num_particles, vectorize_particles=self.vectorize_particles
        )

    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """One draw of the negative bound, without gradients."""
        with torch.no_grad():
            loss = self.differentiable_loss(model, guide, *args, **kwargs)
        return float(warn_if_nan(loss, "loss"))

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """One draw of the negative bound; adds its gradient to the parameters' `.grad`."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        return float(warn_if_nan(loss.detach(), "loss"))

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """One draw of the negative bound, with an unbiased gradient."""
        with SameSubsamples():
            traces = list(self._get_traces(model, guide, args, kwargs))  # type: ignore[no-untyped-call]
        particles = read_particles(traces, self.plate)
        bound = particles.log_weights.logsumexp(0) - math.log(self.num_particles)
        value = total = bound.sum()
        if torch.is_grad_enabled():
            if self.doubly_reparametrised:
                total = doubly_reparametrised(particles)
            elif particles.log_score is not None:
                total = total + score_surrogate(particles.log_weights, particles.log_score, bound)
        return -particles.scale * (value.detach() + total - total.detach())

    def _get_trace(self, model: Program, guide: Program, args: Any, kwargs: Any) -> tuple[Any, Any]:
        if self.doubly_reparametrised and torch.is_grad_enabled():
            if isinstance(unwrap(guide), GuideMessenger):
                raise InputError(
                    f"guide: {type(unwrap(guide)).__name__} draws its latents while the model runs, so its gradients "
                    "cannot be doubly reparametrised. Set doubly_reparametrised=False."
                )
            guide = CutDraws()(guide)
        traces: tuple[Any, Any] = get_importance_trace("flat", self.max_plate_nesting, model, guide, args, kwargs)
        return traces
