"""What people do to pipelines, each a case: done to a tiny pipeline before and after `attach`, and judged.

Cells of the table:
- same: the images of the untouched pipeline with the same attachment.
- own: the case changes the images by itself. Both orders agree; an attachment that is off leaves exactly what the case
  makes alone, and one that is on changes it.
- refused: one sentence.

In every one, nothing is left after the `with` block.
"""

from __future__ import annotations

import contextlib
import functools
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from denoisers import CALLS, ROWS, tiny
from diffusers import (
    AutoPipelineForText2Image,
    ClassifierFreeGuidance,
    ContextParallelConfig,
    FasterCacheConfig,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SD3ControlNetModel,
    StableDiffusion3ControlNetPipeline,
    TaylorSeerCacheConfig,
    TextKVCacheConfig,
    WanPipeline,
)
from diffusers.hooks import apply_faster_cache
from diffusers.models import _modeling_parallel
from diffusers.modular_pipelines.stable_diffusion_3 import StableDiffusion3AutoBlocks
from peft import LoraConfig
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from tiny import generators, tiny_flux, tiny_sd3
from tiny import run as tiny_run
from variegate import ContextualRepulsion, attach

Build = Callable[[], Any]
Change = Callable[[Any], Any]
Run = Callable[[Any], Tensor]

ORDERS = ("attach first", "attach second")
IMAGES = 3
STEPS = 2
STRONG = ContextualRepulsion(strength=2.0, start=0, stop=None, blocks="all")
OFF = ContextualRepulsion(strength=2.0, start=99, stop=None, blocks="all")  # hooked, but never on
CROSSING = ContextualRepulsion(strength=2.0, start=0, stop=None, blocks="all", site="cross_attention")
ATTENTION = ContextualRepulsion(strength=2.0, start=0, stop=None, blocks="all", site="attention")
IMAGE = ContextualRepulsion(strength=2.0, start=0, stop=None, blocks="all", site="image")

run = functools.partial(tiny_run, n=IMAGES, num_inference_steps=STEPS, max_sequence_length=8)


def transformer(pipe: Any) -> Any:
    return pipe.transformer


def unchanged(pipe: Any) -> Any:
    """Nothing is done: the case lies in how the pipeline is called."""
    return pipe


@dataclass(frozen=True, eq=False)
class Case:
    """One thing that people do.

    Attributes:
        what: its name in the table.
        apply: does it, and returns the pipeline to call.
        build: makes the pipeline.
        run: calls it.
        compiles: whether graphs are made. Those of another pipeline are there before, which is never attached to.
        own: whether it changes the images by itself.
        reference: of a case that doesn't: the pipeline whose images it must have.
        plainly: how that pipeline is called.
        expected: makes the images themselves, where no pipeline does.
        refused: part of the sentence that refuses it, by order.
        intervention: what is attached.
        target: what it is attached to, of the pipeline.
        note: what a reader should know.
        other: whether the pipeline that is called is another than the one that comes first.
    """

    what: str
    apply: Change = unchanged
    build: Build = tiny_sd3
    run: Run = run
    compiles: bool = False
    own: bool = False
    reference: Change = unchanged
    plainly: Run | None = None
    expected: Callable[[Case], Tensor] | None = None
    refused: tuple[str | None, str | None] = (None, None)
    intervention: ContextualRepulsion = STRONG
    target: Change = unchanged
    note: str = ""
    other: bool = False


ANEW = "the first run with hooks compiles anew; later attachments of the same kind, and runs without one, do not"
SHARED = "blocks of a class share a graph, and those without hooks another; the edit finds its block at run time"
SKIPS = "an edit of a block that the cache skips has no effect"
FASTER = "reach its blocks, so their samples can't be told apart; switch off what splits the batch"
CALLED = "attach to the pipeline that is called: of others with the same denoiser an attachment leaves the calls alone"
SPLIT = "runs under context parallelism, which splits the tokens of a sample over devices; use tensor parallelism"

