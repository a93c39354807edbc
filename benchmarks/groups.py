"""What is compared with what: one function for each group of rows."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import timm
import torch
from torch import Tensor, nn

import zoo
from benchmarks.measure import Row, Run, peak, resident, take_turns, time_ratio
from benchmarks.reference import DeepPrompts, bitfit, full
from zoo.adapters.lora import LoRA
from zoo.model import Model

LINEARS = ["qkv", "attn.proj", "fc1", "fc2"]
IMPORTS = {
    "torch": "import torch",
    "zoo": "import zoo",
    "zoo, its API": "from zoo import load, fit, adapter",
    "timm": "import timm",
    "peft": "import peft",
}


@dataclass
class Setting:
    """Sizes of a benchmark."""

    vit: str = "vit_base_patch16_224"
    swin: str = "swin_tiny_patch4_window7_224"
    vit_options: dict[str, Any] = field(default_factory=dict)
    swin_options: dict[str, Any] = field(default_factory=dict)
    size: int = 224
    batch: int = 8
    classes: int = 100
    rounds: int = 7
    prompts: tuple[int, int] = (50, 100)
    device: str = "cpu"
    targets: bool = True  # whether the targets of ViT-B/16 apply

    def batch_of(self) -> tuple[Tensor, Tensor]:
        """Images (B, 3, size, size) and labels (B,)."""
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(self.batch, 3, self.size, self.size, generator=generator)
        targets = torch.randint(self.classes, (self.batch,), generator=generator)
        return images.to(self.device), targets.to(self.device)

    def target(self, value: float) -> float | None:
        """The target, if it was set for these sizes."""
        return value if self.targets else None

    # -- builders ---------------------------------------------------------------------------------------------------

    def ours(self, adapter: Any, backbone: str | None = None, **options: Any) -> Model:
        """A model of ours on random weights, in train mode."""
        name, own = self._of(backbone)
        model = zoo.load(
            f"timm:{name}", adapter, num_classes=self.classes, pretrained=False, device=self.device, **own, **options
        )
        return model.train()

    def plain(self, make: Callable[..., nn.Module], backbone: str | None = None) -> nn.Module:
        """A plain timm module."""
        name, own = self._of(backbone)
        return make(name, num_classes=self.classes, **own).to(self.device)

    def peft_lora(self, targets: list[str]) -> nn.Module:
        """peft's LoRA of rank 8 and a trainable head."""
        config = peft.LoraConfig(r=8, lora_alpha=8, target_modules=targets, modules_to_save=["head"])
        return peft.get_peft_model(self.plain(timm.create_model), config).train()

    def prompted(self, num_tokens: int, backbone: str | None = None) -> nn.Module:
        """Deep prompts in the straightforward form."""
        return DeepPrompts(self.plain(timm.create_model, backbone), num_tokens).to(self.device).train()

    def _of(self, backbone: str | None) -> tuple[str, dict[str, Any]]:
        name = backbone or self.vit
        return name, self.swin_options if name == self.swin else self.vit_options


Tick = Callable[[], None]


def _memory(model: Model, setting: str) -> Callable[[], None]:
    def setup() -> None:
        if model.memory != setting:
            model.memory = setting

    return setup


