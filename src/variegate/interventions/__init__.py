"""Diversity methods, one file per paper."""

from variegate.interventions.cads import CADS
from variegate.interventions.contextual_repulsion import ContextualRepulsion
from variegate.interventions.dave import DAVE
from variegate.interventions.interval_guidance import IntervalGuidance
from variegate.interventions.particle_guidance import ParticleGuidance
from variegate.interventions.seed_variance import SeedVariance

__all__ = ["CADS", "DAVE", "ContextualRepulsion", "IntervalGuidance", "ParticleGuidance", "SeedVariance"]
