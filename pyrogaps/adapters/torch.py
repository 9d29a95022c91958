"""`from_torch`: an encoder and a decoder in plain PyTorch as a Pyro model and a Pyro guide."""

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from pyrogaps.adapters.distributions import as_pyro, described
from pyrogaps.adapters.loss import NUM_DATAPOINTS, Losses, difference, explanation, losses_of, terms_of
from pyrogaps.adapters.observation import Observation
from pyrogaps.adapters.posterior import SCALES, Reader
from pyrogaps.density import Data, IndexedData
from pyrogaps.density.arguments import parameters_of
from pyrogaps.density.data import evenly_spaced
from pyrogaps.density.forms import as_indexed
from pyrogaps.density.parts import Part
from pyrogaps.density.runs import evaluating
from pyrogaps.density.structure import OUTSIDE_SUPPORT
from pyrogaps.errors import InputError, counted
from pyrogaps.guard import ProgramError, guarded
from pyrogaps.settings import Count, Name, Positive, checked
from pyrogaps.streams import seeded

# Rows on which the outputs of decoder and encoder are judged, and how much farther latents and data are put: so far
# that the outputs of a last linear layer take both signs, however small its weights are.
NUM_JUDGED, FAR = 64, (1.0, 10.0, -10.0, 1e4, -1e4)


class Conditioned(nn.Module):
    """A program of x and of conditions, whose names its signature has."""

    def __init__(self, conditions: Sequence[str]) -> None:
        super().__init__()
        self.further = tuple(conditions)
        if len({"x", *self.further}) <= len(self.further) or not all(name.isidentifier() for name in self.further):
            raise InputError(
                f"conditions: must be different names other than 'x', as of arguments, got {list(self.further)}. "
                "Rename them"
            )
        names = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in ("x", *self.further)]
        self.__signature__ = inspect.Signature(names)

    def check(self, x: Any, given: tuple[Any, ...]) -> None:
        """Refuse data of another form than x and the conditions."""
        if len(given) != len(self.further):
            named = f" ({', '.join(self.further)})" if self.further else ""
            raise InputError(
                f"conditions: the data have {counted(len(given), 'argument')} beside x, but "
                f"{counted(len(self.further), 'condition')} {'is' if len(self.further) == 1 else 'are'} "
                f"named{named}. Name each, as in conditions=('label',), or pass x alone"
            )
        if not isinstance(x, Tensor) or not x.dim():
            raise InputError(f"data: x is {described(x)}. Pass a tensor with a row for each datapoint")


class TorchGuide(Conditioned):
    """q(z | x) of an encoder: site "z" in the plate "data"."""

    def __init__(self, encoder: Part, reader: Reader, conditions: Sequence[str]) -> None:
        super().__init__(conditions)
        self.encoder, self.reader = encoder, reader

    def posterior(self, x: Tensor, *conditions: Any) -> Any:
        """q(z | x), with batch shape `(B,)`."""
        return self.reader(self.encoder(x, *conditions))

    def forward(self, x: Tensor, *conditions: Any) -> Tensor:
        """Run the guide on `x` `(B, *event)`; returns z, shape `(B, *latent_shape)`."""
        self.check(x, conditions)
        fn = self.posterior(x, *conditions)
        with pyro.plate("data", len(x)):
            z: Tensor = pyro.sample("z", fn)
        return z