# Compilation. The backend runs the graphs as they are and counts the edits in them.

compiling = functools.partial(Case, compiles=True)
EDITS_IN_GRAPHS: list[int] = []


def counting(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    """A backend that notes how many edits a graph holds, and runs it as it is."""
    EDITS_IN_GRAPHS.append(sum("variegate.edit" in str(node.target) for node in graph.graph.nodes))
    return graph.forward


def short_sd3() -> Any:
    """Two blocks: compilation is slow."""
    pipe = tiny_sd3()
    del pipe.transformer.transformer_blocks[1:3]
    return pipe


def short_flux() -> Any:
    """A block of each kind."""
    pipe = tiny_flux()
    del pipe.transformer.transformer_blocks[1:], pipe.transformer.single_transformer_blocks[1:]
    return pipe


def compiled(**how: Any) -> Change:
    def apply(pipe: Any) -> Any:
        pipe.transformer = torch.compile(pipe.transformer, **how)
        return pipe

    return apply


def compiled_in_place(pipe: Any) -> Any:
    pipe.transformer.compile(backend=counting, fullgraph=True)
    return pipe


def compiled_blocks(pipe: Any) -> Any:
    pipe.transformer.compile_repeated_blocks(backend=counting, fullgraph=True)
    return pipe


def compiled_forward(pipe: Any) -> Any:
    pipe.transformer.forward = torch.compile(pipe.transformer.forward, backend=counting, fullgraph=True)
    return pipe


def one_compiled_block(pipe: Any) -> Any:
    """As some do by hand; here the block, not the denoiser, is wrapped."""
    blocks = pipe.transformer.transformer_blocks
    blocks[0] = torch.compile(blocks[0], backend=counting, fullgraph=True)
    return pipe


# Memory.


def offloaded(pipe: Any) -> Any:
    pipe.enable_model_cpu_offload(device="cpu")
    return pipe


def offloaded_sequentially(pipe: Any) -> Any:
    """The call of `enable_sequential_cpu_offload`, for the denoiser alone: T5's weights do not survive it on a CPU."""
    cpu_offload(pipe.transformer, torch.device("cpu"), offload_buffers=True)
    return pipe


def offloaded_by_group(kind: str) -> Change:
    def apply(pipe: Any) -> Any:
        pipe.transformer.enable_group_offload(torch.device("cpu"), offload_type=kind, num_blocks_per_group=1)
        return pipe

    return apply


def cast_by_layer(pipe: Any) -> Any:
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    return pipe


def rounded(pipe: Any) -> Any:
    """The weights that `cast_by_layer` computes with."""
    stored = cast_by_layer(tiny_sd3()).transformer
    for ours, theirs in zip(pipe.transformer.parameters(), stored.parameters(), strict=True):
        ours.data = theirs.data.float()
    return pipe


def quantised(pipe: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.ao.quantization.quantize_dynamic(pipe.transformer, {nn.Linear}, dtype=torch.qint8, inplace=True)
    return pipe


def quantised_by_torchao(pipe: Any) -> Any:
    quantize_(pipe.transformer, Int8WeightOnlyConfig(version=2))
    return pipe


# Adapters and guidance.


def with_lora(pipe: Any) -> Any:
    config = LoraConfig(r=2, target_modules=["to_q", "to_v", "add_k_proj"], init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe.transformer.add_adapter(config)
    return pipe


def with_fused_lora(pipe: Any) -> Any:
    with_lora(pipe).transformer.fuse_lora()
    return pipe


def weights(*shape: int) -> Tensor:
    return 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(5))


def with_ip_adapter(pipe: Any) -> Any:
    width = pipe.transformer.inner_dim
    layers = {}
    for block in range(len(pipe.transformer.transformer_blocks)):
        for name in ("to_k_ip", "to_v_ip"):
            layers |= {f"{block}.{name}.weight": weights(width, width), f"{block}.{name}.bias": weights(width)}
    projection = {"proj.weight": weights(4 * width, 8), "proj.bias": weights(4 * width)}
    projection |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    state = {"image_proj": projection, "ip_adapter": layers}
    pipe.load_ip_adapter(state, weight_name="", image_encoder_pretrained_model_name_or_path=None)
    return pipe


def run_with_ip_adapter(pipe: Any) -> Tensor:
    if getattr(pipe.transformer, "encoder_hid_proj", None) is None:
        return run(pipe)
    picture = [weights(1, 1, 8)]
    return run(pipe, ip_adapter_image_embeds=picture, negative_ip_adapter_image_embeds=picture)


def with_control_net(pipe: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = SD3ControlNetModel.from_transformer(pipe.transformer, num_layers=2, num_extra_conditioning_channels=0)
    for parameter in net.parameters():
        if not parameter.any():
            parameter.data = 0.1 * weights(*parameter.shape)
    return quiet(StableDiffusion3ControlNetPipeline(**pipe.components, controlnet=net))


def run_with_control_net(pipe: Any) -> Tensor:
    if not hasattr(pipe, "controlnet"):
        return run(pipe)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the image's code is a sample
        return run(pipe, control_image=torch.full((1, 3, 16, 16), 0.5))


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def with_perturbed_attention(pipe: Any) -> Any:
    return quiet(AutoPipelineForText2Image.from_pipe(pipe, enable_pag=True, pag_applied_layers=["blocks.1"]))


def run_skipping_a_layer(pipe: Any) -> Tensor:
    skipped = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    return run(pipe, **skipped, skip_layer_guidance_scale=50.0)


# Caches.


def cached(make: Callable[[], Any]) -> Change:
    def apply(pipe: Any) -> Any:
        pipe.transformer.enable_cache(make())
        return pipe

    return apply


def always() -> dict[str, Any]:
    """Settings of a cache that is used at every second step, whatever the time."""
    return {
        "spatial_attention_block_skip_range": 2,
        "spatial_attention_timestep_skip_range": (-1, 1001),
        "current_timestep_callback": lambda: 500,
    }


def cached_faster(pipe: Any) -> Any:
    """With the rows of both guidance branches in one batch, it drops one branch inside the denoiser."""
    inputs = ["hidden_states", "encoder_hidden_states", "timestep", "pooled_projections"]
    config = FasterCacheConfig(
        **always(),
        unconditional_batch_skip_range=2,
        unconditional_batch_timestep_skip_range=(-1, 1001),
        tensor_format="BCHW",
        attention_weight_callback=lambda module: 0.5,
        _unconditional_conditional_input_kwargs_identifiers=inputs,
    )
    apply_faster_cache(pipe.transformer, config)
    return pipe


def cached_faster_distilled(pipe: Any) -> Any:
    settings = always() | {
        "spatial_attention_timestep_skip_range": (-1, 900),  # the first step has to be computed
        "current_timestep_callback": lambda: pipe.current_timestep,
    }
    pipe.transformer.enable_cache(
        FasterCacheConfig(**settings, is_guidance_distilled=True, attention_weight_callback=lambda module: 0.5)
    )
    return pipe


# Parallelism.


def split_tokens(pipe: Any) -> Any:
    """What `enable_parallelism` records on the denoiser; the call itself asks for accelerators."""
    config = _modeling_parallel.ParallelConfig(context_parallel_config=ContextParallelConfig(ulysses_degree=2))
    pipe.transformer._parallel_config = config
    return pipe


# Other ways to call.


def bare(name: str, **changes: Any) -> Build:
    """A denoiser alone; a namespace holds it, so that `transformer` can be replaced as in a pipeline."""
    return lambda: SimpleNamespace(transformer=tiny(name, **changes))


# Of a U-Net, whose compilation is slow.
SHALLOW = {
    "block_out_channels": (8,), "down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)
}  # fmt: skip


def run_bare(pipe: Any) -> Tensor:
    """Two steps of one call."""
    call = CALLS[type(getattr(pipe.transformer, "_orig_mod", pipe.transformer)).__name__]()
    steps = [call | {"timestep": torch.full((ROWS,), timestep)} for timestep in (0.9, 0.4)]
    with torch.no_grad():
        return torch.cat([pipe.transformer(**step, return_dict=False)[0] for step in steps])


def run_backwards(pipe: Any) -> Tensor:
    """Output of a step and its gradient by the latents."""
    call = CALLS[type(pipe.transformer).__name__]()
    latents = call["hidden_states"].requires_grad_()
    output = pipe.transformer(**call, return_dict=False)[0]
    (gradient,) = torch.autograd.grad(output.square().sum(), latents)
    return torch.cat([output.detach(), gradient])


def checkpointed(pipe: Any) -> Any:
    pipe.transformer.enable_gradient_checkpointing()
    return pipe


def run_in_inference_mode(pipe: Any) -> Tensor:
    with torch.inference_mode():
        return run(pipe)


def run_two_prompts(pipe: Any) -> Tensor:
    return run(pipe, ["a cat", "a dog"], n=2)


def run_each_prompt(pipe: Any) -> Tensor:
    return torch.cat([run(pipe, "a cat", n=2), run(pipe, "a dog", n=2, seed=2)])


def run_with_callback(pipe: Any) -> Tensor:
    def halve(pipe: Any, index: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"latents": tensors["latents"] / 2}

    return run(pipe, callback_on_step_end=halve)


def run_after_an_interrupt(pipe: Any) -> Tensor:
    """The images of the run after one that was interrupted."""

    def interrupt(pipe: Any, index: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        pipe._interrupt = True
        return tensors

    run(pipe, callback_on_step_end=interrupt)
    return run(pipe)


def with_another_backend(pipe: Any) -> Any:
    pipe.transformer.set_attention_backend("_native_math")
    return pipe


def from_pipe(pipe: Any) -> Any:
    run(pipe, num_inference_steps=2 * STEPS)  # what the first pipeline has done must not matter to the second
    return quiet(AutoPipelineForText2Image.from_pipe(pipe))


def modular(guider: Callable[[], Any]) -> Change:
    def apply(pipe: Any) -> Any:
        new = StableDiffusion3AutoBlocks().init_pipeline()
        new.update_components(guider=guider(), **{k: v for k, v in pipe.components.items() if k in new.component_names})
        return quiet(new)

    return apply


def run_modular(pipe: Any) -> Tensor:
    if not hasattr(pipe, "guider"):
        return run(pipe)
    call = {"num_inference_steps": STEPS, "max_sequence_length": 8, "num_images_per_prompt": IMAGES}
    return pipe(prompt="a cat", generator=generators(range(IMAGES)), output="latents", **call)


def two_stages() -> WanPipeline:
    """One denoiser for high noise, another for low."""
    first, second = tiny("WanTransformer3DModel"), tiny("WanTransformer3DModel")
    return quiet(
        WanPipeline(
            transformer=first, transformer_2=second, boundary_ratio=0.5, scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=None, text_encoder=None, tokenizer=None,
        )
    )  # fmt: skip


def run_video(pipe: Any) -> Tensor:
    text = weights(2, 5, 16)
    return pipe(
        prompt_embeds=text[:1].repeat(IMAGES, 1, 1), negative_prompt_embeds=text[1:].repeat(IMAGES, 1, 1),
        height=64, width=64, num_frames=1, num_inference_steps=4, generator=generators(range(IMAGES)),
        output_type="latent",
    ).frames  # fmt: skip


def two_branches() -> SimpleNamespace:
    """One denoiser for the prompt, another for the other branch, and a scheduler: what `attach` looks at."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    first, second = tiny("Ideogram4Transformer2DModel"), tiny("Ideogram4Transformer2DModel")
    return SimpleNamespace(transformer=first, unconditional_transformer=second, scheduler=scheduler)


def run_both(pipe: Any) -> Tensor:
    pipe.scheduler.set_timesteps(1)
    call = CALLS["Ideogram4Transformer2DModel"]()
    with torch.no_grad():
        return torch.cat([d(**call, return_dict=False)[0] for d in (pipe.transformer, pipe.unconditional_transformer)])


def both_alone(*names: str) -> Callable[[Case], Tensor]:
    """The images with an attachment on each denoiser, which are not those with one alone."""

    def expected(case: Case) -> Tensor:
        pipe = case.build()
        one, other = (attach(getattr(pipe, name), case.intervention) for name in names)
        both = case.run(pipe)
        one.remove()
        assert not close(case.run(pipe), both)
        other.remove()
        return both

    return expected


CASES = (
    compiling("`torch.compile(pipe.transformer)`", compiled(backend=counting), short_sd3, note=ANEW),
    compiling(
        "`torch.compile(pipe.transformer, fullgraph=True)`", compiled(backend=counting, fullgraph=True), short_flux
    ),
    compiling("`pipe.transformer.compile(fullgraph=True)`", compiled_in_place, short_sd3),
    compiling(
        "the same, PixArt",
        compiled_in_place,
        bare("PixArtTransformer2DModel"),
        run_bare,
        intervention=CROSSING,
        target=transformer,
    ),
    compiling(
        "the same, Qwen-Image", compiled_in_place, bare("QwenImageTransformer2DModel"), run_bare, target=transformer
    ),
    compiling(
        "the same, a U-Net",
        compiled_in_place,
        bare("UNet2DConditionModel", **SHALLOW),
        run_bare,
        intervention=CROSSING,
        target=transformer,
    ),
    compiling("`pipe.transformer.compile_repeated_blocks(fullgraph=True)`", compiled_blocks, short_flux),
    compiling(
        'the same, `site="attention"` of some blocks',
        compiled_blocks,
        tiny_flux,
        intervention=replace(ATTENTION, blocks=(1, 2)),  # the second of the dual-stream blocks, the first of the others
        note=SHARED,
    ),
    compiling(
        'the same, Wan, `site="cross_attention"` of the last block',
        compiled_blocks,
        bare("WanTransformer3DModel"),
        run_bare,
        intervention=replace(CROSSING, blocks=(1,)),
        target=transformer,
    ),
    compiling(
        'the same, Kandinsky 5, `site="cross_attention"` of the first block',
        compiled_blocks,
        bare("Kandinsky5Transformer3DModel"),
        run_bare,
        intervention=replace(CROSSING, blocks=(0,)),
        target=transformer,
    ),
    compiling("`pipe.transformer.forward = torch.compile(pipe.transformer.forward)`", compiled_forward, short_sd3),
    compiling("`torch.compile` of a block, put back into its list", one_compiled_block, short_sd3),
    compiling('the same, `site="attention"`', one_compiled_block, short_sd3, intervention=ATTENTION),
    Case("`enable_model_cpu_offload`", offloaded, note="run with the CPU as the device"),
    Case(
        "`enable_sequential_cpu_offload`",
        offloaded_sequentially,
        note="run for the denoiser, with the CPU as the device",
    ),
    Case("`enable_group_offload`, by block", offloaded_by_group("block_level"), note="run with the CPU as the device"),
    Case("`enable_group_offload`, by leaf", offloaded_by_group("leaf_level"), note="run with the CPU as the device"),
    Case("`enable_layerwise_casting` to fp8", cast_by_layer, reference=rounded),
    Case("int8 weights (`torch.ao.quantization.quantize_dynamic`)", quantised, own=True),
    Case("int8 weights (torchao)", quantised_by_torchao, own=True),
    Case("LoRA", with_lora, own=True),
    Case("LoRA, fused", with_fused_lora, own=True),
    Case("IP-Adapter", with_ip_adapter, tiny_flux, run_with_ip_adapter, own=True),
    Case("ControlNet", with_control_net, run=run_with_control_net, own=True, note=CALLED, other=True),
    Case(
        "perturbed-attention guidance (`enable_pag=True`)",
        with_perturbed_attention,
        own=True,
        note=CALLED,
        other=True,
    ),
    Case("skip-layer guidance", run=run_skipping_a_layer, plainly=run, own=True),
    Case(
        "`FirstBlockCacheConfig`",
        cached(lambda: FirstBlockCacheConfig(threshold=10.0)),
        tiny_flux,
        own=True,
        note=SKIPS,
    ),
    Case(
        "`MagCacheConfig`",
        cached(
            lambda: MagCacheConfig(threshold=10.0, mag_ratios=[1.0, 1.0], num_inference_steps=2, retention_ratio=0.0)
        ),
        tiny_flux,
        own=True,
        note=SKIPS,
    ),
    Case(
        "`PyramidAttentionBroadcastConfig`",
        cached(lambda: PyramidAttentionBroadcastConfig(**always())),
        tiny_flux,
        own=True,
    ),
    Case(
        "`TaylorSeerCacheConfig`",
        cached(lambda: TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1)),
        tiny_flux,
        own=True,
    ),
    Case(
        "`TextKVCacheConfig`",
        cached(TextKVCacheConfig),
        bare("NucleusMoEImageTransformer2DModel"),
        run_bare,
        intervention=IMAGE,
        target=transformer,
    ),
    Case("`FasterCacheConfig(is_guidance_distilled=True)`", cached_faster_distilled, tiny_flux, own=True),
    Case("`FasterCacheConfig`, guidance in one batch", cached_faster, refused=(FASTER, FASTER)),
    Case("`set_attention_backend`", with_another_backend),
    Case("`torch.inference_mode`", run=run_in_inference_mode, plainly=run),
    Case("gradient checkpointing", checkpointed, bare("SD3Transformer2DModel"), run_backwards, target=transformer),
    Case("context parallelism", split_tokens, tiny_flux, refused=(SPLIT, SPLIT)),
    Case("several prompts, a generator an image", run=run_two_prompts, plainly=run_each_prompt),
    Case("`callback_on_step_end` that changes the latents", run=run_with_callback, plainly=run, own=True),
    Case("a run that was interrupted (`pipe._interrupt`)", run=run_after_an_interrupt, plainly=run),
    Case("`AutoPipelineForText2Image.from_pipe`", from_pipe, note=CALLED, other=True),
    Case(
        "modular pipeline, `ClassifierFreeGuidance`",
        modular(ClassifierFreeGuidance),
        run=run_modular,
        own=True,
        note=CALLED,
        other=True,
    ),
    Case("a bare transformer", run=run, target=transformer),
    Case(
        "`transformer` and `transformer_2`",
        build=two_stages,
        run=run_video,
        intervention=CROSSING,
        expected=both_alone("transformer", "transformer_2"),
    ),
    Case(
        "`transformer` and `unconditional_transformer`",
        build=two_branches,
        run=run_both,
        expected=both_alone("transformer", "unconditional_transformer"),
    ),
)

UNTESTED = {
    "CUDA graphs": "no GPU; the edit's operator is tagged `cudagraph_unsafe`, so that graphs are cut around it",
    "the inductor backend": "a minute of C++ compilation; tried by hand with torch 2.13: the same, in both orders",
    "options of `torch.compile` that skip guards": "guards tell a graph made without hooks from one with them",
    "offloading to an accelerator": "no GPU; the same hooks run above with the CPU as the device",
    "bitsandbytes, GGUF": "need a GPU, or a checkpoint in that format; they change linear layers only",
    "`SeaCacheConfig`": "needs a pipeline that tells `cache_context` its step",
    "modular pipelines with `SkipLayerGuidance`": "on SD3 it fails in diffusers 0.42.1 itself, with nothing attached",
    "tensor parallelism": "needs several accelerators; it splits weights, not tokens",
}


def close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-3, atol=1e-3)


def hook_count(pipe: Any) -> int:
    """Hooks on the denoisers."""
    denoisers = [pipe.transformer, getattr(pipe, "transformer_2", None) or nn.Identity()]
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for d in denoisers for m in d.modules())


def own_forwards(pipe: Any) -> int:
    """Modules of the denoiser whose `forward` is not simply that of their class."""
    return sum("forward" in vars(module) for module in pipe.transformer.modules())


@functools.cache
def reference(case: Case) -> tuple[Tensor, Tensor]:
    """The images without and with an attachment where nothing was done."""
    pipe, plainly = case.reference(case.build()), case.plainly or case.run
    stock = plainly(pipe)
    if case.expected:
        return stock, case.expected(case)
    with attach(case.target(pipe), case.intervention):
        return stock, plainly(pipe)


@functools.cache
def attached(case: Case, order: str, intervention: ContextualRepulsion) -> tuple[Tensor, Tensor, list[int]]:
    """The images during and after an attachment, and the edits in each graph that was compiled."""
    torch.compiler.reset()
    EDITS_IN_GRAPHS.clear()
    other = case.apply(case.build()) if case.compiles else None
    alone = case.run(other) if other else None
    pipe = case.build()
    if order == "attach first":
        attachment = attach(case.target(pipe), intervention)
        pipe = case.apply(pipe)
    else:
        pipe = case.apply(pipe)
        case.run(pipe)  # what is compiled or set up at the first call is there before the hooks
        attachment = attach(case.target(pipe), intervention)
    with warnings.catch_warnings():
        if intervention.start or case.other:  # that nothing happened is what the case is about
            warnings.simplefilter("ignore", UserWarning)
        with attachment:
            during = case.run(pipe)
            if other:
                assert torch.equal(case.run(other), alone), "another pipeline is changed"
                assert torch.equal(case.run(pipe), during), "another pipeline changes what is attached"
    clean = case.apply(case.build())
    assert hook_count(pipe) == hook_count(clean), "a hook is left"
    assert own_forwards(pipe) == own_forwards(clean), "a mark is left"
    return during, case.run(pipe), list(EDITS_IN_GRAPHS)


def refusal(case: Case, order: str, sentence: str) -> str:
    """The whole sentence that a case is refused with."""
    pipe = case.build()
    before = hook_count(pipe)
    if order == "attach first":
        case.run(pipe)

    def use() -> None:
        with contextlib.ExitStack() as stack:
            if order == "attach first":
                stack.enter_context(attach(case.target(pipe), case.intervention))
            changed = case.apply(pipe)
            if order == "attach second":
                stack.enter_context(attach(case.target(changed), case.intervention))
            case.run(changed)

    with pytest.raises(ValueError, match=re.escape(sentence)) as caught:
        use()
    assert hook_count(pipe) == before, "a hook is left"
    return str(caught.value)


@functools.cache
def judge(case: Case, order: str) -> tuple[str, str]:
    """The cell of the table, and the note; raises AssertionError where the case is not what it says."""
    sentence = case.refused[ORDERS.index(order)]
    if sentence:
        return "refused", refusal(case, order, sentence)
    (stock, expected), (during, after, _) = reference(case), attached(case, order, case.intervention)
    if case.other and order == "attach first":
        assert torch.equal(during, case.run(case.apply(case.build()))), "what is attached to one acts on another"
        return "stock", case.note
    if not case.own:
        assert not close(expected, stock), "the attachment does nothing"
        assert close(during, expected), "other images than those of the eager run"
        assert close(after, stock), "not back to stock"
        return "same", case.note
    alone = case.run(case.apply(case.build()))
    assert not close(alone, stock), "the case does nothing"
    assert not close(during, alone), "the attachment does nothing"
    orders = [other for other, refused in zip(ORDERS, case.refused, strict=True) if not refused]
    orders = orders[-1:] if case.other else orders
    assert all(close(during, attached(case, other, case.intervention)[0]) for other in orders), "the orders differ"
    assert torch.equal(after, alone), "not back to what the case makes alone"
    assert torch.equal(attached(case, order, OFF)[0], alone), "off is not off"
    return "own", case.note
