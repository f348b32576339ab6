"""Measures against plain loops, and the network against values of a foreign implementation."""

import importlib
import math
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch import nn

from variegate.metrics import (
    clip_score,
    efficientnet_lite0,
    extractors,
    fid,
    kid,
    mean_pairwise_distance,
    mean_pairwise_ms_ssim,
    mean_pairwise_vendi,
    prdc,
    vendi_score,
)
from variegate.metrics.extractors import blurred

ROOT = Path(__file__).parents[1]


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cosine(a, b):
    return float(a.double() @ b.double() / (a.double().norm() * b.double().norm()))


@pytest.fixture(scope="module")
def extract():
    return efficientnet_lite0()


@pytest.mark.parametrize("order", [0.1, 0.5, 1, 1.5, 2, 40, 2000, math.inf])
def test_vendi_is_the_exponential_of_the_renyi_entropy(order):
    rows = noise(5, 7)
    gram = torch.tensor([[cosine(a, b) for b in rows] for a in rows], dtype=torch.float64)
    spectrum = torch.linalg.svdvals(gram / 5).tolist()
    if order == 1:
        expected = math.exp(-sum(p * math.log(p) for p in spectrum))
    elif order > 100:
        expected = 1 / max(spectrum)
    else:
        expected = sum(p**order for p in spectrum) ** (1 / (1 - order))
    assert vendi_score(rows, order=order).item() == pytest.approx(expected, rel=2e-3 if order == 2000 else 1e-9)


@pytest.mark.parametrize("order", [0.1, 1, 2, math.inf])
def test_vendi_counts_distinct_rows_at_every_order(order):
    equal, apart = noise(1, 9).expand(8, 9), torch.eye(8)
    assert vendi_score(equal, order=order).item() == pytest.approx(1, rel=1e-9)
    assert vendi_score(apart, order=order).item() == pytest.approx(8, rel=1e-9)
    pairs = torch.eye(8)[[0, 0, 1, 1, 2, 2, 3, 3]] * torch.arange(1, 9)[:, None]
    assert vendi_score(pairs, order=order).item() == pytest.approx(4, rel=1e-9)


def test_mean_pairwise_distance_is_over_distinct_pairs():
    rows = noise(6, 4)
    distances = [1 - cosine(a, b) for a, b in combinations(rows, 2)]
    assert mean_pairwise_distance(rows).item() == pytest.approx(sum(distances) / 15, rel=1e-9)


@pytest.mark.parametrize("measure", [vendi_score, mean_pairwise_distance])
def test_measures_of_many_sets_are_those_of_each(measure):
    sets = noise(2, 3, 4, 5).half()
    result = measure(sets)
    assert result.shape == (2, 3)
    assert result.dtype == torch.float64
    assert result[1, 2].item() == pytest.approx(measure(sets[1, 2]).item(), rel=1e-12)


@pytest.mark.parametrize("order", [0, -1, math.nan])
def test_an_order_must_be_positive(order):
    with pytest.raises(ValueError, match="order="):
        vendi_score(torch.eye(3), order=order)


@pytest.mark.parametrize(("measure", "least"), [(vendi_score, 1), (mean_pairwise_distance, 2)])
def test_measures_need_rows_with_a_direction(measure, least):
    with pytest.raises(ValueError, match=f"N at least {least}"):
        measure(torch.ones(least - 1, 3))
    for value in (0.0, math.nan, math.inf):
        rows = torch.eye(3)
        rows[1, 1] = value
        with pytest.raises(ValueError, match=r"a row that is zero|NaN or infinite values, in 1 of 3 rows"):
            measure(rows)


@pytest.mark.filterwarnings("ignore:.* has 8 rows of width 8")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_no_measure_takes_what_is_not_finite(value, dtype):
    rows, good = torch.eye(8, dtype=dtype), torch.eye(8, dtype=dtype)
    rows[5, 2] = value
    for measure in (vendi_score, mean_pairwise_vendi, mean_pairwise_distance):
        with pytest.raises(ValueError, match="features has NaN or infinite values, in 1 of 8 rows"):
            measure(torch.stack([good, rows])[1])
    for measure in (kid, fid, prdc, clip_score):
        for first, second in ((rows, good), (good, rows)):
            with pytest.raises(ValueError, match="has NaN or infinite values, in 1 of 8 rows; measure without them"):
                measure(first, second)
    pixels = torch.zeros(2, 3, 16, 16, dtype=dtype)
    pixels[1, 2, 3, 4] = value
    with pytest.raises(ValueError, match="images has NaN or infinite values, in 1 of 96 rows"):
        mean_pairwise_ms_ssim(pixels)


