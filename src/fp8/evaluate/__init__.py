"""Holding FP8 against high precision: the same run twice, what the codes did, the noise of the gradient, the study."""

from __future__ import annotations

from .comparison import difference, run_arm, settings, surroundings
from .gradient_noise import GradientNoise, gradient_noise
from .perplexity import perplexity, token_loss, validation_loss
from .probe import Watch, probe, shares

__all__ = [
    "GradientNoise",
    "Watch",
    "difference",
    "gradient_noise",
    "perplexity",
    "probe",
    "run_arm",
    "settings",
    "shares",
    "surroundings",
    "token_loss",
    "validation_loss",
]
