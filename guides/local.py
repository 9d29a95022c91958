"""Per-datapoint families: autoguides with separate parameters for each datapoint of the data plate."""

from abc import abstractmethod
from contextlib import ExitStack
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoGuide, AutoNormal
from pyro.infer.autoguide.initialization import InitMessenger, init_to_feasible
from pyro.nn import PyroParam
from torch import Tensor
from torch.distributions import biject_to, transform_to

from pyrogaps.density.layout import Site
from pyrogaps.density.structure import find_plate, lay_out
from pyrogaps.errors import InputError
from pyrogaps.family import LocalFamily


class MarginalMultivariateNormal(dist.MultivariateNormal):
    """A multivariate Normal that can score the marginal of a subset of its coordinates."""

    def masked_log_prob(self, value: Tensor, mask: Tensor) -> Tensor:
        """Log-density of the coordinates where `mask` is True, with the others integrated out; shapes of `log_prob`."""
        keep = mask.to(value.dtype)
        covariance = self.covariance_matrix * keep[..., :, None] * keep[..., None, :] + torch.diag_embed(1 - keep)
        centred = (value - self.loc) * keep
        scale_tril = torch.linalg.cholesky(covariance)
        marginal = dist.MultivariateNormal(torch.zeros_like(centred), scale_tril=scale_tril, validate_args=False)
        padding = 0.5 * (1 - keep).sum(-1) * torch.log(torch.tensor(2 * torch.pi, dtype=value.dtype))
        return marginal.log_prob(centred) + padding

    def expand(self, batch_shape: Any, _instance: Any = None) -> "MarginalMultivariateNormal":
        shape = torch.Size(batch_shape)
        loc = self.loc.expand(shape + self.event_shape)
        scale_tril = self.scale_tril.expand(shape + self.event_shape * 2)
        return MarginalMultivariateNormal(loc, scale_tril=scale_tril, validate_args=False)


