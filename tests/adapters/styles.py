"""Variational autoencoders in the styles that are found in public, small: each with its own loss, summed over a batch,
and the lines that make a pair of it.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from pyro.distributions import transforms
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal, TransformedDistribution

import pyrogaps as pg

N, D, L, H = 12, 9, 2, 6
Pair = tuple[Any, Any]


@dataclass
class Style:
    """`pair` makes model and guide with further settings; `loss` is of the data's arguments. `reason`: why the loss is
    not the ELBO, in the words that the library finds; empty where it is.
    """

    data: Any
    pair: Callable[..., Pair]
    loss: Callable[..., Tensor]
    reason: str = ""


STYLES: dict[str, Callable[[], Style]] = {}


def style(make: Callable[[], Style]) -> Callable[[], Style]:
    STYLES[make.__name__.replace("_", " ")] = make
    return make


def bits() -> Tensor:
    return (torch.rand(N, D) < 0.4).float()


def drawn(mean: Tensor, logvar: Tensor) -> Tensor:
    return mean + (logvar / 2).exp() * torch.randn_like(mean)


def kl(mean: Tensor, logvar: Tensor) -> Tensor:
    return -0.5 * (1 + logvar - mean.square() - logvar.exp()).sum()


class Basic(nn.Module):
    """The shape of PyTorch's own example: two methods, a sigmoid, everything in one module."""

    def __init__(self, num_inputs: int = D) -> None:
        super().__init__()
        self.fc1, self.fc21, self.fc22 = nn.Linear(num_inputs, H), nn.Linear(H, L), nn.Linear(H, L)
        self.fc3, self.fc4 = nn.Linear(L, H), nn.Linear(H, num_inputs)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = F.relu(self.fc1(x))
        return 1 + self.fc21(h), self.fc22(h) - 1

    def decode(self, z: Tensor) -> Tensor:
        return torch.sigmoid(self.fc4(F.relu(self.fc3(z))))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, logvar = self.encode(x)
        return self.decode(drawn(mean, logvar)), mean, logvar


@style
def basic() -> Style:
    vae = Basic()

    def loss(x: Tensor) -> Tensor:
        recon, mean, logvar = vae(x)
        return F.binary_cross_entropy(recon, x, reduction="sum") + kl(mean, logvar)

    def pair(**more: Any) -> Pair:
        settings = {"likelihood": "bernoulli", "output": "probabilities", "second": "log_variance"}
        return pg.from_torch(vae.encode, vae.decode, **settings, **more)

    return Style(bits(), pair, loss)


@style
def grey_values_with_a_binary_cross_entropy() -> Style:
    vae, x = Basic(), torch.rand(N, D)

    def loss(x: Tensor) -> Tensor:
        recon, mean, logvar = vae(x)
        return F.binary_cross_entropy(recon, x, reduction="sum") + kl(mean, logvar)

    def pair(**more: Any) -> Pair:
        settings = {"likelihood": "binary-cross-entropy", "output": "probabilities", "second": "log_variance"}
        return pg.from_torch(vae.encode, vae.decode, **settings, **more)

    return Style(x, pair, loss)


@style
def continuous_bernoulli() -> Style:
    vae, x = Basic(), torch.rand(N, D)

    def loss(x: Tensor) -> Tensor:
        recon, mean, logvar = vae(x)
        normaliser = (2 * torch.atanh(1 - 2 * recon) / (1 - 2 * recon)).log().sum()
        return F.binary_cross_entropy(recon, x, reduction="sum") - normaliser + kl(mean, logvar)

    def pair(**more: Any) -> Pair:
        settings = {"likelihood": "continuous-bernoulli", "output": "probabilities", "second": "log_variance"}
        return pg.from_torch(vae.encode, vae.decode, **settings, **more)

    return Style(x, pair, loss)


