"""Training and evaluation: `fit`, `evaluate`, the hooks of adapters, and the optimizer service."""

from zoo.train.averages import MovingAverage
from zoo.train.calibration import calibrate
from zoo.train.evaluation import evaluate
from zoo.train.fitting import fit
from zoo.train.hooks import Hooks, training_hooks
from zoo.train.ist import IST
from zoo.train.optimizer import OptimizerService
from zoo.train.report import Report
from zoo.train.samplers import Balanced, Mixed, OnePart, PerClass, Sampler
from zoo.train.step import TrainingError
from zoo.train.streams import Stream

__all__ = [
    "IST",
    "Balanced",
    "Hooks",
    "Mixed",
    "MovingAverage",
    "OnePart",
    "OptimizerService",
    "PerClass",
    "Report",
    "Sampler",
    "Stream",
    "TrainingError",
    "calibrate",
    "evaluate",
    "fit",
    "training_hooks",
]
