"""Ledgers of these tests take a few steps: what they show is which density is measured, not how well it is refined."""

from typing import Any

import pytest


@pytest.fixture(autouse=True)
def few_steps(brief_check: None) -> None:
    """Checks of convergence of 2 further steps, see `brief_check`."""


@pytest.fixture(params=["eager", pytest.param("captured", marks=pytest.mark.slow)])
def mode(request: pytest.FixtureRequest) -> Any:
    """How densities are evaluated: recording them takes longer than all else that these tests do."""
    return request.param
