"""Assemble a trained checkpoint into a plain diffusers folder, complete or not at all.

python training/export.py base --run runs/base --out src/variegate/emoji/emoji-base
python training/export.py turbo --run runs/turbo --out src/variegate/emoji/emoji-turbo
python training/export.py dev --run runs/dev --out src/variegate/emoji/emoji-dev
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    StableDiffusion3Pipeline,
)
from tokenizers import Regex, Tokenizer, models, normalizers, processors
from transformers import CLIPTextConfig, CLIPTokenizer, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from dev import GuidanceDistilled
from transformer import TextToImage
from turbo import NODES


def silent_t5(width: int) -> tuple[T5EncoderModel, PreTrainedTokenizerFast]:
    """What fills the T5 slot, which `from_pretrained` wants filled: every text becomes padding, every token zero."""
    encoder = T5EncoderModel(T5Config(vocab_size=2, d_model=width, d_kv=8, d_ff=8, num_layers=1, num_heads=1))
    for weight in encoder.parameters():  # all, so that every export writes the same file
        torch.nn.init.zeros_(weight)
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1}, unk_token="<pad>"))
    tokenizer.normalizer = normalizers.Replace(Regex(r"[\s\S]+"), "")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", model_max_length=512
    )
    return encoder, fast


def base(state: dict[str, Any], run: Path, args: argparse.Namespace) -> DiffusionPipeline:
    """The pipeline of transformer.py."""
    tokenizer = CLIPTokenizer.from_pretrained(run / "tokenizer")
    width = state["ema"]["transformer.context_embedder.weight"].shape[0]
    model = TextToImage(tokenizer, width, _count(state["ema"], "transformer.transformer_blocks.")).eval()
    model.load_state_dict(state["ema"])
    vae = AutoencoderKL.from_pretrained(args.autoencoder or run / "vae")
    encoder, silence = silent_t5(width)
    return StableDiffusion3Pipeline(
        transformer=model.transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder=model.text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=model.text_encoder_2,
        tokenizer_2=tokenizer,
        text_encoder_3=encoder,
        tokenizer_3=silence,
    )


def turbo(state: dict[str, Any], run: Path, args: argparse.Namespace) -> DiffusionPipeline:
    """The pipeline of turbo.py: the teacher's but for the transformer, and a last step that is no smaller."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(args.teacher)
    pipeline.transformer.load_state_dict(state["ema"])
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0, shift_terminal=1 / NODES)
    return pipeline


def dev(state: dict[str, Any], run: Path, args: argparse.Namespace) -> DiffusionPipeline:
    """The pipeline of dev.py."""
    teacher = StableDiffusion3Pipeline.from_pretrained(args.teacher)
    tokenizer_2 = PreTrainedTokenizerFast.from_pretrained(run / "tokenizer_2")
    blocks = [_count(state["ema"], f"transformer.{kind}transformer_blocks.") for kind in ("", "single_")]
    width = state["ema"]["transformer.context_embedder.weight"].shape[0]
    clip = CLIPTextConfig.from_dict(teacher.text_encoder.config.to_dict())
    model = GuidanceDistilled(clip, len(tokenizer_2), width, *blocks).eval()
    model.load_state_dict(state["ema"])
    return FluxPipeline(
        transformer=model.transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=teacher.vae,
        text_encoder=model.text_encoder,
        tokenizer=teacher.tokenizer,
        text_encoder_2=model.text_encoder_2,
        tokenizer_2=tokenizer_2,
    )


KINDS = {"base": base, "turbo": turbo, "dev": dev}


def main() -> None:
    """Put the averaged weights, the parts they work with and the true frequencies together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--run", type=Path, required=True, help="folder of checkpoints")
    parser.add_argument("--out", type=Path, required=True, help="folder of the pipeline")
    parser.add_argument("--teacher", type=Path, default=Path("src/variegate/emoji/emoji-base"), help="of turbo and dev")
    parser.add_argument("--autoencoder", type=Path, help="base: with the decoder trained since; default RUN/vae")
    args = parser.parse_args()

    state = torch.load(args.run / "checkpoint.pt", weights_only=True, map_location="cpu")
    pipeline = KINDS[args.kind](state, args.run, args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out.parent) as folder:
        fresh = Path(folder, args.out.name)
        for part in (pipeline.transformer, pipeline.vae):
            part.half()  # half the download; diffusers loads them as float32 unless asked
        pipeline.save_pretrained(fresh)
        for path in (fresh / "model_index.json", *fresh.rglob("config.json")):
            # transformers 4 and 5 share this name of the class.
            config = json.loads(path.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
            config.pop("_name_or_path", None)  # the folder a part was loaded from is no part of the model
            path.write_text(json.dumps(config, indent=2) + "\n")
        shutil.copy((args.run if args.kind == "base" else args.teacher) / "frequencies.json", fresh)
        if (args.out / "README.md").exists():
            shutil.copy(args.out / "README.md", fresh)
        shutil.rmtree(args.out, ignore_errors=True)
        fresh.rename(args.out)
    size = sum(f.stat().st_size for f in args.out.rglob("*") if f.is_file())
    print(f"{args.out}: step {state['step']}, {size / 1e6:.1f} MB")


def _count(weights: dict[str, torch.Tensor], prefix: str) -> int:
    """Blocks in a list of them."""
    return 1 + max(int(name[len(prefix) :].split(".")[0]) for name in weights if name.startswith(prefix))


if __name__ == "__main__":
    main()
