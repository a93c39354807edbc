"""T5 and BART with visual tokens, prefixes and prompts, written down from the formulas. For comparison only.

Nothing here uses `zoo`, `multimodal` or transformers: a forward pass over the tensors of a state dict, in evaluation, one pair of
tokens at a time where that is the plainest. Prompts are really put into the sequence, and what becomes of them is thrown away.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]


def bucket(distance: int, both: bool, count: int = 32, far: int = 128) -> int:
    """T5's bucket of key position - query position."""
    base = 0
    if both:
        count //= 2
        base, distance = (count if distance > 0 else 0), abs(distance)
    else:
        distance = max(-distance, 0)
    exact = count // 2
    if distance < exact:
        return base + distance
    return base + min(exact + int(math.log(distance / exact) / math.log(far / exact) * (count - exact)), count - 1)


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


@dataclass
class Straight:
    """state: the network's tensors. t5: or BART. prefix: attention's path -> (keys, values), each (T, h c).

    prompts: (T, d), one for each encoder block (deep), or one (with `flow`), which `stay` for the decoder or do not.
    """

    state: State
    heads: int
    t5: bool
    prefix: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    prompts: list[Tensor] = field(default_factory=list)
    flow: bool = False
    stay: bool = False

    def linear(self, x: Tensor, path: str) -> Tensor:
        return F.linear(x, self.state[f"{path}.weight"], self.state.get(f"{path}.bias"))

    def norm(self, x: Tensor, path: str) -> Tensor:
        weight, bias = self.state[f"{path}.weight"], self.state.get(f"{path}.bias")
        return rms(x, weight) if bias is None else F.layer_norm(x, weight.shape, weight, bias)

    def attention(self, x: Tensor, source: Tensor, path: str, bias: Tensor, seen: Tensor) -> Tensor:
        """bias (h, M, K); seen (B, M, K), true where the query sees the key."""
        names = ("q", "k", "v", "o") if self.t5 else ("q_proj", "k_proj", "v_proj", "out_proj")
        q, k, v = (self.linear(y, f"{path}.{n}") for y, n in zip((x, source, source), names))
        width = q.shape[-1] // self.heads
        out = []
        for h in range(self.heads):
            part = slice(h * width, (h + 1) * width)
            scores = q[..., part] @ k[..., part].mT * (1 if self.t5 else width**-0.5)
            scores = (scores + bias[h]).masked_fill(~seen, -math.inf)
            values = v[..., part]
            if path in self.prefix:
                keys, more = (p[:, part].expand(len(x), -1, -1) for p in self.prefix[path])
                scores = torch.cat([q[..., part] @ keys.mT * (1 if self.t5 else width**-0.5), scores], dim=-1)
                values = torch.cat([more, values], dim=1)
            out.append(scores.softmax(-1) @ values)
        return self.linear(torch.cat(out, dim=-1), f"{path}.{names[3]}")

    def bias(self, path: str, queries: int, keys: int, both: bool) -> Tensor:
        table = self.state[f"{path}.relative_attention_bias.weight"]
        rows = [[bucket(j - i, both) for j in range(keys)] for i in range(queries)]
        return table[torch.tensor(rows)].permute(2, 0, 1)

    def mlp(self, x: Tensor, path: str) -> Tensor:
        if not self.t5:
            return self.linear(F.gelu(self.linear(x, f"{path}.fc1")), f"{path}.fc2")
        if f"{path}.wi.weight" in self.state:
            return self.linear(self.linear(x, f"{path}.wi").relu(), f"{path}.wo")
        gate = F.gelu(self.linear(x, f"{path}.wi_0"), approximate="tanh")
        return self.linear(gate * self.linear(x, f"{path}.wi_1"), f"{path}.wo")

    # -- the two parts ----------------------------------------------------------------------------------------------

    def visual(self, features: Tensor, boxes: Tensor) -> Tensor:
        path = ("encoder." if self.t5 else "model.encoder.") + "visual_embedding"
        words = self.state["shared.weight" if self.t5 else "model.shared.weight"]
        x1, y1, x2, y2 = boxes.unbind(-1)
        places = torch.stack([x1, y1, x2, y2, (y2 - x2) * (y1 - x1)], dim=-1)
        tokens = self.norm(self.linear(features, f"{path}.feat_embedding.0"), f"{path}.feat_embedding.1")
        other = f"{path}.absolute_vis_pos_embedding"
        tokens = tokens + self.norm(self.linear(places, f"{other}.0"), f"{other}.1")
        order = torch.stack([words[len(words) - 1 - n] for n in range(features.shape[1])])
        return tokens + self.state[f"{path}.img_order_embedding.weight"][0] + order

    def encode(self, ids: Tensor, mask: Tensor, visual: Tensor | None) -> tuple[Tensor, Tensor]:
        """The encoder's output, and which of it is there."""
        flowing = self.prompts[0].expand(len(ids), -1, -1) if self.flow else None
        if self.t5:
            text = self.state["shared.weight"][ids]
        else:
            text = self.state["model.shared.weight"][ids]
            text = text + self.state["model.encoder.embed_positions.weight"][2 : 2 + ids.shape[1]]
        count = 0
        if flowing is not None:
            text, count = torch.cat([flowing, text], dim=1), flowing.shape[1]
        length = text.shape[1]
        x = text if self.t5 else self.norm(text, "model.encoder.layernorm_embedding")
        there = torch.cat([mask.new_ones(len(mask), count), mask], dim=1)
        if visual is not None:
            x = torch.cat([x, visual], dim=1)
            there = torch.cat([there, there.new_ones(visual.shape[:2])], dim=1)
        total = x.shape[1]
        bias = x.new_zeros(self.heads, total, total)
        if self.t5:
            bias[:, :length, :length] = self.bias("encoder.block.0.layer.0.SelfAttention", length, length, True)
        seen = there.bool()[:, None].expand(-1, total, -1)
        for i in range(self.blocks("encoder")):
            if self.prompts and not self.flow:
                prompt = self.prompts[i].expand(len(x), -1, -1)
                extra = prompt.shape[1]
                x = self.block(torch.cat([prompt, x], dim=1), i, F.pad(bias, (extra, 0, extra, 0)), _more(seen, extra))
                x = x[:, extra:]
            else:
                x = self.block(x, i, bias, seen)
        if self.t5:
            x = self.norm(x, "encoder.final_layer_norm")
        return (x, there) if self.stay else (x[:, count:], there[:, count:])

    def blocks(self, stack: str) -> int:
        path = f"{stack}.block." if self.t5 else f"model.{stack}.layers."
        return 1 + max(int(k[len(path) :].split(".")[0]) for k in self.state if k.startswith(path))

    def block(self, x: Tensor, i: int, bias: Tensor, seen: Tensor) -> Tensor:
        if self.t5:
            path = f"encoder.block.{i}.layer"
            n = self.norm(x, f"{path}.0.layer_norm")
            x = x + self.attention(n, n, f"{path}.0.SelfAttention", bias, seen)
            return x + self.mlp(self.norm(x, f"{path}.1.layer_norm"), f"{path}.1.DenseReluDense")
        path = f"model.encoder.layers.{i}"
        x = self.norm(x + self.attention(x, x, f"{path}.self_attn", bias, seen), f"{path}.self_attn_layer_norm")
        return self.norm(x + self.mlp(x, path), f"{path}.final_layer_norm")

    def decode(self, ids: Tensor, memory: Tensor, there: Tensor) -> Tensor:
        count = ids.shape[1]
        causal = torch.ones(count, count, dtype=torch.bool).tril().expand(len(ids), -1, -1)
        reads = there.bool()[:, None].expand(-1, count, -1)
        none = memory.new_zeros(self.heads, count, memory.shape[1])
        if self.t5:
            x = self.state["shared.weight"][ids]
            bias = self.bias("decoder.block.0.layer.0.SelfAttention", count, count, False)
            for i in range(self.blocks("decoder")):
                path = f"decoder.block.{i}.layer"
                n = self.norm(x, f"{path}.0.layer_norm")
                x = x + self.attention(n, n, f"{path}.0.SelfAttention", bias, causal)
                n = self.norm(x, f"{path}.1.layer_norm")
                x = x + self.attention(n, memory, f"{path}.1.EncDecAttention", none, reads)
                x = x + self.mlp(self.norm(x, f"{path}.2.layer_norm"), f"{path}.2.DenseReluDense")
            x = self.norm(x, "decoder.final_layer_norm") * x.shape[-1] ** -0.5
            return x @ self.state["shared.weight"].T
        words = self.state["model.shared.weight"]
        x = words[ids] + self.state["model.decoder.embed_positions.weight"][2 : 2 + count]
        x = self.norm(x, "model.decoder.layernorm_embedding")
        for i in range(self.blocks("decoder")):
            path = f"model.decoder.layers.{i}"
            zero = memory.new_zeros(self.heads, count, count)
            x = self.norm(x + self.attention(x, x, f"{path}.self_attn", zero, causal), f"{path}.self_attn_layer_norm")
            y = self.attention(x, memory, f"{path}.encoder_attn", none, reads)
            x = self.norm(x + y, f"{path}.encoder_attn_layer_norm")
            x = self.norm(x + self.mlp(x, path), f"{path}.final_layer_norm")
        return x @ words.T + self.state["final_logits_bias"]

    def __call__(self, ids: Tensor, mask: Tensor, answer: Tensor, *visual: Any) -> Tensor:
        """Scores (B, T, V)."""
        memory, there = self.encode(ids, mask, self.visual(*visual) if visual else None)
        return self.decode(answer, memory, there)


def _more(seen: Tensor, extra: int) -> Tensor:
    """Extra tokens in front, which see what the first token sees, and are seen by all."""
    seen = torch.cat([seen[:, :1].expand(-1, extra, -1), seen], dim=1)
    return F.pad(seen, (extra, 0), value=True)
