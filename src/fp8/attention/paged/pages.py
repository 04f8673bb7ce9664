"""The memory of a paged cache: fixed-size pages of keys and values that any sequence may own.

A page holds `page_size` consecutive positions of one sequence, of every layer and every key head. A sequence owns a
list of pages, in order; which numbers they have means nothing, and sequences with a common beginning may own the same
ones. The owner of the lists is the scheduler: here are only the bytes.

    codes    [pages, KV, page_size, D]   E4M3, E5M2 or BF16; a head of a page is contiguous, as a kernel reads it
    scales   three layouts
             dynamic   FP32 [pages, KV, page_size]: a power of two a token and head, measured when it is stored, the
                       same that `attention/cache.py` keeps: nothing to calibrate, and nothing ever saturates
             static    FP32 [KV]: one a head, from the checkpoint; D bytes a token and head instead of D + 4, and a
                       value beyond 448 scales is clipped, and counted
             none      BF16

`real = code * scale`, exact for a power of two.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import ConfigError, ShapeError, suggest
from ...formats import Format, format_of

PAGED_DTYPES = {"fp8": "e4m3", "e4m3": "e4m3", "e5m2": "e5m2", "bf16": None}
PAGE_STEP = 16  # page sizes are multiples of it: the tiles of a kernel then never straddle a page


@dataclass(frozen=True)
class LayerPages:
    """The pages of one layer.

    key_codes, value_codes   [pages, KV, page_size, D]
    key_scale, value_scale   FP32 [pages, KV, page_size] (dynamic), FP32 [KV] (static), or None (BF16)
    saturated                int64 [1], shared by all layers: elements that a static scale clipped, so far
    """

    key_codes: Tensor
    value_codes: Tensor
    key_scale: Tensor | None
    value_scale: Tensor | None
    saturated: Tensor

    @property
    def num_kv_heads(self) -> int:
        return self.key_codes.shape[1]

    @property
    def page_size(self) -> int:
        return self.key_codes.shape[2]

    @property
    def head_dim(self) -> int:
        return self.key_codes.shape[3]

    @property
    def format(self) -> Format | None:
        """The format of the codes; None: BF16, stored as it is."""
        return None if self.key_scale is None else format_of(self.key_codes.dtype)

    @property
    def static(self) -> bool:
        """Whether each head has one scale for good."""
        return self.key_scale is not None and self.key_scale.dim() == 1


class PagedCache:
    """The cache of a model, in `.layers`, one `LayerPages` each.

    >>> cache = PagedCache(2, pages=8, page_size=16, num_kv_heads=2, head_dim=64)
    >>> cache.layers[0].key_codes.shape, cache.nbytes == 8 * PagedCache.bytes_per_page(2, 16, 2, 64)
    (torch.Size([8, 2, 16, 64]), True)
    """

    def __init__(
        self,
        num_layers: int,
        pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        dtype: str = "fp8",
        kv_scales: Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Room for `pages * page_size` positions.

        dtype       "fp8" or "e4m3", "e5m2", "bf16"
        kv_scales   FP32 [num_layers, 2, KV]: the static scales of keys and of values, which multiply codes; None:
                    dynamic ones. BF16 has none, and passes over them

        Raises `ConfigError`, `ShapeError`.
        """
        self.format = format_name(dtype)
        check_sizes(num_layers, pages, page_size, num_kv_heads, head_dim)
        if kv_scales is not None and tuple(kv_scales.shape) != (need := (num_layers, 2, num_kv_heads)):
            raise ShapeError(f"static scales of this cache are FP32 {list(need)}; got {list(kv_scales.shape)}.")
        self.dtype, self.num_layers, self.pages, self.page_size = dtype, num_layers, pages, page_size
        self.num_kv_heads, self.head_dim = num_kv_heads, head_dim
        self.saturated = torch.zeros(1, dtype=torch.int64, device=device)
        self.layers = [self._layer(None if kv_scales is None else kv_scales[i], device) for i in range(num_layers)]

    @staticmethod
    def bytes_per_page(
        num_layers: int, page_size: int, num_kv_heads: int, head_dim: int, dtype: str = "fp8", static: bool = False
    ) -> int:
        """Bytes of one page in all layers. `static`: scales are a head's, and cost nothing."""
        plain = format_name(dtype) is None
        scale = 0 if plain or static else 4
        return num_layers * 2 * num_kv_heads * page_size * (head_dim * (2 if plain else 1) + scale)

    @property
    def nbytes(self) -> int:
        """Bytes of all pages, used or not, and of all scales."""
        held = (t for p in self.layers for t in (p.key_codes, p.value_codes, p.key_scale, p.value_scale))
        return sum(t.numel() * t.element_size() for t in held if t is not None)

    def _layer(self, scales: Tensor | None, device: torch.device | str | None) -> LayerPages:
        keys, values = (self._codes(device) for _ in range(2))
        if self.format is None:
            return LayerPages(keys, values, None, None, self.saturated)
        if scales is None:
            ones = torch.ones(keys.shape[:3], device=device)
            return LayerPages(keys, values, ones, ones.clone(), self.saturated)
        key, value = (scale.to(device=device, dtype=torch.float32).contiguous() for scale in scales)
        return LayerPages(keys, values, key, value, self.saturated)

    def _codes(self, device: torch.device | str | None) -> Tensor:
        dtype = torch.bfloat16 if self.format is None else format_of(self.format).dtype
        shape = (self.pages, self.num_kv_heads, self.page_size, self.head_dim)
        return torch.zeros(shape, dtype=dtype, device=device)


def format_name(dtype: str) -> str | None:
    """The format behind a cache's `dtype`; None: BF16."""
    if dtype not in PAGED_DTYPES:
        raise ConfigError(f"a paged KV cache cannot be stored as {dtype!r}. {suggest(dtype, PAGED_DTYPES)}")
    return PAGED_DTYPES[dtype]


def check_sizes(num_layers: int, pages: int, page_size: int, num_kv_heads: int, head_dim: int) -> None:
    """Refuse a cache that cannot be built."""
    if min(num_layers, pages, num_kv_heads, head_dim) < 1:
        raise ConfigError(
            f"a paged cache needs at least one layer, page, key head and channel; got {num_layers} layers, {pages} "
            f"pages, {num_kv_heads} heads, {head_dim} channels."
        )
    if page_size < PAGE_STEP or page_size % PAGE_STEP:
        raise ConfigError(f"page_size={page_size} must be a multiple of {PAGE_STEP}: 64 is usual.")
