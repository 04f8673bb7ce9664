"""Attention, twice: for training (`attention`, BF16 or FP32, with gradients) and over a cache of FP8 keys and values
(`KVCache`).

`softmax(q · k^T / sqrt(D)) · v`, with fewer key heads than query heads allowed (grouped queries) in both. The products
inside attention are not FP8: the scores and the softmax stay in high precision (`docs/numerics.md`); what is FP8 is
the cache.
"""

from __future__ import annotations

from .cache import CACHE_DTYPES, KVCache, LayerCache
from .reference import attend
from .training import attention

__all__ = ["CACHE_DTYPES", "KVCache", "LayerCache", "attend", "attention"]
