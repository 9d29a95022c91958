"""Training by stochastic variational inference: warm-up, entropy annealing, schedules, early stopping, checkpoints."""

from pyrogaps.training.loop import rehearse_training, section_named, train
from pyrogaps.training.schedules import Constant, Cosine, Exponential, Schedule, Staircase
from pyrogaps.training.settings import Training, TrainingResult
from pyrogaps.training.weights import load_model_weights, load_weights, save_weights

__all__ = [
    "Constant",
    "Cosine",
    "Exponential",
    "Schedule",
    "Staircase",
    "Training",
    "TrainingResult",
    "load_model_weights",
    "load_weights",
    "rehearse_training",
    "save_weights",
    "section_named",
    "train",
]
