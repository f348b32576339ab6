"""Every denoiser class at tiny size: `denoisers.json` holds the configurations, this file a call of each.

A call has two rows, the same prompt with different latents.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.models import transformers, unets
from torch import Tensor, nn

CONFIGS: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "denoisers.json").read_text())
ROWS = 2
TEXT = 5  # tokens


def find_class(name: str) -> type[nn.Module]:
    """The diffusers class of that name, exported or not."""
    for package in (transformers, unets):
        for module in pkgutil.iter_modules(package.__path__):
            loaded = importlib.import_module(f"{package.__name__}.{module.name}")
            if hasattr(loaded, name):
                return getattr(loaded, name)
    raise LookupError(name)


def tiny(name: str, **changes: Any) -> nn.Module:
    """The denoiser with random weights, none of them zero: a zero gate would hide its block."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = find_class(name)(**CONFIGS[name] | changes).eval().float()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def latents(*shape: int) -> Tensor:
    """Different in every row."""
    return torch.randn(ROWS, *shape, generator=torch.Generator().manual_seed(1))


def text(*shape: int, seed: int = 0) -> Tensor:
    """The same in every row."""
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(10 + seed)).expand(ROWS, *shape).contiguous()


def time(value: float = 0.5) -> Tensor:
    """One timestep a row; whole numbers too are floats, for int64 breaks Hunyuan."""
    return torch.full((ROWS,), float(value))


def grid(height: int, width: int, axes: int = 3) -> Tensor:
    """Position ids of an image, `[height * width, axes]`."""
    ids = torch.zeros(height, width, axes)
    ids[..., 1] += torch.arange(height)[:, None]
    ids[..., 2] += torch.arange(width)
    return ids.flatten(0, 1)


def flux(*, pooled: int = 0, guidance: float = 0, axes: int = 3) -> dict[str, Any]:
    call = {
        "hidden_states": latents(16, 4),
        "encoder_hidden_states": text(TEXT, 32),
        "timestep": time(),
        "img_ids": grid(4, 4, axes),
        "txt_ids": torch.zeros(TEXT, axes),
    }
    if pooled:
        call["pooled_projections"] = text(pooled)
    if guidance:
        call["guidance"] = time(guidance)
    return call


def image(channels: int, width: int, *, size: int = 8, timestep: float = 0.5, **more: Any) -> dict[str, Any]:
    """Latents in two dimensions and one text."""
    return {
        "hidden_states": latents(channels, size, size),
        "encoder_hidden_states": text(TEXT, width),
        "timestep": time(timestep),
    } | more


def video(channels: int, width: int, *, size: int = 8, **more: Any) -> dict[str, Any]:
    """Latents of one frame and one text."""
    return {
        "hidden_states": latents(channels, 1, size, size),
        "encoder_hidden_states": text(TEXT, width),
        "timestep": time(500),
    } | more


def cogview() -> dict[str, Any]:
    sizes = {"original_size": torch.full((ROWS, 2), 8.0), "target_size": torch.full((ROWS, 2), 8.0)}
    return image(4, 8, timestep=500, crop_coords=torch.zeros(ROWS, 2), **sizes)


def qwen(**more: Any) -> dict[str, Any]:
    return {
        "hidden_states": latents(16, 16),
        "encoder_hidden_states": text(TEXT, 16),
        "encoder_hidden_states_mask": None,
        "timestep": time(),
    } | more


def ideogram() -> dict[str, Any]:
    images = 4
    length = TEXT + images
    hidden, embeddings = torch.zeros(ROWS, length, 16), torch.zeros(ROWS, length, 24)
    hidden[:, TEXT:], embeddings[:, :TEXT] = latents(images, 16), text(TEXT, 24)
    return {
        "hidden_states": hidden,
        "timestep": time(),
        "encoder_hidden_states": embeddings,
        "position_ids": torch.arange(length)[None, :, None].expand(ROWS, length, 3),
        "segment_ids": torch.ones(ROWS, length, dtype=torch.long),
        "indicator": torch.tensor([3] * TEXT + [2] * images).repeat(ROWS, 1),
    }


