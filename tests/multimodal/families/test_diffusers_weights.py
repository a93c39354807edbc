"""Checkpoints of diffusers in the precision that is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("diffusers")

from diffusion_models import make

import zoo
from multimodal.families.diffusion.weights import NAME
from zoo.families.precision import stored_dtype

PRECISIONS = (torch.float32, torch.bfloat16, torch.float16)


class Copied(TorchDispatchMode):
    """Names of the parameters of which a copy in float32 was made inside."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.parameters = {k: p.detach() for k, p in module.named_parameters()}
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.dtype == torch.float32 and x.device.type != "meta":
                with no_dispatch():
                    same = (k for k, p in self.parameters.items() if p.shape == x.shape and torch.equal(p.float(), x))
                    self.names |= set(same)
        return result


def stored(folder: Path, dtype: torch.dtype, name: str = "dit", shards: bool = False) -> nn.Module:
    """A tiny checkpoint in a precision, in one file or in several."""
    module: Any = make(name)[0].backbone.to(dtype)
    module.save_pretrained(folder / "transformer", **({"max_shard_size": "20KB"} if shards else {}))
    assert (len(list((folder / "transformer").glob("*.safetensors"))) > 1) == shards
    return module


@pytest.mark.parametrize("wanted", PRECISIONS)
@pytest.mark.parametrize("own", PRECISIONS)
def test_the_precision_that_is_asked_for(own: torch.dtype, wanted: torch.dtype, tmp_path: Path) -> None:
    """Numbers are the stored ones rounded once, and the fingerprint is that of float32, so that an adapter fits either."""
    source = stored(tmp_path, own)
    assert stored_dtype(str(tmp_path), "transformer", NAME) == own
    default = zoo.load(f"diffusers:{tmp_path}", "lora", seed=0)
    model = zoo.load(f"diffusers:{tmp_path}", "lora", dtype=wanted, seed=0)
    assert {p.dtype for p in model.backbone.parameters()} == {wanted} and default.dtype == torch.float32
    assert {p.dtype for p in model.parameters_to_train().values()} == {torch.float32}  # whatever the backbone's is
    assert model.fingerprint == default.fingerprint
    for key, value in source.state_dict().items():
        assert torch.equal(model.backbone.get_parameter(key), value.float().to(wanted)), key
    saved = default.save_adapter(tmp_path / "saved")
    again = zoo.load(f"diffusers:{tmp_path}", saved, dtype=wanted)
    with torch.no_grad():
        assert again(*again.example_batch()).isfinite().all()


@pytest.mark.parametrize("name", ["cogvideox", "sd3", "flux", "pixart", "dit"])
@pytest.mark.parametrize("shards", [False, True])
def test_no_copy_in_float32(name: str, shards: bool, tmp_path: Path) -> None:
    source = stored(tmp_path, torch.bfloat16, name, shards)
    matrices = {k for k, p in source.named_parameters() if p.ndim > 1}
    with Copied(source) as copied:
        zoo.load(f"diffusers:{tmp_path}")
    assert matrices <= copied.names  # as the library does it by itself
    with Copied(source) as copied:
        model = zoo.load(f"diffusers:{tmp_path}", dtype=torch.bfloat16)
    assert not matrices & copied.names
    assert all(torch.equal(p, model.backbone.get_parameter(k)) for k, p in source.named_parameters())


def test_other_files_are_left_to_the_library(tmp_path: Path) -> None:
    module: Any = stored(tmp_path, torch.bfloat16)
    module.to(torch.float16).save_pretrained(tmp_path / "transformer", variant="fp16")
    model = zoo.load(f"diffusers:{tmp_path}", dtype=torch.float16, variant="fp16")
    assert torch.equal(model.backbone.get_parameter("proj_out_2.weight"), module.proj_out_2.weight)
    assert all(stored_dtype(str(f), "", NAME) is None for f in (tmp_path, tmp_path / "none"))
    with pytest.raises(zoo.errors.ConfigError, match="could not be loaded"):
        (tmp_path / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
        zoo.load(f"diffusers:{tmp_path}", dtype=torch.bfloat16)
