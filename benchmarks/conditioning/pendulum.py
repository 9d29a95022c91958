"""A pendulum: what filtering loses where the future tells of the past, and two settings in which it does not."""

import math
from collections.abc import Iterator
from typing import Any

import torch

import pyrogaps as pg
from benchmarks.conditioning.rows import Options, Row, mean_row, simulated, trained_for
from pyrogaps.guides.sequential import StructuredNormal
from pyrogaps.models.pendulum import Pendulum

STEPS = 15
SETTINGS: dict[str, dict[str, Any]] = {
    "process noise, partial observations": {},
    "next to no process noise, first state unknown": {"process_scale": 1e-3},
    "next to no process noise, first state known": {"process_scale": 1e-3, "known_first_state": True},
    "full state observed": {"full_state": True, "observation_scale": 0.003},
}
LOOKAHEADS = (0, 1, 3, math.inf)


def rows(options: Options) -> Iterator[Row]:
    """The gap of every lookahead, log p(x) by the smoother's importance weights, and the bracket by the smoother."""
    for number, (name, settings) in enumerate(SETTINGS.items()):
        model = Pendulum(**settings)
        shape = torch.zeros(256, STEPS, model.data_dim)
        x = simulated(model, shape, options.num_test, options.seed + 1)
        guides = {}
        for lookahead in LOOKAHEADS:
            folder = options.runs / f"pendulum-{number}" / f"lookahead-{lookahead}"

            def make(lookahead: float = lookahead, model: Pendulum = model) -> StructuredNormal:
                # Without innovations a network hardly learns to read off a state that is all but seen.
                return StructuredNormal(
                    model.data_dim, 2, 64, lookahead=lookahead, around=model, innovations=model.full_state
                )

            guides[lookahead] = trained_for(model, make, shape, folder, options)
        evidence = pg.iwae(model, guides[math.inf], x, num_particles=1000).value
        elbos = {k: pg.elbo(model, guide, x, num_particles=200).value for k, guide in guides.items()}
        for lookahead, elbo in elbos.items():
            told = "pendulum", name, f"lookahead {lookahead}"
            yield mean_row(*told, "log p(x) - L[trained guide]", evidence - elbo)
            yield mean_row(*told, "L[smoother] - L[trained guide]", elbos[math.inf] - elbo)
