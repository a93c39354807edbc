"""LoRA on ten networks of three libraries, beside peft's LoRA on the same weights. Nothing here is described by a family's table.

    python benchmarks/against_peft_reach.py            # half a minute; results/against_peft_reach.{json,md}

Each network is small and of random weights; it is wrapped without being known (`zoo.load(module, lora, example=batch)`), and by
peft with the paths of all of its projections. Both get the same random A and B, and one forward and backward pass on one batch.

- *difference*: of the outputs, and of the gradients of all A and B, relative to the largest entry of each tensor; target 2e-6.
  In float64, so that the order in which sums are formed does not count.
- *saved*: bytes that autograd keeps for backward in float32, ours by peft's; target below 1.
- *dead*: tensors that peft trains and no forward pass reads. Here the projections that they belong to are refused, with the
  reason; a merge there would change the network where the live adapter did not.

Exit code 1 if a target is missed.
"""

from __future__ import annotations

import copy
import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RESULTS = Path(__file__).parent / "results"
RANK, ALPHA, TARGET = 4, 8, 2e-6


def _timm(name: str, size: int = 64, **options: Any) -> tuple[nn.Module, Any]:
    import timm

    module = timm.create_model(name, num_classes=0, **options)
    return module, torch.randn(2, 3, size, size)


def resnet() -> tuple[nn.Module, Any]:
    """Convolutions alone."""
    return _timm("resnet10t")


def mixer() -> tuple[nn.Module, Any]:
    """MLPs over tokens and over channels."""
    from timm.models.mlp_mixer import MlpMixer

    return MlpMixer(img_size=64, patch_size=16, num_blocks=2, embed_dim=32, num_classes=0), torch.randn(2, 3, 64, 64)


def swin2() -> tuple[nn.Module, Any]:
    """A projection whose weight is read: q and v have biases beside it."""
    options: dict[str, Any] = {"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": (1, 1), "num_heads": (2, 4)}
    return _timm("swinv2_tiny_window8_256", 64, **options)


def vit() -> tuple[nn.Module, Any]:
    """transformers' ViT."""
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=8
    )
    return ViTModel(config), torch.randn(2, 3, 32, 32)


