"""Holding FP8 against high precision: the same run twice, what the codes did, the noise of the gradient, the study; and
`judge`, which holds finished models side by side on texts and tasks."""

from __future__ import annotations

from .comparison import difference, run_arm, settings, surroundings
from .gradient_noise import GradientNoise, gradient_noise
from .judge import Judgement, judge, variants
from .measurement import TaskMeasurement, TextMeasurement
from .perplexity import perplexity, token_loss, validation_loss
from .probe import Watch, probe, shares
from .subject import ModelSpec
from .tasks import load_task

__all__ = [
    "GradientNoise",
    "Judgement",
    "ModelSpec",
    "TaskMeasurement",
    "TextMeasurement",
    "Watch",
    "difference",
    "gradient_noise",
    "judge",
    "load_task",
    "perplexity",
    "probe",
    "run_arm",
    "settings",
    "shares",
    "surroundings",
    "token_loss",
    "validation_loss",
    "variants",
]
