"""Assemble a trained checkpoint into a plain diffusers folder, complete or not at all.

python training/export.py --run runs/base --out src/variegate/emoji/emoji-base
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from tokenizers import Regex, Tokenizer, models, normalizers, processors
from transformers import CLIPTokenizer, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from transformer import TextToImage


def silent_t5(width: int) -> tuple[T5EncoderModel, PreTrainedTokenizerFast]:
    """What fills the T5 slot, which `from_pretrained` wants filled: every text becomes padding, every token zero."""
    encoder = T5EncoderModel(T5Config(vocab_size=2, d_model=width, d_kv=8, d_ff=8, num_layers=1, num_heads=1))
    torch.nn.init.zeros_(encoder.encoder.final_layer_norm.weight)
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1}, unk_token="<pad>"))
    tokenizer.normalizer = normalizers.Replace(Regex(r"[\s\S]+"), "")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", model_max_length=512
    )
    return encoder, fast


def main() -> None:
    """Put the averaged weights, the autoencoder, the tokenizer and the true frequencies together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder written by transformer.py")
    parser.add_argument("--out", type=Path, required=True, help="folder of the pipeline")
    parser.add_argument("--autoencoder", type=Path, help="its decoder, if polished since; default RUN/vae")
    args = parser.parse_args()

    state = torch.load(args.run / "checkpoint.pt", weights_only=True)
    tokenizer = CLIPTokenizer.from_pretrained(args.run / "tokenizer")
    width = state["ema"]["transformer.context_embedder.weight"].shape[0]
    layers = 1 + max(int(k.split(".")[2]) for k in state["ema"] if k.startswith("transformer.transformer_blocks."))
    model = TextToImage(tokenizer, width, layers).eval()
    model.load_state_dict(state["ema"])
    vae = AutoencoderKL.from_pretrained(args.run / "vae")
    if args.autoencoder:
        vae.load_state_dict(AutoencoderKL.from_pretrained(args.autoencoder).state_dict())
    encoder, silence = silent_t5(width)
    pipeline = StableDiffusion3Pipeline(
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
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out.parent) as folder:
        fresh = Path(folder, args.out.name)
        pipeline.save_pretrained(fresh)
        # transformers 4 and 5 share this name of the class.
        index = fresh / "model_index.json"
        index.write_text(index.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
        shutil.copy(args.run / "frequencies.json", fresh)
        if (args.out / "README.md").exists():
            shutil.copy(args.out / "README.md", fresh)
        shutil.rmtree(args.out, ignore_errors=True)
        fresh.rename(args.out)
    size = sum(f.stat().st_size for f in args.out.rglob("*") if f.is_file())
    print(f"{args.out}: step {state['step']}, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
