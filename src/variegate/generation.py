"""The engine under every face of the package: a request in, a gallery out, a stock pipeline in between."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from variegate import recipes
from variegate.emoji.models import (
    DEVICES,
    call_defaults,
    check_steps,
    load_pipeline,
    locate,
    pick_device,
    pick_dtype,
    quiet,
)
from variegate.gallery import Gallery, Group, Row, read_recipe
from variegate.intervention import Intervention
from variegate.request import Request, to_text
from variegate.sampling import UNTOLD, adapters_of, differences, scheduler_of, seeded
from variegate.schema import FORMAT
from variegate.selection import SGI, select
from variegate.selection.preview import arguments_of, check_scheduler

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

LIBRARIES = ("variegate", "torch", "diffusers", "transformers")

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Replay:
    """A picture made again.

    Attributes:
        gallery: its whole group.
        index: its place in the group.
        difference: largest difference between a value of the old picture and the new one, of 0 to 255.
        versions: library to its versions (then, now), where they are not the same.
        changes: "scheduler", "adapters", "dtype" or "device" to what they were and are, where they are not the same.
    """

    gallery: Gallery
    index: int
    difference: int
    versions: Mapping[str, tuple[str, str]]
    changes: Mapping[str, tuple[str, str]] = dataclasses.field(default_factory=dict)

    @property
    def report(self) -> str:
        """In words: identical or not, and what has changed since that may be why."""
        if self.difference == 0:
            return "identical"
        every = {**self.changes, **self.versions}
        changed = "; ".join(f"{name} {then} -> {now}" for name, (then, now) in every.items())
        return f"not identical: pixels differ by up to {self.difference} of 255; " + (
            f"what differs: {changed}"
            if changed
            else "all library versions, the scheduler and the adapters are the same"
        )


def generate(request: Request, *, pipeline: Any | None = None, progress: Progress | None = None) -> Gallery:
    """Make the pictures of a request.

    Each prompt is one call of the stock pipeline, or, to compare, two with the same seeds: one as it is, one
    with the method attached. A method that chooses makes the second from the seeds it has chosen. A scheduler that
    draws noise in its steps draws it by the seeds of the call, see `sampling.seeded`.

    Args:
        request: what to make.
        pipeline: use this one, in place of loading `request.model`, which should then be its name; of a path, the
            recipes tell the last part alone.
        progress: called after each denoising step with the steps done and those of the whole request.

    Raises:
        ValueError: if the model can't be loaded, does not take what the request asks for or has no contextual
            space, or if pictures come out with values that are not finite.
        MemoryError: if the accelerator's memory does not suffice.

    Example:
        >>> gallery = generate(Request(("an animal",), n=4, steps=8))
        >>> [len(row.images) for row in gallery.groups[0].rows]
        [4, 4]
    """
    method = request.configured
    if request.n == 1 and method is not None and method.needs_company:
        warnings.warn(
            "n=1: a single picture has nothing to be different from, so it is the stock pipeline's.",
            stacklevel=2,
        )
        request = dataclasses.replace(request, method="none", parameters={})
    if pipeline is None:
        place = pick_device(request.device)
        checkpoint = locate(request.model, request.revision)
        request = dataclasses.replace(
            request,
            model=checkpoint.name,
            revision=checkpoint.revision,
            device=place,
            dtype=pick_dtype(request.dtype, place),
        )
        pipeline = load_pipeline(checkpoint.folder, dtype=request.dtype, device=request.device, offload=request.offload)
    else:
        # The recipe has no path, which may tell a user's name, and says where the pipeline really is.
        device = str(getattr(pipeline, "_execution_device", request.device)).partition(":")[0]
        request = dataclasses.replace(
            request,
            model=recipes.name_of(request.model),
            device=device if device in DEVICES else request.device,
            dtype=str(pipeline.dtype).removeprefix("torch."),
        )
    run = _Run(request, pipeline, progress)
    return Gallery(tuple(run.group(prompt) for prompt in request.prompts), run.settings)


def replay(
    path: str | Path,
    *,
    model: str | None = None,
    device: str | None = None,
    pipeline: Any | None = None,
    progress: Progress | None = None,
    trust_recipe: bool = False,
) -> Replay:
    """Make a picture again from its file alone, with the group it belongs to, and compare.

    The file may be anybody's: of itself it only loads bundled models, and it can't ask for more than a picture of the
    model's kind takes. docs/security.md says what is trusted.

    Args:
        path: PNG of a saved gallery.
        model: where its model is now: a bundled one, a folder or a hub id; None: the bundled one that it names.
        device: in place of the one it was made on.
        pipeline: as in `generate`.
        progress: as in `generate`.
        trust_recipe: also load the model of the hub that it names.

    Raises:
        ValueError: if the file has no recipe, or the recipe can't or must not be followed.

    Warns:
        UserWarning: if the pipeline has another scheduler or other adapters than the recipe.
    """
    import numpy as np
    from PIL import Image

    recipe = read_recipe(path)
    request = recipes.request_of(recipe, path, model=model, device=device, pipeline=pipeline, trust=trust_recipe)
    recipes.check_size(request, path, pipeline)
    changes = {} if pipeline is None else differences(recipe, _sampling(pipeline))
    if told := ", ".join(f"{name} {then}, not {now}" for name, (then, now) in changes.items() if then != UNTOLD):
        warnings.warn(f"{path} was not made as this pipeline would make it, but with {told}.", stacklevel=2)
    index = recipe["index"]
    gallery = generate(request, pipeline=pipeline, progress=progress)
    (row,) = gallery.groups[0].rows
    with Image.open(path) as image:
        old, new = (np.asarray(picture.convert("RGB"), int) for picture in (image, row.images[index]))
    difference = int(abs(old - new).max()) if old.shape == new.shape else 255
    then, now = recipe.get("versions", {}), _versions()
    changed = {name: (then.get(name, "?"), now[name]) for name in now if then.get(name) != now[name]}
    return Replay(gallery, index, difference, changed, differences(recipe, gallery.settings))


class _Run:
    """A request on its pipeline: what its calls have in common, and how far it is."""

    def __init__(self, request: Request, pipeline: Any, progress: Progress | None) -> None:
        known, takes_any = arguments_of(pipeline)
        asked = {
            "num_images_per_prompt": request.n,
            "num_inference_steps": request.steps,
            "guidance_scale": request.guidance,
            "negative_prompt": request.negative_prompt,
            "height": request.height,
            "width": request.width,
        }
        given = {name: value for name, value in asked.items() if value is not None}
        for name in given:
            if name not in known and not takes_any:
                raise ValueError(f"{type(pipeline).__name__} takes no {name}, which the request asks for.")
        self.arguments = {**call_defaults(request.model), **given}
        values = known | self.arguments
        if values.get("num_inference_steps") is None:
            raise ValueError(
                f"{type(pipeline).__name__} does not tell how many steps it takes; give steps, such as 20."
            )
        self.steps = values["num_inference_steps"]
        check_steps(pipeline, self.steps)
        self.has_callback = "callback_on_step_end" in known
        self.text_length = values.get("max_sequence_length")
        self.request, self.pipeline, self.progress = request, pipeline, progress
        self.method = request.configured
        steps = self.steps * ((request.compare or self.method is None) + (self.method is not None))
        # Both refuse before anything is made.
        if isinstance(self.method, SGI):
            check_scheduler(pipeline)
            steps += 0 if request.seeds else self.method.steps_to_choose(request.n, self.steps)
        elif isinstance(self.method, Intervention):
            _attach(pipeline, self.method, request.seed).remove()
        self.total, self.done = len(request.prompts) * steps, 0
        kept = (
            "n",
            "seed",
            "model",
            "revision",
            "negative_prompt",
            "height",
            "width",
            "dtype",
            "device",
            "offload",
        )
        self.settings = (
            {"format": FORMAT}
            | {name: getattr(request, name) for name in kept}
            | {
                "steps": self.steps,
                "guidance": values.get("guidance_scale"),
                "versions": _versions(),
                **_sampling(pipeline),
            }
        )

    def group(self, prompt: str) -> Group:
        """The pictures of one prompt."""
        if cut := _cut(self.pipeline, prompt, self.text_length):
            warnings.warn(f"The prompt {prompt!r} is too long: {'; '.join(cut)}.", stacklevel=3)
        compare = self.request.compare or self.method is None
        return Group(
            prompt,
            self._row(prompt, None) if compare else None,
            self._row(prompt, self.method) if self.method else None,
        )

    def _row(self, prompt: str, method: Intervention | SGI | None) -> Row:
        request, seeds = self.request, self.request.seeds
        if isinstance(method, SGI) and seeds is None:
            seeds = self._choose(prompt, method)
        with _attach(self.pipeline, method, request.seed) if isinstance(method, Intervention) else nullcontext():
            images = self._images(prompt, method, seeds or range(request.seed, request.seed + request.n))
        vendi = distance = None
        if len(images) > 1:
            from variegate.metrics import efficientnet_lite0

            vendi, distance = diversity(efficientnet_lite0()(images))
        parameters = {
            option.name: to_text(getattr(method, option.name))
            for option in (dataclasses.fields(method) if method else ())
        }
        return Row(request.method if method else "none", parameters, images, vendi, distance, seeds)

    def _choose(self, prompt: str, method: SGI) -> tuple[int, ...]:
        request, before = self.request, self.done
        with self._enough_memory():
            choice = select(
                self.pipeline,
                prompt,
                method,
                n=request.n,
                seed=request.seed,
                progress=lambda done: self._report(before + done),
                **self.arguments,
            )
        return choice.seeds

    def _images(self, prompt: str, method: Intervention | SGI | None, seeds: Sequence[int]) -> tuple[Image, ...]:
        import numpy as np
        import torch
        from PIL import Image

        request, before = self.request, self.done

        def step_end(pipe: Any, index: int, timestep: Any, tensors: Any) -> dict[str, Any]:
            self._report(before + min(index + 1, self.steps))
            return {}

        callback = {"callback_on_step_end": step_end} if self.has_callback else {}
        with self._enough_memory(), quiet(), seeded(self.pipeline, seeds):
            result = self.pipeline(
                prompt=prompt,
                generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
                output_type="np",
                **self.arguments,
                **callback,
            )
        self._report(before + self.steps)
        pixels = np.asarray(result.images)
        if not np.isfinite(pixels).all():
            wider = {"float16": "dtype='float32' or 'bfloat16'", "bfloat16": "dtype='float32'"}.get(request.dtype)
            weaker = f"weaker {request.method}" if isinstance(method, Intervention) else "lower guidance"
            raise ValueError(
                f"dtype={request.dtype!r} made pictures of {prompt!r} with values that are not finite; "
                f"nothing is kept; use {f'{wider}, or ' if wider else ''}{weaker}."
            )
        return tuple(Image.fromarray(image) for image in (pixels * 255).round().astype("uint8"))

    @contextmanager
    def _enough_memory(self) -> Iterator[None]:
        import torch

        try:
            yield
        except torch.OutOfMemoryError as error:
            raise MemoryError(
                f"n={self.request.n} pictures at once do not fit the memory of the {self.request.device} device; "
                "use a smaller n, height or width, or offload='model'."
            ) from error

    def _report(self, done: int) -> None:
        self.done = done
        if self.progress is not None:
            self.progress(done, self.total)


def diversity(features: Tensor) -> tuple[float, float]:
    """Vendi score and mean distance of a row's features `[N, D]`, to four digits, as a gallery tells them."""
    from variegate.metrics import mean_pairwise_distance, vendi_score

    return round(vendi_score(features).item(), 4), round(mean_pairwise_distance(features).item(), 4)


