"""Tiny but complete pipelines of the real classes, built from configs: no download, milliseconds a step."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from variegate import Request, TokenIntervention, attach, generate

LETTERS = "abcdefghijklmnopqrstuvwxyz"
CLIP_LENGTH = 24  # letters of a prompt that the CLIP encoders take, plus 2
SAMPLE_SIZE = 8  # latent pixels; an image has twice as many
CHANNELS = 4
WIDTH = 16
TEXT = 32
STEPS = 3  # of a run


@dataclass(frozen=True, kw_only=True)
class Recorder(TokenIntervention):
    """Keeps what it is given; changes nothing."""

    seen: list[torch.Tensor] = field(default_factory=list, compare=False)
    observes: ClassVar[bool] = True

    def edit(self, tokens):
        self.seen.append(tokens.clone())
        return tokens


def generators(seeds: Iterable[int]) -> list[torch.Generator]:
    """One for each image."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def run(
    pipe: Any,
    prompt: str | Sequence[str] = "a cat",
    n: int = 4,
    seed: int = 0,
    *,
    num_inference_steps: int = STEPS,
    max_sequence_length: int = 16,
    **call: Any,
) -> torch.Tensor:
    """Final latents of n images of each prompt, from `seed` and those that follow, or from `latents`."""
    images = n if isinstance(prompt, str) else n * len(prompt)
    start = {} if "latents" in call else {"generator": generators(range(seed, seed + images))}
    return pipe(
        prompt,
        num_images_per_prompt=n,
        num_inference_steps=num_inference_steps,
        max_sequence_length=max_sequence_length,
        output_type="latent",
        **start,
        **call,
    ).images


def tiny_sd3(seed: int = 0) -> StableDiffusion3Pipeline:
    """A `StableDiffusion3Pipeline` of 16 x 16 pixels with both CLIP encoders and T5."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer = SD3Transformer2DModel(
            sample_size=SAMPLE_SIZE,
            patch_size=2,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            num_layers=4,
            attention_head_dim=WIDTH,
            num_attention_heads=2,
            joint_attention_dim=TEXT,
            caption_projection_dim=2 * WIDTH,
            pooled_projection_dim=TEXT,
            pos_embed_max_size=16,
            qk_norm="rms_norm",
        )
        tokenizer = _clip_tokenizer()
        pipe = StableDiffusion3Pipeline(
            transformer=_alive(transformer),
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=_autoencoder(),
            text_encoder=CLIPTextModelWithProjection(_clip_config(tokenizer)).eval(),
            tokenizer=tokenizer,
            text_encoder_2=CLIPTextModelWithProjection(_clip_config(tokenizer)).eval(),
            tokenizer_2=tokenizer,
            text_encoder_3=_t5(),
            tokenizer_3=_t5_tokenizer(),
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_flux(seed: int = 0) -> FluxPipeline:
    """A guidance-distilled `FluxPipeline` of 16 x 16 pixels with dual- and single-stream blocks."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer = FluxTransformer2DModel(
            in_channels=4 * CHANNELS,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=WIDTH,
            num_attention_heads=2,
            joint_attention_dim=TEXT,
            pooled_projection_dim=TEXT // 2,
            guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
        )
        tokenizer = _clip_tokenizer()
        pipe = FluxPipeline(
            transformer=_alive(transformer),
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=_autoencoder(),
            text_encoder=CLIPTextModel(_clip_config(tokenizer)).eval(),
            tokenizer=tokenizer,
            text_encoder_2=_t5(),
            tokenizer_2=_t5_tokenizer(),
        )
    pipe.default_sample_size = SAMPLE_SIZE  # its class says 128; a reloaded folder needs height and width
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _alive(module: nn.Module) -> nn.Module:
    """Noise in place of zero weights, and stronger modulation, so that text and time matter."""
    for name, parameter in module.named_parameters():
        if not parameter.any() or ("norm1" in name and "linear.weight" in name):
            nn.init.normal_(parameter, std=0.2)
    return module.eval()


def _autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=CHANNELS,
        norm_num_groups=4,
        layers_per_block=1,
        scaling_factor=1.0,
        shift_factor=0.0,
    ).eval()


def _clip_tokenizer() -> CLIPTokenizer:
    """One token a letter."""
    tokens = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=CLIP_LENGTH)


def _clip_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT // 2,
        intermediate_size=TEXT,
        projection_dim=TEXT // 2,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CLIP_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=1.0,
    )


def _t5_tokenizer() -> T5Tokenizer:
    tokens = ["<pad>", "</s>", "<unk>", "▁", *LETTERS]
    return T5Tokenizer(vocab=[(token, 0.0) for token in tokens], extra_ids=0, model_max_length=512)


def _t5() -> T5EncoderModel:
    config = T5Config(vocab_size=30, d_model=TEXT, d_kv=8, d_ff=TEXT, num_layers=1, num_heads=2)
    return T5EncoderModel(config).eval()


def through_a_request(name, intervention, seed=0):
    """The stock row and the changed one of a request that says what an intervention is."""
    parameters = {option.name: getattr(intervention, option.name) for option in dataclasses.fields(intervention)}
    options = {"n": 2, "seed": seed, "steps": 3, "height": 16, "width": 16}
    request = Request(("a cat",), model="tiny", method=name, parameters=parameters, **options)
    stock, changed = generate(request, pipeline=tiny_sd3()).groups[0].rows
    assert changed.method == name
    return stock.images, changed.images


def one_and_two(pipe, intervention, **options) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Number, stock latents and changed ones of a single image, then of two; nothing is said of the single one."""
    for n in (1, 2):
        stock = run(pipe, n=n, **options)
        with attach(pipe, intervention), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            changed = run(pipe, n=n, **options)
        yield n, stock, changed
