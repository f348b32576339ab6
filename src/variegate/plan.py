"""What an attachment does with one denoiser, before and after it runs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from variegate.architectures import Architecture
from variegate.architectures.layout import unwrapped
from variegate.caches import uncached
from variegate.call import POOLED, DenoiserCall
from variegate.clock import Clock
from variegate.compiled import Mark
from variegate.effects import Effects
from variegate.gradients import refuse_backward
from variegate.intervention import ConditionIntervention, Intervention, PreviewIntervention
from variegate.noise import Start
from variegate.prediction_edits import PredictionEdits
from variegate.token_edits import TokenEdits, blocks_of


class Plan:
    """The interventions on one denoiser.

    Args:
        outer: the denoiser, or what torch.compile made of it.
        architecture: its record; None: that of the table.
        interventions: in the order they act.
        clock: shared by the denoisers of a pipeline.
        start: what the pipeline starts from, likewise.
        seed: of random numbers.
        effects: what the interventions have done.
        warn: what to do with a warning.
        here: whether the denoiser is called for the target of the attachment.
        stray: what to do where it is not.

    Raises:
        ValueError: if the class is unknown, or lacks the site or the blocks that an intervention asks for.
    """

    def __init__(
        self,
        outer: nn.Module,
        architecture: Architecture | None,
        interventions: Sequence[Intervention],
        clock: Clock,
        start: Start,
        seed: int,
        effects: Effects,
        warn: Callable[[str], None],
        here: Callable[[], bool],
        stray: Callable[[nn.Module], None],
    ) -> None:
        self.outer, self._start, self._effects, self._warn = outer, start, effects, warn
        self._here, self._stray = here, stray
        denoiser = unwrapped(outer)
        _refuse_split_tokens(denoiser)
        self._call = DenoiserCall(denoiser, architecture, interventions, clock, seed)
        self.tokens = TokenEdits(self._call, start, effects, here)
        self.predictions = PredictionEdits(self._call, effects)

    def __reduce__(self) -> tuple[Callable[[], Plan], tuple[()]]:
        """Its hooks on copies and pickles of the denoiser do nothing."""
        return _idle, ()

    def fits(self, outer: nn.Module) -> bool:
        """Whether its hooks are where a denoiser runs: it is the same one, with the same blocks."""
        return outer is self.outer and self.tokens.blocks == blocks_of(self._call)

    def marks(self) -> list[Mark]:
        """Mark the modules that get hooks, so that graphs made without them are not taken for those with them."""
        denoiser, *parts = [Mark(module) for module in (self._call.denoiser, *dict(self.tokens.hooks()))]
        # The denoiser's own hooks run outside of its graph, unless its caller is compiled.
        if not all(mark.tells for mark in parts) and self._is_compiled():
            torch.compiler.reset()
        return [denoiser, *parts]

    def _is_compiled(self) -> bool:
        """Whether the denoiser or one of its modules is compiled."""
        return any(
            module._compiled_call_impl is not None  # module.compile()
            or hasattr(module.forward, "_torchdynamo_orig_callable")  # torch.compile(module), or of module.forward
            for module in self.outer.modules()
        )

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch does not annotate it
    def see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before any attachment edits what the denoiser is given."""
        if self._here():
            self._call.note_prompts(args, kwargs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch does not annotate it
    def begin(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before the denoiser runs: read the clock, find the places of the tokens, edit noise and condition."""
        if not self._here():
            self._stray(self.outer)
            return None
        call = self._call
        _refuse_split_tokens(call.denoiser)
        refuse_backward(call.denoiser)
        call.read(args, kwargs)
        self._effects.see(call.step, call.latents, call.clock.pipeline is None)
        self.tokens.begin()
        alone = [i for i in call.interventions if i.needs_company and i.active(call.step)]
        if alone and all(len(samples.rows) == 1 for samples in call.step.sets):
            self._warn(
                "Every prompt has a single image, so there is nothing to push it away from: the images are those of "
                "the stock pipeline. Ask for more, e.g. num_images_per_prompt=4."
            )
            self._effects.settle(*alone)
        for intervention in call.interventions if call.step.index == 0 else ():
            start, stop = intervention.window(call.step.total)
            if stop <= start:
                self._warn(
                    f"{type(intervention).__name__} acts in no step: start={intervention.start} and "
                    f"stop={intervention.stop} of {call.step.total} steps leave none; give both as steps, or both as "
                    "fractions of the run."
                )
                self._effects.settle(intervention)
        changed = self._preview(args, kwargs) | self._conditions()
        return call.replaced(args, kwargs, changed) if changed else None

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch does not annotate it
    def end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """After the denoiser has run: edit its prediction."""
        if not self._here():
            return None
        self._effects.completed = True
        return self.predictions(output)

    def _preview(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Edit the noise of a run that is about to begin, in the pipeline's own tensor; the denoiser's new latents."""
        call = self._call
        previewing = call.active(PreviewIntervention)
        latents, self._start.latents = self._start.latents, None  # a run begins once, whatever calls its first step has
        if not previewing or latents is None:
            return {}
        name, given, images = call.architecture.latents, call.latents, len(latents)

        def copies(noise: Tensor) -> Tensor:
            """A copy for each branch, as the denoiser was given."""
            return torch.cat([noise] * max(1, len(given) // images)).to(given)

        if not isinstance(given, Tensor) or not torch.equal(copies(latents), given):
            raise ValueError(
                f"{type(previewing[0]).__name__} needs a denoiser that is given the pipeline's latents as they are, "
                f"but {type(call.clock.pipeline).__name__} changes them first."
            )

        def preview(rows: Sequence[tuple[int, ...]], noise: Tensor) -> Tensor:
            index = torch.tensor(rows, device=noise.device)
            whole = latents.to(noise.dtype).index_put((index % images,), noise)
            new_args, new_kwargs = call.replaced(args, kwargs, {name: copies(whole)})
            output = self.outer.forward(*new_args, **new_kwargs)  # not a call, which would come back here
            first = output if isinstance(output, Tensor) else output[0]
            if first.shape != given.shape:
                raise ValueError(
                    f"{type(previewing[0]).__name__} needs predictions in the shape of the latents, but "
                    f"{call.architecture.denoiser} makes {list(first.shape)} of {list(given.shape)}."
                )
            return call.moment(rows).images(call.architecture.sign * first[index].to(noise.dtype), noise)

        new = latents.clone()
        with self.tokens.silent(), uncached(self.outer):
            for intervention in previewing:
                for rows in call.batches(intervention):
                    index = torch.tensor(rows, device=latents.device) % images
                    noise = self._effects.apply(intervention, new[index].float(), functools.partial(preview, rows))
                    new[index] = noise.to(new.dtype)
        latents.copy_(new)
        return {name: copies(new)}

    def _conditions(self) -> dict[str, Any]:
        """The embeddings that interventions have changed, by argument name."""
        call = self._call
        changed: dict[str, Any] = {}
        for intervention in call.active(ConditionIntervention):
            for name in (call.architecture.text, *POOLED):
                given = changed.get(name, call.arguments.get(name))
                if given is not None:
                    new = list(given) if isinstance(given, list) else given.clone()
                    for rows in call.batches(intervention):
                        old = torch.stack([torch.stack([given[row] for row in samples]) for samples in rows])
                        edited = self._effects.apply(intervention, old, call.moment(rows))
                        for samples, values in zip(rows, edited, strict=True):
                            for row, value in zip(samples, values, strict=True):
                                new[row] = value
                    changed[name] = new
        return changed


def _idle() -> Plan:
    plan = object.__new__(Plan)
    plan.outer, plan._here, plan._stray = nn.Identity(), lambda: False, lambda denoiser: None
    return plan


def _refuse_split_tokens(denoiser: nn.Module) -> None:
    config = getattr(denoiser, "_parallel_config", None)
    if getattr(config, "context_parallel_config", None) is not None:
        raise ValueError(
            f"{type(denoiser).__name__} runs under context parallelism, which splits the tokens of a sample over "
            "devices; use tensor parallelism, or spread the prompts over the devices."
        )
