"""Train, quantize and serve transformers in 8-bit floating point, and prove on any CPU, bit for bit, what it does."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .formats import FORMATS, Format
from .fused.adamw import AdamW
from .matmul import explain_matmul, matmul
from .nn import (
    Conv2d,
    Linear,
    MultiheadAttention,
    Report,
    TransformerLayer,
    attach,
    autocast,
    convert,
    count_products,
    graph,
    refresh,
    register,
    revert,
    update_scales,
)
from .quantize import Quantized, quantize, quantize_both
from .recipe import Recipe
from .tile import Tile

if TYPE_CHECKING:
    from . import advise
    from .calibrate.qat import finalize, prepare_qat
    from .serve import LLM, SamplingParams
    from .train.optimizer import adjust_hyperparameters

__all__ = [
    "FORMATS",
    "LLM",
    "AdamW",
    "Conv2d",
    "Format",
    "Linear",
    "MultiheadAttention",
    "Quantized",
    "Recipe",
    "Report",
    "SamplingParams",
    "Tile",
    "TransformerLayer",
    "adjust_hyperparameters",
    "advise",
    "attach",
    "autocast",
    "convert",
    "count_products",
    "explain_matmul",
    "finalize",
    "graph",
    "matmul",
    "prepare_qat",
    "quantize",
    "quantize_both",
    "refresh",
    "register",
    "revert",
    "update_scales",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """What belongs to a room that `import fp8` does not open."""
    if name == "adjust_hyperparameters":
        from .train.optimizer import adjust_hyperparameters

        return adjust_hyperparameters
    if name in ("prepare_qat", "finalize"):
        return getattr(importlib.import_module(".calibrate.qat", __name__), name)
    if name in ("LLM", "SamplingParams"):
        return getattr(importlib.import_module(".serve", __name__), name)
    if name == "advise":
        return importlib.import_module(".advise", __name__)
    raise AttributeError(f"module 'fp8' has no attribute {name!r}")
