"""Measures against foreign implementations: vendi-score, torchmetrics, prdc, scipy, pytorch-msssim, lpips."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import prdc as foreign_prdc
import pytest
import scipy.linalg
import torch
from pytorch_msssim import ms_ssim as foreign_ms_ssim
from safetensors.torch import save_file
from scipy.signal import fftconvolve
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance
from vendi_score import vendi as foreign_vendi

from networks import save_vgg16
from variegate.metrics import (
    LPIPS,
    clip_score,
    fid,
    kid,
    mean_pairwise_ms_ssim,
    mean_pairwise_vendi,
    prdc,
    vendi_score,
)
from variegate.metrics.ms_ssim import WEIGHTS, scales


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Means(torch.nn.Module):
    """Features that are simple enough to be in torchmetrics' hands: the mean of each channel and row."""

    num_features = 12

    def forward(self, images):
        return images.double().mean(-1).flatten(1)


def images_and_features(count, seed):
    images = (noise(count, 3, 4, 5, seed=seed).sigmoid() * 255).byte()
    return images, Means()(images)


@pytest.mark.parametrize("order", [0.5, 1, 2, 10])
def test_vendi_is_that_of_its_authors(order):
    rows = noise(6, 4)
    unit = (rows / rows.norm(dim=1, keepdim=True)).numpy()
    assert vendi_score(rows, order=order).item() == pytest.approx(foreign_vendi.score_K(unit @ unit.T, q=order))