def training(s: Setting, tick: Tick) -> list[Row]:
    """LoRA of ours and of peft, BitFit and full fine-tuning: step time and saved bytes."""
    qkv, everything = s.ours(LoRA(targets="q,k,v")), s.ours(LoRA(targets="all-linear"))
    runs = [
        Run("full", s.plain(full)),
        Run("BitFit", s.plain(bitfit)),
        Run("BitFit (zoo)", s.ours("bitfit")),
        Run("LoRA qkv (peft)", s.peft_lora(["qkv"])),
        Run("LoRA q,k,v (zoo)", qkv),
        Run("LoRA all (peft)", s.peft_lora(LINEARS)),
        Run("LoRA all (zoo)", everything, _memory(everything, "default")),
        Run("LoRA all, low (zoo)", everything, _memory(everything, "low")),
        Run("LoRA all, min (zoo)", everything, _memory(everything, "min")),
    ]
    images, targets = s.batch_of()
    take_turns(runs, lambda run: run.step(images, targets), s.rounds, tick)
    by = {run.name: run for run in runs}
    rows = []
    for ours, theirs, target in (
        ("LoRA q,k,v (zoo)", "LoRA qkv (peft)", 1.0),
        ("LoRA all (zoo)", "LoRA all (peft)", 1.03),
        ("LoRA all, low (zoo)", "LoRA all (peft)", 1.2),
        ("LoRA all, min (zoo)", "LoRA all (peft)", None),
        ("BitFit (zoo)", "BitFit", None),
    ):
        wanted = None if target is None else s.target(target)
        rows.append(time_ratio("step time", f"{ours} / {theirs}", by[ours], by[theirs], wanted))
    rows += [time_ratio("step time", f"{run.name} / full", run, by["full"]) for run in runs[1:]]
    limits = {
        "LoRA q,k,v (zoo)": 0.64,
        "LoRA all (zoo)": 0.66,
        "LoRA all, low (zoo)": 0.42,
        "LoRA all, min (zoo)": 0.1,
    }
    return rows + memory_rows(s, runs, runs[0], {k: s.target(v) for k, v in limits.items()})


def memory_rows(s: Setting, runs: list[Run], base: Run, limits: dict[str, float | None]) -> list[Row]:
    """Saved bytes by those of full fine-tuning, and the check by what the process grows by."""
    images, targets = s.batch_of()
    whole, whole_resident, whole_peak = base.saved_bytes(images), resident(base, images), peak(base, images, targets)
    rows: list[Row] = []
    checks: list[Row] = []
    for run in runs:
        if run is base:
            continue
        rows.append(Row("saved bytes", f"{run.name} / full", run.saved_bytes(images) / whole, limits.get(run.name)))
        if whole_resident:
            checks.append(Row("memory growth", f"{run.name} / full", resident(run, images) / whole_resident))
        if whole_peak:
            checks.append(Row("peak memory", f"{run.name} / full", peak(run, images, targets) / whole_peak))
    return rows + checks


def prompts(s: Setting, tick: Tick, backbone: str | None = None) -> list[Row]:
    """VPT-deep of ours against the straightforward form."""
    few, many = s.prompts
    group = "swin-t" if backbone else "vit"
    runs = []
    for count in (few, many):
        runs.append(Run(f"VPT-deep {count}, {group} (straightforward)", s.prompted(count, backbone)))
        runs.append(Run(f"VPT-deep {count}, {group} (zoo)", s.ours(zoo.adapter("vpt", num_tokens=count), backbone)))
    images, targets = s.batch_of()
    take_turns(runs, lambda run: run.step(images, targets), s.rounds, tick)
    rows = [
        time_ratio("step time", f"{runs[i + 1].name} / straightforward", runs[i + 1], runs[i], s.target(target))
        for i, target in ((0, 0.82), (2, 0.72))
    ]
    base = Run(f"BitFit, {group}", s.plain(bitfit, backbone))
    whole, floor = Run("full", s.plain(full, backbone)).saved_bytes(images), base.saved_bytes(images)
    for run in runs:
        saved = run.saved_bytes(images)
        target = s.target(1.03) if "zoo" in run.name else None
        rows.append(Row("saved bytes", f"{run.name} / BitFit", saved / floor, target))
        rows.append(Row("saved bytes", f"{run.name} / full", saved / whole))
    for run in runs:
        run.seconds.clear()
        run.module.eval()
    take_turns(runs, lambda run: run.evaluate(images), s.rounds, tick)
    for i in (0, 2):
        rows.append(time_ratio("eval", f"{runs[i + 1].name} / straightforward", runs[i + 1], runs[i]))
    return rows


def swin_prompts(s: Setting, tick: Tick) -> list[Row]:
    """VPT-deep per window on Swin-T."""
    return prompts(s, tick, s.swin)


