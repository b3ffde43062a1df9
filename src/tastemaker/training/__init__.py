"""The training engine: optimizer steps over micro-batches, weight averages, checkpoints. It knows no algorithm."""

from tastemaker.settings import OptimizerConfig
from tastemaker.training.average import WeightAverage, decay_for
from tastemaker.training.trainer import Loss, StepReport, Trainer, learning_rate_factor

__all__ = [
    "Loss",
    "OptimizerConfig",
    "StepReport",
    "Trainer",
    "WeightAverage",
    "decay_for",
    "learning_rate_factor",
]
