"""`zoo fit`, `zoo eval`, `zoo demo`."""


def fit() -> None:
    """x"""


def evaluate() -> None:
    """x"""


def demo() -> None:
    """x"""