def queries(s: Setting, tick: Tick) -> list[Row]:
    """VQT with one query: what it keeps, and its step against BitFit's, which goes back through the backbone."""
    runs = [Run("BitFit", s.plain(bitfit)), Run("VQT 1 (zoo)", s.ours(zoo.adapter("vqt", num_tokens=1)))]
    images, targets = s.batch_of()
    take_turns(runs, lambda run: run.step(images, targets), s.rounds, tick)
    base = Run("full", s.plain(full))
    rows = [time_ratio("step time", "VQT 1 (zoo) / BitFit", runs[1], runs[0])]
    return rows + memory_rows(s, runs[1:], base, {"VQT 1 (zoo)": s.target(0.13)})


def evaluation(s: Setting, tick: Tick) -> list[Row]:
    """What an adapter costs in evaluation: inactive, merged, live."""
    inactive, merged = s.ours(LoRA(targets="all-linear")), s.ours(LoRA(targets="all-linear")).merge()
    inactive.set_active()
    runs = [
        Run("bare", s.plain(timm.create_model)),
        Run("bare again", s.plain(timm.create_model)),
        Run("inactive (zoo)", inactive),
        Run("merged (zoo)", merged),
        Run("LoRA q,k,v live (zoo)", s.ours(LoRA(targets="q,k,v"))),
        Run("LoRA qkv live (peft)", s.peft_lora(["qkv"])),
        Run("LoRA all live (zoo)", s.ours(LoRA(targets="all-linear"))),
        Run("LoRA all live (peft)", s.peft_lora(LINEARS)),
    ]
    for run in runs:
        run.module.eval()
    images, _ = s.batch_of()
    take_turns(runs, lambda run: run.evaluate(images), 2 * s.rounds, tick)
    by = {run.name: run for run in runs}
    rows = [time_ratio("eval", "bare again / bare", by["bare again"], by["bare"])]  # how far equal things differ here
    for name, target in (("inactive (zoo)", 1.0), ("merged (zoo)", 1.0)):
        rows.append(time_ratio("eval", f"{name} / bare", by[name], by["bare"], s.target(target), by_fastest=True))
    for name in list(by)[4:]:
        rows.append(time_ratio("eval", f"{name} / bare", by[name], by["bare"]))
    for ours, theirs in (
        ("LoRA q,k,v live (zoo)", "LoRA qkv live (peft)"),
        ("LoRA all live (zoo)", "LoRA all live (peft)"),
    ):
        rows.append(time_ratio("eval", f"{ours} / {theirs}", by[ours], by[theirs], s.target(1.0)))
    return rows


