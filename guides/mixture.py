"""Mixtures of Gaussians for posteriors with several modes: amortized, and separate for each datapoint."""

import math
from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.infer.autoguide.initialization import init_to_feasible
from pyro.nn import PyroParam
from torch import Tensor, nn
from torch.distributions import transform_to

from pyrogaps.density import Data, IndexedData, JointDensity
from pyrogaps.density.data import as_tuple
from pyrogaps.density.runs import Program
from pyrogaps.density.simulate import simulate
from pyrogaps.errors import InputError
from pyrogaps.guides.amortized import Amortized
from pyrogaps.guides.local import AutoLocal
from pyrogaps.streams import seeded

# Initial log-weight of the other components of a local mixture, relative to the first.
INITIAL_LOG_WEIGHT = -4.0


class DiagonalMixture(dist.MixtureSameFamily):
    r"""A mixture of factorised Normals over vectors, with draws that are differentiable in all parameters.

    Draws are reparametrised implicitly (Figurnov et al., arXiv:1805.08498). With $F_d$ the conditional distribution
    function of coordinate d given the coordinates before it, the derivative of a draw z in the parameters is

    $$dz_d = -\frac{d F_d(z_d | z_{<d})}{q(z_d | z_{<d})}$$

    It is built from a `Categorical` and `Normal(...).to_event(1)`, like torch's class; `log_prob` is exact.
    """

    support = constraints.real_vector
    has_rsample = True

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        with torch.no_grad():
            z = self.sample(sample_shape)
        if not (torch.is_grad_enabled() and self._depends_on_parameters()):
            return z
        normals = self.component_distribution.base_dist
        log_weights, moved = self.mixture_distribution.logits, []
        for d in range(z.shape[-1]):
            component = dist.Normal(normals.loc[..., d], normals.scale[..., d])  # batch shape (*batch, K)
            weights, value = log_weights.softmax(-1), z[..., d, None]
            cumulative = (weights * component.cdf(value)).sum(-1)
            density = (weights * component.log_prob(value).exp()).sum(-1).detach()
            moved.append(z[..., d] - (cumulative - cumulative.detach()) / density.clamp(min=1e-30))
            log_weights = log_weights + component.log_prob(moved[-1][..., None])
        return torch.stack(moved, -1)

    def _depends_on_parameters(self) -> bool:
        normals = self.component_distribution.base_dist
        parts = (normals.loc, normals.scale, self.mixture_distribution.logits)
        return any(part.requires_grad for part in parts)


