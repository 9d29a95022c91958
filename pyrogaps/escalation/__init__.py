"""log p(x) by escalation: every datapoint gets what it takes, and no more."""

from pyrogaps.escalation.check import LadderCheck, check_ladder
from pyrogaps.escalation.climb import climb_chunk
from pyrogaps.escalation.evidence import checked, log_evidence
from pyrogaps.escalation.result import METHODS, EscalatedEstimate, escalated
from pyrogaps.escalation.settings import Escalation

__all__ = [
    "METHODS",
    "EscalatedEstimate",
    "Escalation",
    "LadderCheck",
    "check_ladder",
    "checked",
    "climb_chunk",
    "escalated",
    "log_evidence",
]
