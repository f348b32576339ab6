"""Choosing among seeds: solvers against every subset, previews against the scheduler's own numbers, whole runs."""

from __future__ import annotations

import itertools
import json
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Pipeline,
)

from pipelines import stable_diffusion_xl
from tiny import generators, tiny_flux, tiny_sd3
from variegate import SGI, Request, generate, select
from variegate.gallery import read_recipe
from variegate.generation import replay
from variegate.metrics import efficientnet_lite0, mean_pairwise_distance
from variegate.selection import sgi, solvers
from variegate.selection.preview import previews

STEPS = 3
CALL = {"num_inference_steps": STEPS}
BUILDERS = {"sd3": tiny_sd3, "flux": tiny_flux}


@pytest.fixture(scope="module", params=BUILDERS)
def pipe(request):
    return BUILDERS[request.param]()


@pytest.fixture(scope="module")
def extract():
    return efficientnet_lite0()


def stock(pipe, seeds, **call):
    return pipe("a cat", num_images_per_prompt=len(seeds), generator=generators(seeds), **CALL, **call).images


def rows(pipe):
    """Counts the rows of the denoiser's calls."""
    counts = []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: counts.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    return counts, handle


# Solvers.


def instance(seed, items, channels=6):
    random = np.random.default_rng(seed)
    features = random.normal(size=(items, channels)) + 0.5
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    d = 1.5 * (1 - features @ features.T)
    np.fill_diagonal(d, 0)
    return random.normal(size=items) * 0.2, d


def best(u, d, count):
    """The best value by looking at every subset."""
    subsets = map(list, itertools.combinations(range(len(u)), count))
    return max(
        sum(u[i] for i in subset) + sum(d[i, j] for i, j in itertools.combinations(subset, 2)) for subset in subsets
    )


@pytest.mark.parametrize(("items", "count"), [(2, 1), (5, 1), (6, 3), (9, 4), (9, 8), (9, 9), (12, 5)])
def test_the_exact_solver_finds_the_best_of_all_subsets(items, count):
    for seed in range(5):
        u, d = instance(seed, items)
        subset = solvers.exact(u, d, count)
        assert len(set(subset.tolist())) == count
        assert solvers.value(u, d, subset) == pytest.approx(best(u, d, count), abs=1e-9)


def test_the_exact_solver_takes_negative_distances():
    u, d = instance(3, 8)
    subset = solvers.exact(u, -d, 3)
    assert solvers.value(u, -d, subset) == pytest.approx(best(u, -d, 3), abs=1e-9)


@pytest.mark.parametrize(("items", "count"), [(10, 4), (12, 3), (14, 7)])
def test_exchanges_improve_on_greedy_choices_and_come_within_two_percent_of_the_best(items, count):
    better = 0
    for seed in range(20):
        u, d = instance(seed, items)
        plain = solvers.greedy(u, d, count, 0)
        swapped = solvers.swap(u, d, plain)
        before, after = solvers.value(u, d, plain), solvers.value(u, d, swapped)
        assert len(set(swapped.tolist())) == count
        assert after >= before
        better += after > before
        assert best(u, d, count) >= solvers.value(u, d, solvers.approximate(u, d, count)) - 1e-9
        assert solvers.value(u, d, solvers.approximate(u, d, count)) >= max(after, 0.98 * best(u, d, count)) - 1e-9
    assert better


def test_after_the_exchanges_none_is_left_that_gains():
    u, d = instance(1, 30)
    subset = solvers.swap(u, d, np.arange(10))
    value = solvers.value(u, d, subset)
    for place, new in itertools.product(range(10), set(range(30)) - set(subset.tolist())):
        other = subset.copy()
        other[place] = new
        assert solvers.value(u, d, other) <= value + 1e-9


def test_equal_candidates_are_taken_in_order():
    nothing = np.zeros(6), np.zeros((6, 6))
    assert solvers.approximate(*nothing, 3).tolist() == [0, 1, 2]
    assert solvers.approximate(*nothing, 6).tolist() == [0, 1, 2, 3, 4, 5]


