"""Train emoji-base: text encoders and transformer together, on latents of the artwork.

    python training/transformer.py --data data/emoji64.npz --autoencoder runs/autoencoder --out runs/base

Flow matching with logit-normal times; captions and pictures from the skewed distribution of captions.py, one in
ten unconditional. Kill it at any time: the same command goes on from the last checkpoint.

The padding trap: `StableDiffusion3Pipeline` appends `max_sequence_length` (default 256) T5 tokens to the prompt.
Here they are zeros, since there is no trained T5. Text tokens carry no position, so these stay equal to one another
through every layer, and K of them act as one whose attention logit is raised by log K. The training appends that one
token, with K = 256 for three pictures of ten and K = 1 for the others, so the model serves a plain `pipe(prompt)` as
well as the short form `max_sequence_length=1`, which is several times faster.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, SD3Transformer2DModel
from diffusers.models.attention_processor import JointAttnProcessor2_0
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from autoencoder import latents_of
from captions import Captions, drawings
from common import Batches, arguments, autocast, fit, prepare
from tokenizer import MAX_LENGTH, train_tokenizer

PADDING = 256  # zero tokens of a plain pipeline call


class TextToImage(nn.Module):
    """The trained parts of a `StableDiffusion3Pipeline`, wired as the pipeline wires them."""

    def __init__(self, tokenizer: CLIPTokenizer, width: int, layers: int) -> None:
        super().__init__()
        self.text_encoder = text_encoder(tokenizer, width - 64, 3)
        self.text_encoder_2 = text_encoder(tokenizer, 64, 2)
        self.transformer = SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=layers,
            attention_head_dim=32,
            num_attention_heads=width // 32,
            joint_attention_dim=width,
            caption_projection_dim=width,
            pooled_projection_dim=width,
            pos_embed_max_size=8,
            qk_norm="rms_norm",
        )

    def encode_prompt(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids `[B, 12]` to tokens `[B, 12, width]` and the pooled embedding `[B, width]`.

        Layer by layer, since a text encoder that is asked for its hidden states can't be compiled in one piece.
        """
        causal = torch.ones(MAX_LENGTH, MAX_LENGTH, dtype=torch.bool, device=ids.device).tril()
        tokens, pooled = [], []
        for encoder in (self.text_encoder, self.text_encoder_2):
            text, end = encoder.text_model, (ids == encoder.config.eos_token_id).int().argmax(dim=-1)
            x = text.embeddings(input_ids=ids)
            for layer in text.encoder.layers:
                before, x = x, layer(x, causal)
            last = text.final_layer_norm(x)
            tokens.append(before)
            pooled.append(encoder.text_projection(last[torch.arange(len(ids), device=ids.device), end]))
        return torch.cat(tokens, dim=-1), torch.cat(pooled, dim=-1)

    def forward(self, latents: Tensor, t: Tensor, ids: Tensor, padded: Tensor | None = None) -> Tensor:
        """Velocity of `[B, 16, 8, 8]` latents at times `[B]` in [0, 1]; `padded` ones `[B]` see 256 zero tokens."""
        tokens, pooled = self.encode_prompt(ids)
        return self.transformer(
            hidden_states=latents,
            timestep=1000 * t,
            encoder_hidden_states=F.pad(tokens, (0, 0, 0, 1)),
            pooled_projections=pooled,
            joint_attention_kwargs=copies(padded, PADDING, 16 + MAX_LENGTH),
            return_dict=False,
        )[0]


def text_encoder(tokenizer: CLIPTokenizer, width: int, layers: int) -> CLIPTextModelWithProjection:
    """A CLIP text encoder with randomly initialised weights."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config)


def load_weights(folder: Path, tokenizer: CLIPTokenizer) -> TextToImage:
    """The trained parts of a pipeline's folder."""
    loaded = SD3Transformer2DModel.from_pretrained(folder / "transformer")
    model = TextToImage(tokenizer, loaded.inner_dim, loaded.config.num_layers)
    load_parts(model, folder)
    return model


def load_parts(model: nn.Module, folder: Path, *names: str) -> None:
    """The weights of a pipeline's folder into these parts of a model; without names, into all that it has."""
    for name in names or dict(model.named_children()):
        part = model.get_submodule(name)
        part.load_state_dict(type(part).from_pretrained(folder / name).state_dict())


def copies(padded: Tensor | None, count: int, before: int, after: int = 0) -> dict[str, Tensor]:
    """What makes one token stand for `count` equal ones: a mask that raises its attention logit by their log.

    The token has `before` others before it and `after` behind it; `padded` says for which samples `[B]`.
    """
    if padded is None:
        return {}
    raised = math.log(count) * padded[:, None, None, None].float()
    return {"attention_mask": F.pad(raised, (before, after))}


