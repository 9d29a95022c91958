"""The ledger of gaps: what separates inference from the truth, and whose fault it is."""

from pyrogaps.gaps.certificate import Certificate
from pyrogaps.gaps.compare import compare
from pyrogaps.gaps.comparison import Comparison
from pyrogaps.gaps.decompose import decompose
from pyrogaps.gaps.ledger import GapLedger
from pyrogaps.gaps.retrain import Retraining, Split
from pyrogaps.gaps.terms import TERMS, Columns, Term, Values, values_of

__all__ = [
    "TERMS",
    "Certificate",
    "Columns",
    "Comparison",
    "GapLedger",
    "Retraining",
    "Split",
    "Term",
    "Values",
    "compare",
    "decompose",
    "values_of",
]
