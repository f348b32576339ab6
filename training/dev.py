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

import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from tokenizers import Tokenizer, processors
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from captions import Captions, drawings
from common import Batches, arguments, autocast, fit, prepare
from tokenizer import EOS, MAX_LENGTH, ids_of
from transformer import TextToImage, copies, encode_latents, guided, load_parts, load_weights, noised

LENGTH = 16  # text tokens of the short form
LONG = 512  # those of a plain pipeline call
REACH = 4  # tokens that a token of the text encoder sees: itself and three before it
PAD = "<pad>"


class GuidanceDistilled(nn.Module):
    """The trained parts of a `FluxPipeline`, wired as the pipeline wires them."""

    def __init__(self, clip: CLIPTextConfig, vocabulary: int, width: int, dual: int = 4, single: int = 4) -> None:
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
        self, latents: Tensor, t: Tensor, ids: Tensor, ids_2: Tensor, guidance: Tensor, padded: Tensor
    ) -> Tensor:
        """Velocity of `[B, 16, 8, 8]` latents at times `[B]` in [0, 1]; `padded` ones `[B]` see 512 tokens of text."""
        tokens = self.text_encoder_2(ids_2)[0]
        packed = self.transformer(
            hidden_states=FluxPipeline._pack_latents(latents, len(latents), 16, 8, 8),
            encoder_hidden_states=tokens,
            pooled_projections=self.text_encoder(ids).pooler_output,
            timestep=t,
            guidance=guidance,
            img_ids=FluxPipeline._prepare_latent_image_ids(1, 4, 4, latents.device, torch.float32),
            txt_ids=torch.zeros(LENGTH, 3, device=latents.device),
            joint_attention_kwargs=copies(padded, 1 + LONG - LENGTH, LENGTH - 1, after=16),
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
    """Distil; kill it and go on at any time."""
    parser = arguments(__doc__, steps=10000, lr=1.2e-3)
    parser.add_argument("--teacher", type=Path, default=Path("src/variegate/emoji/emoji-base"))
    args = parser.parse_args()

    prepare(args)
    data = np.load(args.data)
    items = drawings(data)
    captions = Captions(items)
    tokenizer = CLIPTokenizer.from_pretrained(args.teacher / "tokenizer")
    tokenizer_2 = word_tokenizer(tokenizer, args.out / "tokenizer_2")
    vae = AutoencoderKL.from_pretrained(args.teacher / "vae").eval()
    latents = encode_latents(vae, torch.from_numpy(data["images"])[[item.row for item in items]], args.device)

    teacher = load_weights(args.teacher, tokenizer).requires_grad_(False).to(args.device)
    model = GuidanceDistilled(teacher.text_encoder.config, len(tokenizer_2), teacher.transformer.inner_dim)
    if args.init:
        load_parts(model, args.init)
    else:
        start_from(model, teacher)
    model.to(args.device)
    ema = copy.deepcopy(model).requires_grad_(False)
    if args.compile:
        teacher.compile(mode=args.compile)
        model.compile(mode=args.compile)
    empty = ids_of(tokenizer, [""]).to(args.device)

    def loss_of(generator: torch.Generator, batch: Sequence[Tensor]) -> Tensor:
        rows, padded, ids, ids_2 = batch
        noisy, t, _ = noised(latents[rows], generator)
        w = 1 + 5 * torch.rand(len(rows), generator=generator, device=args.device)
        velocity = guided(teacher, noisy, t, ids, empty, w)
        with autocast(args.device):
            predicted = model(noisy, t, ids, ids_2, w, padded)
        return F.mse_loss(predicted.float(), velocity)

    batches = Batches(captions, args.batch, args.seed, (tokenizer, MAX_LENGTH), (tokenizer_2, LENGTH))
    fit(args, batches, model, ema, loss_of, decay=0.5, project=model.fix)


if __name__ == "__main__":
    main()
