"""The selective scan against the recurrence written token by token, and the Triton kernels against the plain form."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import zoo
from vision.families.groupmamba import selective_scan as module
from vision.families.groupmamba.selective_scan import scan_, scan_back_, selective_scan, sequential_scan

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))  # for the benchmarks
# batch, tokens, channels, states, groups: one token, two, odd and even lengths, several states and groups
SHAPES = [(2, 1, 8, 1, 4), (2, 2, 8, 1, 1), (1, 3, 8, 2, 2), (2, 49, 12, 1, 4), (2, 150, 8, 3, 2), (1, 515, 4, 16, 1)]


def problem(shape: tuple[int, ...], scale: float = 1.0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """u, delta, A, B, C, D and the bias of delta, as leaves."""
    batch, tokens, dim, states, groups = shape
    make = torch.Generator().manual_seed(sum(shape))
    sizes = [(batch, tokens, dim)] * 2 + [(dim, states)] + [(batch, tokens, groups, states)] * 2 + [(dim,)] * 2
    tensors = [torch.randn(s, generator=make, dtype=torch.float64) for s in sizes]
    tensors[1] *= scale
    tensors[2] = -tensors[2].exp()
    return [t.to(dtype).requires_grad_() for t in tensors]


def results(scan: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    """y and the gradient of each input."""
    y = scan(*tensors)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view_as(y)
    grads = torch.autograd.grad((y * weights).sum(), tensors, allow_unused=True)
    return [y.detach(), *(torch.zeros_like(t) if g is None else g for g, t in zip(grads, tensors))]


def assert_near(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Largest difference in units of the largest value, for y and each gradient by itself."""
    for one, other in zip(found, expected, strict=True):
        assert torch.isfinite(one).all()
        assert (one - other).abs().max() <= tolerance * max(1.0, float(other.abs().max()))


