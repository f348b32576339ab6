"""Train emoji-base: text encoders and transformer together, on latents of the artwork.

    python training/transformer.py --data data/emoji64.npz --autoencoder runs/autoencoder --out runs/base

Flow matching with logit-normal times; captions and pictures from the skewed distribution of captions.py, one in
ten unconditional. Kill it at any time: the same command goes on from the last checkpoint.

The padding trap: `StableDiffusion3Pipeline` appends `max_sequence_length` (default 256) T5 tokens to the prompt.
Here they are zeros, since there is no trained T5. Text tokens carry no position, so these stay equal to one another
through every layer, and K of them act as one whose attention logit is raised by log K. The training appends that one
token, with K = 256 in three steps of ten and K = 1 in the others, so the model serves a plain `pipe(prompt)` as well
as the short form `max_sequence_length=1`, which is several times faster.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from captions import Captions, drawings
from common import Progress, atomic_save, load_state
from tokenizer import MAX_LENGTH, ids_of, train_tokenizer

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

    def encode_prompt(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids `[B, 12]` to tokens `[B, 12, width]` and the pooled embedding `[B, width]`."""
        outputs = [e(ids, output_hidden_states=True) for e in (self.text_encoder, self.text_encoder_2)]
        tokens = torch.cat([o.hidden_states[-2] for o in outputs], dim=-1)
        return tokens, torch.cat([o.text_embeds for o in outputs], dim=-1)

    def forward(self, latents: torch.Tensor, t: torch.Tensor, ids: torch.Tensor, padding: int = 1) -> torch.Tensor:
        """Velocity of `[B, 16, 8, 8]` latents at times `[B]` in [0, 1]."""
        unique, inverse = ids.unique(dim=0, return_inverse=True)
        tokens, pooled = (x[inverse] for x in self.encode_prompt(unique))
        tokens = F.pad(tokens, (0, 0, 0, 1))
        PaddedAttention.log_copies = math.log(padding)
        return self.transformer(
            hidden_states=latents,
            timestep=1000 * t,
            encoder_hidden_states=tokens,
            pooled_projections=pooled,
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


def load_parts(model: nn.Module, folder: Path) -> None:
    """The weights of a pipeline's folder into the parts of a model that have its names."""
    for name, part in model.named_children():
        part.load_state_dict(type(part).from_pretrained(folder / name).state_dict())


class PaddedAttention:
    """Joint attention in which the last text token stands for many equal ones."""

    log_copies = 0.0

    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None):
        """As `JointAttnProcessor2_0`, with the logits of the last token raised by `log_copies`."""
        length = hidden_states.shape[1]

        def heads(x):
            return x.unflatten(2, (attn.heads, -1)).transpose(1, 2)

        q = torch.cat(
            [
                attn.norm_q(heads(attn.to_q(hidden_states))),
                attn.norm_added_q(heads(attn.add_q_proj(encoder_hidden_states))),
            ],
            dim=2,
        )
        k = torch.cat(
            [
                attn.norm_k(heads(attn.to_k(hidden_states))),
                attn.norm_added_k(heads(attn.add_k_proj(encoder_hidden_states))),
            ],
            dim=2,
        )
        v = torch.cat([heads(attn.to_v(hidden_states)), heads(attn.add_v_proj(encoder_hidden_states))], dim=2)
        mask = None
        if self.log_copies:
            mask = torch.zeros(1, 1, 1, k.shape[2])
            mask[..., -1] = self.log_copies
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        image, text = out[:, :length], out[:, length:]
        if not attn.context_pre_only:
            text = attn.to_add_out(text)
        return attn.to_out[0](image), text


@torch.no_grad()
def guided(
    teacher: TextToImage,
    latents: torch.Tensor,
    t: torch.Tensor,
    ids: torch.Tensor,
    empty: torch.Tensor,
    w: torch.Tensor,
) -> torch.Tensor:
    """Velocity of a frozen model with guidance of scale `[B]`, in half the time by bfloat16 products."""
    PaddedAttention.log_copies = 0.0
    both = torch.cat([ids, empty.expand(len(ids), -1)])
    with torch.autocast("cpu", torch.bfloat16):
        cond, uncond = teacher(latents.repeat(2, 1, 1, 1), t.repeat(2), both).float().chunk(2)
    return uncond + w[:, None, None, None] * (cond - uncond)


@torch.no_grad()
def encode_latents(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """uint8 `[N, 64, 64, 3]` to latents `[N, 16, 8, 8]`, scaled and shifted to zero mean and unit deviation."""
    chunks = [vae.encode(x.permute(0, 3, 1, 2).float() / 127.5 - 1).latent_dist.mode() for x in pixels.split(64)]
    latents = torch.cat(chunks)
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
    return (latents - vae.config.shift_factor) * vae.config.scaling_factor


def learning_rate(step: int, steps: int, decay: float = 0.35, warmup: int = 150) -> float:
    """Warm up, hold, and come down linearly over the last part: the end can be moved while it holds."""
    return min(1.0, (step + 1) / warmup, max(0.01, (steps - step) / (decay * steps)))


def main() -> None:
    """Train, report a line every 100 steps, save a checkpoint every 200."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="npz written by dataset.py")
    parser.add_argument("--autoencoder", type=Path, required=True, help="folder written by autoencoder.py")
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints and the log")
    parser.add_argument("--steps", type=int, default=36000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1.2e-3)
    parser.add_argument("--width", type=int, default=160)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--init", type=Path, help="start from the weights of this pipeline, e.g. the bundled one")
    parser.add_argument("--compile", action="store_true", help="a third faster, after minutes of compiling")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
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
    latents = encode_latents(vae, torch.from_numpy(data["images"])[[item.row for item in items]])
    vae.save_pretrained(args.out / "vae")
    (args.out / "frequencies.json").write_text(
        json.dumps({"emoji": captions.emoji, "styles": captions.styles}, indent=1)
    )

    model = load_weights(args.init, tokenizer) if args.init else TextToImage(tokenizer, args.width, args.layers)
    model.transformer.set_attn_processor(PaddedAttention())
    ema = copy.deepcopy(model).requires_grad_(False)
    if args.compile:
        model.transformer.compile()
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    parts = {"model": model, "ema": ema, "optimizer": optimizer}
    step = load_state(args.out / "checkpoint.pt", **parts)
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {len(items)} drawings",
        flush=True,
    )

    progress = Progress(args.steps, step, args.batch, args.out / "loss.csv")
    while step < args.steps:
        rng = random.Random(f"{args.seed} {step}")
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        texts, rows = zip(*(captions.draw(rng) for _ in range(args.batch)), strict=True)
        ids = ids_of(tokenizer, texts)
        image = latents[list(rows)]
        noise = torch.randn(image.shape, generator=generator)
        t = torch.randn(args.batch, generator=generator).sigmoid()
        noisy = torch.lerp(image, noise, t[:, None, None, None])
        loss = F.mse_loss(model(noisy, t, ids, PADDING if rng.random() < 0.3 else 1), noise - image)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * learning_rate(step, args.steps)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        decay = min(0.999, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
        progress.update(step, loss=loss)
        if step % 200 == 0 or step == args.steps:
            atomic_save(args.out / "checkpoint.pt", step, **parts)


if __name__ == "__main__":
    main()
