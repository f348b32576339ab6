"""What the training scripts take for granted: padding, prompt embeddings, wider decoders, resuming."""

import importlib
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn
from torch.nn.functional import mse_loss, pad
from transformers import CLIPTokenizer

from variegate.emoji.models import locate

ROOT = Path(__file__).parents[1]
BASE = locate("emoji-base").folder


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "training")


@pytest.fixture
def transformer():
    return importlib.import_module("transformer")


@pytest.fixture
def tokenizer():
    return CLIPTokenizer.from_pretrained(BASE / "tokenizer")


@pytest.fixture
def model(transformer, tokenizer):
    return transformer.load_weights(BASE, tokenizer).eval()


@pytest.fixture
def prompt(tokenizer):
    return importlib.import_module("tokenizer").ids_of(tokenizer, ["a cat", "", "bear, 3d style"])


@torch.no_grad()
def test_prompts_are_encoded_as_the_pipeline_encodes_them(model, prompt):
    tokens, pooled = model.encode_prompt(prompt)
    encoders = [encoder(prompt, output_hidden_states=True) for encoder in (model.text_encoder, model.text_encoder_2)]
    assert torch.equal(tokens, torch.cat([output.hidden_states[-2] for output in encoders], dim=-1))
    assert torch.equal(pooled, torch.cat([output.text_embeds for output in encoders], dim=-1))


@torch.no_grad()
def test_one_raised_token_stands_for_the_padding_of_a_plain_call(transformer, model, prompt):
    latents, t = torch.randn(3, 16, 8, 8), torch.tensor([0.2, 0.5, 0.9])
    tokens, pooled = model.encode_prompt(prompt)

    def plain(padding):
        return model.transformer(latents, pad(tokens, (0, 0, 0, padding)), pooled, 1000 * t, return_dict=False)[0]

    expected = torch.stack([plain(256)[0], plain(1)[1], plain(256)[2]])
    model.transformer.set_attn_processor(transformer.MaskedAttention())
    found = model(latents, t, prompt, padded=torch.tensor([True, False, True]))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert (plain(256)[1] - expected[1]).abs().max() > 1e-2  # padding makes a difference


@torch.no_grad()
def test_a_widened_autoencoder_is_the_same_function():
    script = importlib.import_module("autoencoder")
    small = AutoencoderKL(**script.CONFIG).eval()
    wide = script.widened(small).eval()
    pixels, latents = torch.rand(2, 3, 64, 64), torch.randn(2, 16, 8, 8)
    assert list(wide.config.block_out_channels) == [16, 32, 64, 128]
    torch.testing.assert_close(wide.decode(latents).sample, small.decode(latents).sample, atol=1e-4, rtol=0)
    torch.testing.assert_close(
        wide.encode(pixels).latent_dist.mode(), small.encode(pixels).latent_dist.mode(), atol=1e-4, rtol=0
    )


class Numbers:
    """Captions without a data set."""

    def draw(self, rng):
        return "", rng.randrange(8)


def fit(common, out, steps, *, killed_at=None):
    """Fit eight vectors to a matrix's rows; the model and its average."""
    torch.manual_seed(0)
    model, ema = nn.Linear(4, 4), nn.Linear(4, 4).requires_grad_(False)
    seen = []

    def loss_of(generator, batch):
        seen.append(batch)
        if len(seen) == killed_at:
            raise KeyboardInterrupt
        x = torch.randn(len(batch[0]), 4, generator=generator)
        return mse_loss(model(x), batch[0][:, None].float() * x)

    args = Namespace(out=out, steps=steps, batch=2, lr=0.1, workers=0, seed=0, device=torch.device("cpu"))
    common.fit(args, common.Batches(Numbers(), args.batch, args.seed), model, ema, loss_of, decay=0.5)
    return model, ema, seen


def test_a_killed_run_goes_on_as_if_nothing_had_been(tmp_path, monkeypatch):
    common = importlib.import_module("common")
    monkeypatch.setattr(common, "SECONDS_BETWEEN_CHECKPOINTS", -1)
    whole = fit(common, tmp_path / "whole", 6)
    with pytest.raises(KeyboardInterrupt):
        fit(common, tmp_path / "killed", 6, killed_at=4)
    resumed = fit(common, tmp_path / "killed", 6)
    assert len(resumed[2]) == 3
    for kept, new in zip(
        (*whole[0].parameters(), *whole[1].parameters()),
        (*resumed[0].parameters(), *resumed[1].parameters()),
        strict=True,
    ):
        assert torch.equal(kept, new)


def test_batches_depend_on_nothing_but_seed_and_step():
    common = importlib.import_module("common")
    one, other = (common.Batches(Numbers(), 16, seed) for seed in (0, 1))
    assert torch.equal(one[3][0], one[3][0])
    assert not torch.equal(one[3][0], one[4][0])
    assert not torch.equal(one[3][0], other[3][0])


def test_what_a_student_has_learnt_is_carried_over_to_a_new_teacher():
    carry_over = importlib.import_module("carry_over").carry_over
    old, student, teacher = (nn.Linear(2, 2) for _ in range(3))
    expected = teacher.weight + student.weight - old.weight
    carry_over(teacher, student, old)
    torch.testing.assert_close(teacher.weight, expected)
    assert (student.weight - old.weight).abs().max() > 0.01  # so the teacher has moved
