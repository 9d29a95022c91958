"""One ledger for all tests of the page."""

import pyro
import pytest

import pyrogaps as pg
from tests.report.ledgers import awkward


@pytest.fixture(scope="session")
def ledger() -> pg.GapLedger:
    with pyro.validation_enabled(False):
        return awkward()
