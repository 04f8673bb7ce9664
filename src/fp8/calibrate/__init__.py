"""Scales from text: what a model's activations, keys and values reach, measured before it is served."""

from __future__ import annotations

from .calibration import Calibration
from .observers import OBSERVERS, Magnitudes
from .remedies import Remedies

__all__ = ["OBSERVERS", "Calibration", "Magnitudes", "Remedies"]