class MaskedAttention(JointAttnProcessor2_0):
    """Joint attention that heeds its mask, `[B, 1, 1, image + text tokens]`."""

    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None):
        """As its base, which leaves the mask out."""
        length = hidden_states.shape[1]

        def heads(x):
            return x.unflatten(2, (attn.heads, -1)).transpose(1, 2)

        def joint(image, text, norm=lambda x: x, added_norm=lambda x: x):
            return torch.cat([norm(heads(image(hidden_states))), added_norm(heads(text(encoder_hidden_states)))], dim=2)

        q = joint(attn.to_q, attn.add_q_proj, attn.norm_q, attn.norm_added_q)
        k = joint(attn.to_k, attn.add_k_proj, attn.norm_k, attn.norm_added_k)
        v = joint(attn.to_v, attn.add_v_proj)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask).transpose(1, 2).flatten(2)
        image, text = out[:, :length], out[:, length:]
        if not attn.context_pre_only:
            text = attn.to_add_out(text)
        return attn.to_out[0](image), text


@torch.no_grad()
def guided(teacher: TextToImage, latents: Tensor, t: Tensor, ids: Tensor, empty: Tensor, w: Tensor) -> Tensor:
    """Velocity of a frozen model with guidance of scale `[B]`, in half the time by bfloat16 products."""
    both = torch.cat([ids, empty.expand(len(ids), -1)])
    torch.compiler.cudagraph_mark_step_begin()
    with torch.autocast(latents.device.type, torch.bfloat16):
        cond, uncond = teacher(latents.repeat(2, 1, 1, 1), t.repeat(2), both).float().chunk(2)
    return uncond + w[:, None, None, None] * (cond - uncond)


@torch.no_grad()
def encode_latents(vae: AutoencoderKL, pixels: Tensor, device: torch.device) -> Tensor:
    """uint8 `[N, 64, 64, 3]` to latents `[N, 16, 8, 8]`, scaled and shifted to zero mean and unit deviation."""
    latents = latents_of(vae.to(device), pixels.permute(0, 3, 1, 2))
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
    return (latents - vae.config.shift_factor) * vae.config.scaling_factor


def noised(latents: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Latents `[B, 16, 8, 8]` at logit-normal times, those times `[B]`, and the velocity from latents to noise."""
    noise = torch.randn(latents.shape, generator=generator, device=latents.device)
    t = torch.randn(len(latents), generator=generator, device=latents.device).sigmoid()
    return torch.lerp(latents, noise, t[:, None, None, None]), t, noise - latents


def main() -> None:
    """Train; kill it and go on at any time."""
    parser = arguments(__doc__, steps=36000, lr=1.2e-3)
    parser.add_argument("--autoencoder", type=Path, required=True, help="folder written by autoencoder.py")
    parser.add_argument("--width", type=int, default=160)
    parser.add_argument("--layers", type=int, default=6)
    args = parser.parse_args()

    prepare(args)
    data = np.load(args.data)
    items = drawings(data)
    captions = Captions(items)
    # Never trained anew for weights that exist: the trainer breaks ties at random, and ids would change their meaning.
    trained = [folder for folder in (args.out, args.init) if folder and (folder / "tokenizer").is_dir()]
    if trained:
        tokenizer = CLIPTokenizer.from_pretrained(trained[0] / "tokenizer")
        tokenizer.save_pretrained(args.out / "tokenizer")
    else:
        tokenizer = train_tokenizer(captions.texts(), args.out / "tokenizer")
    vae = AutoencoderKL.from_pretrained(args.autoencoder).eval()
    latents = encode_latents(vae, torch.from_numpy(data["images"])[[item.row for item in items]], args.device)
    vae.save_pretrained(args.out / "vae")
    (args.out / "frequencies.json").write_text(
        json.dumps({"emoji": captions.emoji, "styles": captions.styles}, indent=1)
    )

    model = load_weights(args.init, tokenizer) if args.init else TextToImage(tokenizer, args.width, args.layers)
    model.transformer.set_attn_processor(MaskedAttention())
    model.to(args.device)
    ema = copy.deepcopy(model).requires_grad_(False)
    if args.compile:
        model.compile(mode=args.compile)

    def loss_of(generator: torch.Generator, batch: Sequence[Tensor]) -> Tensor:
        rows, padded, ids = batch
        noisy, t, velocity = noised(latents[rows], generator)
        with autocast(args.device):
            predicted = model(noisy, t, ids, padded)
        return F.mse_loss(predicted.float(), velocity)

    fit(args, Batches(captions, args.batch, args.seed, (tokenizer, MAX_LENGTH)), model, ema, loss_of, decay=0.35)


if __name__ == "__main__":
    main()
