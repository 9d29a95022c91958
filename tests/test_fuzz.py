"""Random Pyro programs: what is valid by construction is measured, what has a fault is refused; see `tests.fuzz`."""

import warnings
from collections import Counter

import pytest

from tests.fuzz.checks import check, spec_of
from tests.fuzz.faults import FAULTS

# Cheap ones that together have every guide, every form of data and two thirds of all that programs differ in; of the
# last two, one has discrete latents that are summed out, and one a discrete latent that the guide draws.
VALID = [205, 307, 337, 360, 396, 398, 420, 433, 450, 71, 13]


@pytest.mark.parametrize("seed", [*VALID, *range(4, 4 + 5 * len(FAULTS), 5)])
def test_a_random_program(seed: int) -> None:
    spec = spec_of(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of programs that cannot be recorded
        assert check(spec) == ("measured" if spec.fault is None else "refused")


@pytest.mark.slow
def test_500_random_programs() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outcomes = Counter(check(spec_of(seed)) for seed in range(500))
    assert outcomes == {"measured": 400, "refused": 100}
