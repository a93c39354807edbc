"""Roles of projections and norms by the names that libraries give them.

A role is what a method asks for ("q", "v", "up"); a name is what the author of a network wrote (`q_proj`, `to_q`, `query`).
Where a name says nothing, the role is "linear" or "conv", which "all-linear" and a convolutional network's LoRA take.
"""

from __future__ import annotations

import re

from torch import nn

from zoo.points.rows import is_conv

# Last word of a module's path -> role, wherever it stands
PLAIN: dict[str, tuple[str, ...]] = {
    "q": ("q", "q_proj", "to_q", "query", "wq", "w_q", "q_lin", "query_proj", "linear_q", "q_linear", "proj_q", "wq_b"),
    "k": ("k", "k_proj", "to_k", "key", "wk", "w_k", "k_lin", "key_proj", "linear_k", "k_linear", "proj_k"),
    "v": ("v", "v_proj", "to_v", "value", "wv", "w_v", "v_lin", "value_proj", "linear_v", "v_linear", "proj_v"),
    "qkv": (
        *("qkv", "to_qkv", "qkv_proj", "query_key_value", "wqkv", "Wqkv", "c_attn", "kv", "to_kv", "kv_proj", "qk"),
        *("in_proj_qkv", "attn_qkv", "qkv_linear", "to_added_qkv"),
    ),
    "o": ("o_proj", "to_out", "wo", "w_o", "out_lin", "output_proj", "linear_out", "to_add_out", "proj_out_attn"),
    "up": (
        *("fc1", "up_proj", "linear1", "lin1", "c_fc", "wi", "wi_1", "fc1_x", "dense_h_to_4h", "intermediate_dense"),
        *("fc_in", "linear_1", "dense1", "ffn_1", "up", "mlp_up"),
    ),
    "gate": ("gate_proj", "wi_0", "fc1_g", "gate_up_proj"),
    "down": (
        *("fc2", "down_proj", "linear2", "lin2", "dense_4h_to_h", "output_dense", "fc_out", "linear_2", "dense2"),
        *("ffn_2", "down", "mlp_down"),
    ),
    "patch": ("patch_embed", "patch_embedding", "patch_embeddings", "patchify", "x_embedder"),
}
ROLES = {name: role for role, names in PLAIN.items() for name in names}
ATTENTION = re.compile(r"(^|[._])(\w*attn\w*|\w*attention\w*|mixer|token_mixer|mha|sa|xattn)($|[.])", re.IGNORECASE)
MLP = re.compile(r"(^|[._])(\w*mlp\w*|ffn?|feed_?forward\w*|intermediate|expert\w*|\w*net)($|[.\d])", re.IGNORECASE)
PATCH = re.compile(r"(^|\.)(patch_?embed\w*|x_embedder|pos_embed|embeddings?)(\.|$)", re.IGNORECASE)


def linear_role(path: str, module: nn.Module, siblings: frozenset[str] = frozenset()) -> str:
    """The role of a projection: "q", "k", "v", "qkv", "o", "up", "gate", "down", "in", "out", "patch"; else what it is.

    That is "linear", "conv" or (a convolution of several groups) "grouped".

    Args:
        path: of the module in its network.
        siblings: names of the modules beside it, which tell a Mamba's `in_proj` from an attention's.
    """
    words = path.split(".")
    last = next((w for w in reversed(words) if not w.isdigit()), words[-1])
    parent = ".".join(words[:-1])
    unnamed = "conv" if is_conv(module) else "linear"
    if is_conv(module) and module.groups > 1:  # type: ignore[operator]
        return "grouped"
    if PATCH.search(path) and is_conv(module) and max(module.kernel_size) > 1:  # type: ignore[type-var,arg-type]
        return "patch"
    if is_conv(module) and max(module.kernel_size) > 1:  # type: ignore[type-var,arg-type]
        return unnamed  # `conv.q` of an image is no projection of tokens
    inside, mlp = bool(ATTENTION.search(parent)), bool(MLP.search(parent))
    if last in ("in_proj", "out_proj", "x_proj", "dt_proj") and siblings & {"conv1d", "x_proj", "dt_proj", "A_log"}:
        return {"in_proj": "in", "out_proj": "out"}.get(last, unnamed)
    if last in ("w1", "w2", "w3", "w12"):  # the gated MLP of LLaMA, or a plain one
        gated = "w3" in siblings
        return {"w1": "gate" if gated else "up", "w3": "up" if gated else "down", "w12": "up"}.get(last, "down")
    if last == "wo" and siblings & {"wi", "wi_0", "wi_1"}:
        return "down"
    if last in ("proj", "out_proj", "dense", "c_proj", "out", "proj_out", "output", "proj_in", "in_proj"):
        if last == "in_proj":
            return "qkv" if inside else unnamed
        if last == "proj_in":
            return unnamed
        if last == "c_proj":
            return "down" if "c_fc" in siblings else "o"
        if last == "dense":
            if parent.endswith("intermediate"):
                return "up"
            return ("o" if inside else "down") if parent.endswith("output") else unnamed
        if inside and not mlp:
            return "o"
        if last == "proj" and words[-2:-1] == ["0"] and "net" in words:  # diffusers: ff.net.0.proj, ff.net.2
            return "up"
        return unnamed
    role = ROLES.get(last)
    if role in ("q", "k", "v") and len(last) == 1 and not inside:
        return role
    if role is not None:
        return role
    if words[-1] == "2" and words[-2:-1] == ["net"]:
        return "down"
    return unnamed


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation with a scale for each channel (and perhaps an activation behind it)."""
    if "norm" not in type(module).__name__.lower():
        return False
    if any(True for child in module.children() for _ in child.parameters()):
        return False
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim == 1


# Elementwise functions whose backward needs their input (their output can be computed again), by what libraries call them
ACTIVATIONS = re.compile(r"\w*(gelu|silu|swish|mish|softplus|selu)\w*", re.IGNORECASE)
LIBRARIES = ("torch", "timm", "transformers", "diffusers", "open_clip")


def activates(module: nn.Module) -> bool:
    """Whether a module is an elementwise function of a known kind, without parameters, that makes a tensor of its own."""
    kind = type(module)
    known = ACTIVATIONS.fullmatch(kind.__name__) and kind.__module__.split(".")[0] in LIBRARIES
    state = next(module.parameters(), None) is not None or next(module.buffers(), None) is not None
    return bool(known) and not state and not getattr(module, "inplace", False)
