"""What a model holds: FP8 layers, the context that switches them, and the conversion of a model that has none."""

from .attach import attach, refresh, update_scales
from .attention import MultiheadAttention
from .autocast import autocast, count_products
from .convert import Report, convert, register, revert
from .graph import Graphed, graph
from .linear import Conv2d, Linear
from .products import Fp8Products
from .transformer import TransformerLayer

__all__ = [
    "Conv2d",
    "Fp8Products",
    "Graphed",
    "Linear",
    "MultiheadAttention",
    "Report",
    "TransformerLayer",
    "attach",
    "autocast",
    "convert",
    "count_products",
    "graph",
    "refresh",
    "register",
    "revert",
    "update_scales",
]