def siglip() -> tuple[nn.Module, Any]:
    """Its pooling is an nn.MultiheadAttention, which reads the weight of its output projection."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    config = SiglipVisionConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=8
    )
    return SiglipVisionModel(config), torch.randn(2, 3, 32, 32)


def gpt2() -> tuple[nn.Module, Any]:
    """Weights that are stored as (in, out)."""
    from transformers import GPT2Config, GPT2Model

    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=16)
    return GPT2Model(config), torch.arange(16).view(2, 8)


def qwen2() -> tuple[nn.Module, Any]:
    """Grouped keys, a gated MLP, norms without shift."""
    from transformers import Qwen2Config, Qwen2Model

    config = Qwen2Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        vocab_size=50,
    )
    return Qwen2Model(config), torch.arange(16).view(2, 8)


def wav2vec2() -> tuple[nn.Module, Any]:
    """Waveforms."""
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    config = Wav2Vec2Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        conv_dim=(16, 16),
        conv_stride=(5, 4),
        conv_kernel=(10, 8),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
    )
    return Wav2Vec2Model(config), torch.randn(2, 800)


def wan() -> tuple[nn.Module, Any]:
    """A transformer for videos."""
    from diffusers import WanTransformer3DModel

    module = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    batch = {
        "hidden_states": torch.randn(2, 4, 2, 8, 8),
        "timestep": torch.tensor([3, 500]),
        "encoder_hidden_states": torch.randn(2, 6, 16),
    }
    return module, batch


def unet() -> tuple[nn.Module, Any]:
    """The network of Stable Diffusion."""
    from diffusers import UNet2DConditionModel

    module = UNet2DConditionModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    batch = {
        "sample": torch.randn(2, 4, 16, 16),
        "timestep": torch.tensor([3, 500]),
        "encoder_hidden_states": torch.randn(2, 6, 16),
    }
    return module, batch


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "timm resnet10t": resnet,
    "timm mixer_s32": mixer,
    "timm swinv2_tiny": swin2,
    "transformers ViT": vit,
    "transformers SigLIP": siglip,
    "transformers GPT-2": gpt2,
    "transformers Qwen2": qwen2,
    "transformers wav2vec 2.0": wav2vec2,
    "diffusers Wan": wan,
    "diffusers UNet": unet,
}


@dataclass
class Row:
    """What was measured on one network."""

    network: str
    places: int
    outputs: float
    gradients: float
    saved: float  # ours by peft's
    dead: int  # tensors
    refused: int  # projections


def projections(module: nn.Module) -> list[str]:
    """Paths of what peft would take as a projection (of a network of convolutions alone: these)."""
    linears = [n for n, m in module.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]
    return linears or [n for n, m in module.named_modules() if isinstance(m, nn.Conv2d) and m.groups == 1]


def compare(name: str) -> Row:
    """One network."""
    import peft

    import zoo
    from zoo.engine.memory import saved_bytes

    torch.manual_seed(0)
    module, batch = NETWORKS[name]()
    module.eval()
    inputs, named = ((), batch) if isinstance(batch, dict) else ((batch,), {})
    paths = projections(module)
    theirs = peft.get_peft_model(
        copy.deepcopy(module),
        peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=paths, lora_dropout=0.0),
    ).eval()
    bare = zoo.wrap(copy.deepcopy(module), example=batch, features=_whole, head=None)
    reached = [p.name for p in bare.points if p.path in paths]
    bare.add_adapter(zoo.adapter("lora", rank=RANK, alpha=float(ALPHA), targets=tuple(reached)))
    ours = bare.eval()
    adapter: Any = ours.adapters["lora"]
    layers = {n.removeprefix("base_model.model."): m for n, m in theirs.named_modules() if hasattr(m, "lora_A")}
    pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
    for path, layer in layers.items():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        nn.init.normal_(a, std=0.1)
        nn.init.normal_(b, std=0.1)
        if path in reached:
            part = adapter.module_at(path)
            with torch.no_grad():
                part.lora_a.copy_(a.flatten(1))
                part.lora_b.copy_(b.flatten(1))
            pairs += [(part.lora_a, a), (part.lora_b, b)]

    def ours_run() -> Tensor:
        return ours(*inputs, **named)

    def theirs_run() -> Tensor:
        return _whole(theirs, *inputs, **named)

    kept = ours.saved_bytes(*inputs, **named)
    held = [*theirs.parameters(), *theirs.buffers(), *(v for v in (*inputs, *named.values()) if isinstance(v, Tensor))]
    kept /= saved_bytes(theirs_run, held)
    for model in (ours, theirs):
        model.double()
    inputs = tuple(_double(v) for v in inputs)
    named = {k: _double(v) for k, v in named.items()}
    one, other = ours_run(), theirs_run()
    weights = torch.randn_like(one)
    (one * weights).sum().backward()
    (other * weights).sum().backward()
    dead = [
        p for m in layers.values() for n in ("lora_A", "lora_B") if (p := getattr(m, n)["default"].weight).grad is None
    ]
    return Row(
        name,
        len(reached),
        _difference(one, other),
        max(_difference(a.grad.flatten(1), b.grad.flatten(1)) for a, b in pairs),  # type: ignore[union-attr]
        kept,
        len(dead),
        len(set(paths) - set(reached)),
    )


def _whole(module: nn.Module, *inputs: Any, **named: Any) -> Tensor:
    """All tensors that the network gives, side by side: (B, n)."""
    output = module(*inputs, **named)
    values = [output] if isinstance(output, Tensor) else list(output.values())
    return torch.cat([v.flatten(1) for v in values if isinstance(v, Tensor)], dim=1)


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max().clamp_min(1e-12))


def as_markdown(rows: list[Row]) -> str:
    """A table."""
    lines = [
        "| network | projections | outputs differ by | gradients differ by | saved bytes, by peft's | dead in peft | refused |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {r.network} | {r.places} | {r.outputs:.1e} | {r.gradients:.1e} | {r.saved:.2f} | {r.dead} | {r.refused} |"
        for r in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """See the file."""
    warnings.simplefilter("ignore")
    rows = [compare(name) for name in NETWORKS]
    print(as_markdown(rows))
    (RESULTS / "against_peft_reach.json").write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n")
    (RESULTS / "against_peft_reach.md").write_text(as_markdown(rows))
    missed = [r.network for r in rows if max(r.outputs, r.gradients) > TARGET or r.saved >= 1]
    if missed:
        print("missed on:", ", ".join(missed))
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
