"""The two kernels around cuDNN's (`chunks.py`): keys and values out of their pages, and the join of several calls.

    gather_keys   KEYS positions of one head: codes and scales of their pages, to BF16 [keys, KV, D]; equal in bytes
    join_rows     ROWS tokens of one query head: the calls' results by their shares, FP32, rounded once

bytes: a gathered position of one head moves D codes twice, its scales, and 4 D bytes out; a join reads 2 D + 4 a call
and writes 2 D.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chunks import Part
from .pages import LayerPages
from .triton import read_from, scales_of

KEYS = 64  # positions of a program
ROWS = 32  # tokens of a program


@triton.jit(do_not_specialize=["first", "count", "stop"])
def gather_keys(
    keys_ptr, values_ptr, key_scale_ptr, value_scale_ptr, pages_ptr, k_ptr, v_ptr, first, count, stop, kv,
    PAGE: tl.constexpr, D: tl.constexpr, SCALES: tl.constexpr, KEYS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(1)
    i, d = tl.program_id(0) * KEYS + tl.arange(0, KEYS), tl.arange(0, BD)
    at = first + i
    held = at < stop
    page = tl.load(pages_ptr + at // PAGE, mask=held, other=0).to(tl.int64)
    row = (page * kv + h) * PAGE + at % PAGE
    inside = held[:, None] & (d < D)[None, :]
    out = (i.to(tl.int64)[:, None] * kv + h) * D + d[None, :]
    written = (i < count)[:, None] & (d < D)[None, :]
    keys = tl.load(keys_ptr + row[:, None] * D + d[None, :], mask=inside, other=0.0)
    values = tl.load(values_ptr + row[:, None] * D + d[None, :], mask=inside, other=0.0)
    if SCALES == 0:
        tl.store(k_ptr + out, keys, mask=written)
        tl.store(v_ptr + out, values, mask=written)
    else:
        if SCALES == 1:
            k_scale = tl.load(key_scale_ptr + h) + tl.zeros([KEYS], tl.float32)
            v_scale = tl.load(value_scale_ptr + h) + tl.zeros([KEYS], tl.float32)
        else:
            k_scale = tl.load(key_scale_ptr + row, mask=held, other=0.0)
            v_scale = tl.load(value_scale_ptr + row, mask=held, other=0.0)
        tl.store(k_ptr + out, (keys.to(tl.float32) * k_scale[:, None]).to(tl.bfloat16), mask=written)
        tl.store(v_ptr + out, (values.to(tl.float32) * v_scale[:, None]).to(tl.bfloat16), mask=written)


@triton.jit(do_not_specialize=["rows"])
def join_rows(
    given_ptrs, lse_ptrs, strides, out_ptr, rows, heads,
    PARTS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """given [T, H, D] and lse [H, T], whose heads are `strides` apart, of PARTS calls, to out [T, H, D]."""
    h = tl.program_id(1)
    r, d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BD)
    held = r < rows
    inside = held[:, None] & (d < D)[None, :]
    at = (r.to(tl.int64)[:, None] * heads + h) * D + d[None, :]
    top = tl.full([ROWS], float("-inf"), tl.float32)
    for i in tl.static_range(PARTS):
        top = tl.maximum(top, tl.load(lse_ptrs[i] + h.to(tl.int64) * strides[i] + r, mask=held, other=0.0))
    total = tl.zeros([ROWS], tl.float32)
    product = tl.zeros([ROWS, BD], tl.float32)
    for i in tl.static_range(PARTS):
        share = tl.exp(tl.load(lse_ptrs[i] + h.to(tl.int64) * strides[i] + r, mask=held, other=0.0) - top)
        total += share
        product += share[:, None] * tl.load(given_ptrs[i] + at, mask=inside, other=0.0).to(tl.float32)
    y = tl.div_rn(product, tl.broadcast_to(total[:, None], [ROWS, BD]))
    tl.store(out_ptr + at, y.to(tl.bfloat16), mask=inside)


def gathered(layer: LayerPages, pages: Tensor, first: int, count: int, stop: int) -> tuple[Tensor, Tensor]:
    """`chunks.gathered` on CUDA, equal in bytes."""
    kv, width = layer.num_kv_heads, layer.head_dim
    k, v = torch.empty(2, count, kv, width, dtype=torch.bfloat16, device=pages.device)
    gather_keys[(triton.cdiv(count, KEYS), kv)](
        *read_from(layer, k), pages, k, v, first, count, stop, kv,
        PAGE=layer.page_size, D=width, SCALES=scales_of(layer), KEYS=KEYS, BD=max(16, triton.next_power_of_2(width)),
        num_warps=4,
    )  # fmt: skip
    return k, v


def joined(parts: list[Part], out: Tensor) -> None:
    """`chunks.joined` on CUDA; a part alone is copied."""
    rows, heads, width = parts[0][0].shape
    join_rows[(triton.cdiv(rows, ROWS), heads)](
        tuple(given for given, _ in parts), tuple(lse for _, lse in parts), tuple(lse.stride(0) for _, lse in parts),
        out, rows, heads,
        PARTS=len(parts), D=width, ROWS=ROWS, BD=max(16, triton.next_power_of_2(width)), num_warps=4,
    )  # fmt: skip
