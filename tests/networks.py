"""Networks of the measures at tiny size and with random weights, saved as their users get them."""

from __future__ import annotations

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from variegate.metrics.lpips import CHANNELS

SIZE = {"size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28}}
VISION = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}


def clip_tokenizer():
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=24)


def seeded(build):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build().eval()


def save_dinov2(folder):
    seeded(lambda: Dinov2Model(Dinov2Config(**VISION, initializer_range=0.5))).save_pretrained(folder)
    BitImageProcessorPil(**SIZE).save_pretrained(folder)


def save_clip(folder):
    tokenizer = clip_tokenizer()
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 24, "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    config = CLIPConfig(text_config=text, vision_config=VISION | {"intermediate_size": 32}, projection_dim=8)
    config.initializer_factor = 20.0
    model = seeded(lambda: CLIPModel(config))
    model.text_projection.weight.data.neg_()  # as it is, no text fits any picture
    model.save_pretrained(folder)
    CLIPImageProcessorPil(**SIZE).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_llava(folder):
    vocab = {word: place for place, word in enumerate(("<pad>", "<image>", "Yes", "No", "cat", "dog"))}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", unk_token="<pad>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    text = LlamaConfig(
        vocab_size=len(vocab), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, initializer_range=1.0,
    )  # fmt: skip
    config = LlavaConfig(
        text_config=text,
        vision_config=CLIPVisionConfig(**VISION, intermediate_size=32, initializer_factor=20.0),
        image_token_index=vocab["<image>"],
    )
    seeded(lambda: LlavaForConditionalGeneration(config)).save_pretrained(folder)
    template = (
        "{% for m in messages %}{% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
    )
    LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        tokenizer,
        patch_size=14,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
        chat_template=template,
    ).save_pretrained(folder)


def save_vgg16(folder):
    """VGG16's convolutions, drawn as for the values of lpips 0.1.4 in test_metrics_reference."""
    generator, weights, place, inputs = torch.Generator().manual_seed(0), {}, 0, 3
    for outputs in CHANNELS:
        if outputs:
            kernel = torch.randn(outputs, inputs, 3, 3, generator=generator) * (2 / (9 * inputs)) ** 0.5
            weights[f"features.{place}.weight"] = kernel
            weights[f"features.{place}.bias"] = torch.randn(outputs, generator=generator) / 10
            inputs = outputs
        place += 2 if outputs else 1
    weights["head.fc.bias"] = torch.zeros(3)  # a whole VGG16 has a classifier
    save_file(weights, folder / "model.safetensors")
