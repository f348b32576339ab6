"""Do images show what their prompts say? CLIPScore and VQAScore."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from variegate.metrics.features import unit_rows

if TYPE_CHECKING:
    from PIL.Image import Image

LLAVA = "llava-hf/llava-1.5-7b-hf"
QUESTION = 'Does this figure show "{}"? Please answer yes or no.'


def clip_score(images: Tensor, texts: Tensor) -> Tensor:
    """How well each image fits its text, by CLIP features of both.

    Args:
        images: `[N, D]`, any scale, as of `extractor("clip")`.
        texts: `[N, D]`, as of its method `texts`.

    Returns:
        `[N]`, in [0, 100]: 100 times the cosine, 0 where that is negative.

    Raises:
        ValueError: if the two are not matrices of one shape, or a row is zero or not finite.

    Reference:
        Hessel et al., arXiv:2104.08718. *Deviation*: the factor is 100, as most tables have it, not 2.5.

    Example:
        >>> clip_score(torch.eye(2), torch.tensor([[3.0, 4.0], [0.0, -1.0]])).round(decimals=3)
        tensor([60.,  0.])
    """
    if images.ndim != 2 or images.shape != texts.shape:
        raise ValueError(f"images has shape {tuple(images.shape)} and texts {tuple(texts.shape)}; use [N, D] for both.")
    cosine = (unit_rows(images, "images") * unit_rows(texts, "texts")).sum(dim=-1)
    return 100 * cosine.to(torch.result_type(images, 1.0)).clamp(0, 1)


class VQAScore:
    """How likely a model that sees and talks answers "Yes" when asked whether an image shows its prompt.

    Args:
        model: hub id or folder of a chat model of images and text, in transformers' format with safetensors.
        device: where it runs.

    Raises:
        ValueError: if the model can't be loaded, or has no chat template.

    Reference:
        Lin et al., arXiv:2404.01291, with its question. *Deviation*: their own CLIP-FlanT5 is no model of
        transformers; the default is LLaVA-1.5, which they evaluate too. Scores of two models can't be compared.
    """

    def __init__(self, model: str | Path = LLAVA, *, device: str | torch.device = "cpu") -> None:
        from variegate.metrics.pretrained import plain_errors

        with plain_errors("a chat model of images", model, LLAVA):
            from transformers import AutoModelForImageTextToText, AutoProcessor

            self.processor = AutoProcessor.from_pretrained(model, backend="pil")
            if not self.processor.chat_template:
                raise ValueError("it has no chat template")
            network = AutoModelForImageTextToText.from_pretrained(model, use_safetensors=True, torch_dtype="auto")
        self.network = network.to(device).eval()
        self.yes = self.processor.tokenizer.encode("Yes", add_special_tokens=False)[0]

    @torch.no_grad()
    def __call__(self, images: Sequence[Image], prompts: Sequence[str]) -> Tensor:
        """Score images, each by its prompt, one at a time.

        Returns:
            `[N]`, float32, in [0, 1].

        Raises:
            ValueError: if there are not as many prompts as images.
        """
        scores = []
        for image, prompt in zip(images, prompts, strict=True):
            content = [{"type": "image"}, {"type": "text", "text": QUESTION.format(prompt)}]
            text = self.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True
            )
            inputs = self.processor(images=image.convert("RGB"), text=text, return_tensors="pt")
            logits = self.network(**inputs.to(self.network.device, self.network.dtype)).logits[0, -1]
            scores.append(logits.float().softmax(-1)[self.yes])
        return torch.stack(scores).cpu()
