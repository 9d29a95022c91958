"""Latents shared by datapoints: settings, the datapoints given draws of them, and the global gap."""

from pyrogaps.shared.global_gap import GlobalGap, global_gap
from pyrogaps.shared.settings import Shared

__all__ = ["GlobalGap", "Shared", "global_gap"]
