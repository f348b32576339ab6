"""The prompts of tuning and of the report, which the benchmark shares, and those of the sheet of pictures."""

from __future__ import annotations

from variegate.bench.prompts import GENERIC_HELDOUT, GENERIC_TUNING, SEEDS, SPECIFIC_HELDOUT, SPECIFIC_TUNING

__all__ = ["GENERIC_HELDOUT", "GENERIC_TUNING", "SEEDS", "SHEET", "SPECIFIC_HELDOUT", "SPECIFIC_TUNING"]

SHEET = ("an animal", "a vehicle", "food", "a heart", "tiger", "3d tomato", "sailboat", "black and white camel")