@pytest.mark.parametrize("exponent", [-1000, -540, -3, 500, 1000])
def test_measures_of_directions_do_not_depend_on_the_scale(exponent):
    rows, other = noise(6, 5).double(), noise(6, 5, seed=1).double()
    scale = 2.0**exponent  # a power of two, so that nothing else is rounded
    for measure in (vendi_score, mean_pairwise_vendi, mean_pairwise_distance):
        assert measure(scale * rows).item() == measure(rows).item()
    torch.testing.assert_close(clip_score(scale * rows, other), clip_score(rows, other), rtol=0, atol=0)
    torch.testing.assert_close(clip_score(rows, scale * other), clip_score(rows, other), rtol=0, atol=0)
    assert prdc(scale * rows, scale * other, k=2) == prdc(rows, other, k=2)
    assert 0 < prdc(rows, other, k=2).precision < 1
    if abs(exponent) < 512:  # else its square is no number
        assert fid(scale * rows, scale * other).item() == scale**2 * fid(rows, other).item()


def test_the_smallest_and_largest_numbers_have_a_direction():
    rows = torch.tensor([[5e-324, 0.0], [1.7e308, 1.7e308], [0.0, 1e-310]], dtype=torch.float64)
    assert mean_pairwise_distance(rows).item() == pytest.approx(1 - (2 * 0.5**0.5 + 0) / 3, rel=1e-12)


def test_features_whose_distances_overflow_are_refused():
    rows = 1e200 * noise(8, 2).double()
    with pytest.raises(ValueError, match="so large that their products to the power of 3 overflow"):
        kid(rows, rows + 1e200)
    with pytest.raises(ValueError, match="so large that squares of their distances overflow"):
        fid(rows, 2 * rows)


@pytest.mark.parametrize("measure", [vendi_score, mean_pairwise_distance, lambda x: clip_score(x, x)])
def test_features_without_values_are_refused(measure):
    with pytest.raises(ValueError, match=r"has shape \(3, 0\), which is empty"):
        measure(torch.ones(3, 0))


@pytest.mark.parametrize("scale", [None, 1.0])
def test_kid_is_the_unbiased_discrepancy(scale):
    x, y = noise(4, 3).double(), noise(5, 3, seed=1).double() + 1
    factor = 1 / 3 if scale is None else scale

    def kernel(a, b):
        return (factor * float(a @ b) + 1) ** 3

    within_x = sum(kernel(x[i], x[j]) for i in range(4) for j in range(4) if i != j) / 12
    within_y = sum(kernel(y[i], y[j]) for i in range(5) for j in range(5) if i != j) / 20
    between = sum(kernel(a, b) for a in x for b in y) / 20
    assert kid(x, y, scale=scale).item() == pytest.approx(within_x + within_y - 2 * between, rel=1e-9)


def test_kid_is_zero_on_average_for_samples_of_one_distribution():
    draws = [(noise(10, 8, seed=2 * i), noise(10, 8, seed=2 * i + 1)) for i in range(300)]
    same = torch.stack([kid(x, y) for x, y in draws])
    apart = torch.stack([kid(x, y + 0.5) for x, y in draws])
    error = same.std().item() / 300**0.5
    assert abs(same.mean().item()) < 3 * error
    assert apart.mean().item() > 20 * error


@pytest.mark.parametrize(("name", "x", "y"), [("features", 1, 3), ("reference", 3, 1)])
def test_kid_needs_two_rows_of_each(name, x, y):
    with pytest.raises(ValueError, match=f"{name} has shape"):
        kid(torch.ones(x, 4), torch.ones(y, 4))


def test_kid_needs_equal_widths():
    with pytest.raises(ValueError, match="reference has shape"):
        kid(torch.ones(3, 4), torch.ones(3, 5))