class AmortizedMixture(Amortized):
    r"""q(z|x) = (1 - e) sum_k w_k(x) N(m_k(x), diag(s_k(x)^2)) + e N(0, I), parametrised by one MLP.

    The last component, with the fixed weight e = `defensive`, is the prior of models with a standard Normal latent. For
    them it bounds the importance weights, p(x, z) / q(z|x) <= max_z p(x|z) / e, so that IWAE's errors are finite even
    if the network is wrong (Hesterberg, 1995, doi:10.1080/00401706.1995.10484303).

    A Pyro guide: `guide(x)` with `x` `(N, *event)`; site "z" `(N, latent_dim)` in the plate "data". Its draws are
    reparametrised, see `DiagonalMixture`. Other arguments and errors are those of `AmortizedNormal`; also raises
    `InputError` for no component and for `defensive` outside [0, 1).

    Training by the ELBO or IWAE loses modes, and IWAE gives no sign of a mode that q misses. `fit` trains on draws of
    the model instead, which cover every mode: use it to evaluate a model's log p(x).
    """

    def __init__(
        self,
        data_dim: int = 2,
        latent_dim: int = 1,
        hidden: Sequence[int] = (64, 64),
        activation: str = "Tanh",
        min_scale: float = 1e-3,
        num_components: int = 10,
        defensive: float = 0.05,
        features: nn.Module | None = None,
    ) -> None:
        _check(self, num_components, defensive)
        num_outputs = num_components * (1 + 2 * latent_dim)
        super().__init__(data_dim, latent_dim, hidden, activation, min_scale, num_outputs, features)
        self.num_components, self.defensive = num_components, defensive
        self._start()

    def reset_parameters(self) -> None:
        """Draw fresh weights of the encoder, as for a new guide; `features` are unchanged."""
        for part in self.encoder:
            if isinstance(part, nn.Linear):
                part.reset_parameters()
        self._start()

    def _start(self) -> None:
        last = self.encoder[-1]
        assert isinstance(last, nn.Linear)
        number = self.num_components
        with torch.no_grad():  # components that start equal would stay equal
            last.bias[number : number * (1 + self.latent_dim)].normal_()

    def forward(self, x: Tensor) -> Tensor:
        """Run the guide on `x` `(N, *event)`; returns z, shape `(N, latent_dim)`."""
        with pyro.plate("data", len(x)):
            z: Tensor = pyro.sample("z", self.posterior(x))
        return z

    def posterior(self, x: Tensor) -> DiagonalMixture:
        """q(z|x) for `x` `(N, *event)`, batch shape `(N,)`, event shape `(latent_dim,)`."""
        return _mixture(*_defended(*self.parameters_of(x), self.defensive))

    def parameters_of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-weights `(N, K)`, means and scales `(N, K, latent_dim)` of the network's K components."""
        number, size = self.num_components, self.num_components * self.latent_dim
        raw_weights, means, raw_scales = self.encode(x).split([number, size, size], -1)
        shape = (len(x), number, self.latent_dim)
        return raw_weights.log_softmax(-1), means.reshape(shape), self.positive(raw_scales).reshape(shape)

    def local_family(self, model: Any, plate: str | None = None) -> "AutoLocalMixture":
        """The family of this guide with separate weights, means and scales for each datapoint."""
        sizes: dict[str, Any] = {"num_components": self.num_components, "defensive": self.defensive}
        return AutoLocalMixture(model, **sizes, plate=plate)

    def start_local(self, guide: "AutoLocalMixture", x: Tensor) -> None:
        """Initialise `guide`, a `local_family` set up on `x`, to this guide's q(z|x)."""
        guide.start_mixture(*self.parameters_of(x))

    def fit(
        self,
        model: Program,
        data: Data,
        *,
        num_draws: int = 20_000,
        num_steps: int = 2000,
        batch_size: int = 500,
        learning_rate: float = 1e-2,
        seed: int = 0,
    ) -> list[float]:
        r"""Train this guide on `num_draws` draws of `model` in the shape of `data`; the model is not trained.

        `num_steps` steps of Adam, with a learning rate that falls to 0 along half a cosine, minimise

        $$\mathbb E_{p(x, z)} [-\log q(z|x)] = \mathbb E_{p(x)} \mathrm{KL}(p(z|x) \| q(z|x)) + \text{const.}$$

        which penalises every missing mode. Returns the loss of every step, in nats per datapoint. The caller's random
        state is unchanged.

        Raises `InputError` if `model` cannot be simulated (see `JointDensity.simulate`) or its latents are not a single
        site "z" of size `latent_dim`, and `FloatingPointError` if the loss is not finite.
        """
        joint = JointDensity(model, data)
        if list(joint.sites) != ["z"] or joint.dim != self.latent_dim:
            raise InputError(
                f"AmortizedMixture: the model has latents {', '.join(joint.sites)} ({joint.dim} dimensions in all). "
                f"This guide needs a single site 'z' with latent_dim={self.latent_dim} dimensions."
            )
        with seeded(seed, "fit", device=joint.device), pyro.validation_enabled(False):
            repeated = IndexedData(num_draws, lambda indices: joint.fetch(indices % joint.num_datapoints))
            drawn, z = simulate(joint.over(repeated))
            return self._descend(as_tuple(drawn)[0], z, num_steps, batch_size, learning_rate)

    def _descend(self, x: Tensor, z: Tensor, num_steps: int, batch_size: int, learning_rate: float) -> list[float]:
        optimizer = torch.optim.Adam(self.parameters(), lr=learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
        losses = []
        for step in range(num_steps):
            rows = torch.randint(len(x), (min(batch_size, len(x)),), device=x.device)
            loss = -self.posterior(x[rows]).log_prob(z[rows]).mean()
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                raise FloatingPointError(
                    f"AmortizedMixture: the loss of step {step + 1} is {losses[-1]}. Lower learning_rate."
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        return losses


class AutoLocalMixture(AutoLocal):
    r"""A separate mixture of factorised Normals for each datapoint, over all its latents in unconstrained space.

    $$q(z_n) = (1 - e) \sum_k w_{nk} \mathcal N(m_n + s_n \odot a_{nk}, \mathrm{diag}(s_n \odot b_{nk})^2) +
      e\, \mathcal N(0, I)$$

    with e = `defensive`. Initially one Normal has most of the weight, surrounded by components of small weight. From
    there the fit seldom reaches distant modes; as the own family of a fitted `AmortizedMixture` it starts with all of
    that guide's modes. Other arguments and errors are those of `AutoLocal`.
    """

    log_weights: Any
    offsets: Any
    widths: Any

    def __init__(
        self,
        model: Any,
        *,
        num_components: int = 10,
        defensive: float = 0.0,
        plate: str | None = None,
        init_loc_fn: Any = init_to_feasible,
        init_scale: float = 0.1,
        create_plates: Any = None,
    ) -> None:
        options = {"plate": plate, "init_loc_fn": init_loc_fn, "init_scale": init_scale, "create_plates": create_plates}
        super().__init__(model, **options)
        _check(self, num_components, defensive)
        self._num_components, self._defensive = num_components, defensive

    def local_family(self, model: Any, plate: str | None = None) -> "AutoLocalMixture":
        """The same family, with the same sizes, for other datapoints."""
        sizes: dict[str, Any] = {"num_components": self._num_components, "defensive": self._defensive}
        return AutoLocalMixture(model, **sizes, plate=plate)

    def setup_posterior(self, loc: Tensor) -> None:
        number, batch, dim = self._num_components, loc.shape[:-1], loc.shape[-1]
        offsets = torch.randn(number, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(loc)
        offsets[0] = 0.0
        log_weights = loc.new_full((number,), INITIAL_LOG_WEIGHT)
        log_weights[0] = 0.0
        self.log_weights = PyroParam(log_weights.expand(*batch, number).clone(), event_dim=1)
        self.offsets = PyroParam((2 * offsets).expand(*batch, number, dim).clone(), event_dim=2)
        widths = loc.new_ones(*batch, number, dim)
        self.widths = PyroParam(widths, constraints.softplus_positive, 2)

    def get_posterior(self) -> DiagonalMixture:
        means = self.loc[..., None, :] + self.scale[..., None, :] * self.offsets
        scales = self.scale[..., None, :] * self.widths
        return _mixture(*_defended(self.log_weights.log_softmax(-1), means, scales, self._defensive))

    def start_mixture(self, log_weights: Tensor, means: Tensor, scales: Tensor) -> None:
        """Initialise to log-weights `(N, K)`, means and scales `(N, K, dim)`."""
        rows, _, dim = means.shape
        self.start_at(means.new_zeros(rows, dim), means.new_ones(rows, dim))
        parameters = dict(self.named_parameters())
        inverse = transform_to(constraints.softplus_positive).inv
        values = {"log_weights": log_weights, "offsets": means, "widths": inverse(scales)}
        with torch.no_grad():
            for name, value in values.items():
                parameter = parameters[f"{name}_unconstrained"]
                parameter.copy_(value.reshape(parameter.shape))

    def units(self) -> dict[str, Tensor | float]:
        """As in `AutoLocal`; the step size of a component's offset is its width."""
        return {**super().units(), "offsets_unconstrained": self.widths.detach().clone()}


def _check(guide: Any, num_components: int, defensive: float) -> None:
    name = type(guide).__name__
    if num_components < 1:
        raise InputError(f"{name}: num_components must be at least 1, got {num_components}")
    if not 0 <= defensive < 1:
        raise InputError(f"{name}: defensive must be in [0, 1), got {defensive}")


def _mixture(log_weights: Tensor, means: Tensor, scales: Tensor) -> DiagonalMixture:
    return DiagonalMixture(dist.Categorical(logits=log_weights), dist.Normal(means, scales).to_event(1))


def _defended(log_weights: Tensor, means: Tensor, scales: Tensor, defensive: float) -> tuple[Tensor, Tensor, Tensor]:
    """Log-weights `(*batch, K + 1)`, means and scales `(*batch, K + 1, dim)` with N(0, I) as a last component."""
    if defensive == 0:
        return log_weights, means, scales
    rest, fixed = torch.full_like(log_weights[..., :1], math.log(defensive)), torch.zeros_like(means[..., :1, :])
    shares = torch.cat([log_weights + math.log1p(-defensive), rest], -1)
    return shares, torch.cat([means, fixed], -2), torch.cat([scales, fixed + 1], -2)