class TorchModel(Conditioned):
    """p(z) p(x | z) of a prior and a decoder: sites "z" and "x" in the plate "data".

    At its first run it judges what encoder and decoder return, once, and reads the shape of z. The encoder is no part
    of it.

    Attributes:
        remarks: what the ledger says of it.
    """

    def __init__(
        self, guide: TorchGuide, decoder: Part, observation: Observation, prior: Part | Distribution | None
    ) -> None:
        super().__init__(guide.further)
        self.decoder, self.observation, self.prior = decoder, observation, prior
        self.latent_shape: tuple[int, ...] | None = None
        self.remarks: tuple[str, ...] = ()
        self._guide = (guide,)  # a tuple, because a module would be registered as a part

    def forward(self, x: Tensor, *conditions: Any) -> Tensor:
        """Run the model on `x` `(B, *event)`; returns z, shape `(B, *latent_shape)`."""
        self.check(x, conditions)
        if self.latent_shape is None:
            self.read(x, *conditions)
        prior = self.prior_of(x, conditions)
        with pyro.plate("data", len(x)):
            z: Tensor = pyro.sample("z", prior)
            fn, seen, remedy = self.observation(self.decoder(z, *conditions), x)
            infer: Any = {OUTSIDE_SUPPORT: remedy}
            pyro.sample("x", fn, obs=seen, infer=infer)
        return z

    def add_remark(self, remark: str) -> None:
        """Have ledgers say a sentence."""
        self.remarks = (*self.remarks, remark)

    def prior_of(self, x: Tensor, conditions: tuple[Any, ...]) -> Any:
        """p(z), with batch shape `()` or, given conditions, `(B,)`."""
        shape = self.latent_shape
        assert shape is not None
        if self.prior is None:
            return dist.Normal(self._like(x).new_zeros(shape), 1.0).to_event(len(shape))
        fn = self.prior
        if isinstance(fn, Part):
            taken = parameters_of(fn.net or fn.function)  # type: ignore[arg-type]
            fn = fn(*(() if taken is None or taken.take(0) else conditions))
        if not isinstance(fn, Distribution):
            raise InputError(f"prior: it returned {described(fn)}. Return a distribution of z")
        whole = tuple(fn.batch_shape + fn.event_shape)
        if whole in (shape, (len(x), *shape)):
            own = as_pyro(fn)
            events = len(fn.batch_shape) - (whole != shape)
            return own.to_event(events) if events else own
        if not whole:
            return as_pyro(fn).expand(shape).to_event(len(shape))
        raise InputError(
            f"prior: its draws have shape {whole}, but the encoder's latents have {shape}. Make them equal, or let a "
            "module return a distribution for each datapoint"
        )

    def _like(self, x: Tensor) -> Tensor:
        """A tensor with the dtype and device of the latents."""
        default = x.new_zeros((), dtype=torch.get_default_dtype())
        return next((value for value in self.parameters() if value.is_floating_point()), default)

    def read(self, x: Tensor, *conditions: Any) -> None:
        """Read the shape of z and judge what encoder and decoder return for these datapoints.

        Raises `InputError` for what cannot be what it is said to be, and sizes that do not fit.
        """
        self.check(x, conditions)
        (guide,) = self._guide
        rows = evenly_spaced(len(x), NUM_JUDGED)
        rows = rows[torch.arange(NUM_JUDGED) % len(rows)].to(x.device)
        x, conditions = x[rows], tuple(c[rows] if isinstance(c, Tensor) and c.dim() else c for c in conditions)
        with evaluating(guide, self), seeded(0, "from_torch", device=x.device), torch.no_grad():
            self.latent_shape = tuple(guide.posterior(x, *conditions).event_shape)
            try:
                if x.is_floating_point():
                    with suppress(ProgramError):  # of encoders that only take data of their own range
                        guide.reader.judge([guide.encoder(far * x, *conditions) for far in FAR])
                prior = self.prior_of(x, conditions)
                z = prior.sample() if prior.batch_shape else prior.sample((len(x),))
                outputs = [self.decoder(z, *conditions)]
                self.observation(outputs[0], x)
                with suppress(ProgramError):
                    outputs += [self.decoder(far * z, *conditions) for far in FAR[1:]]
                self.observation.judge(outputs)
            except InputError:
                self.latent_shape = None
                raise


