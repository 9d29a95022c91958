"""Turning a model's density into a fast value-and-gradient function: Pyro runs once per shape, not per gradient."""

from pyrogaps.capture.evaluator import BoundDensity, GradientEvaluator, Mode
from pyrogaps.capture.programs import elementwise_elements

__all__ = ["BoundDensity", "GradientEvaluator", "Mode", "elementwise_elements"]
