"""Diversity methods, one file per paper."""

from variegate.interventions.cads import CADS
from variegate.interventions.cno import CNO
from variegate.interventions.contextual_repulsion import ContextualRepulsion
from variegate.interventions.dave import DAVE
from variegate.interventions.diverse_flow import DiverseFlow
from variegate.interventions.feature_self_guidance import FeatureSelfGuidance
from variegate.interventions.interval_guidance import IntervalGuidance
from variegate.interventions.particle_guidance import ParticleGuidance
from variegate.interventions.pink_noise import PinkNoise
from variegate.interventions.seed_variance import SeedVariance
from variegate.interventions.sparke import SPARKE
from variegate.interventions.spell import SPELL
from variegate.interventions.stride import STRIDE

__all__ = [
    "CADS",
    "CNO",
    "DAVE",
    "SPARKE",
    "SPELL",
    "STRIDE",
    "ContextualRepulsion",
    "DiverseFlow",
    "FeatureSelfGuidance",
    "IntervalGuidance",
    "ParticleGuidance",
    "PinkNoise",
    "SeedVariance",
]
