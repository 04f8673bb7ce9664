"""Train, quantize and serve transformer models in 8-bit floating point, and prove on any CPU, bit for bit, what it does."""

from .formats import FORMATS, Format
from .matmul import explain_matmul, matmul
from .quantize import Quantized, quantize, quantize_both
from .recipe import Recipe
from .tile import Tile

__all__ = ["FORMATS", "Format", "Quantized", "Recipe", "Tile", "explain_matmul", "matmul", "quantize", "quantize_both"]
__version__ = "0.1.0"
