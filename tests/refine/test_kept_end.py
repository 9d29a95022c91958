"""A refinement keeps, for every datapoint, the best of its start, its end, and the end of a further run.

The best has the highest ELBO on the selection draws, which are the same for all three. Here the optimiser is replaced
by one that moves the mean of each datapoint to a known distance from the optimum, so the best is known.
"""

from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor

from pyrogaps import Refinement
from pyrogaps.refine.optimise import Optimisation
from tests.references import WrongEncoder, anisotropic, draws_of, refined_by_adam

# Distances from the optimum in standard deviations: of the start, the end, and the further end, in every order.
START = 1.0
ENDS = [(first, second) for first, second in permutations([0.0, 0.5, 1.5, 2.0], 2)]


def refined_to(ends: list[tuple[float, float]], monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Tensor]:
    """What refinement returns, and the distances from the optimum of what it kept, `(N,)`."""
    model = anisotropic(8, 3)
    x, _ = draws_of(model, len(ends))
    best, scale = (part.detach() for part in model.mean_field_optimum(x))
    distances = iter(torch.tensor(ends, dtype=torch.float64).T)

    def moved(self: Optimisation, *args: Any, **kwargs: Any) -> Tensor:
        with torch.no_grad():
            self.refinable.parameters[0].copy_(best + next(distances)[:, None] * scale)
        return torch.zeros(50, len(ends), dtype=torch.float64)

    monkeypatch.setattr(Optimisation, "_ascend", moved)
    guide = WrongEncoder(model, shrink=1.0, shift=START, width=1.0)
    refined = refined_by_adam(model, guide, x, Refinement(num_steps=10))
    kept = refined.at(torch.arange(len(ends))).distributions["z"].mean
    return refined, ((kept.detach() - best) / scale).mean(-1)


def test_the_best_of_start_end_and_further_end_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    refined, kept = refined_to(ENDS, monkeypatch)
    expected = torch.tensor([min(START, *ends) for ends in ENDS], dtype=torch.float64)
    torch.testing.assert_close(kept, expected)
    assert refined.kept_start.tolist() == [min(ends) > START for ends in ENDS]


def test_an_end_that_a_further_run_improves_has_not_converged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor has a start that is kept because both ends are worse."""
    refined, _ = refined_to(ENDS, monkeypatch)
    assert refined.converged.tolist() == [second > first and first < START for first, second in ENDS]