# Previews.


def foreseen(pipe, seeds, step):
    """x_t - t v of a step, from what a stock run gives its scheduler."""
    seen, take = [], pipe.scheduler.step

    def watch(prediction, timestep, latents, **kwargs):
        seen.append(latents - pipe.scheduler.sigmas[len(seen)] * prediction)
        return take(prediction, timestep, latents, **kwargs)

    pipe.scheduler.step = watch
    try:
        stock(pipe, seeds, output_type="latent")
    finally:
        del pipe.scheduler.step
    return seen[step - 1]


def decoded(pipe, latents):
    """Pictures of latents, by a run whose only step has them as its result."""

    def put(pipe, index, timestep, tensors):
        return {"latents": latents}

    return stock(pipe, range(len(latents)), callback_on_step_end=put)


def check_preview(pipe, step):
    images = previews(pipe, "a cat", range(2), step, **CALL)
    expected = decoded(pipe, foreseen(pipe, range(2), step))
    for one, other in zip(images, expected, strict=True):
        np.testing.assert_allclose(np.asarray(one, int), np.asarray(other, int), atol=1)
    return images


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_preview_is_what_the_denoiser_foresees(pipe, step):
    images = check_preview(pipe, step)
    assert (step == STEPS) == all(
        a.tobytes() == b.tobytes() for a, b in zip(images, stock(pipe, range(2)), strict=True)
    )


@pytest.mark.parametrize(
    "settings",
    [{"shift": 3.0, "shift_terminal": 0.1}, {"use_dynamic_shifting": True}, {"use_beta_sigmas": False, "shift": 0.5}],
)
def test_a_preview_keeps_to_the_schedule(settings):
    pipe = tiny_sd3()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(**settings)
    check_preview(pipe, 2)


def test_a_preview_leaves_the_pipeline_as_it_was(pipe):
    scheduler, images = pipe.scheduler, stock(pipe, range(2))
    previews(pipe, "a cat", range(2), 1, **CALL)
    with pytest.raises(TypeError):
        previews(pipe, "a cat", range(2), 1, no_such_argument=1)
    assert pipe.scheduler is scheduler
    assert "set_timesteps" not in vars(scheduler)
    assert [image.tobytes() for image in stock(pipe, range(2))] == [image.tobytes() for image in images]


def test_schedulers_that_do_not_foresee_are_refused():
    pipe = tiny_sd3()
    call = {"prompt": "a cat", "method": SGI(candidates=4), "n": 2} | CALL
    pipe.scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    with pytest.raises(
        ValueError, match="has the scheduler DPMSolverMultistepScheduler, whose steps can't be cut short"
    ):
        select(pipe, **call)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    with pytest.raises(ValueError, match="stochastic_sampling=True of the scheduler draws noise in every step"):
        select(pipe, **call)


def test_the_other_euler_scheduler_foresees_too():
    pipe = stable_diffusion_xl().pipe
    assert isinstance(pipe.scheduler, EulerDiscreteScheduler)
    check_preview(pipe, 2)


# The choice.


@pytest.mark.parametrize(
    ("method", "n", "steps", "rounds", "ours", "papers"),
    [
        (SGI(candidates=64, ratio=0.9), 4, 4, [(1, 64, 7), (2, 7, 4)], 94, 79),
        (SGI(candidates=128), 4, 20, [(1, 128, 64), (2, 64, 32), (3, 32, 16), (4, 16, 8), (5, 8, 4)], 536, 308),
        (SGI(candidates=10, ratio=0.7), 3, 4, [(1, 10, 3)], 22, 19),
        (SGI(candidates=6, ratio=0.1), 2, 2, [(2, 6, 2)], 16, 12),  # a share of 6 too small to drop one
        (SGI(candidates=4), 4, 4, [], 16, 16),
    ],
)
def test_candidates_are_pruned_as_in_the_paper(method, n, steps, rounds, ours, papers):
    assert list(method.rounds(n, steps)) == rounds
    assert sum(step * left for step, left, _ in rounds) + n * steps == ours
    sizes, left = [], method.candidates
    for step in range(1, steps + 1):
        sizes.append(left)
        left = next((kept for at, _, kept in rounds if at == step), left)
    assert sum(sizes) == papers
    assert left == n


