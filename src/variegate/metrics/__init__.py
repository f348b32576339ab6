"""Measures of image sets: pure functions of features or pixels, and the extractors that make features of images."""

from variegate.metrics.alignment import VQAScore, clip_score
from variegate.metrics.extractors import efficientnet_lite0
from variegate.metrics.features import Extractor, Features, Network
from variegate.metrics.fid import fid
from variegate.metrics.kid import kid
from variegate.metrics.lpips import LPIPS
from variegate.metrics.ms_ssim import mean_pairwise_ms_ssim
from variegate.metrics.prdc import PRDC, prdc
from variegate.metrics.pretrained import Clip, clip, dinov2
from variegate.metrics.registry import extractor
from variegate.metrics.vendi import mean_pairwise_distance, mean_pairwise_vendi, vendi_score

__all__ = [
    "LPIPS",
    "PRDC",
    "Clip",
    "Extractor",
    "Features",
    "Network",
    "VQAScore",
    "clip",
    "clip_score",
    "dinov2",
    "efficientnet_lite0",
    "extractor",
    "fid",
    "kid",
    "mean_pairwise_distance",
    "mean_pairwise_ms_ssim",
    "mean_pairwise_vendi",
    "prdc",
    "vendi_score",
]
