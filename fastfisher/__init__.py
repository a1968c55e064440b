"""Penalise and measure curvature through the Fisher Information Matrix, close to the cost of a plain training step."""

from fastfisher.labels import sample_cross_entropy
from fastfisher.slow_path import SlowPathWarning

__all__ = ["SlowPathWarning", "sample_cross_entropy"]
