"""Bria FIBO and FIBO 2."""

from variegate.architectures.layout import Architecture, Blocks, Call, Part, Place, by_row, leading, single, text_length

_TEXT, _IMAGE = leading(text_length)


def _half(channels: int) -> int:
    """The rest is replaced by the text encoder's next layer before each block."""
    return channels // 2


FIBO = Architecture(
    "BriaFiboTransformer2DModel",
    (
        Blocks(
            "transformer_blocks.*",
            context=Part(0, channels=_half),
            image=Part(1),
            attention=Part(1, module="attn"),
        ),
        Blocks(
            "single_transformer_blocks.*",
            context=Part(tokens=_TEXT, channels=_half),
            image=Part(tokens=_IMAGE),
            attention=Part(tokens=_TEXT, module="attn"),
        ),
    ),
)


def _gists(call: Call) -> list[int]:
    """Tokens into which the perceiver squeezes each row's text."""
    from diffusers.models.transformers.transformer_bria_fibo2 import compute_gist_count

    config, embeddings, mask = call["self"].config, call["encoder_hidden_states"], call.get("encoder_attention_mask")
    lengths = [embeddings.shape[2]] * len(embeddings) if mask is None else mask.sum(1).tolist()
    counts: list[int] = compute_gist_count(
        lengths,
        min_gist=config.min_num_gist_tokens,
        max_gist=config.max_num_gist_tokens,
        gist_step=config.gist_step,
        min_text_len=config.gist_min_text_len,
        max_text_len=config.gist_max_text_len,
    )
    return counts


def _images(call: Call) -> int:
    """Image tokens, those of reference images included."""
    size = call["self"].config.patch_size
    latents = [call["hidden_states"], *(call.get("context_latents") or [])]
    return sum((x.shape[-2] // size) * (x.shape[-1] // size) for x in latents)


def _gist(call: Call) -> Place:
    counts = _gists(call)
    if len(set(counts)) == 1:
        return slice(counts[0])
    return by_row([_images(call)] * len(counts), counts)  # text goes last where rows differ in its length


def _picture(call: Call) -> slice:
    counts = _gists(call)
    return slice(counts[0], None) if len(set(counts)) == 1 else slice(_images(call))


FIBO2 = Architecture(
    "BriaFibo2Transformer2DModel", (single("layers", _gist, _picture, attention="attention"),), branches=()
)
