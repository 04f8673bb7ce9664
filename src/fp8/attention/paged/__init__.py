"""Attention over a cache in pages, which many sequences share: the doors.

`pages.py` is the memory, `rows.py` what is asked; `reference.py` is the definition of both operations, `triton.py`
writes the same bytes and reads within a stated bound; `cuda.py` and `decode.cu` do a decode step over an FP8 cache;
`chunks.py` takes long chunks of prompts to cuDNN.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...backends import Backend, choose, function, why_not_cuda, why_not_triton
from ...errors import ShapeError, TensorError
from ...fused.rows import Into, row_codes
from ...quantize.record import Quantized
from . import chunks
from .pages import PAGED_DTYPES, LayerPages, PagedCache
from .rows import Chunk, Rows

__all__ = [
    "BACKENDS", "PAGED_DTYPES", "READERS", "Chunk", "LayerPages", "PagedCache", "Rows", "attend", "rope_attend",
    "rope_write",
]  # fmt: skip


@dataclass(frozen=True)
class Request:
    """What a backend of `attend` is asked."""

    q: Tensor
    layer: LayerPages
    batch: Rows

    @property
    def device(self) -> torch.device:
        return self.q.device


def _decoded(q: Tensor, heads: int, layer: LayerPages, batch: Rows) -> str | None:
    """Why the decode kernel in CUDA does not take this; None when it does."""
    reason = why_not_cuda(q.device)
    return reason or function("fp8.attention.paged.cuda", "why_not")(len(q), heads, layer, batch)


BACKENDS = (
    Backend("triton", "a Hopper GPU and Triton", lambda x: why_not_triton(x.device), "fp8.attention.paged.triton"),
    Backend("reference", "nothing", lambda x: None, "fp8.attention.paged.reference"),
)
READERS = (
    Backend(
        "cuda",
        "a Hopper GPU and NVRTC; decode",
        lambda x: _decoded(x.q, x.q.shape[1], x.layer, x.batch),
        "fp8.attention.paged.cuda",
    ),
    Backend(
        "chunks",
        "a Hopper GPU and Triton; for long chunks cuDNN",
        lambda x: chunks.why_not(x.q, x.layer, x.batch),
        "fp8.attention.paged.chunks",
    ),
    *BACKENDS,
)


def _heads(qkv: Tensor, layer: LayerPages) -> int:
    """The query heads of a joined product. Raises `TensorError`, `ShapeError`."""
    if qkv.dtype != torch.bfloat16:
        raise TensorError(f"rope_write takes the joined product in bfloat16, not {str(qkv.dtype)[6:]}.")
    if qkv.dim() != 2 or qkv.shape[1] % layer.head_dim or qkv.shape[1] // layer.head_dim <= 2 * layer.num_kv_heads:
        raise ShapeError(
            f"rope_write takes [T, (H + 2 * {layer.num_kv_heads}) * {layer.head_dim}] for this cache, not "
            f"{list(qkv.shape)}."
        )
    return qkv.shape[1] // layer.head_dim - 2 * layer.num_kv_heads


def rope_write(
    qkv: Tensor,
    positions: Tensor,
    slots: Tensor,
    layer: LayerPages,
    rope: tuple[Tensor, Tensor],
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Turn queries and keys, store keys and values in their pages; the queries `[T, H, D]`, BF16.

    qkv              BF16 [T, (H + 2 KV) D], contiguous: heads of queries, of keys, of values
    positions        int32 [T]
    slots            int64 [T]: page * page_size + offset; -1: nothing is stored. No two are the same
    rope             cos and sin, FP32 [positions, D / 2]
    q_norm, k_norm   [D]: weights of an RMS norm of each head before the rotation, with `eps`

    Codes are those of `attention.LayerCache` for the same BF16 keys and values. Raises `TensorError`, `ShapeError`.
    """
    _heads(qkv, layer)
    return choose("rope_write", BACKENDS, qkv).run(qkv, positions, slots, layer, rope, q_norm, k_norm, eps)


def attend(q: Tensor, layer: LayerPages, batch: Rows, scale: float) -> Tensor:
    """Causal attention of new rows over everything stored of their sequences: `[T, H * D]`, BF16.

    q       BF16 [T, H, D]; the row at position p sees the keys j <= p of its own sequence
    scale   multiplies q · k, usually 1 / sqrt(D)

    A row's result depends on its query and on the keys that it sees, not on the rest of the batch. Raises
    `TensorError`, `ShapeError`.
    """
    if q.dtype != torch.bfloat16:
        raise TensorError(f"attend takes queries in bfloat16, not {str(q.dtype)[6:]}.")
    if q.dim() != 3 or q.shape[2] != layer.head_dim or q.shape[1] % layer.num_kv_heads:
        raise ShapeError(
            f"attend takes [T, H, {layer.head_dim}] with H a multiple of {layer.num_kv_heads}, not {list(q.shape)}."
        )
    return choose("attend", READERS, Request(q, layer, batch)).run(q, layer, batch, scale)


def rope_attend(
    qkv: Tensor, positions: Tensor, slots: Tensor, layer: LayerPages, rope: tuple[Tensor, Tensor], batch: Rows,
    scale: float, norms: tuple[Tensor, Tensor, float] | None = None, into: Into | None = None,
) -> Tensor | Quantized:  # fmt: skip
    """`attend` of `rope_write`, BF16 `[T, H * D]`, or the codes of that: two launches for a decode step on a GPU.

    qkv     BF16 [T, (H + 2 KV) D], with positions, slots, layer and rope as `rope_write` takes them
    norms   `q_norm`, `k_norm` and `eps` of `rope_write`
    into    how the result is quantized; None: it stays in BF16

    Raises what the two raise.
    """
    heads = _heads(qkv, layer)
    if norms is None and _decoded(qkv, heads, layer, batch) is None and (into is None or into.joinable):
        run = function("fp8.attention.paged.cuda", "rope_attend")
        return run(qkv, positions, slots, layer, rope, batch, scale, into)
    q_norm, k_norm, eps = norms or (None, None, 0.0)
    q = rope_write(qkv, positions, slots, layer, rope, q_norm, k_norm, eps)
    y = attend(q, layer, batch, scale)
    return y if into is None else row_codes(y, into)
