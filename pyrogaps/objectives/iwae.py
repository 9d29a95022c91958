"""`IWAE_ELBO`: the importance-weighted bound as a loss for `pyro.infer.SVI`, datapoint by datapoint."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

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


@dataclass
class IWAE_ELBO(ELBO):
    r"""The importance-weighted bound (Burda et al., arXiv:1509.00519) of every datapoint, summed over the data plate.

    $$\sum_n c \, \log \frac1K \sum_{k=1}^K \frac{p(x_n, z_{nk})}{q(z_{nk} | x_n)}, \quad z_{nk} \sim q(z | x_n),$$

    in nats; a lower bound of $\sum_n \log p(x_n)$ in expectation that grows with K and, for K = 1, is the ELBO. The
    plate's scale c = N / n (of a plate of size N that holds n rows) stands outside the logarithm, so that the bound is
    unbiased under subsampling. (`pyro.infer.RenyiELBO` raises the weights to the power c, and exceeds the evidence.)
    Plates within the data plate are summed; a `poutine.scale` of the user's own stays inside the logarithm.

    The loss is the negative bound. Its gradient is unbiased: by reparametrisation where the guide's distributions
    allow it, by scores with leave-one-out baselines (VIMCO, arXiv:1602.06725) where they do not.

    Args:
        num_particles: K.
        doubly_reparametrised: estimate the gradient of what the guide draws by Tucker et al.'s doubly reparametrised
            estimator (arXiv:1810.04152), unbiased too, whose signal does not drown as K grows; the model's gradient
            stays as it is. It costs a second pass backward through the model, and wants a guide whose distributions
            can all be reparametrised and scored at any point.
        vectorize_particles: whether to run all particles at once, in a plate left of all others, as Pyro's losses do;
            the model and the guide must allow it. Otherwise they are run K times.
        plate: the data plate's name. None finds it where exactly one plate encloses every site; False, or a model
            without plates, makes the whole data set one datapoint.

    Raises:
        InputError: at the first step, naming the site or plate: for latents or data outside the data plate, a plate
            subsampled within a datapoint, latents that model and guide do not share, a Delta in the guide, and, doubly
            reparametrised, distributions without reparametrisation.

    Use it as `SVI(model, guide, optimizer, loss=IWAE_ELBO(10))`, or as `pyrogaps.train(..., objective=IWAE_ELBO(10))`.
    """

    num_particles: int = 10
    doubly_reparametrised: bool = False
    vectorize_particles: bool = False
    plate: str | Literal[False] | None = None

    # `pyrogaps.train` may record its steps: no number is read off a tensor on the way to the loss.
    recordable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.num_particles < 1:
            raise InputError(f"IWAE_ELBO: num_particles must be at least 1, got {self.num_particles}")
        super().__init__(  # type: ignore[no-untyped-call]
            num_particles=self.num_particles, vectorize_particles=self.vectorize_particles
        )

    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """One draw of the negative bound, without gradients."""
        with torch.no_grad():
            loss = self.differentiable_loss(model, guide, *args, **kwargs)
        return float(warn_if_nan(loss, "loss"))

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """One draw of the negative bound; its gradient is added to the parameters'."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        return float(warn_if_nan(loss.detach(), "loss"))

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """One draw of the negative bound, whose backward pass gives an unbiased gradient."""
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
                    f"guide: {type(unwrap(guide)).__name__} draws inside the model, so its gradients cannot be doubly "
                    "reparametrised; set doubly_reparametrised=False"
                )
            guide = CutDraws()(guide)
        traces: tuple[Any, Any] = get_importance_trace("flat", self.max_plate_nesting, model, guide, args, kwargs)
        return traces
