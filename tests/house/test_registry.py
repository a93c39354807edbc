"""Registration, lazy imports, and packages that shadow ours."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import zoo
from zoo import registry
from zoo.adapters.base import Adapter
from zoo.errors import ConfigError, UnknownNameError

ROOT = Path(zoo.__file__).resolve().parent.parent


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    path = [str(folder), str(ROOT)]
    code = f"import sys; sys.path[:0] = {path!r}\n{code}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, timeout=120)


TRY = """
import zoo
for name, adapter in (("vit-micro", "lora"), ("vit-micro", "vpt"), ("ast-micro", "lora"), ("clip-micro", "lora")):
    try:
        zoo.load(name, adapter, pretrained=False, device="meta")
        print(name, adapter, "loads")
    except zoo.ZooError as e:
        print(name, adapter, type(e).__name__, e)
print("vit-micro" in zoo.list_backbones())
"""


# The libraries are imported once; each folder is a process of its own that imports zoo there.
EACH = """
import contextlib, os
ast = "transformers.models.audio_spectrogram_transformer.modeling_audio_spectrogram_transformer"
for name in ("timm", "open_clip", ast):
    with contextlib.suppress(ImportError):
        __import__(name)
assert not {{"zoo", "vision", "audio", "multimodal"}} & set(sys.modules)
del sys.path[0]  # the folder that all are in
for folder in {folders!r}:
    if not os.fork():
        os.chdir(folder)
        sys.path.insert(0, folder)
        with open("said", "w") as out, contextlib.redirect_stdout(out):
            exec({code!r})
        os._exit(0)
    os.wait()
"""
LAYOUTS = ["vision.py", "vision/__init__.py", "audio/__init__.py", "multimodal/__init__.py"]


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """For each layout of a project its folder and what `TRY` said there."""
    root = tmp_path_factory.mktemp("shadows")
    folders = {layout: root / str(i) for i, layout in enumerate(LAYOUTS)}
    for layout, folder in folders.items():
        (folder / layout).parent.mkdir(parents=True)
        (folder / layout).write_text("x = 1\n")
    done = run(EACH.format(folders=[str(f) for f in folders.values()], code=TRY), root)
    assert done.returncode == 0, done.stderr
    return {layout: (folder, (folder / "said").read_text()) for layout, folder in folders.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_package_that_shadows_ours(tried: dict[str, tuple[Path, str]], layout: str) -> None:
    """A project with an `audio` folder could load no ViT: only the package that is needed is asked for."""
    folder, said = tried[layout]
    name = layout.split("/")[0].split(".")[0]
    needs = {"vision": ("vit-micro",), "audio": ("ast-micro",), "multimodal": ("clip-micro",)}[name]
    lines = said.splitlines()
    assert len(lines) == 5 and lines[-1] == str(name != "vision"), said
    for line in lines[:-1]:
        if line.startswith(needs):
            assert f"ShadowError The package '{name}' found at {folder}" in line and "rename" in line
        else:
            assert line.endswith("loads")


def test_import_is_light(tmp_path: Path) -> None:
    result = run(
        "import zoo; zoo.list_adapters; from zoo import adapter, fit, load\n"
        "heavy = ('timm', 'open_clip', 'transformers', 'diffusers', 'accelerate', 'peft')\n"
        "print([h for h in (*heavy, 'pyarrow', 'torchvision', 'matplotlib', 'typer') if h in sys.modules])\n"
        "zoo.load('vit-micro', pretrained=False)\n"
        "print([h for h in heavy[1:] if h in sys.modules])",
        tmp_path,
    )
    assert result.stdout.split("\n")[:2] == ["[]", "[]"], result.stdout + result.stderr


def test_globs() -> None:
    assert {"vit-b16", "vit-micro"} <= set(zoo.list_backbones("vit*"))
    assert zoo.list_adapters("vp*") == ["vpt", "vpt-sp"]


def test_a_taken_name() -> None:
    with pytest.raises(ConfigError, match="is taken"):

        @zoo.register_adapter("lora")
        @dataclass
        class Other(Adapter):
            pass


def test_decorators_in_the_wrong_order() -> None:
    with pytest.raises(ConfigError, match="stands above @dataclass"):

        @zoo.register_adapter("other")
        class Other(Adapter):
            strength: int = 1


def test_almost_a_backbone() -> None:
    """A network whose file a family knows and whose blocks it does not loads all the same; a misspelt name does not."""
    assert zoo.load("timm:vit_base_patch16_rpn_224", "lora", device="meta", num_classes=0).active == ("lora",)
    with pytest.raises(UnknownNameError, match="Did you mean"):
        zoo.load("timm:vit_base_patch16_225", pretrained=False)


def test_every_method_has_a_place_in_the_taxonomy() -> None:
    kinds = {"additive", "selective", "reparametrised", "hybrid", "system"}
    assert {registry.adapter_class(name).taxonomy for name in registry.list_adapters()} == kinds


def test_the_public_names_load_no_compiler_and_no_library() -> None:
    """Torch's compiler alone costs a second, and most people never ask for it."""
    code = "import sys; from zoo import load, fit, adapter, run; print(*[m for m in HEAVY if m in sys.modules])"
    heavy = ("timm", "open_clip", "transformers", "diffusers", "torch._dynamo")
    done = subprocess.run(
        [sys.executable, "-c", code.replace("HEAVY", repr(heavy))], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []
