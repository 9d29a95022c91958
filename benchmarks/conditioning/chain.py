"""A linear-Gaussian chain: trained guides of every lookahead against the best there can be, known in closed form."""

import math
from collections.abc import Iterator

import torch

import pyrogaps as pg
from benchmarks.conditioning.rows import Options, Row, mean_row, simulated, trained_for
from pyrogaps.guides.sequential import StructuredNormal
from pyrogaps.models.state_space import LinearGaussianStateSpace

STEPS = 5
CHAINS = {
    "F = Q = H = V = P1 = 1, T = 5": (1.0, 1.0, 1.0, 1.0, 1.0),
    "F = 0.9, Q = 0.5, T = 5": (0.9, 0.5, 1.0, 1.0, 1.0),
}
LOOKAHEADS = (0, 1, 2, math.inf)


def rows(options: Options) -> Iterator[Row]:
    """Of every guide, how far it lies below log p(x) in all, and below the best guide of its lookahead."""
    for number, (name, numbers) in enumerate(CHAINS.items()):
        model = LinearGaussianStateSpace(*numbers)
        shape = torch.zeros(256, STEPS, 1)
        x = simulated(model, shape, options.num_test, options.seed + 1)
        evidence = model.log_evidence(x)
        for lookahead in LOOKAHEADS:
            folder = options.runs / f"chain-{number}" / f"lookahead-{lookahead}"

            def make(lookahead: float = lookahead) -> StructuredNormal:
                return StructuredNormal(1, 1, 32, lookahead=lookahead)

            guide = trained_for(model, make, shape, folder, options)
            best = pg.elbo(model, model.optimal_guide(lookahead), x, num_particles=200).value
            reached = pg.elbo(model, guide, x, num_particles=200).value
            exact = float(model.conditioning_gap(STEPS, lookahead))
            told = "chain", name, f"lookahead {lookahead}"
            yield mean_row(*told, "log p(x) - L[best guide]", evidence - best, exact)
            yield mean_row(*told, "log p(x) - L[trained guide]", evidence - reached, exact)
            yield mean_row(*told, "L[best guide] - L[trained guide]", best - reached, 0.0)
