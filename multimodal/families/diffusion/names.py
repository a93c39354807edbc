"""Which class of diffusers a name is of, and the family that describes it."""

from __future__ import annotations

from typing import Any

from zoo.library import pretrained_config

# What a configuration file calls the classes that families here describe
FAMILIES = {
    "DiTTransformer2DModel": "dit",
    "CogVideoXTransformer3DModel": "cogvideox",
    "PixArtTransformer2DModel": "pixart",
    "SD3Transformer2DModel": "sd3",
    "FluxTransformer2DModel": "flux",
    "UNet2DConditionModel": "unet",
    **dict.fromkeys(
        (
            *("ChromaTransformer2DModel", "BriaTransformer2DModel", "LongCatImageTransformer2DModel"),
            *("OvisImageTransformer2DModel", "Flux2Transformer2DModel", "QwenImageTransformer2DModel"),
            *("AuraFlowTransformer2DModel", "HunyuanImageTransformer2DModel"),
        ),
        "mmdit",
    ),
    **dict.fromkeys(
        ("HunyuanVideoTransformer3DModel", "HunyuanVideo15Transformer3DModel", "MochiTransformer3DModel"), "mmdit-video"
    ),
    **dict.fromkeys(("HunyuanDiT2DModel", "SanaTransformer2DModel"), "cross-dit"),
    **dict.fromkeys(("CogView3PlusTransformer2DModel", "CogView4Transformer2DModel"), "cogview"),
    **dict.fromkeys(("Lumina2Transformer2DModel", "ZImageTransformer2DModel"), "single-dit"),
    **dict.fromkeys(
        (
            *("WanTransformer3DModel", "SkyReelsV2Transformer3DModel", "LTXVideoTransformer3DModel"),
            *("SanaVideoTransformer3DModel", "LatteTransformer3DModel"),
        ),
        "cross-dit-video",
    ),
}
# The first releases of DiT and PixArt name a class that the library has split since
_SPLIT = {"ada_norm_zero": "DiTTransformer2DModel", "ada_norm_single": "PixArtTransformer2DModel"}


def source_config(source: str) -> tuple[dict[str, Any] | str, str]:
    """The transformer's configuration in a pipeline or in a folder of its own, and the subfolder that it is in."""
    inside = pretrained_config(source, "transformer/config.json")
    if isinstance(inside, dict):
        return inside, "transformer"
    unet = pretrained_config(source, "unet/config.json")
    if isinstance(unet, dict):
        return unet, "unet"
    alone = pretrained_config(source)
    return (alone, "") if isinstance(alone, dict) else (inside, "")


def source_class(source: str) -> str:
    """The class that a repository, a folder or a class's name is of, or a sentence that says why it is of none."""
    if source in FAMILIES:
        return source
    config, _ = source_config(source)
    return config if isinstance(config, str) else class_of(config)


def class_of(config: dict[str, Any]) -> str:
    """The library's class that a configuration is of."""
    name = str(config.get("_class_name", "?"))
    return _SPLIT.get(str(config.get("norm_type")), name) if name == "Transformer2DModel" else name
