"""Train, quantize and serve transformer models in 8-bit floating point, and prove on any CPU, bit for bit, what it does."""

from .formats import FORMATS, Format
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
    refresh,
    register,
    revert,
    update_scales,
)
from .quantize import Quantized, quantize, quantize_both
from .recipe import Recipe
from .tile import Tile

__all__ = [
    "FORMATS",
    "Conv2d",
    "Format",
    "Linear",
    "MultiheadAttention",
    "Quantized",
    "Recipe",
    "Report",
    "Tile",
    "TransformerLayer",
    "attach",
    "autocast",
    "convert",
    "count_products",
    "explain_matmul",
    "matmul",
    "quantize",
    "quantize_both",
    "refresh",
    "register",
    "revert",
    "update_scales",
]
__version__ = "0.1.0"
