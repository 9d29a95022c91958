"""A mixture as the prior: torch's own constraint of its support is known to have a way to the components'."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyrogaps as pg


def mixture(components: dist.TorchDistribution) -> dist.TorchDistribution:
    return dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.3, 0.7])), components)


PRIORS = {
    "real": lambda: mixture(dist.Normal(torch.tensor([-2.0, 1.0]), 0.5)),
    "vector": lambda: mixture(dist.Normal(torch.tensor([[-2.0, 0.0], [1.0, 3.0]]), 0.5).to_event(1)),
    "positive": lambda: mixture(dist.Gamma(torch.tensor([2.0, 9.0]), 2.0)),
}


@pytest.mark.parametrize("kind", PRIORS)
def test_mixture_prior_is_scored_in_unconstrained_space(kind: str) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", PRIORS[kind]())
            total = z.sum(-1) if z.dim() > 1 else z
            pyro.sample("x", dist.Normal(total, 1.0), obs=x)

    x = torch.tensor([0.3, -1.0, 2.0])
    joint = pg.JointDensity(model, x)
    z = torch.randn(4, 3, joint.dim, generator=torch.Generator().manual_seed(0))
    prior, _ = joint.terms(z)
    fn = PRIORS[kind]()
    value = z if kind == "vector" else z[..., 0]
    expected = fn.log_prob(value.exp()) + value if kind == "positive" else fn.log_prob(value)
    torch.testing.assert_close(prior, expected)