def minimax() -> dict[str, Any]:
    videos, audios = 4, 3
    length = TEXT + videos + audios
    return {
        "hidden_states": latents(videos, 16),
        "audio_hidden_states": latents(audios, 6),
        "encoder_hidden_states": text(TEXT, 8),
        "timestep": torch.tensor([500.0]),
        "timestep_indices": torch.zeros(length, dtype=torch.long),
        "token_tags": torch.tensor([1] * TEXT + [0] * videos + [2] * audios),
        "position_ids": torch.arange(length)[:, None].repeat(1, 3),
        "text_indices": torch.arange(TEXT),
        "video_indices": torch.arange(TEXT, TEXT + videos),
        "audio_indices": torch.arange(TEXT + videos, length),
    }


def hunyuan_dit() -> dict[str, Any]:
    return image(
        4,
        8,
        timestep=500,
        text_embedding_mask=torch.ones(ROWS, TEXT),
        encoder_hidden_states_t5=text(TEXT, 8),
        text_embedding_mask_t5=torch.ones(ROWS, TEXT),
        image_meta_size=torch.ones(ROWS, 6),
        style=torch.zeros(ROWS, dtype=torch.long),
        image_rotary_emb=(torch.ones(1, 8), torch.zeros(1, 8)),
    )


def second_text() -> dict[str, Tensor]:
    return {
        "encoder_attention_mask": torch.ones(ROWS, TEXT),
        "encoder_hidden_states_2": text(3, 8),
        "encoder_attention_mask_2": torch.ones(ROWS, 3),
    }


def ltx(**more: Any) -> dict[str, Any]:
    return {
        "hidden_states": latents(16, 4),
        "encoder_hidden_states": text(TEXT, 16),
        "timestep": time(500),
        "encoder_attention_mask": torch.ones(ROWS, TEXT, dtype=torch.bool),
        "num_frames": 1,
        "height": 4,
        "width": 4,
    } | more


def kandinsky(**more: Any) -> dict[str, Any]:
    return {
        "hidden_states": latents(1, 8, 8, 4),
        "encoder_hidden_states": text(TEXT, 16),
        "timestep": time(500),
        "pooled_projections": text(8),
    } | more


def ones(*shape: int) -> Tensor:
    return torch.ones(ROWS, *shape, dtype=torch.bool)


JOINT: dict[str, Callable[[], dict[str, Any]]] = {
    "AuraFlowTransformer2DModel": lambda: image(4, 32),
    "BriaFibo2Transformer2DModel": lambda: image(4, 16, encoder_hidden_states=text(2, TEXT, 16)),
    "BriaFiboTransformer2DModel": lambda: flux() | {"text_encoder_layers": [text(TEXT, 16, seed=i) for i in range(4)]},
    "BriaTransformer2DModel": flux,
    "ChromaTransformer2DModel": flux,
    "CogVideoXTransformer3DModel": lambda: video(4, 8) | {"hidden_states": latents(1, 4, 8, 8)},
    "CogView3PlusTransformer2DModel": cogview,
    "CogView4Transformer2DModel": cogview,
    "EasyAnimateTransformer3DModel": lambda: video(4, 16),
    "ErnieImageTransformer2DModel": lambda: {
        "hidden_states": latents(16, 4, 4),
        "timestep": time(),
        "text_bth": text(TEXT, 16),
        "text_lens": torch.full((ROWS,), TEXT),
    },
    "Flux2Transformer2DModel": lambda: flux(guidance=1, axes=4),
    "Flux3Transformer2DModel": lambda: flux(axes=4),
    "FluxTransformer2DModel": lambda: flux(pooled=32, guidance=3.5),
    "GlmImageTransformer2DModel": lambda: image(
        4,
        32,
        timestep=500,
        prior_token_id=torch.ones(ROWS, 16, dtype=torch.long),
        prior_token_drop=~ones(16),
        target_size=torch.full((ROWS, 2), 8.0),
        crop_coords=torch.zeros(ROWS, 2),
    ),
    "HiDreamImageTransformer2DModel": lambda: {
        "hidden_states": latents(4, 8, 8),
        "timesteps": time(500),
        "encoder_hidden_states_t5": text(TEXT, 8),
        "encoder_hidden_states_llama3": torch.stack([text(3, 4, seed=i) for i in range(4)]),
        "pooled_embeds": text(8),
    },
    "HunyuanImageTransformer2DModel": lambda: image(4, 16, size=4, timestep=500) | second_text(),
    "HunyuanVideo15Transformer3DModel": lambda: (
        video(4, 16, size=4) | second_text() | {"image_embeds": torch.zeros(ROWS, 2, 12)}
    ),
    "HunyuanVideoTransformer3DModel": lambda: video(
        4, 16, size=4, pooled_projections=text(8), encoder_attention_mask=torch.ones(ROWS, TEXT), guidance=time(6000)
    ),
    "Ideogram4Transformer2DModel": ideogram,
    "JoyImageEditPlusTransformer3DModel": lambda: {
        "hidden_states": latents(2, 16, 1, 2, 2),
        "encoder_hidden_states": text(TEXT, 16),
        "timestep": time(),
        "shape_list": [[(1, 1, 1), (1, 1, 1)]] * ROWS,
    },
    "JoyImageEditTransformer3DModel": lambda: video(16, 16, size=4) | {"timestep": time()},
    "Krea2Transformer2DModel": lambda: {
        "hidden_states": latents(16, 4),
        "encoder_hidden_states": text(TEXT, 2, 16),
        "timestep": time(),
        "position_ids": torch.cat([torch.zeros(TEXT, 3), grid(4, 4)]),
        "encoder_attention_mask": None,
    },
    "LongCatImageTransformer2DModel": flux,
    "Lumina2Transformer2DModel": lambda: image(4, 32, encoder_attention_mask=ones(TEXT)),
    "MiniMaxH3Transformer3DModel": minimax,
    "MochiTransformer3DModel": lambda: video(4, 16, encoder_attention_mask=ones(TEXT)),
    "MotifVideoTransformer3DModel": lambda: video(9, 32, size=4),
    "OvisImageTransformer2DModel": flux,
    "QwenImageTransformer2DModel": lambda: qwen(img_shapes=[(1, 4, 4)] * ROWS),
    "SD3Transformer2DModel": lambda: image(4, 32, timestep=500, pooled_projections=text(64)),
    "ZImageTransformer2DModel": lambda: {
        "x": list(latents(16, 1, 16, 16)),
        "cap_feats": list(text(40, 16)),
        "t": time(),
    },
}

