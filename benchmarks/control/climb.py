"""Many small maximisations at once: BFGS with a line search for each, batched over independent problems."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

SUFFICIENT = 1e-4  # of the increase that the gradient promises (Armijo)
LONGEST = 1.0  # of a parameter in one step
TRIALS = 6
CAREFUL = 1e-2  # length of a step of which the curvature is not known
FLAT = 1e-4  # slopes below which a problem is solved, nats


def maximise(model: nn.Module, objective: Callable[[], Tensor], num_steps: int) -> tuple[Tensor, Tensor]:
    """Maximise `objective()` `(B,)` in place over the parameters `(B, ...)` of `model`, each problem by itself.

    Returns the values and the largest absolute slope of every problem, `(B,)` each.
    """
    parameters = [*model.parameters()]

    def evaluate(theta: Tensor) -> tuple[Tensor, Tensor]:
        sizes = [parameter[0].numel() for parameter in parameters]
        with torch.no_grad():
            for parameter, part in zip(parameters, theta.split(sizes, 1), strict=True):
                parameter.copy_(part.reshape(parameter.shape))
        values = -objective()
        slopes = torch.autograd.grad(values.sum(), parameters)
        flat = torch.cat([slope.flatten(1) for slope in slopes], 1)
        good = values.isfinite() & flat.isfinite().all(1)
        return torch.where(good, values.detach(), torch.inf), torch.where(good[:, None], flat, 0.0)

    def steepest(slope: Tensor) -> Tensor:
        """A short step up, however steep it is."""
        return CAREFUL * identity / slope.norm(dim=1).clamp(min=1.0)[:, None, None]

    theta = torch.cat([parameter.detach().flatten(1) for parameter in parameters], 1)
    identity = torch.eye(theta.shape[1], dtype=theta.dtype).expand(len(theta), -1, -1)
    value, slope = evaluate(theta)
    inverse, fresh = steepest(slope), torch.ones_like(value, dtype=torch.bool)
    stuck = torch.zeros_like(value, dtype=torch.bool)
    for _ in range(num_steps):
        active = ~stuck & (slope.abs().amax(1) > FLAT)
        if not bool(active.any()):
            break
        direction = -(inverse @ slope[..., None])[..., 0]
        direction = direction / (direction.abs().amax(1, keepdim=True) / LONGEST).clamp(min=1.0)
        promised = (direction * slope).sum(1)
        size, best = torch.ones_like(value), (theta, value, slope)
        waiting = active & (promised < 0)
        for _ in range(TRIALS):
            if not bool(waiting.any()):
                break
            moved = torch.where(waiting[:, None], theta + size[:, None] * direction, best[0])
            new_value, new_slope = evaluate(moved)
            taken = waiting & (new_value <= value + SUFFICIENT * size * promised)
            best = (
                torch.where(taken[:, None], moved, best[0]),
                torch.where(taken, new_value, best[1]),
                torch.where(taken[:, None], new_slope, best[2]),
            )
            waiting, size = waiting & ~taken, size / 4
        # Nothing higher along the direction, to rounding: once more along the gradient, then no more.
        stuck = stuck | (waiting & fresh)
        s, y = best[0] - theta, best[2] - slope
        inverse = torch.where(fresh[:, None, None], _scaled(identity, s, y), inverse)
        fresh = waiting
        theta, value, slope = best
        inverse = torch.where(fresh[:, None, None], steepest(slope), _updated(inverse, s, y, identity))
    evaluate(theta)
    return -value, slope.abs().amax(1)


def _scaled(identity: Tensor, s: Tensor, y: Tensor) -> Tensor:
    """The multiple of the identity that fits the curvature along the first step (Nocedal and Wright, 6.20)."""
    curvature = (s * y).sum(1) / y.square().sum(1).clamp(min=1e-300)
    return torch.where(curvature > 0, curvature, CAREFUL)[:, None, None] * identity


def _updated(inverse: Tensor, s: Tensor, y: Tensor, identity: Tensor) -> Tensor:
    """The inverse Hessians after steps `s` that changed the slopes by `y`; unchanged where curvature is negative."""
    product = (s * y).sum(1)
    curved = product > 1e-10 * s.norm(dim=1) * y.norm(dim=1)
    scale = 1 / torch.where(curved, product, 1.0)
    left = identity - scale[:, None, None] * s[:, :, None] * y[:, None, :]
    updated = left @ inverse @ left.mT + scale[:, None, None] * s[:, :, None] * s[:, None, :]
    return torch.where(curved[:, None, None], updated, inverse)
