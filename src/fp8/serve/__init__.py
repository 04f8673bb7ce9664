"""The serving engine: from requests to tokens, in FP8 from the weights to the cache.

`batch.py` is what one step computes; `models/` computes it.
"""

from __future__ import annotations

from .batch import Batch

__all__ = ["Batch"]
