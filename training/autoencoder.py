r"""Train the autoencoder: 64 x 64 pixels to 8 x 8 x 16 latents.

An `AutoencoderKL` of 0.7 M parameters, absolute error on pixels and on their differences (flat artwork lives by
its edges), a light KL term. `--decoder-only` goes on with the decoder under a frozen encoder, so that latents a
transformer was trained on stay valid: it learns to decode what a sampler almost hits, latents with `--noise`, and
`--widen` gives it (and the encoder, which stays the same function) twice the channels.

    python training/autoencoder.py --data data/emoji64.npz --out runs/autoencoder
    python training/autoencoder.py --data data/emoji64.npz --out runs/decoder --init runs/base/vae \
        --decoder-only --widen
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from common import Progress, atomic_save, load_state
from domain import in_domain, in_licence

CONFIG = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (8, 16, 32, 64),
    "layers_per_block": 1,
    "latent_channels": 16,
    "norm_num_groups": 2,
    "sample_size": 64,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "mid_block_add_attention": False,
}
KL_WEIGHT = 5e-4
COLOUR_WEIGHT = 1.0


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Absolute error of `[B, 3, H, W]` pixels, of their differences, and of local colours.

    The colours are averages over 4 x 4 pixels along the red-green and the blue-yellow axis: without their own term
    the second axis, a small share of the error, is left out of the latents for a long time.
    """
    edges = sum((output.diff(dim=d) - target.diff(dim=d)).abs().mean() for d in (2, 3))
    red, green, blue = F.avg_pool2d(output - target, 4).unbind(1)
    colour = (red - green).abs().mean() + (blue - (red + green) / 2).abs().mean()
    return (output - target).abs().mean() + 0.5 * edges + COLOUR_WEIGHT * colour


@torch.no_grad()
def widened(model: AutoencoderKL) -> AutoencoderKL:
    """The same function with every channel twice, and its readers' weights shared out unequally among the two.

    Net2Net (arXiv 1511.05641). Groups of channels keep their size, so that their norms stay what they are.
    """
    config = dict(model.config)
    config["block_out_channels"] = [2 * channels for channels in config["block_out_channels"]]
    config["norm_num_groups"] *= 2
    wide = AutoencoderKL.from_config(config)
    for name, new in wide.state_dict().items():
        old = model.state_dict()[name]
        if new.shape[0] != old.shape[0]:
            old = torch.cat([old, old])
        if new.shape[1:] != old.shape[1:]:
            share = 0.5 + 0.25 * torch.randn(old.shape)
            old = torch.cat([share * old, (1 - share) * old], dim=1)
        new.copy_(old)
    return wide


@torch.no_grad()
def latents_of(model: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """uint8 `[N, 3, 64, 64]` to latents `[N, 16, 8, 8]`, as the encoder gives them, on its device."""
    chunks = (x.to(model.device).float() / 127.5 - 1 for x in pixels.split(64))
    return torch.cat([model.encode(x).latent_dist.mode() for x in chunks])


def main() -> None:
    """Train, report a line every 100 steps, save a checkpoint every 200."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="npz written by dataset.py")
    parser.add_argument("--out", type=Path, required=True, help="folder of the autoencoder and its checkpoint")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--init", type=Path, help="start from the autoencoder in this folder")
    parser.add_argument("--decoder-only", action="store_true", help="freeze the encoder")
    parser.add_argument("--widen", action="store_true", help="twice the channels of --init")
    parser.add_argument("--noise", type=float, default=0.5, help="most noise in latents of --decoder-only, deviations")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    data = np.load(args.data)
    pixels = torch.from_numpy(data["images"]).permute(0, 3, 1, 2)
    # The domain first, the rest of the artwork now and then, so that the encoder serves other pictures too.
    weights = torch.from_numpy(np.where(in_domain(data), 1.0, 0.02) * in_licence(data))
    model = AutoencoderKL.from_pretrained(args.init) if args.init else AutoencoderKL(**CONFIG)
    if args.widen:
        model = widened(model)
    model.train().to(memory_format=torch.channels_last)
    if args.decoder_only:
        model.encoder.requires_grad_(False)
        latents = latents_of(model, pixels)
        most_noise = args.noise * latents.std()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], args.lr, betas=(0.9, 0.98))
    warmup = min(100, args.steps // 10)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, total_steps=args.steps + 1, pct_start=warmup / args.steps
    )
    checkpoint = args.out / "checkpoint.pt"
    step = load_state(checkpoint, model=model, optimizer=optimizer, schedule=schedule)
    progress = Progress(args.steps, step, args.batch, args.out / "loss.csv")
    while step < args.steps:
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        rows = torch.multinomial(weights, args.batch, replacement=True, generator=generator)
        x = pixels[rows].float() / 127.5 - 1
        if args.decoder_only:
            z = latents[rows]
            level = most_noise * torch.rand(args.batch, 1, 1, 1, generator=generator)
            rebuilt = model.decode(z + level * torch.randn(z.shape, generator=generator)).sample
            kl = torch.zeros(())
        else:
            x = torch.where(torch.rand(args.batch, 1, 1, 1, generator=generator) < 0.25, x.flip(3), x)
            posterior = model.encode(x).latent_dist
            rebuilt = model.decode(posterior.sample(generator)).sample
            kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss = reconstruction_loss(rebuilt, x)
        (loss + KL_WEIGHT * kl).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        step += 1
        psnr = -10 * torch.log10(F.mse_loss(rebuilt.clamp(-1, 1), x) / 4)
        progress.update(step, loss=loss, psnr=psnr, kl=kl)
        if step % 200 == 0 or step == args.steps:
            atomic_save(checkpoint, step, model=model, optimizer=optimizer, schedule=schedule)
            model.save_pretrained(args.out)


if __name__ == "__main__":
    main()
