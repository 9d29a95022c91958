"""The mixture guide: its density and gradients, and IWAE with it against exact evidence."""

import math

import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from pyrogaps import IWAE_ELBO, Refinement, elbo, iwae, refine, train
from pyrogaps.errors import InputError
from pyrogaps.guides.mixture import AmortizedMixture, AutoLocalMixture, DiagonalMixture
from pyrogaps.models.curves import CURVES
from pyrogaps.models.linear_gaussian import LinearGaussian
from pyrogaps.models.synthetic import SyntheticModel

PAPER = [name for name in CURVES if name != "absolute-value-monotone"]
QUICK = {"num_draws": 10_000, "num_steps": 200, "batch_size": 300}


def mixture(parameters: list[Tensor]) -> DiagonalMixture:
    """Two components over two dimensions, batch shape (3,)."""
    logits, means, log_scales = parameters
    return DiagonalMixture(dist.Categorical(logits=logits), dist.Normal(means, log_scales.exp()).to_event(1))


def parameters() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(3, 2), (3, 2, 2), (3, 2, 2)]
    # Components that lie near each other: where density is all but zero between two, gradients have no variance.
    return [(0.4 * torch.randn(shape, generator=generator, dtype=torch.float64)).requires_grad_() for shape in shapes]


def test_density_is_the_mixture_s() -> None:
    logits, means, log_scales = chosen = parameters()
    z = torch.randn(5, 3, 2, dtype=torch.float64)
    parts = torch.distributions.Normal(means, log_scales.exp()).log_prob(z[:, :, None]).sum(-1)
    expected = (parts + logits.log_softmax(-1)).logsumexp(-1)
    torch.testing.assert_close(mixture(chosen).log_prob(z), expected)
    assert mixture(chosen).expand((4, 3)).rsample().shape == (4, 3, 2)


def test_draws_move_with_the_parameters_as_their_moments_do() -> None:
    """The gradient of E[h(z)] through draws against that of the exact moments, in standard errors."""
    chosen, weights = parameters(), torch.tensor([1.0, -0.5], dtype=torch.float64)
    logits, means, log_scales = chosen
    probs, second = logits.softmax(-1)[..., None], means**2 + (2 * log_scales).exp()
    product = (probs * means[..., :1] * means[..., 1:]).sum(1)  # coordinates are dependent through the component
    exact_value = ((probs * (means + second)).sum(1) * weights).sum() + product.sum()
    exact = torch.autograd.grad(exact_value, chosen)
    torch.manual_seed(0)
    runs = []
    for _ in range(40):
        z = mixture(chosen).rsample(torch.Size([4000]))
        value = ((z + z**2) * weights).sum(-1) + z[..., 0] * z[..., 1]
        gradient = torch.autograd.grad(value.mean(0).sum(), chosen)
        runs.append(torch.cat([part.flatten() for part in gradient]))
    mean, error = torch.stack(runs).mean(0), torch.stack(runs).std(0) / math.sqrt(len(runs))
    expected = torch.cat([part.flatten() for part in exact])
    assert ((mean - expected).abs() < 4 * error + 1e-9).all()
    assert (expected.abs() > 10 * error).double().mean() > 0.7


def test_guide_scores_what_it_draws() -> None:
    guide, x = AmortizedMixture(6, 3, [5], num_components=4), torch.randn(7, 2, 3)
    trace = poutine.trace(guide).get_trace(x)
    trace.compute_log_prob()
    site = trace.nodes["z"]
    assert site["value"].shape == (7, 3)
    assert [frame.name for frame in site["cond_indep_stack"]] == ["data"]
    torch.testing.assert_close(site["log_prob"], guide.posterior(x).log_prob(site["value"]))


def test_defensive_component_is_the_prior() -> None:
    x = torch.randn(7, 2)
    guarded, bare = AmortizedMixture(defensive=0.1), AmortizedMixture(defensive=0.0)
    bare.load_state_dict(guarded.state_dict())
    z = torch.linspace(-4, 4, 9)[:, None, None].expand(9, 7, 1)
    prior = dist.Normal(0.0, 1.0).log_prob(z[..., 0]).exp()
    expected = 0.9 * bare.posterior(x).log_prob(z).exp() + 0.1 * prior
    torch.testing.assert_close(guarded.posterior(x).log_prob(z).exp(), expected)
    log_weights, means, scales = guarded.parameters_of(x)
    assert log_weights.shape == (7, 10) and means.shape == scales.shape == (7, 10, 1)
    torch.testing.assert_close(log_weights.exp().sum(-1), torch.ones(7))


@pytest.mark.parametrize("curve", PAPER)
def test_iwae_reaches_the_evidence_of_every_ground_truth(curve: str) -> None:
    model = SyntheticModel(curve, "surrogate")
    x, _ = model.draw(32, seed=1)
    guide = AmortizedMixture()
    losses = guide.fit(model, x, **QUICK)
    assert len(losses) == 200 and sum(losses[-50:]) < sum(losses[:50])
    estimate, exact = iwae(model, guide, x, num_particles=16_000), model.log_evidence(x)
    error = (estimate.value - exact) / estimate.mcse
    assert float(estimate.mcse.median()) < 0.02 and float(estimate.mcse.max()) < 0.15
    # Large weights are rare, so errors are skewed: four of them would be exceeded now and then, of 160.
    assert float(error.abs().max()) < 5
    assert 0.7 < float(error.square().mean().sqrt()) < 1.4
    assert float((estimate.value - exact).mean().abs()) < 4 * float(estimate.mcse.norm()) / len(x)


