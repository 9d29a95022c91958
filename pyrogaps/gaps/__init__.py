"""The ledger of gaps: what separates inference from the truth, and whose fault it is."""

from pyrogaps.gaps.decompose import decompose
from pyrogaps.gaps.ledger import GapLedger

__all__ = ["GapLedger", "decompose"]
