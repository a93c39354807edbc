"""`zoo new method <name>`: the file of a method and its test, to begin from. Nothing else has to be touched."""

from __future__ import annotations

import keyword
import re
from pathlib import Path
from string import Template
from typing import Annotated, Any

import typer

from zoo.cli.common import JSON_HELP, console, print_json
from zoo.errors import ConfigError, SaveError, nearest

__all__ = ["new", "write_method"]

DOMAINS = ("zoo", "vision", "multimodal", "audio")
Json = Annotated[bool, typer.Option("--json", help=JSON_HELP)]


def new(
    what: Annotated[str, typer.Argument(help="What to begin: method.")],
    name: Annotated[str, typer.Argument(help="Its name, e.g. my_method: letters, digits and '_'.")],
    domain: Annotated[
        str, typer.Option(help="zoo (any modality), or that of its paper: vision, multimodal, audio.")
    ] = "zoo",
    as_json: Json = False,
) -> None:
    """Begin a method: its file and its test, which work as they are. Edit these two; everything else finds them.

    \b
      zoo new method my_method
      zoo new method my_method --domain vision

    The template has the docstring's parts in their order, settings, attach, merge, and a module of two vectors.
    """
    if what != "method":
        raise ConfigError(f"'zoo new {what}' is unknown. {nearest(what, ['method'])}")
    files = write_method(name, domain)
    if as_json:
        print_json({"name": name, "files": files})
        return
    out = console()
    for file in files:
        out.print(f"wrote {file}", soft_wrap=True, markup=False)
    out.print(f"Next: python -m pytest {files[1]} && zoo info {name}", soft_wrap=True, markup=False)
    out.print("The tests of all methods, README's table (make format) and the documentation find it by themselves.")


def write_method(name: str, domain: str = "zoo", root: Path | None = None) -> list[Path]:
    """Write file and test of a new method into a checkout (`root`; default: the one that `zoo` runs from).

    Raises:
        ConfigError: a name that is taken or cannot be one, an unknown domain, no checkout. SaveError: a file cannot be written;
            nothing is left behind.
    """
    root = Path(__file__).resolve().parents[2] if root is None else root
    if domain not in DOMAINS:
        raise ConfigError(f"There is no domain '{domain}'. {nearest(domain, DOMAINS)} It has: {', '.join(DOMAINS)}.")
    if not (root / "tests" / "parts").is_dir():
        raise ConfigError(
            f"{root} is an installation without tests, not a checkout. Clone the repository and install it with "
            "`pip install -e .`; a method in a package of your own registers by an entry point (docs/adapters.md)."
        )
    _check_name(name, root)
    tests = root / "tests" / ("" if domain == "zoo" else domain) / "adapters"
    files = {
        root / domain / "adapters" / f"{name}.py": METHOD,
        tests / f"test_{name}.py": TEST,
    }
    room = root / domain / "adapters" / "__init__.py"
    if not room.exists():
        files = {room: Template(f'"""Methods of {domain}, one file each."""\n'), **files}
    words = {"name": name, "Class": _camel(name), "title": name.replace("_", " ").capitalize()}
    written: list[Path] = []
    try:
        for file, template in files.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("x", encoding="utf-8") as stream:
                written.append(file)
                stream.write(template.substitute(words))
    except OSError as error:
        for file in written:
            file.unlink()
        raise SaveError(f"{file} could not be written: {error.strerror or error}. Nothing was left behind.") from error
    return [file for file in files if file != room]


def _check_name(name: str, root: Path) -> None:
    """Refuse what cannot name a method: a file, a module, a key of saved tensors and a command-line word in one."""
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name) or keyword.iskeyword(name):
        raise ConfigError(
            f"'{name}' cannot name a method: use small letters, digits and single '_', beginning with a letter (it names "
            "its file, too), and no word of Python's."
        )
    from torch import nn

    import zoo

    if name in dir(nn.ModuleDict()) or name in ("default", "head", "base", "parts", "backbone"):
        raise ConfigError(f"'{name}' cannot name a method: a model uses the word for something else.")
    for what, known in (
        ("method", zoo.list_adapters()),
        ("backbone", zoo.list_backbones()),
        ("task", zoo.list_tasks()),
    ):
        if name in known:
            raise ConfigError(f"there is a {what} '{name}' already; choose another name.")
    taken = [root / domain / "adapters" / f"{name}.py" for domain in DOMAINS]
    taken += [root / domain / "adapters" / name for domain in DOMAINS]
    taken += (root / "tests").rglob(f"test_{name}.py")  # pytest wants one file of a name
    if found := [file for file in taken if file.exists()]:
        raise ConfigError(f"{found[0]} exists already; nothing is ever overwritten. Choose another name.")


