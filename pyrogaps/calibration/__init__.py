"""Simulation-based calibration of amortized and refined guides."""

from pyrogaps.calibration.calibrate import calibrate
from pyrogaps.calibration.calibration import Calibration

__all__ = ["Calibration", "calibrate"]