def test_it_costs_the_rows_it_says(pipe):
    method = SGI(candidates=7, ratio=0.4)
    guided = 1 if "Flux" in type(pipe).__name__ else 2  # branches in a batch
    counts, handle = rows(pipe)
    done = []
    seeds = select(pipe, "a cat", method, n=3, progress=done.append, **CALL).seeds
    handle.remove()
    assert len(set(seeds)) == 3
    assert sum(counts) == guided * sum(step * left for step, left, _ in method.rounds(3, STEPS))
    assert max(counts) == guided * 3  # no more at a time than pictures are wanted
    assert done[-1] == len(counts) == method.steps_to_choose(3, STEPS)


def test_the_chosen_differ_more_than_the_first(pipe, extract):
    gained = []
    for seed in range(0, 60, 10):
        seeds = select(pipe, "a cat", SGI(candidates=10, ratio=0.5), n=3, seed=seed, extract=extract, **CALL).seeds
        assert set(seeds) <= set(range(seed, seed + 10))
        first, chosen = (extract(stock(pipe, s)) for s in (range(seed, seed + 3), seeds))
        gained.append((mean_pairwise_distance(chosen) - mean_pairwise_distance(first)).item())
    assert sum(gain > 0 for gain in gained) >= 5
    assert sum(gained) > 0


@pytest.mark.parametrize("solver", ["swap", "exact"])
def test_a_choice_in_one_round_is_the_best_subset_of_the_previews(pipe, extract, solver):
    seeds, (score,) = select(pipe, "a cat", SGI(candidates=8, ratio=0.6, solver=solver), n=4, seed=5, **CALL)
    features = extract([x for at in (5, 9) for x in previews(pipe, "a cat", range(at, at + 4), 1, **CALL)]).double()
    d = 1.5 * (1 - features @ features.T).numpy()
    assert score == pytest.approx(best(np.zeros(8), d, 4), rel=1e-5 if solver == "exact" else 0.02)
    picked = [seed - 5 for seed in seeds]
    assert score == pytest.approx(sum(d[i, j] for i, j in itertools.combinations(picked, 2)), rel=1e-5)


def test_nothing_to_choose_from_or_by_is_the_first_seeds(pipe):
    counts, handle = rows(pipe)
    for method, n in ((SGI(candidates=4), 4), (SGI(candidates=9, strength=0), 4), (SGI(candidates=9), 1)):
        assert select(pipe, "a cat", method, n=n, seed=3, **CALL).seeds == tuple(range(3, 3 + n))
    handle.remove()
    assert counts == []


def test_quality_alone_chooses_the_best(pipe):
    def brightness(images, prompt):
        assert prompt == "a cat"
        return torch.tensor([np.asarray(image).mean() for image in images])

    method = SGI(candidates=6, ratio=0.9, strength=0)
    seeds = select(pipe, "a cat", method, n=2, quality=brightness, **CALL).seeds
    images = [x for at in (0, 2, 4) for x in previews(pipe, "a cat", range(at, at + 2), 1, **CALL)]
    bright = [np.asarray(image).mean() for image in images]
    assert sorted(seeds) == sorted(np.argsort(bright)[-2:].tolist())


@pytest.mark.parametrize("numbers", [[1.0], [1.0, math.nan], [[1.0], [2.0]]])
def test_a_quality_that_is_not_one_number_an_image_is_refused(numbers):
    with pytest.raises(ValueError, match=r"quality gave .* for 2 images; it should give one finite number for each"):
        select(tiny_sd3(), "a cat", SGI(candidates=4), n=2, quality=lambda images, prompt: numbers, **CALL)