@pytest.mark.parametrize("order", [0.5, 1, 2])
def test_mean_pairwise_vendi_is_over_distinct_pairs(order):
    rows = noise(2, 5, 7)
    rows[0, 1] = 3 * rows[0, 0]
    expected = [
        sum(vendi_score(group[[i, j]], order=order).item() for i, j in combinations(range(5), 2)) / 10 for group in rows
    ]
    assert mean_pairwise_vendi(rows, order=order).tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance`")
def test_fid_and_kid_are_those_of_torchmetrics():
    (x, features), (y, reference) = images_and_features(30, 1), images_and_features(40, 2)
    other = FrechetInceptionDistance(feature=Means(), input_img_size=(3, 4, 5)).set_dtype(torch.float64)
    other.update(y, real=True)
    other.update(x, real=False)
    assert fid(features, reference).item() == pytest.approx(other.compute().item(), rel=1e-6)
    other = KernelInceptionDistance(feature=Means(), subsets=1, subset_size=30)
    other.update(y[:30], real=True)
    other.update(x, real=False)
    assert kid(features, reference[:30]).item() == pytest.approx(other.compute()[0].item(), rel=1e-6)


@pytest.mark.parametrize(("n", "m"), [(9, 30), (30, 9), (5, 4)])
@pytest.mark.filterwarnings("ignore:.*mostly bias")
def test_fid_with_few_rows_is_still_the_frechet_distance(n, m):
    x, y = noise(n, 8, seed=3), 2 * noise(m, 8, seed=4) + 1
    if min(n, m) > 8:
        root = scipy.linalg.sqrtm(np.cov(x.numpy().T) @ np.cov(y.numpy().T)).real.trace()
    else:  # sqrtm is inaccurate for singular matrices
        values = np.linalg.eigvals(np.cov(x.numpy().T) @ np.cov(y.numpy().T))
        root = np.sqrt(np.abs(values[np.abs(values) > 1e-9])).sum()
    expected = (x.mean(0) - y.mean(0)).square().sum() + x.var(0).sum() + y.var(0).sum() - 2 * root
    assert fid(x, y).item() == pytest.approx(expected.item(), rel=1e-6)


def test_fid_says_when_it_is_mostly_bias():
    x, y = noise(9, 8), noise(8, 8)
    assert fid(x, x).item() == pytest.approx(0, abs=1e-12)
    with pytest.warns(UserWarning, match="reference has 8 rows of width 8"):
        fid(x, y)
    for bad in (noise(1, 8), noise(9, 7), noise(8)):
        with pytest.raises(ValueError, match="reference has shape"):
            fid(x, bad)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_prdc_is_that_of_its_authors(k):
    reference, features = noise(40, 6, seed=5), 0.7 * noise(30, 6, seed=6) + 0.3
    expected = foreign_prdc.compute_prdc(reference.numpy(), features.numpy(), nearest_k=k)
    found = {name: value.item() for name, value in prdc(features, reference, k=k)._asdict().items()}
    assert found == pytest.approx(expected)
    assert len(set(found.values())) == 4


def test_prdc_of_equal_rows():
    rows = noise(8, 3).repeat(2, 1)  # each twice: the nearest neighbour is 0 away, and nothing is closer
    assert prdc(rows, rows, k=1).precision == 0
    assert prdc(rows, rows, k=2).precision == 1


def test_prdc_refuses_what_it_cannot_do():
    x = noise(6, 4)
    for k in (0, 5):
        with pytest.raises(ValueError, match=f"k={k} is out of range; use 1 to 4"):
            prdc(x, x[:5], k=k)
    with pytest.raises(ValueError, match=r"features has shape \(6, 4\) and reference \(6, 3\)"):
        prdc(x, x[:, :3])


def smooth(count, height, width):
    y, x = torch.meshgrid(torch.arange(float(height)), torch.arange(float(width)), indexing="ij")
    one = [torch.stack([torch.sin(x / a), torch.cos(y / 3), torch.sin((x + y) / a)]) for a in (2, 5, 11)[:count]]
    return torch.stack(one)


def test_ms_ssim_of_five_scales_is_that_of_pytorch_msssim():
    images = smooth(3, 192, 208)
    unit = (images + 1) / 2
    expected = [foreign_ms_ssim(unit[i : i + 1], unit[j : j + 1], data_range=1.0) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert mean_pairwise_ms_ssim(images).item() == pytest.approx(torch.stack(expected).mean().item(), abs=1e-5)
    assert 0.01 < torch.stack(expected).min() < 0.9


def test_ms_ssim_of_small_images_has_fewer_scales():
    images = smooth(2, 64, 64)
    images[1] = 0.8 * images[0] + 0.1 * images[1]
    window = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window = np.outer(window, window) / window.sum() ** 2

    def blur(values):
        return np.stack([fftconvolve(value, window, mode="valid") for value in values])

    x, y = ((image.double().numpy() + 1) / 2 for image in images)
    expected = np.ones(3)
    for scale in range(3):
        mean_x, mean_y = blur(x), blur(y)
        both = blur(x * y) - mean_x * mean_y
        own = blur(x * x) - mean_x**2 + blur(y * y) - mean_y**2
        similarity = (2 * both + 0.03**2) / (own + 0.03**2)
        if scale == 2:
            similarity *= (2 * mean_x * mean_y + 0.01**2) / (mean_x**2 + mean_y**2 + 0.01**2)
        expected *= similarity.mean((1, 2)) ** (WEIGHTS[scale] / sum(WEIGHTS[:3]))
        x, y = (value.reshape(3, len(value[0]) // 2, 2, -1, 2).mean((2, 4)) for value in (x, y))
    assert mean_pairwise_ms_ssim(images).item() == pytest.approx(expected.mean(), abs=1e-5)
    assert 0.5 < expected.min() < 0.99


def test_the_scales_of_a_size():
    assert [scales(side, 500) for side in (11, 21, 22, 44, 64, 87, 88, 175, 176)] == [1, 1, 2, 3, 3, 3, 4, 4, 5]
    for side in (11, 22, 44, 88, 176):
        assert mean_pairwise_ms_ssim(smooth(2, side, side)[[0, 0]]).item() == pytest.approx(1, abs=1e-5)
    with pytest.raises(ValueError, match="images of 10 x 64 are too small"):
        mean_pairwise_ms_ssim(torch.zeros(2, 3, 10, 64))
    with pytest.raises(ValueError, match="N at least 2"):
        mean_pairwise_ms_ssim(torch.zeros(1, 3, 64, 64))


def test_clip_score_is_of_pairs():
    for images, texts in ((noise(2, 4), noise(3, 4)), (noise(4), noise(4))):
        with pytest.raises(ValueError, match=r"use \[N, D\] for both"):
            clip_score(images, texts)


@pytest.fixture(scope="module")
def vgg16(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vgg16")
    save_vgg16(folder)
    return folder


def test_lpips_is_that_of_its_authors(vgg16):
    network, images = LPIPS(vgg16), smooth(3, 32, 40)
    foreign = {(0, 1): 0.189423, (0, 2): 0.178106, (1, 2): 0.211081}
    for pair, expected in foreign.items():
        assert network.mean_pairwise(images[list(pair)]).item() == pytest.approx(expected, abs=1e-5)
    assert network.mean_pairwise(images).item() == pytest.approx(sum(foreign.values()) / 3, abs=1e-5)
    assert network.mean_pairwise(images[[1, 1, 1]]).item() == pytest.approx(0, abs=1e-9)


def test_lpips_refuses_what_it_cannot_do(vgg16, tmp_path):
    with pytest.raises(ValueError, match="N at least 2, sides at least 16"):
        LPIPS(vgg16).mean_pairwise(torch.zeros(2, 3, 15, 40))
    with pytest.raises(ValueError, match="images has NaN or infinite values, in 96 of 96 rows"):
        LPIPS(vgg16).mean_pairwise(torch.full((2, 3, 16, 16), torch.nan))
    with pytest.raises(ValueError, match=r"nowhere' can't be loaded.*hf download timm/vgg16\.tv_in1k model\.safe"):
        LPIPS(tmp_path / "nowhere")
    save_file({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="does not have the convolutions of VGG16"):
        LPIPS(tmp_path)
