"""Arguments of `zoo.fit`, `zoo.evaluate` and `zoo.load`: any kind of number means the same, anything else is refused by name."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from train_parts import difference, easy_data, fit, tiny_model, weights

import zoo
from zoo.arguments import number, whole
from zoo.errors import ConfigError, ZooError

# of every type that somebody may pass by mistake
WRONG: list[Any] = [
    object(),
    [],
    {},
    (),
    b"x",
    1j,
    float("nan"),
    float("inf"),
    -3,
    2.5,
    "x",
    "",
    True,
    torch.ones(3),
    {1: 2},
]
FREE = {"model", "train", "val", "data", "callbacks"}  # of any type, or with messages of their own


def reference(**options: Any) -> dict[str, torch.Tensor]:
    model = tiny_model()
    fit(model, easy_data(32), epochs=1, **options)
    return weights(model)


@pytest.mark.parametrize(
    ("name", "value"),
    [("mixup", 1), ("cutmix", 1), ("label_smoothing", 0), ("clip", 1), ("lr", 1), ("warmup", 1), ("layer_decay", 1)],
)
def test_any_kind_of_number_means_the_same(name: str, value: int) -> None:
    """`mixup=1` as a whole number stopped inside torch (NotImplementedError)."""
    expected = reference(**{name: float(value)})
    kinds = [value, np.float32(value), np.int64(value), np.float64(value), torch.tensor(float(value))]
    for given in kinds if name == "mixup" else kinds[:2]:
        assert difference(reference(**{name: given}), expected) == 0


def test_whole_numbers_of_any_kind() -> None:
    expected = reference(batch_size=8, accumulate=2, seed=3, steps=3)
    for kind in (np.int32, np.int64, float, np.float32, torch.tensor):
        options = {"batch_size": kind(8), "accumulate": kind(2), "seed": kind(3), "steps": kind(3)}
        assert difference(reference(**options), expected) == 0


@pytest.mark.parametrize("function", [zoo.fit, zoo.evaluate, zoo.load], ids=["fit", "evaluate", "load"])
def test_what_is_of_another_type_is_refused_by_name(
    function: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong types stopped inside torch, timm or accelerate: 344 of 997 calls ended in somebody else's error."""
    monkeypatch.chdir(tmp_path)  # "x" is a path, too
    model, data = tiny_model(), easy_data(8)
    before = weights(model)
    given: dict[str, Any] = {"backbone": "vit-micro", "pretrained": False, "device": "meta"}
    if function is not zoo.load:
        given = {"model": model, "train" if function is zoo.fit else "data": data, "progress": False}
    if function is zoo.fit:
        given |= {"epochs": 1, "batch_size": 8}
    refused = 0
    for name, parameter in inspect.signature(function).parameters.items():
        if name in FREE or parameter.kind is parameter.VAR_KEYWORD:
            continue
        for value in WRONG:
            try:
                function(**{**given, name: value})
            except ZooError as error:
                refused += 1
                if isinstance(error, ConfigError) and not isinstance(value, (str, dict)):
                    assert name in str(error) or name.rstrip("s") in str(error), f"{name}={value!r}: {error}"
    assert refused > 8 * (len(inspect.signature(function).parameters) - len(FREE))
    if function is zoo.evaluate:
        assert difference(weights(model), before) == 0


def test_an_argument_that_there_is_not() -> None:
    with pytest.raises(ConfigError, match=r"zoo.fit has no argument 'epoch'\. Did you mean 'epochs'"):
        fit(tiny_model(), easy_data(8), epoch=3)
    with pytest.raises(
        ConfigError, match=r"missing a required argument: 'train'; it is called fit\(model, train, val, ...\)"
    ):
        zoo.fit(tiny_model())  # type: ignore[call-arg]


def test_a_wrapper_around_the_model_is_named() -> None:
    with pytest.raises(
        ConfigError, match=r"model is a DataParallel around a model; expected the model itself, model\.module"
    ):
        fit(torch.nn.DataParallel(tiny_model()), easy_data(8))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"expected a model of zoo\.load"):
        zoo.evaluate(torch.nn.Linear(2, 2), easy_data(8))  # type: ignore[arg-type]


def test_an_optimizer_that_is_none() -> None:
    with pytest.raises(ConfigError, match="optimizer gave a list; expected a function that returns a torch optimizer"):
        fit(tiny_model(), easy_data(8), optimizer=lambda groups: [])


@pytest.mark.parametrize("options", [{"mlp_ratio": "big"}, {"patch_size": 0}, {"num_heads": 7}, {"embed_dim": 2.5}])
def test_options_that_a_builder_breaks_over(options: dict[str, Any]) -> None:
    """A division by zero inside timm, an assertion, a TypeError."""
    with pytest.raises(ConfigError, match=r"does not take these options|cannot be built with"):
        zoo.load("vit-micro", pretrained=False, **options)


def test_precision_as_text() -> None:
    assert zoo.load("vit-micro", pretrained=False, dtype="bfloat16").dtype == torch.bfloat16  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="dtype is 'int8'; expected a floating type"):
        zoo.load("vit-micro", pretrained=False, dtype="int8")  # type: ignore[arg-type]


def test_kinds() -> None:
    assert (whole(1) | number(0)).of("x", 0.5) == 0.5
    assert type(number().of("x", np.float32(2))) is float and type(whole().of("x", np.int8(2))) is int
    for wrong in (True, np.bool_(True), "1", None, torch.ones(2), float("nan"), 10**400):
        with pytest.raises(ConfigError, match=r"^x is "):
            number().of("x", wrong)