class AutoLocal(LocalFamily, AutoGuide):
    """Base class of guides with separate parameters for each datapoint, over all its latent sites as one flat vector.

    The vector is in unconstrained space. The parameters have an axis of datapoints, so that many datapoints can be
    refined at once. A subclass implements two methods. `setup_posterior(loc)` creates parameters in addition to
    `self.loc` and `self.scale`, after the first run has determined the shapes. `get_posterior()` returns the
    distribution of the vector, which is drawn at the site "_local_latent".

    Args:
        model: a Pyro model in which one plate encloses every site, or with the data plate named `plate`.
        plate: the data plate's name.
        init_loc_fn: the initial values, as for Pyro's autoguides.
        init_scale: the initial standard deviation in unconstrained space.

    Raises:
        InputError: if no data plate encloses every latent site.
    """

    def __init__(
        self,
        model: Any,
        *,
        plate: str | None = None,
        init_loc_fn: Any = init_to_feasible,
        init_scale: float = 0.1,
        create_plates: Any = None,
    ) -> None:
        super().__init__(InitMessenger(init_loc_fn)(model), create_plates=create_plates)
        self._plate = plate
        self._init_scale = init_scale

    # Shape and location are hard to optimise together, so start from the best fit of AutoNormal.
    starts_from = AutoNormal
    prototype_trace: Any
    loc: Any
    scale: Any

    @abstractmethod
    def setup_posterior(self, loc: Tensor) -> None:
        """Create additional parameters; `loc` `(*batch, dim)` are the initial means, with the plate's batch axis."""

    @abstractmethod
    def get_posterior(self) -> Any:
        """The distribution of the vector, with the plate's batch shape; its first `dim` elements are the latents."""

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        messages = dict(self.prototype_trace.iter_stochastic_nodes())
        plate = self._plate or find_plate(messages)
        if plate is None:
            name = type(self).__name__
            raise InputError(f"{name}: the model has no data plate. Use Pyro's AutoMultivariateNormal instead.")
        self._plate = plate
        self._sites: dict[str, Site] = lay_out(messages, plate, -1)
        columns = []
        for name, message in messages.items():
            columns.append(self._sites[name].flatten(biject_to(message["fn"].support).inv(message["value"].detach())))
        # Rows are at the data plate's dimension, so that minibatches and Pyro's subsampling of parameters work.
        shape = (*[1] * (-1 - self._prototype_frames[plate].dim),)
        loc = torch.cat(columns, -1)
        rows, dim = loc.shape
        loc = loc.reshape(rows, *shape, dim)
        self.loc = PyroParam(loc, event_dim=1)
        self.scale = PyroParam(torch.full_like(loc, self._init_scale), constraints.softplus_positive, 1)
        self.setup_posterior(loc)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        plates = self._create_plates(*args, **kwargs)
        with plates[self._plate]:
            latent = pyro.sample("_local_latent", self.get_posterior(), infer={"is_auxiliary": True})
        batch = -self._prototype_frames[self._plate].dim - 1
        flat = latent.flatten(-2 - batch, -2) if batch else latent
        result = {}
        for name, message in self.prototype_trace.iter_stochastic_nodes():
            unconstrained = self._sites[name].unflatten(flat)
            transform = biject_to(message["fn"].support)
            value = transform(unconstrained)
            log_density = transform.inv.log_abs_det_jacobian(value, unconstrained)
            extra = log_density.dim() - (value.dim() - message["fn"].event_dim)
            log_density = log_density.sum(list(range(-extra, 0))) if extra else log_density
            with ExitStack() as stack:
                for frame in message["cond_indep_stack"]:
                    stack.enter_context(plates[frame.name])
                delta = dist.Delta(value, log_density=log_density, event_dim=message["fn"].event_dim)
                result[name] = pyro.sample(name, delta)
        return result

    def start_at(self, loc: Tensor, scale: Tensor) -> None:
        """Initialise to independent coordinates with means `loc` and standard deviations `scale`, each `(N, dim)`."""
        parameters = dict(self.named_parameters())
        softplus_inverse = transform_to(constraints.softplus_positive).inv
        with torch.no_grad():
            parameters["loc_unconstrained"].copy_(loc.reshape(self.loc.shape))
            parameters["scale_unconstrained"].copy_(softplus_inverse(scale.clamp(min=1e-6)).reshape(self.loc.shape))

    def units(self) -> dict[str, Tensor | float]:
        """Step sizes of parameters: the standard deviation for locations, 1 for parameters not in the result."""
        return {"loc_unconstrained": self.scale.detach().clone()}


class AutoLocalMultivariateNormal(AutoLocal):
    r"""A separate full-covariance Normal for each datapoint, over all its latent sites in unconstrained space.

    $$q(z_n) = \mathcal N(z_n;\, m_n,\, L_n L_n^\top), \quad L_n = \mathrm{diag}(s_n)\, U_n$$

    with $U_n$ unit lower triangular. Pyro's `AutoMultivariateNormal` has a single covariance over all datapoints.
    Arguments and errors are those of `AutoLocal`.
    """

    unit_scale_tril: Any

    def setup_posterior(self, loc: Tensor) -> None:
        dim = loc.shape[-1]
        identity = torch.eye(dim, dtype=loc.dtype, device=loc.device).expand(*loc.shape, dim).clone()
        self.unit_scale_tril = PyroParam(identity, constraints.unit_lower_cholesky, 2)

    def get_posterior(self) -> MarginalMultivariateNormal:
        scale_tril = self.scale[..., None] * self.unit_scale_tril
        return MarginalMultivariateNormal(self.loc, scale_tril=scale_tril)

    def location_scale(self, loc: Tensor, scale_tril: Tensor) -> None:
        """Set means `(N, dim)` and covariance factors `(N, dim, dim)`."""
        scale = scale_tril.diagonal(dim1=-2, dim2=-1)
        self.start_at(loc, scale)
        with torch.no_grad():
            unit = dict(self.named_parameters())["unit_scale_tril_unconstrained"]
            unit.copy_((scale_tril / scale[..., None]).reshape(unit.shape))
