"""Measures of image sets: pure functions of features, and the extractors that make features of images."""

from variegate.metrics.extractors import Extractor, efficientnet_lite0
from variegate.metrics.kid import kid
from variegate.metrics.vendi import mean_pairwise_distance, vendi_score

__all__ = ["Extractor", "efficientnet_lite0", "kid", "mean_pairwise_distance", "vendi_score"]
