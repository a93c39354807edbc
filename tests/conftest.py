"""What all tests share: one thread, the folder of real data sets, and a small image folder."""

from __future__ import annotations

import contextlib
import gc
import os
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
# Processes that tests start find this checkout and the tests' shared parts, too.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT), str(ROOT / "tests" / "parts"), *filter(None, [os.environ.get("PYTHONPATH")])]
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--whole", action="store_true", help="every pair of family and method, not a sample (tests/parts/sampled.py)"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what `sampled` did not draw, unless `--whole` is given."""
    if config.getoption("--whole"):
        return
    rest = [item for item in items if item.get_closest_marker("rest")]
    if rest:
        config.hook.pytest_deselected(items=rest)
        items[:] = [item for item in items if not item.get_closest_marker("rest")]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Neighbours stay on one worker (what they import, compile and share is made once); who is done takes from others' ends."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log) if config.option.dist == "load" else None


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny models run faster on one thread, and sums come out in the same order everywhere."""
    torch.set_num_threads(1)
    for device in (torch.cuda, torch.xpu, torch.mtia):
        if not device.is_available():  # torch notes the whole stack, of a device that it never starts, at each seed
            device.traceback = types.SimpleNamespace(format_stack=list)  # type: ignore[attr-defined]


@pytest.fixture(scope="module", autouse=True)
def only_what_is_new() -> None:
    """What there is in front of a file of tests (libraries above all) is left out of its collections: a second less for each."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def no_waits_for_the_hub() -> None:
    """Where the Hub is away, its client asks again five times and waits 23 seconds in between; here it asks at once."""
    with contextlib.suppress(ImportError):
        from huggingface_hub.utils import _http

        _http.time = types.SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})  # type: ignore[assignment]


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data sets (`ZOO_TEST_DATA`, by default `../shared/data`); skips where there is none."""
    folder = Path(os.environ.get("ZOO_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no data sets in {folder}; name their folder in ZOO_TEST_DATA")
    return folder


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`train/` and `test/` with the class folders `blue` and `red`, 12 and 6 images of 32 px each: easily told apart."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 6)):
        for name, channel in (("blue", 2), ("red", 0)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 80, (32, 32, 3), dtype=np.uint8)
                pixels[..., channel] += 150
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root
