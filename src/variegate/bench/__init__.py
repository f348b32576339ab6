"""The benchmark: a grid of experiments, one immutable record per cell, and what the records say together."""