def test_features_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="extract gave features that are not finite"):
        select(tiny_sd3(), "a cat", SGI(candidates=4), n=2, extract=lambda x: torch.full((len(x), 3), math.nan), **CALL)


def test_exactness_begins_when_few_are_left(monkeypatch):
    sizes = []

    def watched(u, d, count):
        sizes.append(len(u))
        return solvers.approximate(u, d, count)

    monkeypatch.setattr(solvers, "exact", watched)
    monkeypatch.setattr(sgi, "EXACT_UP_TO", 4)
    select(tiny_sd3(), "a cat", SGI(candidates=8, solver="exact"), n=2, **CALL)
    assert sizes == [4]


class HandingOn(StableDiffusion3Pipeline):
    """Hands on what it is given."""

    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs)


def test_a_pipeline_that_hands_on_what_it_is_given():
    pipe, method = tiny_sd3(), SGI(candidates=4)
    again = HandingOn(**pipe.components)
    assert select(again, "a cat", method, n=2, **CALL) == select(pipe, "a cat", method, n=2, **CALL)
    seen = []
    select(again, "a cat", SGI(candidates=3), n=2, progress=seen.append)
    assert seen[-1] == SGI(candidates=3).steps_to_choose(2, 28)  # the default of the class below


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"n": 0}, "n=0 is out of range; use an integer from 1 upwards"),
        ({"n": 2.0}, "n=2.0 is of type float"),
        ({"seed": -1}, "seed=-1 is out of range"),
        ({"num_inference_steps": 2.5}, "num_inference_steps=2.5 is of type float"),
    ],
)
def test_select_refuses_what_is_no_number_of_pictures_or_steps(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        select(tiny_sd3(), "a cat", SGI(candidates=4), **{"n": 2, **CALL, **change})


def test_without_scipy_the_exact_solver_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ValueError, match=r"solver='exact' needs SciPy.*variegate\[selection\].*or use solver='swap'"):
        select(tiny_sd3(), "a cat", SGI(candidates=4, solver="exact"), n=2, **CALL)
    assert len(select(tiny_sd3(), "a cat", SGI(candidates=4), n=2, **CALL).seeds) == 2


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"candidates": 3}, "candidates=3 are fewer than the n=4 pictures; use at least as many"),
        ({"candidates": 0}, "candidates=0 is out of range; use an integer from 1"),
        ({"candidates": 8.5}, "candidates=8.5 is of type float; use an integer"),
        ({"ratio": 0}, "ratio=0 is out of range; use a number between 0 and 1"),
        ({"ratio": 1.0}, "ratio=1.0 is out of range"),
        ({"ratio": "half"}, "ratio='half' is of type str; use a finite number"),
        ({"strength": -1}, "strength=-1 is out of range; use a number from 0 to 1,000"),
        ({"strength": math.inf}, "strength=inf is out of range"),
        ({"solver": "gurobi"}, "solver='gurobi' is unknown; use 'swap' or 'exact'"),
        ({"candidates": "many"}, "candidates='many' is of type str; use an integer"),
        ({"blocks": "all"}, "blocks is no parameter of method 'sgi'; use one of candidates, ratio, strength, solver"),
    ],
)
def test_bad_settings_are_refused(parameters, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        Request(("a cat",), n=4, method="sgi", parameters=parameters)
    assert "\n" not in str(caught.value)


def test_fewer_steps_than_the_scheduler_can_take_are_refused():
    pipe = tiny_sd3()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift_terminal=0.1)
    with pytest.raises(ValueError, match="steps=1 is too few: the scheduler stretches its steps"):
        select(pipe, "a cat", SGI(candidates=4), n=2, num_inference_steps=1)


def test_fewer_candidates_than_pictures_are_refused_by_select_too():
    with pytest.raises(ValueError, match="candidates=3 are fewer than the n=4 pictures"):
        select(tiny_sd3(), "a cat", SGI(candidates=3), n=4)


# Through a request.

REQUEST = Request(("a cat",), n=3, model="tiny", method="sgi", parameters={"candidates": 8}, seed=4, steps=STEPS)