def disk(s: Setting, tick: Tick) -> list[Row]:
    """Milliseconds (wall) to attach, save and load LoRA on qkv, and the ratio to peft's."""
    from zoo.disk import attach, read

    seconds: dict[str, list[float]] = {
        f"{verb} {who}": [] for verb in ("attach", "save", "load") for who in ("zoo", "peft")
    }

    def timed(name: str, act: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = act()
        seconds[name].append(time.perf_counter() - start)
        return result

    model, base = s.ours(None), s.plain(timm.create_model)
    config: dict[str, Any] = {"r": 8, "target_modules": ["qkv"], "modules_to_save": ["head"]}
    for number in range(3 * s.rounds + 1):
        with tempfile.TemporaryDirectory() as folder:
            timed("attach zoo", lambda: model.add_adapter(LoRA(targets="q,k,v")))
            timed("save zoo", lambda at=f"{folder}/zoo": model.save_adapter(at))  # type: ignore[misc]
            model.remove_adapter("lora")
            timed("load zoo", lambda at=f"{folder}/zoo": attach(model, read(at)))  # type: ignore[misc]
            model.remove_adapter("lora")
            theirs = timed("attach peft", lambda it=base: peft.get_peft_model(it, peft.LoraConfig(**config)))  # type: ignore[misc]
            timed("save peft", lambda it=theirs, at=f"{folder}/peft": it.save_pretrained(at))  # type: ignore[misc]
            base = theirs.unload()
            at = f"{folder}/peft"
            theirs = timed("load peft", lambda it=base, at=at: peft.PeftModel.from_pretrained(it, at))  # type: ignore[misc]
            base = theirs.unload()
        tick()
        if number == 0:  # the first is slower on both sides: imports
            for values in seconds.values():
                values.clear()
    rows = []
    for verb in ("attach", "save", "load"):
        ours, theirs = seconds[f"{verb} zoo"], seconds[f"{verb} peft"]
        limit = s.target(10.0) if verb == "attach" else None
        rows.append(Row("disk", f"{verb} (zoo)", 1e3 * statistics.median(ours), limit, 1e3 * min(ours), unit="ms"))
        rows.append(Row("disk", f"{verb} (peft)", 1e3 * statistics.median(theirs), None, 1e3 * min(theirs), unit="ms"))
        ratio = statistics.median(ours) / statistics.median(theirs)
        rows.append(Row("disk", f"{verb}: zoo / peft", ratio, s.target(1.0), min(ours) / min(theirs)))
    return rows


def imports(s: Setting, tick: Tick) -> list[Row]:
    """Processor seconds of a fresh interpreter beyond those of `import torch`."""
    seconds: dict[str, list[float]] = {name: [] for name in IMPORTS}
    root = Path(__file__).resolve().parent.parent
    for number in range(s.rounds + 1):
        for name, code in IMPORTS.items():
            command = [sys.executable, "-c", f"import time; {code}; print(time.process_time())"]
            result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
            if number:
                seconds[name].append(float(result.stdout.split()[-1]))
            tick()
    rows = []
    for name in list(IMPORTS)[1:]:
        target = 0.3 if name.startswith("zoo") else None
        extra = statistics.median(seconds[name]) - statistics.median(seconds["torch"])
        fastest = min(seconds[name]) - min(seconds["torch"])
        rows.append(Row("import", f"{name} - torch", extra, target, fastest, unit="s"))
    return rows


def compiling(s: Setting, tick: Tick) -> list[Row]:
    """Graphs compiled with fullgraph=True after the first call, a switch, the switch back, and switching off."""
    small = Setting(
        vit="vit_tiny_patch16_224",
        vit_options={"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3},
        size=32,
        batch=2,
        device=s.device,
    )
    images, _ = small.batch_of()
    rows = []
    model = small.ours(LoRA(targets="q,v")).eval()
    model.add_adapter(LoRA(targets="q,v"), "other", activate=False)
    switches = [lambda: None, lambda: model.set_active("other"), lambda: model.set_active("lora"), model.set_active]
    for name, count, target in zip(_STAGES, _graphs(model, images, switches, tick), (1, 2, 2, 3)):
        rows.append(Row("graphs compiled", f"{name} (zoo)", count, target, unit=""))
    theirs: Any = small.peft_lora(["qkv"]).eval()
    theirs.add_adapter("other", peft.LoraConfig(r=8, target_modules=["qkv"], modules_to_save=["head"]))
    off = theirs.base_model.disable_adapter_layers
    switches = [lambda: None, lambda: theirs.set_adapter("other"), lambda: theirs.set_adapter("default"), off]
    for name, count in zip(_STAGES, _graphs(theirs, images, switches, tick)):
        rows.append(Row("graphs compiled", f"{name} (peft)", count, unit=""))
    return rows


_STAGES = ("first call", "switched", "switched back", "switched off")


def _graphs(module: nn.Module, images: Tensor, switches: list[Callable[[], Any]], tick: Tick) -> list[int]:
    """How many graphs there are after each switch and a call."""
    compiled: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(1)
        return graph.forward

    torch.compiler.reset()
    fast = torch.compile(module, backend=backend, fullgraph=True)
    counts = []
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for switch in switches:
            switch()
            fast(images)
            counts.append(len(compiled))
            tick()
    torch.compiler.reset()
    return counts


GROUPS: dict[str, Callable[[Setting, Tick], list[Row]]] = {
    "training": training,
    "prompts": prompts,
    "swin": swin_prompts,
    "queries": queries,
    "eval": evaluation,
    "disk": disk,
    "import": imports,
    "compile": compiling,
}


def ticks(s: Setting, name: str) -> int:
    """How often a group's progress ticks."""
    n = s.rounds + 1
    turns = {"training": 9 * n, "prompts": 8 * n, "swin": 8 * n, "queries": 2 * n, "eval": 8 * (2 * s.rounds + 1)}
    return {**turns, "disk": 3 * s.rounds + 1, "import": len(IMPORTS) * n, "compile": 8}[name]
