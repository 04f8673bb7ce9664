"""What a training step costs on a GPU, and serving, from measured rates: time of products, bytes, launches, memory.

    rates.py       the measured figures, read from rates.json, which `fp8 bench rates` makes
    gemm.py        seconds of one product, from its shape and kind
    traffic.py     bytes that everything but the products moves, as tables
    shape.py       a decoder as sizes, and the products of one step
    layer.py       one layer in FP8 beside BF16: what `convert(only_if_faster=True)` asks
    step.py        a whole step: seconds by kind of work
    serving.py     a decoded token and a prompt, with FP8 weights beside BF16
    memory.py      a whole step: bytes at its peak
    fit.py         measurements -> rates.json, with the error on what was fitted and on what was held out

Nothing here times anything or touches a GPU: every answer is a pure function of shape, recipe and table, so that a
model converts the same way twice, and a laptop can plan for an H200.
"""

from __future__ import annotations

from .layer import Gain, linear_gain
from .memory import Memory, memory
from .rates import GPUS, Rates, rates
from .shape import Architecture, Product
from .step import Setting, Step, step

__all__ = [
    "GPUS",
    "Architecture",
    "Gain",
    "Memory",
    "Product",
    "Rates",
    "Setting",
    "Step",
    "linear_gain",
    "memory",
    "rates",
    "step",
]
