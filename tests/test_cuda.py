"""The same numbers on a GPU, where there is one."""

import copy

import pytest
import torch

from pyrogaps import AIS, Refinement, decompose, iwae, train
from pyrogaps.guides.amortized import AmortizedNormal
from pyrogaps.models.vae import VAE

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")

SETTINGS = {"refinement": Refinement(num_steps=200), "num_particles": 1000, "progress": False}


@pytest.fixture
def trained() -> tuple[VAE, AmortizedNormal, torch.Tensor]:
    torch.manual_seed(0)
    x = (torch.rand(300, 40) < torch.rand(300, 1)).float()
    model, guide = VAE(40, 4, (30,)), AmortizedNormal(40, 4, (30,))
    train(model, guide, x, num_epochs=20, progress=False)
    return model, guide, x


@pytest.mark.parametrize("compile", [False, True])
def test_ledger(trained: tuple[VAE, AmortizedNormal, torch.Tensor], compile: bool) -> None:
    """Noise is another, so that values agree within their errors."""
    model, guide, x = trained
    here = decompose(model, guide, x, evidence=AIS(), **SETTINGS)
    there = decompose(
        copy.deepcopy(model).cuda(), copy.deepcopy(guide).cuda(), x.cuda(), evidence=AIS(), compile=compile, **SETTINGS
    )
    assert there.provenance["device"] == "cuda"
    for name in ("elbo", "log_evidence", "inference_gap"):
        left, right = here.per_datapoint, there.per_datapoint
        difference = float((left[name] - right[name]).mean())
        error = float(((left[f"{name}_mcse"] ** 2 + right[f"{name}_mcse"] ** 2).sum() ** 0.5) / len(x))
        assert abs(difference) < 4 * error


def test_training_and_bounds(trained: tuple[VAE, AmortizedNormal, torch.Tensor]) -> None:
    model, guide, x = trained
    before = iwae(model, guide, x, num_particles=100)
    model, guide = copy.deepcopy(model).cuda(), copy.deepcopy(guide).cuda()
    result = train(model, guide, x, num_epochs=20, device="cuda", progress=False)
    after = iwae(model, guide, x.cuda(), num_particles=100)
    assert result.num_epochs == 20
    assert after.value.device.type == "cuda"
    assert float(after.value.mean()) > float(before.value.mean())
