"""What a model is trained and evaluated for: what a batch means, its loss, its metrics."""

from zoo.tasks.base import Task, call
from zoo.tasks.classify import Classify
from zoo.tasks.losses import Weighted
from zoo.tasks.resolve import Custom, objective, of_classes, resolve

__all__ = ["Classify", "Custom", "Task", "Weighted", "call", "objective", "of_classes", "resolve"]
