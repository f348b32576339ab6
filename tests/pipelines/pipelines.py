"""Whole pipelines of the real classes around the tiny denoisers: two prompts of two images each, latents out.

Most get embeddings in place of text encoders, which they could not tell apart; nothing is downloaded.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from denoisers import TEXT, tiny
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from tiny import generators, tiny_flux, tiny_sd3
from variegate.attachment import DENOISERS

PROMPTS, IMAGES, STEPS = 2, 2, 3
STRINGS, NEGATIVES = ["a cat", "a red dog"], ["blurry"] * PROMPTS
# Editing runs the last steps only, 3 of 5 here.
PICTURES = {"image": torch.rand(PROMPTS, 3, 16, 16), "num_inference_steps": 5, "strength": 0.6}
PERTURBED = {"pag_applied_layers": ["blocks.0"]}


@dataclass
class Pipeline:
    """A pipeline, its arguments, the texts of the prompts as its denoiser is to see them, and where to repel."""

    pipe: DiffusionPipeline
    call: dict[str, Any]
    texts: Sequence[Tensor]
    site: str = "context"

    def __call__(self, seed: int | Sequence[int] = 0, **changes: Any) -> Any:
        """Final latents; from one seed, or one for each image."""
        call = {"num_inference_steps": STEPS, "output_type": "latent", "return_dict": False} | self.call | changes
        generator = generators([seed])[0] if isinstance(seed, int) else generators(seed)
        return self.pipe(generator=generator, **call)[0]

    def denoisers(self) -> list[torch.nn.Module]:
        """Its denoisers."""
        found = [getattr(self.pipe, name, None) for name in DENOISERS]
        return [module for module in found if module is not None]


def embeds(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    """Embeddings that differ between prompts, and one negative embedding for all of them."""
    generator = torch.Generator().manual_seed(5)
    found = {}
    for name, shape in shapes.items():
        found[name] = torch.randn(PROMPTS, *shape, generator=generator)
        found[f"negative_{name}"] = torch.randn(1, *shape, generator=generator).repeat(PROMPTS, *[1] * len(shape))
    return found


def mask(name: str, dtype: torch.dtype = torch.long, length: int = TEXT) -> dict[str, Tensor]:
    """Masks without padding."""
    return {prefix + name: torch.ones(PROMPTS, length, dtype=dtype) for prefix in ("", "negative_")}


def lists(**shapes: tuple[int, ...]) -> dict[str, list[Tensor]]:
    """Embeddings as a list of rows."""
    return {name: list(rows) for name, rows in embeds(**shapes).items()}


def size(pixels: int, **more: Any) -> dict[str, Any]:
    """Of square images."""
    return {"height": pixels, "width": pixels} | more


def build(
    name: str,
    denoiser: str,
    call: dict[str, Any],
    *,
    text: str = "prompt_embeds",
    site: str = "context",
    expand: bool = False,
    changes: dict[str, Any] | None = None,
    **parts: Any,
) -> Pipeline:
    """A pipeline without encoders.

    Args:
        name: of the pipeline class.
        denoiser: of the denoiser class.
        call: arguments, with the embeddings.
        text: the argument whose rows the denoiser gets as its text.
        site: where to repel.
        expand: hand over a row per image, where the pipeline does not repeat given embeddings for several images.
        changes: to the denoiser's configuration.
        parts: components.
    """
    cls = getattr(diffusers, name)
    needed = inspect.signature(cls.__init__).parameters.items()
    missing = {key: None for key, value in needed if key != "self" and value.default is inspect.Parameter.empty}
    own = {"transformer": tiny(denoiser, **changes or {}), "scheduler": FlowMatchEulerDiscreteScheduler()}
    pipe = cls(**missing | own | parts)
    pipe.set_progress_bar_config(disable=True)
    texts = call[text]
    if expand:
        call = {key: value.repeat_interleave(IMAGES, 0) if isinstance(value, Tensor) else value
                for key, value in call.items()}  # fmt: skip
    else:
        kind = "images" if "num_images_per_prompt" in inspect.signature(cls.__call__).parameters else "videos"
        call = call | {f"num_{kind}_per_prompt": IMAGES}
    return Pipeline(pipe, call, texts, site)


def strings(pipe: DiffusionPipeline, texts: Sequence[Tensor], site: str = "context", **call: Any) -> Pipeline:
    """A complete pipeline, from strings."""
    pipe.set_progress_bar_config(disable=True)
    return Pipeline(pipe, {"prompt": STRINGS, "num_images_per_prompt": IMAGES} | call, texts, site)


def flux(cls: str = "FluxPipeline", **call: Any) -> Pipeline:
    """From strings; its own guidance is distilled, true guidance is a second call."""
    pipe = tiny_flux()
    texts = pipe.encode_prompt(STRINGS, None, max_sequence_length=16)[0]
    if cls != "FluxPipeline":
        pipe = getattr(diffusers, cls)(**pipe.components)
    return strings(pipe, texts, max_sequence_length=16, **{"true_cfg_scale": 2.0, "negative_prompt": NEGATIVES} | call)


def sd3(cls: str = "StableDiffusion3Pipeline", scheduler: Any = None, **call: Any) -> Pipeline:
    """From strings; guidance in one batch."""
    pipe = tiny_sd3()
    pipe.register_modules(scheduler=scheduler or pipe.scheduler)
    texts = pipe.encode_prompt(STRINGS, None, None, max_sequence_length=16)[0]
    if cls != "StableDiffusion3Pipeline":
        wanted = inspect.signature(getattr(diffusers, cls).__init__).parameters
        parts = {name: part for name, part in pipe.components.items() if name in wanted}
        pipe = getattr(diffusers, cls)(**parts, **PERTURBED if "PAG" in cls else {})
    return strings(pipe, texts, max_sequence_length=16, **{"guidance_scale": 4.0, "negative_prompt": NEGATIVES} | call)


def stable_diffusion(**call: Any) -> Pipeline:
    """Stable Diffusion 1.5, with its own scheduler, which has no `step_index` and takes one timestep twice."""
    parts = tiny_flux()
    pipe = diffusers.StableDiffusionPipeline(
        vae=parts.vae,
        text_encoder=parts.text_encoder,
        tokenizer=parts.tokenizer,
        unet=tiny("UNet2DConditionModel", cross_attention_dim=16),
        scheduler=diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    texts = pipe.encode_prompt(STRINGS, "cpu", 1, False)[0]
    return strings(pipe, texts, "cross_attention", negative_prompt=NEGATIVES, **call)


def stable_diffusion_xl() -> Pipeline:
    """Stable Diffusion XL."""
    first, second = tiny_flux(), tiny_sd3()
    pipe = diffusers.StableDiffusionXLPipeline(
        vae=first.vae,
        text_encoder=first.text_encoder,
        text_encoder_2=second.text_encoder_2,
        tokenizer=first.tokenizer,
        tokenizer_2=second.tokenizer_2,
        unet=tiny(
            "UNet2DConditionModel",
            cross_attention_dim=32,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 16,
        ),
        scheduler=diffusers.EulerDiscreteScheduler(),
        add_watermarker=False,
    )
    texts = pipe.encode_prompt(STRINGS, device="cpu", do_classifier_free_guidance=False)[0]
    return strings(pipe, texts, "cross_attention", negative_prompt=NEGATIVES)


def z_image(**call: Any) -> Pipeline:
    """Guidance in one batch, the prompt first, and lists of rows."""
    texts = lists(prompt_embeds=(40, 16))
    return build("ZImagePipeline", "ZImageTransformer2DModel", texts | size(64, guidance_scale=3.0) | call)


def lumina2(**call: Any) -> Pipeline:
    """Guidance in two calls, that of the negative prompt only in part of the run."""
    texts = embeds(prompt_embeds=(TEXT, 32)) | mask("prompt_attention_mask", torch.bool)
    call = texts | size(64, guidance_scale=3.0) | call
    return build("Lumina2Pipeline", "Lumina2Transformer2DModel", call, expand=True)


def hidream() -> Pipeline:
    """Several texts, one of them with its layers first."""
    llama = [embeds(prompt_embeds=(3, 4)) for _ in range(4)]
    layers = {key: torch.stack([layer[key] for layer in llama]) for key in llama[0]}
    texts = embeds(prompt_embeds_t5=(TEXT, 8), pooled_prompt_embeds=(8,))
    texts |= {f"{key}_llama3": value for key, value in layers.items()}
    made = build("HiDreamImagePipeline", "HiDreamImageTransformer2DModel", texts | size(64), text="prompt_embeds_t5")
    made.pipe.default_sample_size = 8  # it scales every image up to that of its class
    return made


def hunyuan_image(cls: str = "ClassifierFreeGuidance", **config: Any) -> Pipeline:
    """A guider decides which branches run, and in which steps."""
    texts = embeds(prompt_embeds=(TEXT, 16), prompt_embeds_2=(3, 8))
    texts |= mask("prompt_embeds_mask") | mask("prompt_embeds_mask_2", length=3)
    guiders = {name: getattr(diffusers, cls)(guidance_scale=3.0, **config) for name in ("guider", "ocr_guider")}
    return build("HunyuanImagePipeline", "HunyuanImageTransformer2DModel", texts | size(128), **guiders)


def pixart(cls: str = "PixArtSigmaPipeline", **call: Any) -> Pipeline:
    """No attribute tells whether it guides."""
    texts = embeds(prompt_embeds=(TEXT, 16)) | mask("prompt_attention_mask") | {"negative_prompt": None}
    call = texts | size(64, use_resolution_binning=False) | call
    parts = {"scheduler": diffusers.DPMSolverMultistepScheduler()} | (PERTURBED if "PAG" in cls else {})
    return build(cls, "PixArtTransformer2DModel", call, site="cross_attention", **parts)


def wan(**parts: Any) -> Pipeline:
    """Wan 2.1, or with a second denoiser for the later steps Wan 2.2."""
    call = embeds(prompt_embeds=(TEXT, 16)) | size(32, num_frames=1)
    return build("WanPipeline", "WanTransformer3DModel", call, site="cross_attention", expand=True, **parts)


def ideogram() -> Pipeline:
    """The branch without text is a denoiser of its own. It takes no embeddings, so they are put in for its encoder."""
    features = embeds(features=(TEXT, 24))["features"]
    made = build(
        "Ideogram4Pipeline",
        "Ideogram4Transformer2DModel",
        size(64, prompt=STRINGS, max_sequence_length=TEXT, guidance_scale=3.0, guidance_schedule=None)
        | {"features": features},
        text="features",
        site="image",
        unconditional_transformer=tiny("Ideogram4Transformer2DModel"),
    )
    del made.call["features"]
    pipe = made.pipe
    images = (64 // (pipe.vae_scale_factor * pipe.patch_size)) ** 2
    packed = torch.cat([features, torch.zeros(PROMPTS, images, 24)], 1)

    def encode_prompt(prompt: Any, grid_h: int, grid_w: int, max_sequence_length: int, device: Any) -> tuple[Any, ...]:
        return packed, *pipe._prepare_ids([TEXT] * PROMPTS, grid_h, grid_w, max_sequence_length, device)

    pipe.encode_prompt = encode_prompt
    made.texts = packed
    return made


def longcat() -> Pipeline:
    """It takes embeddings only together with strings, and refuses both at once, so they are put in for its encoder."""
    texts = embeds(prompt_embeds=(TEXT, 32))
    call = size(32, prompt=STRINGS, negative_prompt=NEGATIVES, guidance_scale=3.0, enable_prompt_rewrite=False)
    made = build("LongCatImagePipeline", "LongCatImageTransformer2DModel", call | texts, changes={"in_channels": 64})
    made.call = {key: value for key, value in made.call.items() if key not in texts}
    made.pipe._encode_prompt = lambda prompt: texts[f"{'negative_' if prompt == NEGATIVES else ''}prompt_embeds"]
    return made


def vae(levels: int, cls: type = diffusers.AutoencoderKL, **config: Any) -> Any:
    """For pipelines that read its configuration."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    return cls(block_out_channels=(4,) * levels, norm_num_groups=1, latent_channels=1, **blocks, **config)


