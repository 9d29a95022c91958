"""Turning a model's density into a fast value-and-gradient function: Pyro runs once per shape, not per gradient."""

from pyrogaps.capture.evaluator import BoundDensity, GradientEvaluator, Mode

__all__ = ["BoundDensity", "GradientEvaluator", "Mode"]
