"""Diversity methods, one file per paper."""

from variegate.interventions.contextual_repulsion import ContextualRepulsion

__all__ = ["ContextualRepulsion"]
