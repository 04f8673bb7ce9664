"""AdamW that updates all parameters in one pass, keeps small moments, and writes the weights' next codes with it."""

from .optimizer import BACKENDS, AdamW
from .reference import After

__all__ = ["BACKENDS", "AdamW", "After"]
