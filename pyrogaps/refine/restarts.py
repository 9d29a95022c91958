"""Further starts of a refinement: a posterior may have modes that the guide does not know of."""

import torch

from pyrogaps.refine.families import Start
from pyrogaps.refine.objective import Evaluator
from pyrogaps.streams import BLOCK, Chunk, Stream

NUM_DRAWS = 256
NARROW = 0.1


def prior_start(evaluator: Evaluator, chunk: Chunk, stream: Stream, attempt: int) -> Start:
    """The best of some prior draws, by log p(x, z), of every datapoint of a chunk; narrow, to stay in its mode."""
    draws = []
    for block in chunk.blocks():
        stream.reseed(block.start // BLOCK, attempt)
        draws.append(evaluator.joint.sample_prior(NUM_DRAWS, block.indices))
    z = torch.cat(draws, 1)
    (log_joint,) = evaluator.bind(chunk.indices, NUM_DRAWS).at_step(0).values(z)
    best = torch.nan_to_num(log_joint, nan=-torch.inf).argmax(0)
    spread = z.std(0)
    scale = NARROW * torch.where(spread > 0, spread, torch.ones_like(spread))
    return Start(z[best, torch.arange(len(best), device=best.device)], scale, fitted=False)
