"""Denoisers whose text never meets the image: no contextual space, but what the text adds to the image."""

from variegate.architectures.layout import Architecture, Blocks, Part, leading, text_length

_CROSS = "its text enters by cross-attention and never reads the image"
_CAUSAL = "its text is encoded before the image and never reads it"
_UNET = ("down_blocks.*", "mid_block", "up_blocks.*")


def _crossing(
    denoiser: str,
    blocks: str,
    module: str,
    *,
    image: Part | None = None,
    branches: tuple[str, ...] = ("uncond", "cond"),
    sign: int = 1,
) -> Architecture:
    """Blocks that return the image tokens alone, with one cross-attention each."""
    where = Blocks(f"{blocks}.*", image=image or Part(), cross_attention=Part(module=module))
    return Architecture(denoiser, (where,), branches, sign=sign, no_context=_CROSS)


UNET = Architecture(
    "UNet2DConditionModel",
    tuple(
        Blocks(f"{part}.attentions.*.transformer_blocks.*", image=Part(), cross_attention=Part(module="attn2"))
        for part in _UNET
    ),
    latents="sample",
    no_context=_CROSS,
)

CROSS_ATTENTION = (
    UNET,
    _crossing("PixArtTransformer2DModel", "transformer_blocks", "attn2"),
    _crossing("SanaTransformer2DModel", "transformer_blocks", "attn2"),
    _crossing("SanaVideoTransformer3DModel", "transformer_blocks", "attn2"),
    _crossing("HunyuanDiT2DModel", "blocks", "attn2"),
    _crossing("LuminaNextDiT2DModel", "layers", "attn2", branches=("cond", "uncond"), sign=-1),
    _crossing("AllegroTransformer3DModel", "transformer_blocks", "attn2"),
    _crossing("LTXVideoTransformer3DModel", "transformer_blocks", "attn2"),
    _crossing("LTX2VideoTransformer3DModel", "transformer_blocks", "attn2", image=Part(0)),  # (video, audio)
    _crossing("CosmosTransformer3DModel", "transformer_blocks", "attn2", branches=()),
    _crossing("WanTransformer3DModel", "blocks", "attn2", branches=()),
    _crossing("WanVACETransformer3DModel", "blocks", "attn2", branches=()),
    _crossing("WanAnimateTransformer3DModel", "blocks", "attn2", branches=()),
    _crossing("SkyReelsV2Transformer3DModel", "blocks", "attn2", branches=()),
    _crossing("ChronoEditTransformer3DModel", "blocks", "attn2", branches=()),
    _crossing("HeliosTransformer3DModel", "blocks", "attn2", branches=()),
    _crossing("AnyFlowTransformer3DModel", "blocks", "attn2"),
    _crossing("Kandinsky5Transformer3DModel", "visual_transformer_blocks", "cross_attention", branches=()),
    _crossing(
        "Kandinsky6Transformer3DModel",
        "visual_transformer_blocks",
        "video_dec_block.cross_attention",
        image=Part(0),  # (video, audio)
        branches=(),
    ),
)

# Neither text that reads the image nor a cross-attention of its own: only the image tokens can be pushed.
_IMAGE = leading(text_length)[1]
IMAGE_ONLY = (
    Architecture("PRXTransformer2DModel", (Blocks("blocks.*", image=Part()),), no_context=_CROSS),
    Architecture(
        "NucleusMoEImageTransformer2DModel",
        (Blocks("transformer_blocks.*", image=Part()),),
        branches=(),
        sign=-1,
        no_context=_CROSS,
    ),
    Architecture(
        "QwenImage21Transformer2DModel",
        (Blocks("transformer_blocks.*", image=Part(tokens=_IMAGE)),),
        branches=(),
        output=Part(tokens=_IMAGE),
        no_context=_CAUSAL,
    ),
)

# Rows or frames are folded into one another, so there are no samples to push apart.
NO_SITE = (
    Architecture("OmniGenTransformer2DModel", (), no_context=_CAUSAL),
    Architecture("Cosmos3OmniTransformer", (), no_context=_CAUSAL),
    Architecture("LatteTransformer3DModel", (), no_context=_CROSS),
    Architecture("UNet2DModel", (), no_context="it takes no text"),
    Architecture("UNet3DConditionModel", (), no_context=_CROSS),
    Architecture("UNetMotionModel", (), no_context=_CROSS),
    Architecture("UNetSpatioTemporalConditionModel", (), no_context="it takes no text"),
)