def test_features_equal_those_of_a_foreign_implementation(extract):
    # The six largest of efficientnet-lite-pytorch 0.1.0 in float32; ours has float16 weights.
    y, x = torch.meshgrid(torch.arange(128.0), torch.arange(128.0), indexing="ij")
    features = extract(torch.stack([torch.sin(x / 7), torch.cos(y / 11), torch.sin((x + y) / 5)])[None])[0]
    largest = features.topk(6)
    assert largest.indices.tolist() == [949, 966, 287, 31, 292, 100]
    assert largest.values.tolist() == pytest.approx([0.2255, 0.195, 0.1857, 0.1843, 0.1663, 0.1657], abs=2e-3)


def test_features_are_unit_rows_whatever_the_batch(extract):
    images = noise(5, 3, 40, 50).tanh()
    features = extract(images)
    assert features.shape == (5, 1280)
    assert features.dtype == torch.float32
    assert not features.requires_grad
    torch.testing.assert_close(features.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(efficientnet_lite0(batch_size=2)(images), features, atol=1e-5, rtol=0)


def test_pictures_and_tensors_have_equal_features(extract):
    values = (noise(2, 3, 64, 48).sigmoid() * 255).round()
    pictures = [Image.fromarray(v.permute(1, 2, 0).byte().numpy()) for v in values]
    torch.testing.assert_close(extract(pictures), extract(values / 127.5 - 1), atol=1e-5, rtol=0)
    torch.testing.assert_close(extract([pictures[0].convert("RGBA")]), extract(pictures[:1]))


def test_large_pictures_are_shrunk_without_aliasing(extract):
    values = (noise(3, 400, 500).sigmoid() * 255).round()
    large = Image.fromarray(values.permute(1, 2, 0).byte().numpy())
    small = large.resize((128, 128), Image.Resampling.BILINEAR)  # Pillow shrinks with antialiasing
    assert cosine(extract([large])[0], extract([small])[0]) > 0.99


@pytest.mark.parametrize(
    "images",
    [torch.zeros(2, 3, 64), torch.zeros(2, 4, 64, 64), torch.zeros(2, 3, 64, 64, dtype=torch.uint8)],
)
def test_extractors_refuse_other_tensors(extract, images):
    with pytest.raises(ValueError, match=r"use a float tensor \[N, 3, H, W\]"):
        extract(images)


def test_the_blur_is_that_of_scipy():
    images = noise(2, 3, 30, 40)
    expected = gaussian_filter(images.double(), (0, 0, 1.7, 1.7), mode="nearest", truncate=3)
    torch.testing.assert_close(blurred(images, 1.7).double(), torch.from_numpy(expected), atol=1e-5, rtol=0)


def test_blurred_features_are_those_of_blurred_pictures(extract):
    images = noise(2, 3, 128, 128).tanh()
    torch.testing.assert_close(efficientnet_lite0(blur=2)(images), extract(blurred(images, 2)))
    assert str(efficientnet_lite0(blur=2).features) != str(extract.features)
    with pytest.raises(ValueError, match="blur=-1 is no deviation"):
        efficientnet_lite0(blur=-1)


def test_extractors_refuse_no_images(extract):
    with pytest.raises(ValueError, match="images is empty"):
        extract([])


def test_loading_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    efficientnet_lite0.cache_clear()
    extractors._network.cache_clear()
    efficientnet_lite0()
    assert torch.equal(torch.get_rng_state(), before)


def test_the_conversion_folds_normalisation_into_the_convolution(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "training")
    weights = importlib.import_module("judge_weights")
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, eps=weights.EPSILON)).double().eval()
    for tensor in (*model[1].parameters(), *model[1].buffers()):
        if tensor.is_floating_point():
            tensor.data.uniform_(0.5, 2, generator=torch.Generator().manual_seed(tensor.ndim))
    [(weight, bias)] = weights.fold(model.state_dict())
    x = noise(2, 3, 5, 5).double()
    torch.testing.assert_close(nn.functional.conv2d(x, weight, bias), model(x))


def test_importing_the_measures_loads_no_image_library():
    heavy = ["PIL", "safetensors", "diffusers"]
    code = f"import sys, variegate.metrics; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"