@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_sequential_recurrence(shape: tuple[int, ...], scale: float) -> None:
    tensors = problem(shape, scale)
    assert_near(results(selective_scan, tensors), results(sequential_scan, tensors), 1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("shortest", [1, 7, 64])
def test_segments_are_joined(shape: tuple[int, ...], shortest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long sequences go in segments: the state is handed on, and its gradient handed back."""
    monkeypatch.setattr(module, "WORKING", 1)
    monkeypatch.setattr(module, "SHORTEST", shortest)
    tensors = problem((shape[0], min(shape[1], 150), *shape[2:]), dtype=torch.float64)
    assert_near(results(selective_scan, tensors), results(sequential_scan, tensors), 1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_form_for_the_compiler_equals_the_sequential_recurrence(shape: tuple[int, ...]) -> None:
    tensors = problem(shape, dtype=torch.float64)
    found = results(lambda *t: module._plain(*t, True), tensors)
    assert_near(found, results(sequential_scan, tensors), 1e-12)


def test_gradients_by_finite_differences() -> None:
    assert torch.autograd.gradcheck(selective_scan, problem((1, 5, 2, 2, 1), dtype=torch.float64))


def test_without_skip_bias_and_softplus() -> None:
    u, delta, a, b, c, _, _ = problem((2, 37, 6, 2, 3), dtype=torch.float64)
    delta = delta.detach().abs().requires_grad_()

    def run(scan: Callable[..., Tensor]) -> list[Tensor]:
        return results(lambda *t: scan(*t, softplus=False), [u, delta, a, b, c])

    assert_near(run(selective_scan), run(sequential_scan), 1e-12)


def test_long_sequences_and_large_steps_stay_finite() -> None:
    """A product of decays over 2,000 tokens with steps of 50 is exp(-100,000); its inverse would overflow."""
    tensors = problem((1, 2000, 2, 1, 1))
    with torch.no_grad():
        tensors[1] += 50
        tensors[2].fill_(-1.0)
    assert_near(results(selective_scan, tensors), results(sequential_scan, tensors), 1e-5)
    with torch.no_grad():
        tensors[1].fill_(-30.0)  # and no decay at all: a plain sum over all tokens
    assert_near(results(selective_scan, tensors), results(sequential_scan, tensors), 1e-5)


@pytest.mark.parametrize("length", [1, 2, 3, 6, 7, 8, 21])
def test_mirror_image(length: int) -> None:
    a, b = torch.rand(2, length, 3, dtype=torch.float64), torch.randn(2, length, 3, dtype=torch.float64)
    forth, mirrored = b.clone(), b.flip(1).clone()
    scan_(a, forth)
    scan_back_(a.flip(1), mirrored)
    torch.testing.assert_close(mirrored.flip(1), forth)
    steps = [b[:, 0]]
    for t in range(1, length):
        steps.append(b[:, t] + a[:, t] * steps[-1])
    torch.testing.assert_close(forth, torch.stack(steps, dim=1))


def test_keeps_its_inputs_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 states for each of 300 x 8 numbers, and none of them is kept for backward, but those between segments."""
    tensors = problem((1, 300, 8, 16, 1))
    assert zoo.saved_bytes(lambda: selective_scan(*tensors), ignore=tensors) == 0
    monkeypatch.setattr(module, "WORKING", 100 * 8)
    assert zoo.saved_bytes(lambda: selective_scan(*tensors), ignore=tensors) == 3 * 8 * 16 * 4


def test_half_precision_is_computed_in_float32() -> None:
    wide = problem((2, 40, 8, 1, 4))
    half = [t.detach().half().requires_grad_() for t in wide]
    y = selective_scan(*half)
    assert y.dtype == torch.float32
    expected = sequential_scan(*(t.detach().float() for t in half))
    torch.testing.assert_close(y.detach(), expected, rtol=1e-5, atol=1e-5)
    y.sum().backward()
    assert all(t.grad is not None and t.grad.dtype == torch.float16 for t in half)


def test_wrong_shapes_are_named() -> None:
    tensors = problem((2, 10, 8, 1, 4))
    tensors[3] = tensors[3][:, :, :3]
    with pytest.raises(zoo.ZooError, match=r"B \(2, 10, 3, 1\)"):
        selective_scan(*tensors)


INTERPRETED = """
import torch
import test_selective_scan as t
from vision.families.groupmamba.selective_scan_triton import selective_scan_triton, self_test

torch.set_num_threads(1)
self_test(t.module._Scan, "cpu")
for shape, scale in (((1, 1, 4, 1, 4), 1.0), ((1, 33, 3, 3, 1), 30.0)):
    tensors = t.problem(shape, scale)
    t.assert_near(t.results(selective_scan_triton, tensors), t.results(t.sequential_scan, tensors), 1e-5)
print("equal")
"""


def test_kernels_in_the_interpreter() -> None:
    """The kernels' arithmetic without a GPU: Triton's interpreter runs them on the CPU, in a process of its own."""
    pytest.importorskip("triton")
    paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", INTERPRETED], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.strip() == "equal", done.stderr


def test_falls_back_where_triton_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU the kernels cannot be compiled: the plain form is taken, with one warning."""
    triton = pytest.importorskip("vision.families.groupmamba.selective_scan_triton")

    def fail(plain: object) -> None:
        raise RuntimeError("no GPU")

    monkeypatch.setattr(triton, "self_test", fail)
    monkeypatch.setattr(module, "_kernel", True)
    with pytest.warns(UserWarning, match="no GPU"):
        assert module._triton() is None
    assert module._triton() is None


def test_benchmark_at_toy_size() -> None:
    pytest.importorskip("benchmarks.scan_speed")
    from benchmarks.scan_speed import as_markdown, measure

    rows = measure([4, 6], states=2, batch=1, rounds=1, device="cpu")
    assert [(row["count"], row["pass"]) for row in rows] == [
        (count, what) for what in ("forward", "forward and backward") for count in (16, 36)
    ]
    assert all(row["largest_difference"] < 1e-5 and row["faster_than_sequential"]["parallel"] > 0 for row in rows)
    text = as_markdown(rows, {"batch": 1, "machine": {"device": "here", "torch": "?"}})
    assert text.count("\n| 4 x 4 | 2 |") == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("shape", [*SHAPES, (2, 3136, 64, 1, 4)])
def test_kernels_on_the_gpu(shape: tuple[int, ...], scale: float) -> None:
    triton = pytest.importorskip("vision.families.groupmamba.selective_scan_triton")
    tensors = [t.detach().cuda().requires_grad_() for t in problem(shape, scale)]
    expected = results(sequential_scan, problem(shape, scale, torch.float64))
    found = [t.cpu().double() for t in results(triton.selective_scan_triton, tensors)]
    assert_near(found, expected, 1e-4)
    assert module._triton() is triton.selective_scan_triton  # and it is what selective_scan uses
