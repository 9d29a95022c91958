"""Fast values and gradients of a model's density: Pyro runs once per shape instead of once per gradient."""

from pyrogaps.capture.draws import RecordedDraws
from pyrogaps.capture.evaluator import BoundDensity, GradientEvaluator, Mode
from pyrogaps.capture.programs import elementwise_elements

__all__ = ["BoundDensity", "GradientEvaluator", "Mode", "RecordedDraws", "elementwise_elements"]
