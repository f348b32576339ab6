"""Runs of our own beside diffusers' caches: previews of noise, and blocks that run twice."""

from __future__ import annotations

import diffusers.hooks
import pytest
import torch
from cases import always
from diffusers.hooks import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    HookRegistry,
    MagCacheConfig,
    ModelHook,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)

from tiny import run, tiny_flux
from variegate import CNO, FeatureSelfGuidance, attach
from variegate.caches import _CACHES, uncached

CACHES = {
    "first block": lambda pipe: FirstBlockCacheConfig(threshold=0.5),
    "mag": lambda pipe: MagCacheConfig(
        threshold=10.0, mag_ratios=[1.0] * 3, num_inference_steps=3, retention_ratio=0.0, max_skip_steps=1
    ),
    "taylor": lambda pipe: TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1),
    "broadcast": lambda pipe: PyramidAttentionBroadcastConfig(**always()),
    "faster": lambda pipe: FasterCacheConfig(
        **always()
        | {
            "spatial_attention_timestep_skip_range": (-1, 900),
            "current_timestep_callback": lambda: pipe.current_timestep,
        },
        is_guidance_distilled=True,
        attention_weight_callback=lambda module: 0.5,
    ),
}
METHOD = CNO(strength=0.3)


def started_from(pipe) -> torch.Tensor:
    """The noise that CNO makes of the pipeline's, without a cache."""
    seen = []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["hidden_states"].clone()), with_kwargs=True
    )
    with attach(pipe, METHOD):
        handle.remove()
        handle = pipe.transformer.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["hidden_states"].clone()), with_kwargs=True
        )
        run(pipe)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("name", CACHES)
def test_previews_run_without_a_cache_and_leave_it_as_it_was(name):
    pipe = tiny_flux()
    plain, noise = run(pipe), started_from(pipe)
    pipe.transformer.enable_cache(CACHES[name](pipe))
    stock, expected = run(pipe), run(pipe, latents=noise)
    assert not torch.equal(stock, plain)  # it does answer for blocks
    with attach(pipe, METHOD):
        assert torch.equal(run(pipe), expected)
        assert torch.equal(run(pipe), expected)
    assert torch.equal(run(pipe), stock)


@pytest.mark.parametrize("method", [METHOD, FeatureSelfGuidance(blocks=[0], low=0.0)], ids=["CNO", "FSG"])
@pytest.mark.parametrize(
    "config",
    [FirstBlockCacheConfig(threshold=0.0), TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=3)],
    ids=["first block", "taylor"],
)
def test_beside_a_cache_that_never_answers_a_method_is_what_it_is_alone(method, config):
    pipe = tiny_flux()
    with attach(pipe, method):
        expected = run(pipe)
    pipe.transformer.enable_cache(config)
    with attach(pipe, method):
        assert torch.equal(run(pipe), expected)


class Doubling(ModelHook):
    """A hook that is no cache."""

    def post_forward(self, module, output):
        return 2 * output


def test_other_hooks_go_on():
    module = torch.nn.Linear(2, 2)
    HookRegistry.check_if_exists_or_initialize(module).register_hook(Doubling(), "doubling")
    given = torch.ones(1, 2)
    doubled = module(given)
    with uncached(module):
        assert torch.equal(module(given), doubled)


def test_a_cache_is_back_after_an_error():
    pipe = tiny_flux()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.5))
    stock = run(pipe)
    with pytest.raises(KeyboardInterrupt), uncached(pipe.transformer):
        raise KeyboardInterrupt
    assert torch.equal(run(pipe), stock)


def test_every_cache_of_diffusers_is_known():
    configs = [x for name, x in vars(diffusers.hooks).items() if name.endswith(("CacheConfig", "BroadcastConfig"))]
    assert configs
    assert all(_CACHES.fullmatch(config.__module__) for config in configs)