CROSSING: dict[str, Callable[[], dict[str, Any]]] = {
    "AllegroTransformer3DModel": lambda: video(
        4, 8, encoder_attention_mask=torch.ones(ROWS, 1, TEXT), image_rotary_emb=None
    ),
    "CosmosTransformer3DModel": lambda: video(4, 16, attention_mask=torch.ones(ROWS, TEXT), fps=30),
    "HunyuanDiT2DModel": hunyuan_dit,
    "Kandinsky5Transformer3DModel": lambda: kandinsky(
        visual_rope_pos=[torch.arange(1), torch.arange(4), torch.arange(4)], text_rope_pos=torch.arange(TEXT)
    ),
    "Kandinsky6Transformer3DModel": kandinsky,
    "LTX2VideoTransformer3DModel": lambda: ltx(
        audio_hidden_states=latents(9, 4), audio_encoder_hidden_states=text(TEXT, 16), audio_num_frames=9, fps=25.0
    ),
    "LTXVideoTransformer3DModel": ltx,
    "LuminaNextDiT2DModel": lambda: image(
        4,
        32,
        encoder_mask=torch.ones(ROWS, TEXT),
        image_rotary_emb=torch.randn(384, 384, 4, generator=torch.Generator().manual_seed(0)),
        cross_attention_kwargs={},
    ),
    "PixArtTransformer2DModel": lambda: image(
        4, 16, timestep=500, added_cond_kwargs={"aspect_ratio": None, "resolution": None}
    ),
    "SanaTransformer2DModel": lambda: image(4, 8, timestep=500),
    "SkyReelsV2Transformer3DModel": lambda: video(4, 16),
    "UNet2DConditionModel": lambda: {
        "sample": latents(4, 8, 8),
        "timestep": time(500),
        "encoder_hidden_states": text(TEXT, 8),
    },
    "WanTransformer3DModel": lambda: video(4, 16),
    "WanVACETransformer3DModel": lambda: video(4, 16, control_hidden_states=latents(8, 1, 8, 8)),
}

IMAGE_ONLY: dict[str, Callable[[], dict[str, Any]]] = {
    "NucleusMoEImageTransformer2DModel": lambda: qwen(img_shapes=[(1, 4, 4)] * ROWS),
    "PRXTransformer2DModel": lambda: image(4, 16),
    "QwenImage21Transformer2DModel": lambda: qwen(
        img_shapes=[[(1, 4, 4)]] * ROWS, img_mask=torch.tensor([[False] * TEXT + [True] * 4] * ROWS)
    ),
}

CALLS = JOINT | CROSSING | IMAGE_ONLY
