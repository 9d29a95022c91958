"""Models of pythae, where it is installed: the package's own classes and losses."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, Normal, Transform, TransformedDistribution, constraints

import pyrogaps as pg

pytestmark = pytest.mark.filterwarnings("ignore")
X = (torch.rand(12, 1, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.4).float()
SETTINGS: dict[str, dict[str, Any]] = {
    "bce": {"likelihood": "bernoulli", "output": "probabilities"},
    "mse": {"likelihood": "normal", "scale": 1.0},
}


class Flow(Transform):
    """An inverse autoregressive flow of pythae, which takes rows alone."""

    domain = codomain = constraints.real_vector
    bijective = True

    def __init__(self, net: Any) -> None:
        super().__init__(cache_size=1)
        self.net = net

    def _call(self, z0: Tensor) -> Tensor:
        return self.net.inverse(z0.flatten(0, -2)).out.reshape(z0.shape)

    def _inverse(self, z: Tensor) -> Tensor:
        return self.net(z.flatten(0, -2)).out.reshape(z.shape)

    def log_abs_det_jacobian(self, z0: Tensor, z: Tensor) -> Tensor:
        return self.net.inverse(z0.flatten(0, -2)).log_abs_det_jac.reshape(z0.shape[:-1])


@pytest.fixture
def make() -> Callable[..., Any]:
    """A model of pythae by the name of its class."""
    models = pytest.importorskip("pythae.models", exc_type=ImportError)

    def made(name: str, kind: str, **more: Any) -> Any:
        config = getattr(models, f"{name}_Config" if "_" in name else f"{name}Config")
        settings = {"input_dim": (1, 4, 4), "latent_dim": 2, "reconstruction_loss": kind}
        return getattr(models, name)(config(**settings, **more))

    return made


def encoder_of(vae: Any) -> Any:
    if not hasattr(vae, "iaf_flow"):
        return vae.encoder

    def encode(x: Tensor) -> TransformedDistribution:
        output = vae.encoder(x)
        base = Independent(Normal(output.embedding, (output.log_covariance / 2).exp()), 1)
        return TransformedDistribution(base, [Flow(vae.iaf_flow)])

    return encode


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        ("VAE", "bce", ""),
        ("VAE", "mse", "leaves out the log-normaliser"),
        ("IWAE", "bce", "an importance-weighted bound of about"),
        ("BetaVAE", "bce", "weighs the KL term by"),
        ("VAE_IAF", "bce", ""),
    ],
)
def test_a_model_of_pythae(make: Callable[..., Any], name: str, kind: str, reason: str) -> None:
    vae = make(name, kind, **({"beta": 4.0} if name == "BetaVAE" else {}))
    vae.eval()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        pair = pg.from_torch(
            encoder_of(vae), vae.decoder, **SETTINGS[kind], data=X, elbo=lambda x: vae({"data": x}).loss
        )
    notes = [str(warning.message) for warning in warned if str(warning.message).startswith("elbo: ")]
    assert len(notes) == bool(reason)
    assert all(reason in note for note in notes)
    if not reason:
        with torch.no_grad():
            losses = torch.tensor([-float(vae({"data": X}).loss) for _ in range(200)], dtype=torch.float64)
        bound = pg.elbo(*pair, X)
        error = math.hypot(float(losses.std()) / 200**0.5, float(bound.mcse.square().sum().sqrt()) / len(X))
        assert abs(float(losses.mean()) - float(bound.value.mean())) < 4 * error < 0.2
