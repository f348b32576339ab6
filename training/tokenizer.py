"""Train the byte-pair tokenizer of the text encoders on the captions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer, PreTrainedTokenizerBase

MAX_LENGTH = 12
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def train_tokenizer(texts: list[str], folder: Path) -> CLIPTokenizer:
    """A `CLIPTokenizer` of the captions' words, saved in `folder`; longest input 12 tokens, marks included."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(r"'s|'t|[a-z]+|[0-9]|[^\sa-z0-9]+", "isolated"),
            pre_tokenizers.ByteLevel(False),
        ]
    )
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=3000,
        initial_alphabet=sorted(letters),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    vocab: dict[str, int] = {}
    for token in [*sorted(letters), *(f"{c}</w>" for c in sorted(letters)), *model["vocab"]]:
        vocab.setdefault(token, len(vocab))
    vocab[BOS], vocab[EOS] = len(vocab), len(vocab) + 1
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    merges = [" ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    clip = CLIPTokenizer(
        vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=MAX_LENGTH
    )
    clip.save_pretrained(folder)
    return clip


def ids_of(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int = MAX_LENGTH) -> torch.Tensor:
    """Token ids `[B, length]`, padded and cut as a pipeline does."""
    return tokenizer(
        list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
