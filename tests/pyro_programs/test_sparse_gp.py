"""A Gaussian process with inducing points: model and guide of `VariationalSparseGP`, which take no arguments.

Its model has f integrated out under the guide's own q(u), so that y does not depend on u there: log p(x) of the program
as written is the likelihood term alone, and the inference gap is KL(q(u) || p(u)).
"""

from typing import Any

import pyro.contrib.gp as gp
import pytest
import torch

from tests.pyro_programs.pairs import Pair, assert_same, assert_same_draws, elbo_of

POINTS, INDUCING = 8, 3


def process(*, whiten: bool) -> gp.models.VariationalSparseGP:
    x = torch.linspace(0.0, 2.0, POINTS)
    y = torch.sin(2.0 * x) + 0.1 * torch.randn(POINTS)
    kernel, likelihood = gp.kernels.RBF(1, lengthscale=torch.tensor(0.7)), gp.likelihoods.Gaussian()
    process = gp.models.VariationalSparseGP(
        x, y, kernel, Xu=torch.linspace(0.2, 1.8, INDUCING), likelihood=likelihood, whiten=whiten, jitter=1e-4
    )
    prior = torch.eye(INDUCING) if whiten else torch.linalg.cholesky(kernel(process.Xu).detach())
    process.u_loc.data = prior @ (0.1 * torch.randn(INDUCING))
    process.u_scale_tril = 0.9 * prior
    return process


@pytest.mark.parametrize("whiten", [False, True])
def test_ledger(whiten: bool, mode: Any) -> None:
    own = process(whiten=whiten)
    pair = Pair(own.model, own.guide, (), 1)
    ledger = pair.ledger(mode)
    assert_same(elbo_of(ledger), pair.elbo_of_pyro())
    assert_same_draws(pair)