@style
def convolutional_with_batch_normalisation() -> Style:
    body = nn.Sequential(nn.Conv2d(1, 3, 3, 2, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.3), nn.Flatten())
    heads = nn.Linear(12, L), nn.Linear(12, L)
    decoder = nn.Sequential(
        nn.Linear(L, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Unflatten(1, (3, 2, 2)), nn.ConvTranspose2d(3, 1, 4, 2, 1)
    )

    def encode(x: Tensor) -> tuple[Tensor, Tensor]:
        h = body(x)
        return 1 + heads[0](h), heads[1](h)

    def loss(x: Tensor) -> Tensor:
        mean, logvar = encode(x)
        logits = decoder(drawn(mean, logvar))
        return F.binary_cross_entropy_with_logits(logits, x, reduction="sum") + kl(mean, logvar)

    def pair(**more: Any) -> Pair:
        return pg.from_torch(encode, decoder, likelihood="bernoulli", second="log_variance", **more)

    return Style((torch.rand(N, 1, 4, 4) < 0.4).float(), pair, loss)


@style
def beta() -> Style:
    vae = Basic()

    def loss(x: Tensor) -> Tensor:
        recon, mean, logvar = vae(x)
        return F.binary_cross_entropy(recon, x, reduction="sum") + 4 * kl(mean, logvar)

    def pair(**more: Any) -> Pair:
        settings = {"likelihood": "bernoulli", "output": "probabilities", "second": "log_variance"}
        return pg.from_torch(vae.encode, vae.decode, **settings, **more)

    return Style(bits(), pair, loss, r"weighs the KL term by (3\.[89]|4|4\.[012]?) ± 0\.0\d \(beta\)")


@style
def conditional() -> Style:
    net, decoder = nn.Linear(D + 3, 2 * L), nn.Linear(L + 3, D)

    def encode(x: Tensor, label: Tensor) -> tuple[Tensor, ...]:
        return net(torch.cat([x, torch.eye(3)[label]], -1)).chunk(2, -1)

    def decode(z: Tensor, label: Tensor) -> Tensor:
        return decoder(torch.cat([z, torch.eye(3)[label]], -1))

    def loss(x: Tensor, label: Tensor) -> Tensor:
        mean, logvar = encode(x, label)
        logits = decode(drawn(mean, logvar), label)
        return F.binary_cross_entropy_with_logits(logits, x, reduction="sum") + kl(mean, logvar)

    def pair(**more: Any) -> Pair:
        settings = {"likelihood": "bernoulli", "second": "log_variance", "conditions": ("label",)}
        return pg.from_torch(encode, decode, **settings, **more)

    return Style((bits(), torch.arange(N) % 3), pair, loss)


class VampPrior(nn.Module):
    """A mixture of the encoder's posteriors at pseudo-inputs."""

    def __init__(self, encoder: nn.Module, num_components: int = 4) -> None:
        super().__init__()
        self.encoder, self.pseudo = encoder, nn.Parameter(torch.rand(num_components, D))

    def forward(self) -> MixtureSameFamily:
        mean, logvar = self.encoder(self.pseudo).chunk(2, -1)
        parts = Independent(Normal(mean, (logvar / 2).exp()), 1)
        return MixtureSameFamily(Categorical(torch.ones(len(self.pseudo))), parts)


def with_prior(encoder: nn.Module, decoder: nn.Module, prior: nn.Module) -> Style:
    """A VAE whose loss scores draws by a prior of its own."""

    def loss(x: Tensor) -> Tensor:
        mean, logvar = encoder(x).chunk(2, -1)
        z = drawn(mean, logvar)
        reconstruction = F.binary_cross_entropy_with_logits(decoder(z), x, reduction="sum")
        return reconstruction + Normal(mean, (logvar / 2).exp()).log_prob(z).sum() - prior().log_prob(z).sum()

    def pair(**more: Any) -> Pair:
        settings = {"likelihood": "bernoulli", "second": "log_variance", "prior": prior}
        return pg.from_torch(lambda x: encoder(x).chunk(2, -1), decoder, **settings, **more)

    return Style(bits(), pair, loss)


@style
def vampprior() -> Style:
    encoder, decoder = nn.Linear(D, 2 * L), nn.Linear(L, D)
    return with_prior(encoder, decoder, VampPrior(encoder))


class FlowPrior(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.flow = transforms.affine_coupling(L, hidden_dims=[H])

    def forward(self) -> TransformedDistribution:
        return TransformedDistribution(Independent(Normal(torch.zeros(L), 1.0), 1), [self.flow])


@style
def flow_prior() -> Style:
    return with_prior(nn.Linear(D, 2 * L), nn.Linear(L, D), FlowPrior())


@style
def learned_variance() -> Style:
    encoder, decoder = nn.Linear(D, 2 * L), nn.Linear(L, 2 * D)
    decoder.weight.data[D:] *= 0.2  # whose exponentials would have heavy tails

    def loss(x: Tensor) -> Tensor:
        mean, logvar = encoder(x).chunk(2, -1)
        location, log_variance = decoder(drawn(mean, logvar)).chunk(2, -1)
        return F.gaussian_nll_loss(location, x, log_variance.exp(), full=True, reduction="sum") + kl(mean, logvar)

    def pair(**more: Any) -> Pair:
        halves = {"second": "log_variance", "scale": "log_variance"}
        decode = lambda z: decoder(z).chunk(2, -1)  # noqa: E731
        return pg.from_torch(lambda x: encoder(x).chunk(2, -1), decode, likelihood="normal", **halves, **more)

    return Style(torch.randn(N, D), pair, loss)


@style
def sum_of_squares() -> Style:
    encoder, decoder = nn.Linear(D, 2 * L), nn.Linear(L, D)

    def loss(x: Tensor) -> Tensor:
        mean, logvar = encoder(x).chunk(2, -1)
        return F.mse_loss(decoder(drawn(mean, logvar)), x, reduction="sum") + kl(mean, logvar)

    def pair(**more: Any) -> Pair:
        settings = {"likelihood": "normal", "scale": 0.5**0.5, "second": "log_variance"}
        return pg.from_torch(lambda x: encoder(x).chunk(2, -1), decoder, **settings, **more)

    return Style(torch.randn(N, D), pair, loss, r"leaves out the log-normaliser of p\(x \| z\)\.")


@style
def mean_of_squares() -> Style:
    encoder, decoder = nn.Linear(D, 2 * L), nn.Linear(L, D)

    def loss(x: Tensor) -> Tensor:
        mean, logvar = encoder(x).chunk(2, -1)
        return len(x) * F.mse_loss(decoder(drawn(mean, logvar)), x) + kl(mean, logvar)

    def pair(**more: Any) -> Pair:
        settings = {"likelihood": "normal", "scale": 1.0, "second": "log_variance"}
        return pg.from_torch(lambda x: encoder(x).chunk(2, -1), decoder, **settings, **more)

    reason = r"sum of squares .* which is scale=0\.5\*\*0\.5, not 1, and it takes the mean .* over the 9 elements"
    return Style(torch.randn(N, D), pair, loss, reason)


@style
def text() -> Style:
    words, length = 7, 4
    embedding, reader, writer = nn.Embedding(words, 5), nn.GRU(5, 2 * L, batch_first=True), nn.Linear(L, length * words)

    def encode(x: Tensor) -> tuple[Tensor, ...]:
        return reader(embedding(x))[1][0].chunk(2, -1)

    def loss(x: Tensor) -> Tensor:
        mean, logvar = encode(x)
        logits = writer(drawn(mean, logvar)).reshape(-1, words)
        return F.cross_entropy(logits, x.reshape(-1), reduction="sum") + kl(mean, logvar)

    def pair(**more: Any) -> Pair:
        decode = lambda z: writer(z).reshape(-1, length, words)  # noqa: E731
        return pg.from_torch(encode, decode, likelihood="categorical", second="log_variance", **more)

    return Style(torch.randint(words, (N, length)), pair, loss)


class LitVAE(nn.Module):
    """The shape of a LightningModule: networks and heads as attributes, the loss in `training_step`."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Sequential(nn.Linear(D, H), nn.ReLU()), nn.Linear(L, D)
        self.fc_mu, self.fc_var, self.log_scale = nn.Linear(H, L), nn.Linear(H, L), nn.Parameter(torch.tensor([-0.5]))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, _ = batch
        hidden = self.encoder(x)
        q = Normal(self.fc_mu(hidden), (self.fc_var(hidden) / 2).exp())
        z = q.rsample()
        reconstruction = Normal(self.decoder(z), self.log_scale.exp()).log_prob(x).sum(1)
        return (q.log_prob(z).sum(1) - Normal(0.0, 1.0).log_prob(z).sum(1) - reconstruction).mean()


@style
def lightning_module() -> Style:
    lit = LitVAE()

    def pair(**more: Any) -> Pair:
        encode = lambda x: (lit.fc_mu(h := lit.encoder(x)), lit.fc_var(h))  # noqa: E731
        scale = lambda: lit.log_scale.exp()  # noqa: E731
        return pg.from_torch(encode, lit.decoder, likelihood="normal", scale=scale, second="log_variance", **more)

    return Style(torch.randn(N, D), pair, lambda x: len(x) * lit.training_step((x, x), 0))


class ModelOutput(OrderedDict[str, Any]):
    """As that of pythae: entries that are attributes too."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        super().__setattr__(name, value)

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        super().__setattr__(name, value)


class OutputEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(D, 2 * L)

    def forward(self, x: Tensor) -> ModelOutput:
        mean, logvar = self.net(x).chunk(2, -1)
        return ModelOutput(embedding=mean, log_covariance=logvar)


class OutputDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(L, D)

    def forward(self, z: Tensor) -> ModelOutput:
        return ModelOutput(reconstruction=self.net(z))


@style
def objects_like_those_of_pythae() -> Style:
    encoder, decoder = OutputEncoder(), OutputDecoder()

    def loss(x: Tensor) -> Tensor:
        output = encoder(x)
        recon = decoder(drawn(output.embedding, output.log_covariance))["reconstruction"]
        return 0.5 * F.mse_loss(recon, x, reduction="sum") + kl(output.embedding, output.log_covariance)

    def pair(**more: Any) -> Pair:
        return pg.from_torch(encoder, decoder, likelihood="normal", scale=1.0, **more)

    return Style(torch.randn(N, D), pair, loss, r"leaves out the log-normaliser of p\(x \| z\)\.")


class DiagonalGaussian:
    """As that of diffusion models' autoencoders: no distribution of torch."""

    def __init__(self, mean: Tensor, logvar: Tensor) -> None:
        self.mean, self.logvar = mean, logvar


class EncoderOutput:
    def __init__(self, latent_dist: DiagonalGaussian) -> None:
        self.latent_dist = latent_dist


@style
def latents_that_are_images() -> Style:
    encoder, decoder = nn.Conv2d(1, 2, 2, 2), nn.ConvTranspose2d(1, 1, 2, 2)

    def encode(x: Tensor) -> EncoderOutput:
        return EncoderOutput(DiagonalGaussian(*encoder(x).chunk(2, 1)))

    def loss(x: Tensor) -> Tensor:
        q = encode(x).latent_dist
        recon = decoder(drawn(q.mean, q.logvar))
        return -Normal(recon, 0.5).log_prob(x).sum() + kl(q.mean, q.logvar)

    def pair(**more: Any) -> Pair:
        return pg.from_torch(encode, decoder, likelihood="normal", scale=0.5, **more)

    return Style(torch.randn(N, 1, 4, 4), pair, loss)


@style
def counts() -> Style:
    encoder, decoder = nn.Linear(D, 2 * L), nn.Linear(L, D)

    def encode(x: Tensor) -> tuple[Tensor, ...]:
        return encoder(torch.log1p(x)).chunk(2, -1)

    def loss(x: Tensor) -> Tensor:
        mean, logvar = encode(x)
        return F.poisson_nll_loss(decoder(drawn(mean, logvar)), x, log_input=True, reduction="sum") + kl(mean, logvar)

    def pair(**more: Any) -> Pair:
        settings = {"likelihood": "poisson", "output": "log_rate", "second": "log_variance"}
        return pg.from_torch(encode, decoder, **settings, **more)

    return Style(torch.poisson(torch.full((N, D), 2.0)), pair, loss, r"leaves out log x! of p\(x \| z\)\.")


@style
def flow_posterior() -> Style:
    encoder, decoder, flow = nn.Linear(D, 2 * L), nn.Linear(L, D), transforms.affine_autoregressive(L, hidden_dims=[H])

    def encode(x: Tensor) -> TransformedDistribution:
        mean, logvar = encoder(x).chunk(2, -1)
        return TransformedDistribution(Independent(Normal(mean, (logvar / 2).exp()), 1), [flow])

    def loss(x: Tensor) -> Tensor:
        mean, logvar = encoder(x).chunk(2, -1)
        base = drawn(mean, logvar)
        z = flow(base)
        log_q = Normal(mean, (logvar / 2).exp()).log_prob(base).sum(-1) - flow.log_abs_det_jacobian(base, z)
        reconstruction = F.binary_cross_entropy_with_logits(decoder(z), x, reduction="sum")
        return reconstruction + log_q.sum() - Normal(0.0, 1.0).log_prob(z).sum()

    return Style(bits(), lambda **more: pg.from_torch(encode, decoder, likelihood="bernoulli", **more), loss)
