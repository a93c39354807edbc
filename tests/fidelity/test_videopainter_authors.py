"""VideoPainter against numbers recorded from the authors' code, and its counts at full size.

`videopainter.json` holds what TencentARC/VideoPainter (commit bbab6cd, their fork of diffusers 0.31: `branch_cogvideox.py`, its
`from_transformer` and forward, and `cogvideox_transformer_3d.py`) gives on an image-to-video CogVideoX of 4 blocks, width 32, 2
heads, 3 latent frames of 8 x 8, an encoder of 2 blocks, in float64, with the weights and inputs of `waves`: the parameters that
the encoder starts with, every fifth channel and third latent of the output, and the gradients of a weighted sum of it, for what
is added at the background ("background"), at all tokens ("everywhere"), and to the first blocks alone ("first"). Their routine
leaves the bias of the two patch embeddings one tensor, which training the encoder would change in the frozen transformer, too;
for the numbers it was copied.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

from waves import agree, fill, summary, wave

import zoo

AUTHORS: dict[str, Any] = json.loads((Path(__file__).parent / "videopainter.json").read_text())
SMALL: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 32,
    "out_channels": 16,
    "time_embed_dim": 8,
    "text_embed_dim": 12,
    "num_layers": 4,
    "sample_width": 8,
    "sample_height": 8,
    "sample_frames": 9,
    "max_text_seq_length": 5,
}


def made(**options: Any) -> tuple[zoo.Model, dict[str, torch.nn.Parameter]]:
    """The small model, and the encoder's parameters under the authors' names."""
    model = zoo.load("cogvideox-5b-i2v", pretrained=False, **SMALL).double().eval()
    fill(dict(model.backbone.named_parameters()))
    adapter = model.add_adapter(zoo.adapter("videopainter", **options)).double()
    named = {
        k.removeprefix("encoder.").removeprefix("front.network.").replace("out.", "branch_blocks.")
        if k.startswith("encoder.out.")
        else k.removeprefix("encoder.front.network."): p
        for k, p in adapter.named_parameters()
    }
    return model, named


def inputs() -> tuple[tuple[Any, ...], dict[str, Tensor]]:
    """Latents, time, text, the image; and the masked video with its mask."""
    mask = torch.zeros(2, 3, 1, 8, 8, dtype=torch.float64)
    mask[0, 1:, :, 2:5, 3:7] = 1
    mask[1, 2, :, 0:1, 0:1] = 1
    image = wave((2, 3, 16, 8, 8), 3, 1.0)
    call = wave((2, 3, 16, 8, 8), 1, 1.0), torch.tensor([3, 700]), wave((2, 5, 12), 4, 1.0), image
    return call, {"masked": wave((2, 3, 16, 8, 8), 2, 1.0), "mask": mask}


def test_starts_as_the_authors_encoder() -> None:
    _, named = made()
    texts = {k for k in named if "text_proj" in k}
    assert set(named) - texts == set(AUTHORS["start"]) and len(texts) == 2
    for key, numbers in AUTHORS["start"].items():
        found = torch.tensor(summary(named[key].detach()), dtype=torch.float64)
        torch.testing.assert_close(found, torch.tensor(numbers, dtype=torch.float64), rtol=1e-6, atol=1e-7, msg=key)


@pytest.mark.parametrize("mode", ["background", "everywhere", "first"])
def test_equals_the_authors_code(mode: str) -> None:
    model, named = made(**({} if mode == "background" else {mode: True}))
    fill(named)
    call, given = inputs()
    output = model(*call, context=given)
    recorded = AUTHORS[mode]
    part = output.detach()[:, :, ::5, ::3, ::3].flatten()
    torch.testing.assert_close(part, torch.tensor(recorded["output"], dtype=torch.float64), rtol=1e-5, atol=1e-5)
    whole = torch.tensor(summary(output.detach()), dtype=torch.float64)
    torch.testing.assert_close(whole, torch.tensor(recorded["whole"], dtype=torch.float64), rtol=1e-5, atol=1e-4)
    (output * wave(tuple(output.shape), 6, 1.0)).sum().backward()
    for numbers in recorded["gradients"].values():
        assert max(map(abs, numbers)) > 0
    agree(named, recorded["gradients"])


def test_counts_at_full_size() -> None:
    """CogVideoX-5B-I2V; the authors' module has parameters that it never uses besides."""
    model = zoo.load("cogvideox-5b-i2v", "videopainter", device="meta")
    assert model.num_parameters(trainable=True) == 298_106_368
    assert model.num_parameters() - 298_106_368 == 5_570_479_680
    width, time, out, inputs = 3072, 512, 16, 32
    norms, modulation = 2 * 2 * width, time * 2 * width + 2 * width
    unused = norms + modulation + width * 4 * out + 4 * out + inputs * width + width
    assert 298_106_368 + unused == 301_568_576
    block = model.adapters["videopainter"].get_submodule("encoder.front.network.transformer_blocks.0")
    assert sum(p.numel() for p in block.parameters()) == 132_197_632
