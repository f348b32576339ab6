"""The bundled emoji models and the judge of their pictures."""

from variegate.emoji.models import bundled_models, call_defaults, load_pipeline

__all__ = ["bundled_models", "call_defaults", "load_pipeline"]
