"""A function of the user's as a short text: the same for the same function, another where it computes something else."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2

from zoo.data.functions import about_function, about_object

ONE, OTHER = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([3.0, 2.0, 1.0])
SCRIPT = """
import torch
import torch.nn.functional as F
weight = torch.tensor([1.0, {0}])
gamma, steps, seen = {1}, 0, []

def helper(y, t):
    return F.cross_entropy(y, t, weight=weight)

def loss(y, t):
    global steps
    steps += 1
    seen.append(steps)
    return helper(y, t) * gamma if t.dtype in {{torch.long, "a", "b", "c", 2, 3.5}} else None
"""


def of_script(*values: float) -> Any:
    space: dict[str, Any] = {"__name__": "of_a_user"}
    exec(compile(SCRIPT.format(*values), "script.py", "exec"), space)
    return space["loss"]


class WithState(nn.Module):
    """Class weights beside it, and a module inside."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight, self.inner = weight, nn.CrossEntropyLoss(weight=weight)

    def forward(self, y: Tensor, t: Tensor) -> Tensor:
        return self.inner(y, t)


class Plain:
    """A list of settings; called, or by its method."""

    def __init__(self, values: list[float]) -> None:
        self.values = values

    def __call__(self, y: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(y, t, weight=torch.tensor(self.values))


def weighted(weight: Any) -> Callable[..., Any]:
    return lambda y, t: F.cross_entropy(y, t, weight=torch.as_tensor(weight))


def nested(factor: float) -> Callable[..., Any]:
    def times(x: Tensor) -> Tensor:
        return factor * x

    return lambda y, t: times(F.cross_entropy(y, t))


def keyword(factor: float) -> Callable[..., Any]:
    return lambda y, t, *, by=factor: by * F.cross_entropy(y, t)


PAIRS: dict[str, tuple[Callable[[Any], Any], Any, Any]] = {
    "buffer of a module": (lambda w: nn.CrossEntropyLoss(weight=w), ONE, OTHER),
    "attribute of a module": (WithState, ONE, OTHER),
    "closure over a tensor": (weighted, ONE, OTHER),
    "closure over a list": (weighted, [1.0, 2.0, 3.0], [3.0, 2.0, 1.0]),
    "the last bit": (weighted, ONE, torch.nextafter(ONE, OTHER)),
    "partial": (lambda w: functools.partial(F.cross_entropy, weight=w), torch.ones(2000), torch.arange(2000.0)),
    "object with a list": (Plain, [1.0, 2.0], [2.0, 1.0]),
    "method of an object": (lambda v: Plain(v).__call__, [1.0, 2.0], [2.0, 1.0]),
    "function within": (nested, 1.0, 2.0),
    "keyword": (keyword, 1.0, 2.0),
    "tensor of the script, in what it calls": (lambda w: of_script(w, 1.0), 2.0, 3.0),
    "number of the script": (lambda g: of_script(2.0, g), 1.0, 2.0),
}


@pytest.mark.parametrize("case", PAIRS)
def test_what_computes_something_else_is_another(case: str) -> None:
    """All of these had one text, and a run went on with another loss without a word."""
    make, one, other = PAIRS[case]
    assert about_function(make(one)) == about_function(make(one))
    assert about_function(make(one)) != about_function(make(other))
    for name in ("augment", "transform"):
        assert about_object(make(one)) == about_object(make(one)), name
    if not isinstance(make(one), nn.Module):
        assert about_object(make(one)) != about_object(make(other))


def test_what_changes_while_it_runs_does_not_count() -> None:
    seen: list[float] = []
    count = [0]

    def loss(y: Tensor, t: Tensor) -> Tensor:
        found = F.cross_entropy(y, t)
        seen.append(float(found))
        count[0] += 1
        return found

    proxies = nn.Parameter(torch.randn(3))
    learned, script = weighted(proxies), of_script(2.0, 1.0)
    before = [about_function(f) for f in (loss, learned, script)]
    y, t = torch.randn(2, 2), torch.tensor([0, 1])
    loss(y, t)
    script(y, t)
    with torch.no_grad():
        proxies.add_(1)
    assert [about_function(f) for f in (loss, learned, script)] == before


def test_transforms_say_their_settings_and_hide_their_functions() -> None:
    def made(angle: float, shift: float) -> Any:
        return v2.Compose([v2.RandomRotation([-angle, angle]), v2.Lambda(lambda x: x + shift)])

    assert about_object(made(3, 1)) == about_object(made(3, 1)) != about_object(made(5, 1))
    assert about_object(made(3, 1)) != about_object(made(3, 2))
    assert about_object("crop") == "'crop'" and about_object(None) == "None"


def test_a_set_in_another_order() -> None:
    """A set of constants is written down in another order in each process, and the run was refused as another one."""
    found = []
    for constant in (frozenset([0, 8]), frozenset([8, 0])):
        function = lambda y: y in {0, 8}  # noqa: E731
        constants = tuple(constant if isinstance(c, frozenset) else c for c in function.__code__.co_consts)
        function.__code__ = function.__code__.replace(co_consts=constants)
        found.append(about_function(function))
    assert repr(frozenset([0, 8])) != repr(frozenset([8, 0])) and found[0] == found[1]