def _attach(pipeline: Any, intervention: Intervention, seed: int) -> Any:
    from variegate.attachment import attach

    return attach(pipeline, intervention, seed=seed)


def _cut(pipeline: Any, prompt: str, text_length: int | None) -> list[str]:
    """What each kind of tokenizer of the pipeline leaves out of the prompt."""
    found: dict[str, None] = {}
    for name, tokenizer in pipeline.components.items():
        if not name.startswith("tokenizer") or tokenizer is None:
            continue
        # max_sequence_length is for the encoders of sequences; CLIP has its own, fixed one.
        is_clip = type(tokenizer).__name__.startswith("CLIP")
        limit = min(tokenizer.model_max_length, math.inf if is_clip or not text_length else text_length)
        with quiet():
            ids = tokenizer(prompt, add_special_tokens=False).input_ids
        rest = ids[int(min(limit, 2**31)) - tokenizer.num_special_tokens_to_add() :]
        if rest:
            found[f"{type(tokenizer).__name__} takes {limit} tokens and leaves out {tokenizer.decode(rest)!r}"] = None
    return list(found)


def _sampling(pipeline: Any) -> dict[str, Any]:
    return {"scheduler": scheduler_of(pipeline), "adapters": adapters_of(pipeline)}


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {library: version(library) for library in LIBRARIES}
