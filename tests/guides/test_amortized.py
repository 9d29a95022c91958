"""The amortized Gaussian guides."""

import pytest
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal

from pyrogaps.errors import InputError
from pyrogaps.guides.amortized import AmortizedMultivariateNormal, AmortizedNormal

GUIDES = [AmortizedNormal, AmortizedMultivariateNormal]


def site_of(guide: torch.nn.Module, x: Tensor):  # type: ignore[no-untyped-def]
    trace = poutine.trace(guide).get_trace(x)
    trace.compute_log_prob()
    return trace.nodes["z"]


def test_normal_scores_what_it_draws() -> None:
    torch.manual_seed(0)
    guide, x = AmortizedNormal(6, 3, [5]), torch.randn(4, 6)
    mean, scale = guide.parameters_of(x)
    site = site_of(guide, x)
    torch.testing.assert_close(site["log_prob"], Normal(mean, scale).log_prob(site["value"]).sum(-1))


def test_multivariate_normal_fills_its_triangle() -> None:
    torch.manual_seed(0)
    guide, x = AmortizedMultivariateNormal(6, 3, [5]), torch.randn(4, 6)
    mean, scale_tril = guide.parameters_of(x)
    rows, columns = torch.triu_indices(3, 3, offset=1)
    assert (scale_tril[:, rows, columns] == 0).all()
    assert scale_tril.flatten(1).count_nonzero(1).tolist() == [6] * 4
    site = site_of(guide, x)
    expected = MultivariateNormal(mean, scale_tril=scale_tril).log_prob(site["value"])
    torch.testing.assert_close(site["log_prob"], expected)


@pytest.mark.parametrize("kind", GUIDES)
def test_every_output_of_the_encoder_is_used(kind: type[AmortizedNormal]) -> None:
    torch.manual_seed(0)
    guide, x = kind(6, 3, []), torch.randn(4, 6)
    sum(part.square().sum() for part in guide.parameters_of(x)).backward()
    bias = guide.encoder[-1].bias
    assert bias.grad is not None and (bias.grad != 0).all()


@pytest.mark.parametrize("kind", GUIDES)
def test_shapes_plate_and_event_shapes(kind: type[AmortizedNormal]) -> None:
    guide, x = kind(6, 1, [5, 4], "Tanh"), torch.zeros(4, 2, 3, dtype=torch.uint8)
    site = site_of(guide, x)
    assert site["value"].shape == (4, 1)
    assert [frame.name for frame in site["cond_indep_stack"]] == ["data"]


@pytest.mark.parametrize("kind", GUIDES)
def test_scales_do_not_vanish(kind: type[AmortizedNormal]) -> None:
    guide = kind(2, 2, [], min_scale=1e-3)
    with torch.no_grad():
        guide.encoder[-1].bias.fill_(-1e4)
    site = site_of(guide, torch.zeros(3, 2))
    assert torch.isfinite(site["log_prob"]).all()
    scale = guide.parameters_of(torch.zeros(3, 2))[1]
    widths = scale if kind is AmortizedNormal else scale.diagonal(dim1=-2, dim2=-1)
    assert (widths >= 1e-3).all()


@pytest.mark.parametrize("kind", GUIDES)
def test_bad_input_is_named(kind: type[AmortizedNormal]) -> None:
    with pytest.raises(InputError, match=f"{kind.__name__}: data_dim is 64, but a datapoint has 6"):
        kind()(torch.zeros(2, 6))
    with pytest.raises(InputError, match="min_scale"):
        kind(min_scale=0.0)