def _camel(name: str) -> str:
    found = "".join(part.capitalize() for part in name.split("_"))
    taken: Any = {"Adapter", "Merger", "Points", "Added", "Tensor", "True", "False", "None"}
    return f"{found}Method" if found in taken else found


METHOD = Template(
    '''"""$title: a rank-one change of projections, to begin from.

Idea: the frozen W (o, i) gets one outer product.
Points: `linear`.

    y = W x + b + s * u (a . x)        a (i,), u (o,), s = `scale`

Defaults: on q and v, s = 1. a ~ N(0, 1 / i), u = 0, so the start is the pretrained function, to the bit.
Counts: i + o for each point; ViT-B/16 on q, v 36,864.
Source: authors, "title", year (repository of their code).
Deviations: none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zoo import Adapter, LinearPoint, Merger, Points, register_adapter

TARGETS = ("q", "v")


class Added(nn.Module):
    """x (..., dim_in) -> s u (a . x), (..., dim_out): what is added to the projection's output."""

    def __init__(self, dim_in: int, dim_out: int, scale: float) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(dim_in) / dim_in**0.5)
        self.u = nn.Parameter(torch.zeros(dim_out))
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """The delta alone."""
        return self.scale * (x @ self.a)[..., None] * self.u

    def delta(self) -> Tensor:
        """The change of W (dim_out, dim_in)."""
        return self.scale * torch.outer(self.u, self.a)


@register_adapter("$name")
@dataclass
class $Class(Adapter):
    """A rank-one change.

    Args:
        scale: s. targets: roles or names of linear points.
    """

    scale: float = 1.0
    targets: str | tuple[str, ...] = TARGETS

    default_lr = 1e-3
    paper = "Author et al. 2024"
    taxonomy = "reparametrised"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.scale > 0, f"scale is {self.scale}; expected more than 0.")

    def attach(self, points: Points) -> None:
        """Add to every selected projection."""
        points.require("linear", "$name")
        for point in self.selected(points):
            point.add(Added(point.dim_in, point.dim_out, self.scale))

    def selected(self, points: Points) -> list[LinearPoint]:
        """The target points; on a backbone without attention the default is the projection by which its mixer reads."""
        return points.linears(self.targets, TARGETS)

    def merge(self, merger: Merger) -> None:
        """W <- W + s u a^T."""
        for point in self.selected(merger.points):
            merger.add_weight(point, self.module_at(point).delta())
'''
)

TEST = Template(
    '''"""$title: count, start, the equations written out, merging, saving, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import zoo

DIM, DEPTH = 48, 2
TINY = {"embed_dim": DIM, "depth": DEPTH, "num_heads": 3}


def vit(adapter: Any = "$name") -> zoo.Model:
    torch.manual_seed(0)
    return zoo.load("vit-micro", adapter, pretrained=False, num_classes=5, **TINY)


def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def shake(model: zoo.Model) -> None:
    """Away from the start."""
    with torch.no_grad():
        for p in model.adapters["$name"].parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))


def test_counts() -> None:
    model = zoo.load("vit-b16", "$name", num_classes=0, device="meta")
    assert model.num_parameters(trainable=True) == 36_864 == 12 * 2 * (768 + 768)


def test_start() -> None:
    model, x = vit(), images()
    adapted = model(x)
    with model.disable():
        assert torch.equal(adapted, model(x))


def test_against_the_equations() -> None:
    """q and v of each block, by hand, from the frozen weights."""
    model, x = vit(zoo.adapter("$name", scale=0.5)), images()
    shake(model)
    logits = model(x)
    state = model.adapters["$name"].state_dict()
    with model.disable(), torch.no_grad():
        for i, block in enumerate(model.backbone.blocks):
            for start, role in ((0, "q"), (2 * DIM, "v")):
                a, u = state[f"blocks.{i}.attn.{role}.a"], state[f"blocks.{i}.attn.{role}.u"]
                block.attn.qkv.weight[start : start + DIM] += 0.5 * u[:, None] * a[None]
        expected = model(x)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_merges_and_saves(tmp_path: Path) -> None:
    model, x = vit(), images()
    shake(model)
    torch.testing.assert_close(model.merge()(x), model(x), rtol=1e-5, atol=1e-5)
    model.save_adapter(tmp_path / "saved")
    torch.manual_seed(0)  # the same random backbone
    assert torch.equal(zoo.load(adapter=tmp_path / "saved", pretrained=False)(x), model(x))


def test_refusals() -> None:
    with pytest.raises(zoo.ZooError, match="expected more than 0"):
        zoo.adapter("$name", scale=0.0)
'''
)
