"""Distil emoji-dev: a Flux-class transformer, one pass per step, that goes where emoji-base goes with guidance.

    python training/dev.py --data data/emoji64.npz --out runs/dev

Guidance distillation (arXiv 2210.03142, first stage): at noised drawings, the student learns the teacher's guided
velocity u + w (c - u) for scales w drawn from [1, 6], and is told w by its `guidance_embeds`. Targets are functions of
the input, without the noise of a data set, so it learns from far fewer pictures than the teacher did.

The teacher is emoji-base itself: both have the same autoencoder and captions. The student starts with its weights where
the two classes agree: dual-stream blocks are those of SD3, single-stream ones take the image's half of the next
blocks, and the rest of them start as the identity. Positions are new: Flux turns queries and keys, SD3 adds a table.

The text encoder that stands where Flux has T5-XXL reads four tokens back, never ahead, and padding is an embedding of
zero that is not trained. So padding tokens are zeros from the fourth on, however many there are: 512 of them, as a
plain `pipe(prompt)` has, act on attention as one whose logit is raised by log of their number. Three steps of ten
train that form, the others the short one of `max_sequence_length=16`.
"""

from __future__ import annotations

import argparse
import copy
import math
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from tokenizers import Tokenizer, processors
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from captions import Captions, drawings
from common import Progress, atomic_save, load_state
from tokenizer import EOS, MAX_LENGTH, ids_of
from transformer import PaddedAttention, TextToImage, encode_latents, guided, learning_rate, load_parts, load_weights

LENGTH = 16  # text tokens of the short form
LONG = 512  # those of a plain pipeline call
REACH = 4  # tokens that a token of the text encoder sees: itself and three before it
PAD = "<pad>"


class GuidanceDistilled(nn.Module):
    """The trained parts of a `FluxPipeline`, wired as the pipeline wires them."""

    def __init__(self, clip: CLIPTextConfig, vocabulary: int, width: int = 160, dual: int = 4, single: int = 4) -> None:
        super().__init__()
        self.text_encoder = CLIPTextModel(clip)
        self.text_encoder_2 = T5EncoderModel(
            T5Config(
                vocab_size=vocabulary,
                d_model=width,
                d_kv=32,
                d_ff=4 * width,
                num_layers=1,
                num_heads=width // 32,
                relative_attention_num_buckets=4 * REACH,
                dropout_rate=0.0,
                pad_token_id=vocabulary - 1,
                eos_token_id=clip.eos_token_id,
            )
        )
        self.transformer = FluxTransformer2DModel(
            in_channels=64,
            num_layers=dual,
            num_single_layers=single,
            attention_head_dim=32,
            num_attention_heads=width // 32,
            joint_attention_dim=width,
            pooled_projection_dim=clip.hidden_size,
            guidance_embeds=True,
            axes_dims_rope=(4, 14, 14),
        )
        self.fix()

    @torch.no_grad()
    def fix(self) -> None:
        """What training must not change: padding is zero, and a token sees itself and three before it."""
        self.text_encoder_2.shared.weight[-1] = 0
        bias = self.text_encoder_2.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
        bias.weight[REACH:] = -1e4  # buckets: distances 0 to 3 back, farther back, ahead

    def forward(
        self,
        latents: torch.Tensor,
        t: torch.Tensor,
        ids: torch.Tensor,
        ids_2: torch.Tensor,
        guidance: torch.Tensor,
        length: int = LENGTH,
    ) -> torch.Tensor:
        """Velocity of `[B, 16, 8, 8]` latents at times `[B]` in [0, 1], as if the text had `length` tokens."""
        unique, inverse = torch.cat([ids, ids_2], dim=1).unique(dim=0, return_inverse=True)
        ids, ids_2 = unique.split([MAX_LENGTH, LENGTH], dim=1)
        tokens = self.text_encoder_2(ids_2)[0][inverse]
        pooled = self.text_encoder(ids).pooler_output[inverse]
        mask = None
        if length > LENGTH:
            mask = torch.zeros(1, 1, 1, LENGTH + 16)
            mask[..., LENGTH - 1] = math.log(1 + length - LENGTH)
        packed = self.transformer(
            hidden_states=FluxPipeline._pack_latents(latents, len(latents), 16, 8, 8),
            encoder_hidden_states=tokens,
            pooled_projections=pooled,
            timestep=t,
            guidance=guidance,
            img_ids=FluxPipeline._prepare_latent_image_ids(1, 4, 4, "cpu", torch.float32),
            txt_ids=torch.zeros(LENGTH, 3),
            joint_attention_kwargs={"attention_mask": mask},
            return_dict=False,
        )[0]
        return FluxPipeline._unpack_latents(packed, 64, 64, 8)


