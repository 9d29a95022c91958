"""What a model observes of every datapoint: fingerprints, ranges and base measures."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyrogaps import JointDensity
from pyrogaps.density.observations import CONTINUOUS, DISCRETE, FACTOR, Observed, merged, observe
from pyrogaps.likelihoods.discretised_logistic import DiscretisedLogistic

X = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
ALL = torch.arange(6)


def observing(*sites: Callable[[Tensor, Tensor], Any], plates: bool = True) -> Callable[[Tensor], None]:
    """A model with a site for each function of (z, x), which returns a distribution over x."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))
            for number, site in enumerate(sites):
                pyro.sample(f"x{number}", site(z[:, None], x), obs=x)

    return model


def normal(z: Tensor, x: Tensor) -> Any:
    return dist.Normal(z.expand(x.shape), 1.0).to_event(1)


def test_fingerprints_are_of_the_values_of_a_datapoint_alone() -> None:
    joint = JointDensity(observing(normal), X)
    prints, (site,), _ = observe(joint, ALL)
    assert len({*prints}) == 6
    assert observe(joint, ALL[2:5])[0].tolist() == prints[2:5].tolist()
    changed = X.clone()
    changed[3, 1] += 1e-3
    assert (observe(JointDensity(observing(normal), changed), ALL)[0] == prints).tolist() == [n != 3 for n in range(6)]
    # Another precision, distribution, or name of a site changes nothing.
    laplace = observing(lambda z, x: dist.Laplace(z.expand(x.shape), 1.0).to_event(1))
    assert observe(JointDensity(laplace, X.float()), ALL)[0].tolist() == prints.tolist()
    assert (site.low, site.high) == (float(X.min()), float(X.max())) and not site.whole and site.count == 18


def test_masked_values_do_not_count() -> None:
    def masked(z: Tensor, x: Tensor) -> Any:
        return dist.Normal(z.expand(x.shape), 1.0).mask(x > -0.5).to_event(1)

    mask = X > -0.5
    joint, padded = JointDensity(observing(masked), X), torch.where(mask, X, torch.full_like(X, -7.0))
    prints, (site,), _ = observe(joint, ALL)
    assert observe(JointDensity(observing(masked), padded), ALL)[0].tolist() == prints.tolist()
    assert site.count == int(mask.sum()) and site.high == float(X[mask].max())
    assert not mask.all()
    assert (prints != observe(JointDensity(observing(normal), X), ALL)[0]).tolist() == (~mask.all(1)).tolist()


@pytest.mark.parametrize(
    ("site", "x", "measure", "whole"),
    [
        (lambda z, x: dist.Bernoulli(logits=z.expand(x.shape)).to_event(1), (X > 0).double(), DISCRETE, True),
        (lambda z, x: dist.Poisson(z.exp().expand(x.shape)).to_event(1), (3 * X).abs().round(), DISCRETE, True),
        (lambda z, x: DiscretisedLogistic(z.expand(x.shape), torch.ones_like(x)).to_event(1),
         (X.sigmoid() * 255).round() / 255, DISCRETE, False),
        (normal, X, CONTINUOUS, False),
        (lambda z, x: dist.LogNormal(z.expand(x.shape), 1.0).to_event(1), X.exp(), CONTINUOUS, False),
        (lambda z, x: dist.Dirichlet(z.exp().expand(x.shape)), X.softmax(-1), "the simplex of 3", False),
    ],
)  # fmt: skip
def test_measures(site: Any, x: Tensor, measure: str, whole: bool) -> None:
    _, (found,), _ = observe(JointDensity(observing(site), x), ALL)
    assert (found.measure, found.whole) == (measure, whole)


def test_parts_are_merged() -> None:
    joint = JointDensity(observing(normal, normal), X)
    _, whole, _ = observe(joint, ALL)
    parts = merged([observe(joint, rows)[1] for rows in (ALL[:1], ALL[1:4], ALL[4:])])
    assert [site.site for site in parts] == ["x0", "x1"]
    for part, one in zip(parts, whole, strict=True):
        assert part.mean == pytest.approx(one.mean) and part.deviation == pytest.approx(one.deviation)
        assert (part.low, part.high, part.count) == (one.low, one.high, one.count)
    nothing = Observed("x0", "Normal", CONTINUOUS, "", 0.0, 0.0, 0.0, 0.0, whole=True, count=0)
    assert merged([[nothing], whole[:1]]) == whole[:1] == merged([whole[:1], [nothing]])


def test_discrete_latents_factors_and_no_plate() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(torch.full((len(x),), 0.3)))
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal((z + k)[..., None].expand(*(z + k).shape, 3), 1.0).to_event(1), obs=x)
            pyro.factor("f", z)

    prints, sites, _ = observe(JointDensity(model, X), ALL)
    assert [site.measure for site in sites] == [CONTINUOUS, FACTOR]
    assert prints.tolist() == observe(JointDensity(observing(normal), X), ALL)[0].tolist()
    whole, *_ = observe(JointDensity(observing(normal), X, plate=False), torch.zeros(1, dtype=torch.long))
    assert whole.shape == (1,)


def test_a_probe_is_of_the_model_and_of_each_datapoint() -> None:
    probe = observe(JointDensity(observing(normal), X), ALL).probe
    assert observe(JointDensity(observing(normal), X[:4]), ALL[:4]).probe == pytest.approx(probe[:4])
    assert observe(JointDensity(observing(normal), X), ALL[2:]).probe == pytest.approx(probe[2:])
    assert observe(JointDensity(observing(normal, normal), X), ALL).probe != pytest.approx(probe)
