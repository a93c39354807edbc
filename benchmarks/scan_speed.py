"""The selective scan that is parallel over tokens against the loop over tokens, and how each grows with their number.

    python benchmarks/scan_speed.py            # results/scan_speed.{json,md,png}
    python benchmarks/scan_speed.py --quick    # small, a few seconds, nothing written

The sizes are those of the first stage of groupmamba-t (64 channels in four groups, one state) on images of 112, 224 and 448 px:
28 x 28, 56 x 56 and 112 x 112 tokens; and once with 16 states, as in language models. Both sides get the same numbers, which a
test holds equal. In each round all of one size take turns; what is reported are ratios of medians, and time for each token by
that at the smallest size (1 is linear). On a CPU one thread and its processor time. On a GPU the parallel form runs as the Triton
kernel, "plain" is the same without it, and `mamba_ssm` takes part where it is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measure import clock, machine
from vision.families.groupmamba.selective_scan import _Scan, selective_scan, sequential_scan
from zoo.puzzle.costs import single_thread

RESULTS = Path(__file__).parent / "results"
DIM, GROUPS = 64, 4
Scan = Callable[..., Tensor]


def problem(batch: int, side: int, states: int, device: str) -> list[Tensor]:
    """u, delta, A, B, C, D and the bias of delta for side x side tokens."""
    make = torch.Generator().manual_seed(side)
    tokens = side * side
    sizes = [(batch, tokens, DIM)] * 2 + [(DIM, states)] + [(batch, tokens, GROUPS, states)] * 2 + [(DIM,)] * 2
    tensors = [torch.randn(size, generator=make) for size in sizes]
    tensors[1] -= 3  # steps of about 0.05, as a network starts with
    tensors[2] = -tensors[2].exp()
    return [t.to(device).requires_grad_() for t in tensors]


def mamba(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor) -> Tensor:
    """The CUDA kernel of `mamba_ssm`, which takes channels first."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    u, delta = (t.transpose(1, 2).contiguous() for t in (u, delta))
    B, C = (t.permute(0, 2, 3, 1).contiguous() for t in (B, C))
    return selective_scan_fn(u, delta, A, B, C, D, delta_bias=bias, delta_softplus=True).transpose(1, 2)  # type: ignore[no-any-return]


def contestants(device: str) -> dict[str, Scan]:
    """What is measured on this machine; "sequential" is what the others are divided by."""
    found: dict[str, Scan] = {"parallel": selective_scan, "sequential": sequential_scan}
    if device.startswith("cuda"):
        found["plain"] = lambda *t: _Scan.apply(*t, True)
        if importlib.util.find_spec("mamba_ssm") is not None:
            found["mamba_ssm"] = mamba
    return found


def once(scan: Scan, tensors: list[Tensor], backward: bool) -> float:
    """Seconds of a forward pass, or of forward and backward."""
    start = clock(tensors[0])
    if backward:
        torch.autograd.grad(scan(*tensors).sum(), tensors)
    else:
        with torch.no_grad():
            scan(*tensors)
    return clock(tensors[0]) - start


def measure(sides: list[int], states: int, batch: int, rounds: int, device: str) -> list[dict[str, Any]]:
    """One row for each size and pass: ratios to the loop, growth of each, and the largest difference of the outputs."""
    scans, rows = contestants(device), []
    for backward in (False, True):
        per_token: dict[str, list[float]] = {name: [] for name in scans}
        for side in sides:
            tensors = problem(batch, side, states, device)
            with torch.no_grad():
                expected = sequential_scan(*tensors)
                difference = float((selective_scan(*tensors) - expected).abs().max() / expected.abs().max())
            seconds: dict[str, list[float]] = {name: [] for name in scans}
            for number in range(rounds + 1):
                for name, scan in scans.items():
                    spent = once(scan, tensors, backward)
                    if number:  # the first round warms up
                        seconds[name].append(spent)
            medians = {name: statistics.median(values) for name, values in seconds.items()}
            for name, value in medians.items():
                per_token[name].append(value / side**2)
            rows.append(
                {
                    "tokens": f"{side} x {side}",
                    "count": side**2,
                    "states": states,
                    "pass": "forward and backward" if backward else "forward",
                    "faster_than_sequential": {
                        n: round(medians["sequential"] / v, 2) for n, v in medians.items() if n != "sequential"
                    },
                    "time_per_token": {n: round(v[-1] / v[0], 3) for n, v in per_token.items()},
                    "largest_difference": difference,
                }
            )
    return rows


def as_markdown(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """The table, with what it was measured on."""
    names = list(rows[0]["faster_than_sequential"])
    heads = ["tokens", "states", "pass", *(f"{n}: times faster than the loop" for n in names)]
    heads += [f"{n}: time per token, smallest = 1" for n in rows[0]["time_per_token"]]
    lines = [
        f"Selective scan, {DIM} channels in {GROUPS} groups, batch {about['batch']}, float32, on "
        f"{about['machine']['device']}, one thread, torch {about['machine']['torch']}. Made by `benchmarks/scan_speed.py`.",
        "",
        "| " + " | ".join(heads) + " |",
        "| " + " | ".join("---" for _ in heads) + " |",
    ]
    for row in rows:
        cells = [row["tokens"], row["states"], row["pass"]]
        cells += [f"{row['faster_than_sequential'][n]:.1f}" for n in names]
        cells += [f"{v:.2f}" for v in row["time_per_token"].values()]
        lines.append("| " + " | ".join(str(c) for c in cells) + " |")
    worst = max(row["largest_difference"] for row in rows)
    return (
        "\n".join([*lines, "", f"Largest difference between the two outputs, by the largest output: {worst:.1e}."])
        + "\n"
    )


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Left: how many times faster. Right: time for each token, which is level where the cost is linear."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.5), dpi=130)
    for states in sorted({row["states"] for row in rows}):
        for what, style in (("forward", "o-"), ("forward and backward", "s--")):
            chosen = [row for row in rows if row["states"] == states and row["pass"] == what]
            tokens = [row["count"] for row in chosen]
            for name in chosen[0]["faster_than_sequential"]:
                label = f"{name}, {what}, {states} state{'s' if states > 1 else ''}"
                left.plot(tokens, [row["faster_than_sequential"][name] for row in chosen], style, label=label)
                right.plot(tokens, [row["time_per_token"][name] for row in chosen], style, label=label)
    left.set(xlabel="tokens", ylabel="times faster than the loop over tokens", xscale="log", ylim=(0, None))
    right.set(xlabel="tokens", ylabel="time for each token, smallest size = 1", xscale="log", ylim=(0, 2))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def main() -> None:
    """Measure, print, and write the three files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="small sizes, one round, nothing written")
    options = parser.parse_args()
    sides, rounds = ([8, 16], 1) if options.quick else ([28, 56, 112], options.rounds)
    with single_thread():
        rows = [r for n in (1, 16) for r in measure(sides, n, options.batch, rounds, options.device)]
    about = {"batch": options.batch, "rounds": rounds, "machine": machine(options.device)}
    text = as_markdown(rows, about)
    print(text)
    if not options.quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "scan_speed.json").write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n")
        (RESULTS / "scan_speed.md").write_text(text)
        draw(rows, RESULTS / "scan_speed.png")


if __name__ == "__main__":
    main()
