"""Denoisers whose text never meets the image: class name -> why."""

_CROSS = "its text enters by cross-attention and never reads the image"
_CAUSAL = "its text is encoded causally, before the image"

NO_CONTEXT = dict.fromkeys(
    (
        "UNet2DConditionModel",
        "UNet2DModel",
        "UNet3DConditionModel",
        "UNetMotionModel",
        "AllegroTransformer3DModel",
        "CosmosTransformer3DModel",
        "HunyuanDiT2DModel",
        "Kandinsky5Transformer3DModel",
        "LTXVideoTransformer3DModel",
        "LatteTransformer3DModel",
        "LuminaNextDiT2DModel",
        "PRXTransformer2DModel",
        "PixArtTransformer2DModel",
        "SanaTransformer2DModel",
        "SkyReelsV2Transformer3DModel",
        "WanTransformer3DModel",
    ),
    _CROSS,
) | {"OmniGenTransformer2DModel": _CAUSAL}
