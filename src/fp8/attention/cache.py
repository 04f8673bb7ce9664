"""A cache of keys and values in FP8: half the bytes of BF16, read exactly.

**What is stored.** K after the rotary embedding and V as projected, both first rounded to BF16, then quantized by
`fp8.quantize` with one scale for each token and head (the tile "row" over D): codes `[B, KV, capacity, D]` and
power-of-two FP32 scales `[B, KV, capacity]`. The scale is dynamic: the token's own largest magnitude, known when it is
stored, so there is nothing to calibrate and a token's codes never depend on its neighbours or its batch. The cost is 4
bytes of scale for D bytes of codes: with D = 64, 53 % of BF16 instead of 50 %.

**What is computed.** `attend` decodes the codes exactly and computes as `attention/reference.py` says. With E4M3 each
element is within 2^-4 of itself, or within 2^-10 of its token's scale when it is small against the token's largest.

**Memory.** One buffer a layer, contiguous, allocated for `capacity` positions and doubled when full, so that n tokens
cost O(n) copies. Contiguous, not paged: the serving engine has its own pages; here is what the definition reads.

`bf16` and `fp32` caches store what they are given (BF16 rounds, FP32 does not) and share all the rest; they are the
yardsticks that the FP8 ones are held against.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConfigError, ShapeError, TensorError, suggest
from ..quantize import quantize
from .reference import attend

CACHE_DTYPES = {"fp8": "e4m3", "e4m3": "e4m3", "e5m2": "e5m2", "bf16": None, "fp32": None}
PLAIN = {"bf16": torch.bfloat16, "fp32": torch.float32}


class LayerCache:
    """The keys and values of one layer: `append` stores, `attend` reads."""

    def __init__(
        self,
        batch: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        dtype: str = "fp8",
        capacity: int = 256,
        device: torch.device | str | None = None,
    ) -> None:
        """An empty cache for `capacity` positions, in E4M3 ("fp8" or "e4m3"), "e5m2", "bf16" or "fp32"."""
        if dtype not in CACHE_DTYPES:
            raise ConfigError(f"a KV cache cannot be stored as {dtype!r}. {suggest(dtype, CACHE_DTYPES)}")
        self.batch, self.num_kv_heads, self.head_dim = batch, num_kv_heads, head_dim
        self.dtype, self.format = dtype, CACHE_DTYPES[dtype]
        self.length = 0
        self.keys = Store(self, capacity, device)
        self.values = Store(self, capacity, device)

    @property
    def capacity(self) -> int:
        """Positions that fit before the next doubling."""
        return self.keys.codes.shape[2]

    def append(self, k: Tensor, v: Tensor) -> None:
        """Store T more positions: k, v `[B, KV, T, D]` in FP32, BF16 or FP16. Raises `ShapeError`, `TensorError`."""
        new = self.check(k, v)
        self.reserve(self.length + new)
        self.keys.write(k, self.length)
        self.values.write(v, self.length)
        self.length += new

    def attend(self, q: Tensor, causal: bool = True) -> Tensor:
        """`[B, H, T, D]`: the last T positions' queries over everything stored, in the type of q."""
        if not self.length:
            raise ShapeError("the cache is empty: append keys and values before attending.")
        return attend(q, self.keys.decode(self.length), self.values.decode(self.length), causal)

    def reserve(self, positions: int) -> None:
        """Make room for so many positions in all, by doubling."""
        capacity = max(self.capacity, 1)
        while capacity < positions:
            capacity *= 2
        if capacity > self.capacity:
            self.keys.grow(capacity, self.length)
            self.values.grow(capacity, self.length)

    def check(self, k: Tensor, v: Tensor) -> int:
        """How many positions are new, if they fit."""
        need = (self.batch, self.num_kv_heads, self.head_dim)
        if k.shape != v.shape or k.dim() != 4 or (k.shape[0], k.shape[1], k.shape[3]) != need:
            raise ShapeError(
                f"this cache stores k and v of shape [{need[0]}, {need[1]}, T, {need[2]}]; "
                f"got k {tuple(k.shape)} and v {tuple(v.shape)}."
            )
        if not (k.is_floating_point() and v.is_floating_point()):
            raise TensorError(f"a cache stores floating-point keys and values, not {k.dtype} and {v.dtype}.")
        return k.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of what is stored: codes and scales of `length` positions."""
        return self.length * (self.keys.bytes_per_position + self.values.bytes_per_position)

    @property
    def bytes_in_bf16(self) -> int:
        """Bytes that the same positions take in BF16."""
        return 2 * 2 * self.batch * self.num_kv_heads * self.head_dim * self.length


class Store:
    """Keys, or values: `codes [B, KV, capacity, D]` and, in FP8, `scale [B, KV, capacity]`."""

    def __init__(self, layer: LayerCache, capacity: int, device: torch.device | str | None) -> None:
        self.format = layer.format
        rows = (layer.batch, layer.num_kv_heads, capacity)
        if self.format is None:
            self.codes, self.scale = torch.zeros(*rows, layer.head_dim, dtype=PLAIN[layer.dtype], device=device), None
            return
        dtype = torch.float8_e4m3fn if self.format == "e4m3" else torch.float8_e5m2
        self.codes = torch.zeros(*rows, layer.head_dim, dtype=dtype, device=device)
        self.scale = torch.ones(*rows, device=device)

    def write(self, x: Tensor, start: int) -> None:
        """Quantize `x [B, KV, T, D]` into positions from `start` on."""
        stop = start + x.shape[2]
        if self.scale is None or self.format is None:
            self.codes[:, :, start:stop] = x.detach()
            return
        q = quantize(x.detach().to(torch.bfloat16), self.format, "row")
        self.codes.view(torch.uint8)[:, :, start:stop] = q.codes.view(torch.uint8)
        self.scale[:, :, start:stop] = q.scale.view(x.shape[:3])

    def decode(self, length: int) -> Tensor:
        """The first `length` positions, `[B, KV, length, D]` in FP32, exactly."""
        real = self.codes[:, :, :length].float()
        return real if self.scale is None else real * self.scale[:, :, :length, None]

    def grow(self, capacity: int, length: int) -> None:
        """Move the first `length` positions into buffers for `capacity`."""
        self.codes = _grown(self.codes, capacity, length)
        self.scale = None if self.scale is None else _grown(self.scale, capacity, length)

    @property
    def bytes_per_position(self) -> int:
        batch, heads, _, width = self.codes.shape
        return batch * heads * (width * self.codes.element_size() + (0 if self.scale is None else 4))


def _grown(old: Tensor, capacity: int, length: int) -> Tensor:
    new = old.new_zeros(*old.shape[:2], capacity, *old.shape[3:])
    new[:, :, :length] = old[:, :, :length]
    return new


class KVCache:
    """The cache of a whole model: one `LayerCache` a layer, in `.layers`.

    >>> cache = KVCache(2, batch=1, num_kv_heads=2, head_dim=64)
    >>> cache.layers[0].append(torch.zeros(1, 2, 10, 64), torch.zeros(1, 2, 10, 64))
    >>> cache.length, cache.nbytes, cache.bytes_in_bf16
    (10, 2720, 5120)
    """

    def __init__(
        self,
        num_layers: int,
        batch: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        dtype: str = "fp8",
        capacity: int = 256,
        device: torch.device | str | None = None,
    ) -> None:
        """Empty caches for `num_layers` layers; the other arguments as for `LayerCache`."""
        self.dtype = dtype
        self.layers = [
            LayerCache(batch, num_kv_heads, head_dim, dtype=dtype, capacity=capacity, device=device)
            for _ in range(num_layers)
        ]

    @property
    def length(self) -> int:
        """Positions stored so far (in the first layer, which is written first)."""
        return self.layers[0].length

    @property
    def nbytes(self) -> int:
        """Bytes stored: codes and scales of all layers."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def bytes_in_bf16(self) -> int:
        """Bytes that the same positions take in BF16."""
        return sum(layer.bytes_in_bf16 for layer in self.layers)