def test_a_gallery_has_the_stock_pictures_of_the_chosen_seeds(pipe, tmp_path):
    seen = []
    gallery = generate(REQUEST, pipeline=pipe, progress=lambda done, total: seen.append((done, total)))
    first, chosen = gallery.groups[0].rows
    assert (first.method, first.seeds) == ("none", None)
    assert chosen.method == "sgi"
    assert len(set(chosen.seeds)) == 3
    assert set(chosen.seeds) <= set(range(4, 12))
    assert chosen.seeds != (4, 5, 6)
    images = pipe(
        "a cat", num_images_per_prompt=3, num_inference_steps=STEPS, generator=generators(chosen.seeds)
    ).images
    assert [image.tobytes() for image in images] == [image.tobytes() for image in chosen.images]
    assert seen[-1][0] == seen[-1][1] == 2 * STEPS + SGI(candidates=8).steps_to_choose(3, STEPS)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)

    files = gallery.save(tmp_path)
    names = [file.name for file in files]
    assert names[:3] == ["a-cat-04-stock.png", "a-cat-05-stock.png", "a-cat-06-stock.png"]
    assert names[3:6] == [f"a-cat-{seed:02d}.png" for seed in chosen.seeds]
    record = json.loads(files[-1].read_text())
    assert [row["seeds"] for row in record["groups"][0]["rows"]] == [[4, 5, 6], list(chosen.seeds)]
    recipe = read_recipe(files[4])
    assert recipe["seeds"] == list(chosen.seeds)
    assert recipe["parameters"] == {"candidates": 8, "ratio": 0.5, "strength": 1.5, "solver": "swap"}
    seen.clear()
    again = replay(files[4], pipeline=pipe, progress=lambda done, total: seen.append((done, total)))
    assert (again.index, again.difference) == (1, 0)
    assert seen == [(1, STEPS), (2, STEPS), (3, STEPS), (3, STEPS)]  # nothing is chosen a second time
    assert again.gallery.groups[0].diverse.seeds == chosen.seeds
    again.gallery.save(tmp_path / "again")
    assert (tmp_path / "again" / names[4]).read_bytes() == files[4].read_bytes()


def test_seeds_of_ones_own_for_any_method(pipe):
    request = replace(REQUEST, method="none", parameters={}, seeds=(9, 2, 30))
    (row,) = generate(request, pipeline=pipe).groups[0].rows
    images = pipe("a cat", num_images_per_prompt=3, num_inference_steps=STEPS, generator=generators((9, 2, 30))).images
    assert [image.tobytes() for image in images] == [image.tobytes() for image in row.images]
    for seeds, sentence in (
        ((1, 2), "do not fit n=3; use one number per picture"),
        ((1, 2, -3), "holds -3, which is out of range; use a list of integers from 0 to"),
        ((1, 2, 1), "hold one twice"),
    ):
        with pytest.raises(ValueError, match=rf"seeds=\({', '.join(map(str, seeds))}\) {sentence}"):
            replace(request, seeds=seeds)


@pytest.mark.parametrize("method", ["contextual-repulsion", "cads", "particle-guidance"])
def test_parameters_of_a_wrong_type_are_refused(method):
    with pytest.raises(ValueError, match="strength='much' is of type str; use a number from 0 to 1,000"):
        replace(REQUEST, method=method, parameters={"strength": "much"})


def test_a_request_for_one_picture_is_plain_with_a_warning(pipe):
    with pytest.warns(UserWarning, match="n=1: a single picture has nothing to be different from"):
        (row,) = generate(replace(REQUEST, n=1), pipeline=pipe).groups[0].rows
    assert row.method == "none"


def test_a_request_is_refused_before_anything_is_made():
    pipe = tiny_sd3()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    counts, _ = rows(pipe)
    with pytest.raises(ValueError, match="stochastic_sampling=True"):
        generate(REQUEST, pipeline=pipe)
    assert counts == []
