"""The rank of the truth among a posterior's draws, coordinate by coordinate."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pyrogaps.bounds import first_few, refuse_nan
from pyrogaps.density import JointDensity
from pyrogaps.density.draws import BlockedGuide, Posterior
from pyrogaps.errors import InputError
from pyrogaps.run import Run
from pyrogaps.streams import PARTICLE_BLOCK, Chunk, particle_blocks


@dataclass(frozen=True)
class Ranks:
    """Ranks of the truth among L draws, and the same normalised to [0, 1].

    `rank` and `pit` are `(B, dim)`, NaN at coordinates under a False mask; `log_joint` `(B,)` is the normalised rank of
    log p(x, z).
    """

    rank: Tensor
    pit: Tensor
    log_joint: Tensor


def rank_chunk(
    joint: JointDensity,
    posterior: Posterior,
    chunk: Chunk,
    truth: Tensor,
    num_draws: int,
    run: Run,
) -> Ranks:
    r"""Ranks of `truth` `(N, dim)` among draws from `posterior` at the datapoints of `chunk`.

    $r = \#\{z_s < z\} + \lfloor v\,(1 + \#\{z_s = z\}) \rfloor$, ties broken at random by v ~ U(0, 1), and
    $u = (\#\{z_s < z\} + v\,(1 + \#\{z_s = z\})) / (L + 1)$, exactly uniform where the L draws are exchangeable with z.

    Raises `InputError` naming datapoints at which draws, or their densities, are not finite.
    """
    guide, exact = BlockedGuide(posterior, chunk), truth[chunk.start : chunk.stop]
    noise = run.stream("calibration ties").noise(chunk, dtype=torch.float64, device=torch.device("cpu"))
    below, equal = (torch.zeros(exact.shape, dtype=torch.float64, device=exact.device) for _ in range(2))
    num_ranked = min(num_draws, PARTICLE_BLOCK)
    with torch.no_grad():
        for first, size in enumerate(particle_blocks(num_draws)):
            z, _ = guide.sample(size, run.stream("calibration"), first)
            # A guide with auxiliary variables has more latents than the model.
            z = _finite(guide.blocks[0][1].joint.columns_of(z, joint), chunk)
            below, equal = below + (z < exact).sum(0), equal + (z == exact).sum(0)
            if first == 0:  # the first block is enough for one number per datapoint
                log_p, true_log_p = (refuse_nan(joint(at, chunk.indices), chunk.indices) for at in (z, exact[None]))
                better, same = (log_p < true_log_p).sum(0), (log_p == true_log_p).sum(0)
    uniform = noise.uniform(1, exact.shape[1] + 1)[0]
    position = below.cpu() + uniform[:, :-1] * (1 + equal.cpu())
    log_joint = (better.cpu() + uniform[:, -1] * (1 + same.cpu())) / (num_ranked + 1)
    rank, pit = position.floor(), position / (num_draws + 1)
    active = joint.active(chunk.indices)
    if active is not None:
        rank, pit = (value.masked_fill(~active.cpu(), torch.nan) for value in (rank, pit))
    return Ranks(rank, pit, log_joint)


def _finite(z: Tensor, chunk: Chunk) -> Tensor:
    bad = ~torch.isfinite(z).all(-1).all(0)
    if bool(bad.any()):
        raise InputError(
            f"guide: its draws are NaN or infinite at simulated datapoints {first_few(bad, chunk.indices)}. Check the "
            "guide's parameters, and that simulated data resemble the training data"
        )
    return z
