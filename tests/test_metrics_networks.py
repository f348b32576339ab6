"""Extractors and scorers of transformers: the real classes at tiny size, saved to a folder and loaded from there."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize
from transformers import CLIPModel, Dinov2Model, LlavaForConditionalGeneration

from networks import clip_tokenizer, save_clip, save_dinov2, save_llava
from variegate.metrics import VQAScore, clip, clip_score, dinov2, efficientnet_lite0, extractor


@pytest.fixture(scope="module")
def dinov2_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dinov2")
    save_dinov2(folder)
    return folder


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    save_clip(folder)
    return folder


@pytest.fixture(scope="module")
def llava_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    save_llava(folder)
    return folder


def pictures(count, size=(40, 48)):
    generator = torch.Generator().manual_seed(count)
    values = torch.randint(0, 256, (count, size[1] // 8, size[0] // 8, 3), generator=generator).byte()
    return [Image.fromarray(value.numpy()).resize(size, Image.Resampling.NEAREST) for value in values]


def prepared(picture, side=32):
    """What the processors of the folders do, by hand: the shorter side resized, the middle 28 x 28, CLIP's values."""
    width, height = picture.size
    scale = side / min(width, height)
    small = picture.resize((int(width * scale), int(height * scale)), Image.Resampling.BICUBIC)
    left, top = (small.width - 28) // 2, (small.height - 28) // 2
    pixels = torch.from_numpy(np.array(small.crop((left, top, left + 28, top + 28)))).permute(2, 0, 1) / 255
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def test_dinov2_features_are_the_class_token_of_the_prepared_picture(dinov2_folder):
    images = pictures(3)
    with torch.no_grad():
        pixels = torch.stack([prepared(image) for image in images])
        expected = Dinov2Model.from_pretrained(dinov2_folder)(pixels).last_hidden_state[:, 0]
    found = dinov2(dinov2_folder, batch_size=2)(images)
    torch.testing.assert_close(found, normalize(expected, dim=1), atol=1e-5, rtol=0)
    tensors = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1 for image in images])
    torch.testing.assert_close(extractor("dinov2", model=dinov2_folder)(tensors), found)


def test_clip_score_is_the_cosine_in_the_models_own_logits(clip_folder):
    images, prompts = pictures(3), ["cat", "dog", "a much longer text than the model has places for"]
    network = clip(clip_folder, batch_size=2)
    model, tokenizer = CLIPModel.from_pretrained(clip_folder), clip_tokenizer()
    tokens = tokenizer(prompts, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        output = model(**tokens, pixel_values=torch.stack([prepared(image) for image in images]))
    expected = 100 * (output.logits_per_image.diagonal() / model.logit_scale.exp()).clamp(min=0)
    found = clip_score(network(images), network.texts(prompts))
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
    assert found.max() > 1


def test_an_extractor_states_what_it_does(dinov2_folder, clip_folder, tmp_path):
    stated = dinov2(dinov2_folder).features
    assert stated.resize == "shortest_edge 32 bicubic cropped to 28 x 28"
    assert stated.normalisation.startswith("mean 0.481455 0.457827 0.408211 std 0.26863")
    copy = shutil.copytree(dinov2_folder, tmp_path / "copy")
    assert dinov2(copy).features == stated
    weights = load_file(copy / "model.safetensors")
    weights["layernorm.bias"][0] += 1e-6
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert dinov2(copy).features != stated
    assert clip(clip_folder).features != stated


def test_vqa_score_is_the_probability_of_yes(llava_folder):
    images, prompts = pictures(3), ["cat", "dog", "cat"]
    found = VQAScore(llava_folder)(images, prompts)
    model = LlavaForConditionalGeneration.from_pretrained(llava_folder)
    for image, prompt, value in zip(images, prompts, found, strict=True):
        # Four patches; the words, quotation marks and stops of the question, all unknown but the prompt.
        ids = torch.tensor([[1] * 4 + [0] * 5 + [{"cat": 4, "dog": 5}[prompt]] + [0] * 7])
        with torch.no_grad():
            output = model(input_ids=ids, pixel_values=prepared(image, side=28)[None])
        assert value.item() == pytest.approx(output.logits[0, -1].softmax(0)[2].item(), rel=1e-3)
    with pytest.raises(ValueError, match="zip"):
        VQAScore(llava_folder)(images, prompts[:2])


def without(folder, target, *names):
    return shutil.copytree(folder, target, ignore=shutil.ignore_patterns(*names))


def test_models_that_cannot_be_loaded_are_one_sentence(dinov2_folder, clip_folder, llava_folder, tmp_path):
    for load, kind in ((dinov2, "dinov2"), (clip, "clip"), (VQAScore, "a chat model of images")):
        with pytest.raises(ValueError, match=rf"nowhere' can't be loaded as {kind} \(.*hf download [\w.-]+/[\w.-]+`"):
            load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="its kind is clip"):
        dinov2(clip_folder)
    pickled = without(dinov2_folder, tmp_path / "pickled", "*.safetensors")
    torch.save(load_file(dinov2_folder / "model.safetensors"), pickled / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"no file named model\.safetensors"):
        dinov2(pickled)
    pickled = without(llava_folder, tmp_path / "pickled chat", "*.safetensors")
    torch.save(load_file(llava_folder / "model.safetensors"), pickled / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"no file named model\.safetensors"):
        VQAScore(pickled)
    partial = without(dinov2_folder, tmp_path / "partial", "*.safetensors")
    weights = load_file(dinov2_folder / "model.safetensors")
    del weights["layernorm.bias"]
    save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"it lacks weights, layernorm\.bias for one"):
        dinov2(partial)
    cut = without(dinov2_folder, tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(ValueError, match="can't be loaded as dinov2"):
        dinov2(cut)
    with pytest.raises(ValueError, match="it has no chat template"):
        VQAScore(without(llava_folder, tmp_path / "mute", "chat_template*"))


def test_extractors_by_name(dinov2_folder):
    images = pictures(2)
    torch.testing.assert_close(extractor()(images), efficientnet_lite0()(images))
    with pytest.raises(ValueError, match="extractor='inception-v3' is unknown; use efficientnet-lite0, dinov2, clip"):
        extractor("inception-v3")
    with pytest.raises(ValueError, match="efficientnet-lite0 is in the package"):
        extractor(model=dinov2_folder)
