"""What a model is trained and evaluated for: what a batch means, its loss, its metrics."""

from zoo.tasks.base import Task, call
from zoo.tasks.classify import Classify
from zoo.tasks.resolve import Custom, resolve

__all__ = ["Classify", "Custom", "Task", "call", "resolve"]