def test_draws_of_the_model_show_modes_that_the_elbo_loses() -> None:
    """A point of the segment that is run through twice has two latents. Fitted to draws, q holds both."""
    model = SyntheticModel("absolute-value", "exact")
    x = torch.tensor([[0.35, 0.35]]).repeat(64, 1)
    guide = AmortizedMixture()
    guide.fit(model, model.draw(500)[0], **QUICK)
    z = torch.linspace(-6, 6, 2001)
    density = guide.posterior(x[:1]).log_prob(z[:, None, None])[:, 0].exp().detach()
    left = float(density[z < 0].sum() / density.sum())
    assert 0.4 < left < 0.6
    # A mixture of one component and no defence can only hold one of them.
    narrow = AmortizedMixture(num_components=1, defensive=0.0)
    train(model, narrow, x, num_epochs=150, learning_rate=2e-2, progress=False)
    missing = model.log_evidence(x[:1]) - iwae(model, narrow, x[:1], num_particles=1000).value
    assert abs(float(missing) - math.log(2)) < 0.1


@pytest.mark.parametrize("doubly", [False, True])
def test_guide_is_trained_by_importance_weighted_bounds(doubly: bool) -> None:
    model = SyntheticModel("circle", "exact")
    x, _ = model.draw(100)
    guide = AmortizedMixture()
    before = elbo(model, guide, x, num_particles=100).value.mean()
    objective = IWAE_ELBO(5, doubly_reparametrised=doubly, vectorize_particles=True)
    train(model, guide, x, num_epochs=30, learning_rate=1e-2, objective=objective, progress=False)
    assert elbo(model, guide, x, num_particles=100).value.mean() > before + 5


def test_guide_is_refined_in_its_own_family() -> None:
    model = SyntheticModel("figure-8", "exact")
    x, _ = model.draw(4)
    guide = AmortizedMixture(hidden=[8], num_components=3)
    local = guide.local_family(model)
    local(x)
    guide.start_local(local, x)
    z = torch.randn(5, 4, 1)
    torch.testing.assert_close(local.get_posterior().log_prob(z), guide.posterior(x).log_prob(z))
    before = elbo(model, guide, x, num_particles=500)
    after = elbo(model, refine(model, guide, x, settings=Refinement(num_steps=100)), x, num_particles=500)
    assert (after.value > before.value + 4 * before.mcse).all()


def test_refined_mixture_keeps_both_modes() -> None:
    """Of a posterior that is symmetric about 0: refined from a fitted guide it is nearly exact, one Normal is not."""
    model = SyntheticModel("absolute-value", "exact")
    x = torch.tensor([[0.3, 0.3], [0.4, 0.35]])
    guide = AmortizedMixture(num_components=4)
    guide.fit(model, model.draw(500)[0], **QUICK)
    gaps = []
    for family in (AutoNormal, guide):
        bound = elbo(model, refine(model, family, x, settings=Refinement(num_steps=150)), x, num_particles=4000)
        assert float(bound.mcse.max()) < 0.05
        gaps.append(model.log_evidence(x) - bound.value)
    assert (gaps[0] > math.log(2) - 0.1).all()
    assert (gaps[1] < 0.1).all()


def test_local_mixture_starts_at_a_normal() -> None:
    model = SyntheticModel("circle", "exact")
    x, _ = model.draw(3)
    local = AutoLocalMixture(model, num_components=4)
    local(x)
    loc, scale = torch.tensor([[0.5], [-1.0], [0.0]]), torch.tensor([[0.2], [1.0], [0.5]])
    local.start_at(loc, scale)
    z = loc + scale * torch.linspace(-1, 1, 5)[:, None, None]
    torch.testing.assert_close(
        local.get_posterior().log_prob(z), dist.Normal(loc, scale).log_prob(z)[..., 0], atol=0.1, rtol=0
    )


def test_fitting_takes_further_latent_dimensions_and_keeps_the_callers_state() -> None:
    model = LinearGaussian.random(4, 2)
    x = torch.randn(20, 4)
    guide, state = AmortizedMixture(4, 2, [16], num_components=2, defensive=0.1), torch.get_rng_state()
    losses = guide.fit(model, x, num_draws=3000, num_steps=300)
    assert torch.equal(torch.get_rng_state(), state)
    # The loss is an upper estimate of H(z|x), which is exact here.
    entropy = float(dist.MultivariateNormal(torch.zeros(2), model.posterior(x)[1].detach()).entropy())
    assert -0.1 < sum(losses[-50:]) / 50 - entropy < 0.35
    assert not any(value.grad is not None for value in model.parameters())


def test_bad_input_is_named() -> None:
    with pytest.raises(InputError, match="num_components"):
        AmortizedMixture(num_components=0)
    with pytest.raises(InputError, match="defensive"):
        AmortizedMixture(defensive=1.0)
    with pytest.raises(InputError, match="data_dim is 2, but a datapoint has 4"):
        AmortizedMixture()(torch.zeros(3, 4))
    with pytest.raises(InputError, match=r"latents z \(2 dimensions in all\)\. This guide needs a single site 'z'"):
        AmortizedMixture(4, 1).fit(LinearGaussian.random(4, 2), torch.zeros(3, 4))
