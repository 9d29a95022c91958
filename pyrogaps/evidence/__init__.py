"""Ways to log p(x): what they have in common, AIS, the ladder, bridge sampling, bounds from both sides."""

from pyrogaps.evidence.ais import AIS
from pyrogaps.evidence.bdmc import Sandwich, bdmc
from pyrogaps.evidence.bridge import Bridge, BridgeEstimate
from pyrogaps.evidence.ladder import Ladder
from pyrogaps.evidence.ladder_estimate import METHODS, LadderEstimate
from pyrogaps.evidence.log_evidence import ais, log_evidence
from pyrogaps.evidence.protocol import Evidence, Measured, Measurement
from pyrogaps.evidence.simulated_bounds import SimulatedBounds

__all__ = [
    "AIS",
    "METHODS",
    "Bridge",
    "BridgeEstimate",
    "Evidence",
    "Ladder",
    "LadderEstimate",
    "Measured",
    "Measurement",
    "Sandwich",
    "SimulatedBounds",
    "ais",
    "bdmc",
    "log_evidence",
]