@guarded
@checked()
def from_torch(
    encoder: Callable[..., Any],
    decoder: Callable[..., Any],
    *,
    likelihood: Name | Callable[..., Any] | None = None,
    second: Literal["log_variance", "log_scale", "scale"] | None = None,
    output: Literal["logits", "probabilities", "rate", "log_rate"] | None = None,
    scale: Positive | Name | Callable[[], Any] | None = None,
    prior: Distribution | Callable[..., Any] | None = None,
    latent_dim: Count | None = None,
    conditions: Sequence[Name] = (),
    data: Data | None = None,
    elbo: Callable[..., Any] | float | None = None,
) -> tuple[TorchModel, TorchGuide]:
    r"""A VAE in plain PyTorch as a Pyro model and a Pyro guide.

    $$z \sim p(z), \quad x | z \sim \text{likelihood}(\text{decoder}(z)), \quad q(z|x) = \text{encoder}(x)$$

    Both are modules with a data plate, called with x, or with x and the conditions. They hold the encoder and the
    decoder themselves, no copies: what trains one trains the other.

    Args:
        encoder: a module, a method or a function of x. It returns (mean, second) of shape `(B, latent_dim)` each, a
            distribution, or an object with `.latent_dist`, `.embedding` and `.log_covariance`, or `.mean` and
            `.logvar`.
        decoder: the same of z. It returns a tensor, (mean, scale), a distribution, or an object with `.reconstruction`.
        likelihood: bernoulli, binary-cross-entropy, continuous-bernoulli, normal, laplace, discretised-logistic,
            categorical, poisson or negative-binomial; or a function from the decoder's output to a distribution; None
            where the decoder returns one.
        second: what the second of two outputs of the encoder is.
        output: what the decoder returns for a likelihood of probabilities (default: logits) or of counts.
        scale: of normal, laplace and discretised-logistic: a number, "learned", a function that returns it, or what
            the decoder's second output is, as `second`. The second output for a negative-binomial is its dispersion r,
            with variance m + m^2 / r.
        prior: None for the standard Normal, a distribution, or a module that returns one when it is called, with the
            conditions if it takes them.
        latent_dim: the length of z, to be checked; it is read from the encoder otherwise.
        conditions: names of further arguments of both, such as class labels. The data are then (x, label).
        data: some datapoints, to check both at once instead of at their first run.
        elbo: the loss you train with, a function of the data's arguments, or its value on `data`. It is compared with
            the ELBO of the pair; a difference is explained by a warning, and noted in ledgers.

    Returns:
        The model and the guide, with sites "z" and "x" in the plate "data".

    Raises:
        InputError: for outputs of unknown form or of other sizes than the data, and for numbers that cannot be what
            they are said to be: negative scales, logits that all lie in [0, 1], negative rates.

    Example:
        >>> import torch, pyrogaps as pg
        >>> from torch import nn
        >>> net, decoder, x = nn.Linear(16, 4), nn.Linear(2, 16), (torch.rand(6, 16) < 0.5).float()
        >>> encoder = lambda x: net(x).chunk(2, -1)
        >>> model, guide = pg.from_torch(encoder, decoder, likelihood="bernoulli", second="log_variance")
        >>> pg.elbo(model, guide, x).value.shape
        torch.Size([6])
    """
    own_prior = Part("prior", prior) if prior is not None and not isinstance(prior, Distribution) else prior
    reader = Reader(second, latent_dim, standard=prior is None)
    guide = TorchGuide(Part("encoder", encoder), reader, conditions)
    model = TorchModel(guide, Part("decoder", decoder), Observation(likelihood, output, scale), own_prior)
    if elbo is not None and data is None:
        raise InputError("elbo: it is compared on some datapoints. Pass data=, such as one batch")
    if data is not None:
        indexed = as_indexed(data, model)
        model.read(*indexed.fetch(evenly_spaced(len(indexed), NUM_JUDGED)))
        if elbo is not None:
            _compare(model, guide, elbo, indexed)
    return model, guide


def _compare(model: TorchModel, guide: TorchGuide, elbo: Callable[..., Any] | float, data: IndexedData) -> None:
    """Compare a loss with the ELBO of a pair: warn of a difference and note it, or raise `InputError` where the loss
    reads the outputs otherwise than was said.
    """
    number = min(NUM_DATAPOINTS, len(data)) if callable(elbo) else len(data)
    rows = data.fetch(evenly_spaced(len(data), number))
    if callable(elbo):
        losses = losses_of(elbo, rows, (model, guide))
    else:
        value = torch.tensor([elbo], dtype=torch.float64)
        losses = Losses(value, torch.zeros_like(value), number)
    terms = terms_of(model, guide, rows)
    if (words := explanation(terms, losses)) == []:
        return
    for remedy, other_model, other_guide in _other_readings(model, guide):
        same = None
        with suppress(InputError):  # where the numbers cannot be read so
            same = explanation(terms_of(other_model, other_guide, rows), losses)
        if same == []:
            raise InputError(f"elbo: the loss is the ELBO of this pair with {remedy}. Pass {remedy}")
    note = difference(terms, losses, words)
    model.add_remark(note)
    warnings.warn(f"elbo: {note}", stacklevel=2)


def _other_readings(model: TorchModel, guide: TorchGuide) -> Iterator[tuple[str, TorchModel, TorchGuide]]:
    """The pairs that read a second output of the encoder or the decoder otherwise, and the setting that does."""
    for kind in SCALES:
        if guide.reader.second not in (None, kind):
            other = TorchGuide(guide.encoder, replace(guide.reader, second=kind), guide.further)
            yield f"second='{kind}'", TorchModel(other, model.decoder, model.observation, model.prior), other
        if model.observation.second in SCALES and model.observation.second != kind:
            observation = Observation(model.observation.name, None, kind)
            yield f"scale='{kind}'", TorchModel(guide, model.decoder, observation, model.prior), guide