def plain(name: str, denoiser: str, width: int, call: dict[str, Any], **kwargs: Any) -> Callable[[], Pipeline]:
    """A pipeline with one text."""
    return lambda: build(name, denoiser, embeds(prompt_embeds=(TEXT, width)) | call, **kwargs)


PIPELINES: dict[str, Callable[[], Pipeline]] = {
    "AuraFlow": plain("AuraFlowPipeline", "AuraFlowTransformer2DModel", 32, size(64) | mask("prompt_attention_mask")),
    "Bria": lambda: build(
        "BriaPipeline",
        "BriaTransformer2DModel",
        embeds(prompt_embeds=(TEXT, 32)) | size(32),
        expand=True,
        vae=vae(4, shift_factor=0.0),
    ),
    "Chroma": plain(
        "ChromaPipeline",
        "ChromaTransformer2DModel",
        32,
        size(32, guidance_scale=3.0) | mask("prompt_attention_mask", torch.bool),
        expand=True,
    ),
    "CogVideoX": plain(
        "CogVideoXPipeline",
        "CogVideoXTransformer3DModel",
        8,
        size(64, num_frames=1),
        expand=True,
        scheduler=diffusers.CogVideoXDDIMScheduler(),
    ),
    "CogView3Plus": plain(
        "CogView3PlusPipeline",
        "CogView3PlusTransformer2DModel",
        8,
        size(64),
        expand=True,
        scheduler=diffusers.CogVideoXDDIMScheduler(),
    ),
    "CogView4": plain("CogView4Pipeline", "CogView4Transformer2DModel", 8, size(64), expand=True),
    "Ernie": lambda: build(
        "ErnieImagePipeline", "ErnieImageTransformer2DModel", lists(prompt_embeds=(TEXT, 16)) | size(64)
    ),
    "Flux": flux,
    "Flux img2img": lambda: flux("FluxImg2ImgPipeline", **PICTURES, **size(16)),
    "Flux2": lambda: build(
        "Flux2Pipeline",
        "Flux2Transformer2DModel",
        {"prompt_embeds": embeds(prompt_embeds=(TEXT, 32))["prompt_embeds"]} | size(32),
    ),
    "Flux2Klein": lambda: build(
        "Flux2KleinPipeline",
        "Flux2Transformer2DModel",
        embeds(prompt_embeds=(TEXT, 32)) | size(32, guidance_scale=3.0),
        vae=vae(1, diffusers.AutoencoderKLFlux2),
    ),
    "HiDream": hidream,
    "HunyuanImage": hunyuan_image,
    "HunyuanImage SLG": lambda: hunyuan_image(
        "SkipLayerGuidance",
        skip_layer_config=diffusers.LayerSkipConfig(indices=[1], fqn="transformer_blocks"),
        skip_layer_guidance_stop=1.0,
    ),
    "HunyuanVideo": lambda: build(
        "HunyuanVideoPipeline",
        "HunyuanVideoTransformer3DModel",
        embeds(prompt_embeds=(TEXT, 16), pooled_prompt_embeds=(8,))
        | mask("prompt_attention_mask")
        | size(32, num_frames=1, true_cfg_scale=3.0),
        expand=True,
    ),
    "Ideogram4": ideogram,
    "Krea2": lambda: build(
        "Krea2Pipeline",
        "Krea2Transformer2DModel",
        embeds(prompt_embeds=(TEXT, 2, 16)) | mask("prompt_embeds_mask", torch.bool) | size(64),
        changes={"in_channels": 16},
    ),
    "LTX": plain(
        "LTXPipeline",
        "LTXVideoTransformer3DModel",
        16,
        size(64, num_frames=1) | mask("prompt_attention_mask"),
        site="cross_attention",
        expand=True,
    ),
    "LongCat": longcat,
    "Lumina2": lambda: lumina2(cfg_trunc_ratio=0.7),
    "LuminaNext": plain(
        "LuminaPipeline",
        "LuminaNextDiT2DModel",
        32,
        size(64) | mask("prompt_attention_mask"),
        site="cross_attention",
        expand=True,
        changes={"learn_sigma": True},
    ),
    "Mochi": plain(
        "MochiPipeline",
        "MochiTransformer3DModel",
        16,
        size(64, num_frames=1) | mask("prompt_attention_mask", torch.bool),
        expand=True,
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
    ),
    "NucleusMoE": plain(
        "NucleusMoEImagePipeline",
        "NucleusMoEImageTransformer2DModel",
        16,
        size(64) | mask("prompt_embeds_mask"),
        site="image",
    ),
    "Ovis": plain(
        "OvisImagePipeline",
        "OvisImageTransformer2DModel",
        32,
        size(32, guidance_scale=3.0, negative_prompt=None),
    ),
    # With guidance it breaks on more than one image.
    "PRX": plain(
        "PRXPipeline",
        "PRXTransformer2DModel",
        16,
        size(64, use_resolution_binning=False, guidance_scale=1.0) | mask("prompt_attention_mask", torch.bool),
        site="image",
    ),
    "PixArt": pixart,
    "PixArt PAG": lambda: pixart("PixArtSigmaPAGPipeline", pag_scale=2.0),
    "PixArt PAG alone": lambda: pixart("PixArtSigmaPAGPipeline", pag_scale=2.0, guidance_scale=1.0),
    "QwenImage": plain(
        "QwenImagePipeline",
        "QwenImageTransformer2DModel",
        16,
        size(64, true_cfg_scale=3.0) | mask("prompt_embeds_mask"),
    ),
    "SD 1.5": stable_diffusion,
    "SD3": sd3,
    "SD3 Heun": lambda: sd3(scheduler=diffusers.FlowMatchHeunDiscreteScheduler()),
    "SD3 PAG": lambda: sd3("StableDiffusion3PAGPipeline", pag_scale=2.0),
    "SD3 SLG": lambda: sd3(skip_guidance_layers=[1], skip_layer_guidance_stop=1.0),
    "SD3 img2img": lambda: sd3("StableDiffusion3Img2ImgPipeline", **PICTURES),
    "SD3 img2img Heun": lambda: sd3(
        "StableDiffusion3Img2ImgPipeline", scheduler=diffusers.FlowMatchHeunDiscreteScheduler(), **PICTURES
    ),
    "SDXL": stable_diffusion_xl,
    "Sana": plain(
        "SanaPipeline",
        "SanaTransformer2DModel",
        8,
        size(256, use_resolution_binning=False, negative_prompt=None) | mask("prompt_attention_mask"),
        site="cross_attention",
    ),
    "Wan 2.1": wan,
    "Wan 2.2": lambda: wan(transformer_2=tiny("WanTransformer3DModel"), boundary_ratio=0.7),
    "Z-Image": z_image,
    "Z-Image truncated": lambda: z_image(cfg_truncation=0.5),
}
