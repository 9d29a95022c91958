"""The best linear-Gaussian guide for given data, found apart from the code under test."""

import math

import torch
from torch import Tensor

from pyrogaps.guides.controlled import MIN_SCALE, LinearStructuredNormal
from pyrogaps.models.controlled import ControlledLinear, actions_before


def best_guide(model: ControlledLinear, x: Tensor, u: Tensor, lookahead: float) -> LinearStructuredNormal:
    """The guide of this lookahead with the highest mean ELBO on `x` `(N, T, D)` and `u` `(N, T, K)`.

    Its factors have the gains and covariances of p(z_t | z_{t-1}, x, u), and as means the regressions of that factor's
    mean, at z_{t-1} = 0, on what the guide is shown.
    """
    steps, d = x.shape[1], model.latent_dim
    guide = LinearStructuredNormal(model.data_dim, model.action_dim, d, steps, lookahead)
    backward = model.without_actions().backward_information(steps)
    shift, inputs = model.response(u), torch.cat([x, actions_before(u)], -1)
    # Of the data less the effect of the actions; then in the coordinates of the states themselves.
    information = model.without_actions().expected_information(x - shift @ model.C.T, math.inf)
    information = information + torch.einsum("tij,ntj->nti", backward.information, shift)
    with torch.no_grad():
        for t, (R, Omega) in enumerate(zip(backward.covariance, backward.information, strict=True)):
            loc = information[:, t] @ R.T
            if t:
                loc = loc + u[:, t - 1] @ model.B.T @ (torch.eye(d) - R @ Omega).T
            shown = guide.mask[t, 0, :, 0].bool()
            fitted = torch.linalg.lstsq(inputs[:, shown].flatten(1), loc, driver="gelsd").solution
            guide.weight[t][:, shown] = fitted.T.reshape(d, -1, inputs.shape[-1])
            root = torch.linalg.cholesky(R)
            guide.root[t] = root.tril(-1) + (root.diagonal() - MIN_SCALE).expm1().log().diag()
            guide.gain[t] = backward.gain[t]
    return guide