def word_tokenizer(clip: CLIPTokenizer, folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer beside CLIP's: the same words, an end mark, padding of its own."""
    tokenizer = Tokenizer.from_str(clip.backend_tokenizer.to_str())
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", special_tokens=[(EOS, clip.eos_token_id)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, model_max_length=LONG)
    fast.save_pretrained(folder)
    return fast


@torch.no_grad()
def start_from(student: GuidanceDistilled, teacher: TextToImage) -> None:
    """Copy the teacher's weights to where the student has the same layers."""
    clip, flux, sd3 = teacher.text_encoder, student.transformer, teacher.transformer
    inner = getattr(student.text_encoder, "text_model", student.text_encoder)
    inner.load_state_dict(clip.text_model.state_dict())
    words = [e.text_model.embeddings.token_embedding.weight for e in (clip, teacher.text_encoder_2)]
    student.text_encoder_2.shared.weight[: len(words[0])] = 10 * F.normalize(torch.cat(words, dim=1))
    flux.context_embedder.load_state_dict(sd3.context_embedder.state_dict())
    patch = sd3.pos_embed.proj
    flux.x_embedder.weight.copy_(patch.weight.flatten(1))  # packing has the order of a patch: channel, row, column
    flux.x_embedder.bias.copy_(patch.bias)
    time, text = flux.time_text_embed, sd3.time_text_embed
    time.timestep_embedder.load_state_dict(text.timestep_embedder.state_dict())
    project, width = clip.text_projection.weight, len(clip.text_projection.weight)
    time.text_embedder.linear_1.weight.copy_(text.text_embedder.linear_1.weight[:, :width] @ project)
    time.text_embedder.linear_1.bias.copy_(text.text_embedder.linear_1.bias)
    time.text_embedder.linear_2.load_state_dict(text.text_embedder.linear_2.state_dict())
    time.guidance_embedder.linear_2.weight.zero_()
    flux.norm_out.load_state_dict(sd3.norm_out.state_dict())
    order = torch.arange(64).view(2, 2, 16).permute(2, 0, 1).flatten()  # SD3 puts the channel last
    flux.proj_out.weight.copy_(sd3.proj_out.weight[order])
    flux.proj_out.bias.copy_(sd3.proj_out.bias[order])
    blocks = list(sd3.transformer_blocks)
    for new, old in zip(flux.transformer_blocks, blocks, strict=False):
        new.load_state_dict(old.state_dict())
    rest = blocks[len(flux.transformer_blocks) :]
    for index, new in enumerate(flux.single_transformer_blocks):
        gate = slice(2 * new.norm.linear.out_features // 3, None)
        if index >= len(rest):
            new.norm.linear.weight[gate], new.norm.linear.bias[gate] = 0, 0
            continue
        old = rest[index]
        new.norm.linear.weight.copy_(old.norm1.linear.weight[: new.norm.linear.out_features])
        new.norm.linear.bias.copy_(old.norm1.linear.bias[: new.norm.linear.out_features])
        for name in ("to_q", "to_k", "to_v", "norm_q", "norm_k"):
            new.attn.get_submodule(name).load_state_dict(old.attn.get_submodule(name).state_dict())
        widen, narrow = old.ff.net[0].proj, old.ff.net[2]
        new.proj_mlp.load_state_dict(widen.state_dict())
        new.proj_out.weight.copy_(torch.cat([old.attn.to_out[0].weight, narrow.weight], dim=1))
        new.proj_out.bias.copy_(old.attn.to_out[0].bias + narrow.bias)
    student.fix()


def main() -> None:
    """Distil, report a line every 100 steps, save a checkpoint every 200."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="npz written by dataset.py")
    parser.add_argument("--teacher", type=Path, default=Path("src/variegate/emoji/emoji-base"))
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints and the log")
    parser.add_argument("--init", type=Path, help="start from the weights of this pipeline, e.g. the bundled one")
    parser.add_argument("--steps", type=int, default=10000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1.2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    data = np.load(args.data)
    items = drawings(data)
    captions = Captions(items)
    tokenizer = CLIPTokenizer.from_pretrained(args.teacher / "tokenizer")
    tokenizer_2 = word_tokenizer(tokenizer, args.out / "tokenizer_2")
    vae = AutoencoderKL.from_pretrained(args.teacher / "vae").eval()
    latents = encode_latents(vae, torch.from_numpy(data["images"])[[item.row for item in items]])

    teacher = load_weights(args.teacher, tokenizer).requires_grad_(False)
    teacher.transformer.set_attn_processor(PaddedAttention())
    model = GuidanceDistilled(teacher.text_encoder.config, len(tokenizer_2))
    if args.init:
        load_parts(model, args.init)
    else:
        start_from(model, teacher)
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    parts = {"ema": ema, "model": model, "optimizer": optimizer}
    step = load_state(args.out / "checkpoint.pt", **parts)
    empty = ids_of(tokenizer, [""])
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {len(items)} drawings", flush=True)

    progress = Progress(args.steps, step, args.batch, args.out / "loss.csv")
    while step < args.steps:
        rng = random.Random(f"{args.seed} {step}")
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        texts, rows = zip(*(captions.draw(rng) for _ in range(args.batch)), strict=True)
        ids, ids_2 = ids_of(tokenizer, texts), ids_of(tokenizer_2, texts, LENGTH)
        image = latents[list(rows)]
        noise = torch.randn(image.shape, generator=generator)
        t = torch.randn(args.batch, generator=generator).sigmoid()
        noisy = torch.lerp(image, noise, t[:, None, None, None])
        w = 1 + 5 * torch.rand(args.batch, generator=generator)
        velocity = guided(teacher, noisy, t, ids, empty, w)
        loss = F.mse_loss(model(noisy, t, ids, ids_2, w, LONG if rng.random() < 0.3 else LENGTH), velocity)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * learning_rate(step, args.steps, decay=0.5)
        optimizer.step()
        optimizer.zero_grad()
        model.fix()
        step += 1
        torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - min(0.999, (1 + step) / (10 + step)))
        progress.update(step, loss=loss)
        if step % 200 == 0 or step == args.steps:
            atomic_save(args.out / "checkpoint.pt", step, **parts)


if __name__ == "__main__":
    main()
