"""Rich diversity for diffusion transformers.

Two lines around a stock diffusers pipeline:

    from variegate import ContextualRepulsion, attach

    with attach(pipe, ContextualRepulsion()):
        images = pipe("a mythical creature", num_images_per_prompt=8).images
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from variegate.architectures import Architecture as Architecture
    from variegate.architectures import Blocks as Blocks
    from variegate.architectures import Part as Part
    from variegate.architectures import register_architecture as register_architecture
    from variegate.attachment import Attachment as Attachment
    from variegate.attachment import attach as attach
    from variegate.attachment import detach as detach
    from variegate.check import check_layout as check_layout
    from variegate.gallery import Gallery as Gallery
    from variegate.generation import generate as generate
    from variegate.intervention import ConditionIntervention as ConditionIntervention
    from variegate.intervention import GuidanceIntervention as GuidanceIntervention
    from variegate.intervention import ImageIntervention as ImageIntervention
    from variegate.intervention import Intervention as Intervention
    from variegate.intervention import NoiseIntervention as NoiseIntervention
    from variegate.intervention import PredictionIntervention as PredictionIntervention
    from variegate.intervention import PreviewIntervention as PreviewIntervention
    from variegate.intervention import TokenIntervention as TokenIntervention
    from variegate.interventions import CADS as CADS
    from variegate.interventions import CNO as CNO
    from variegate.interventions import DAVE as DAVE
    from variegate.interventions import SPARKE as SPARKE
    from variegate.interventions import SPELL as SPELL
    from variegate.interventions import STRIDE as STRIDE
    from variegate.interventions import ContextualRepulsion as ContextualRepulsion
    from variegate.interventions import DiverseFlow as DiverseFlow
    from variegate.interventions import FeatureSelfGuidance as FeatureSelfGuidance
    from variegate.interventions import IntervalGuidance as IntervalGuidance
    from variegate.interventions import ParticleGuidance as ParticleGuidance
    from variegate.interventions import PinkNoise as PinkNoise
    from variegate.interventions import SeedVariance as SeedVariance
    from variegate.request import Request as Request
    from variegate.scoring import score as score
    from variegate.selection import SGI as SGI
    from variegate.selection import select as select

__version__ = "0.1.0"

# Loaded on first use: `variegate --help` must not wait for torch.
_EXPORTS = {
    "Architecture": "variegate.architectures",
    "Attachment": "variegate.attachment",
    "attach": "variegate.attachment",
    "detach": "variegate.attachment",
    "check_layout": "variegate.check",
    "Blocks": "variegate.architectures",
    "CADS": "variegate.interventions",
    "CNO": "variegate.interventions",
    "DAVE": "variegate.interventions",
    "DiverseFlow": "variegate.interventions",
    "FeatureSelfGuidance": "variegate.interventions",
    "SPARKE": "variegate.interventions",
    "SPELL": "variegate.interventions",
    "STRIDE": "variegate.interventions",
    "IntervalGuidance": "variegate.interventions",
    "ParticleGuidance": "variegate.interventions",
    "PinkNoise": "variegate.interventions",
    "SeedVariance": "variegate.interventions",
    "ContextualRepulsion": "variegate.interventions",
    "Gallery": "variegate.gallery",
    "ConditionIntervention": "variegate.intervention",
    "GuidanceIntervention": "variegate.intervention",
    "ImageIntervention": "variegate.intervention",
    "NoiseIntervention": "variegate.intervention",
    "PredictionIntervention": "variegate.intervention",
    "PreviewIntervention": "variegate.intervention",
    "TokenIntervention": "variegate.intervention",
    "Intervention": "variegate.intervention",
    "Part": "variegate.architectures",
    "Request": "variegate.request",
    "score": "variegate.scoring",
    "SGI": "variegate.selection",
    "select": "variegate.selection",
    "generate": "variegate.generation",
    "register_architecture": "variegate.architectures",
}
__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
