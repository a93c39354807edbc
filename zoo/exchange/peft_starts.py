"""PiSSA and OLoRA in peft's format: a start that also changes the frozen weight, as a plain LoRA of twice the rank.

peft takes the principal part out of the weight W (o, i) of a module when it makes, or loads, such an adapter, and trains it:

    PiSSA   W = V S U,  V (o, m), S (m,), U (m, i)      P = V_r S_r U_r
    OLoRA   W = Q R,    Q (o, m), R (m, i)              P = s Q_r R_r
    then    y = (W - P) x + s B A x

which is W x + s [B, -B_0] [A; A_0] x with s B_0 A_0 = P: a LoRA of rank 2 r on the unchanged weight. The principal part comes
from W alone, so it is computed here again, in float32 as there, and the backbone's weights have to be those that peft had.
Its randomised form (`pissa_niter_16`) draws random numbers that are not saved, and is refused.

Source: Meng et al. 2024 (PiSSA), Büyükakyüz 2024 (OLoRA), and how peft starts them.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from zoo.errors import ConfigError
from zoo.exchange.peft_reader import PeftAdapter, PeftModule

STARTS = ("pissa", "olora")


def plain(saved: PeftAdapter, path: str, module: PeftModule, weight: Tensor) -> PeftModule:
    """The module's factors for the unchanged weight (o, i).

    Raises:
        ConfigError: together with DoRA, whose lengths are those of the changed weight.
    """
    start = saved.settings.get("init_lora_weights", True)
    if start not in STARTS:
        return module
    if module.magnitude is not None:
        raise ConfigError(
            f"'{saved.folder}' has DoRA on a {start} start at '{path}'; only without DoRA is there an equal LoRA. Save it in "
            "peft with path_initial_model_for_weight_conversion."
        )
    assert module.a is not None and module.b is not None
    rank, scale, whole = module.rank, saved.scale(module), weight.detach().to("cpu", torch.float32)
    if start == "pissa":
        left, values, right = torch.linalg.svd(whole, full_matrices=False)
        roots = (values[:rank] / scale).sqrt()
        b, a = left[:, :rank] * roots, roots[:, None] * right[:rank]
    else:
        q, r = torch.linalg.qr(whole)
        b, a = q[:, :rank], r[:rank]
    factors = torch.cat([module.a.float(), a]), torch.cat([module.b.float(), -b], dim=1)
    # s stays: it is alpha over the rank, or over its root
    alpha = module.alpha * (2**0.5 if saved.settings.get("use_rslora") else 2)
    return replace(module, a=factors[0], b=factors[1], alpha=alpha)
