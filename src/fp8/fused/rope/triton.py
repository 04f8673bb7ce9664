"""The GPU's rotary positions: `rope_heads` turns the queries and keys of a joined product; their gradients are turned
back by `both.cu`, which writes the joined gradient in both orientations, as codes.

bytes an element (BF16): forward 4; backward 4, and 2 more where the scale of the whole tensor, or those of its rows and
columns, are measured first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..both import Room, both, rope_source
from ..target import Codes, Target
from .reference import Heads


@triton.jit
def rope_heads(
    x_ptr, y_ptr, cos_ptr, sin_ptr, rows, cols, tokens, total, turned, HALF: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """A block of rows of one head of x [rows, total * 2 HALF] to y."""
    head = tl.program_id(0) % total
    r = tl.program_id(0) // total * BM + tl.arange(0, BM)
    i = tl.arange(0, BN)
    inside = (r < rows)[:, None] & (i < HALF)[None, :]
    at = r.to(tl.int64)[:, None] * cols + head * 2 * HALF + i[None, :]
    first = tl.load(x_ptr + at, mask=inside, other=0.0)
    second = tl.load(x_ptr + at + HALF, mask=inside, other=0.0)
    if head < turned:
        place = (r % tokens)[:, None] * HALF + i[None, :]
        cos = tl.load(cos_ptr + place, mask=inside, other=0.0)
        sin = tl.load(sin_ptr + place, mask=inside, other=0.0)
        a, b = first.to(tl.float32), second.to(tl.float32)
        tl.store(y_ptr + at, a * cos - b * sin, mask=inside)
        tl.store(y_ptr + at + HALF, b * cos + a * sin, mask=inside)
    else:
        tl.store(y_ptr + at, first, mask=inside)
        tl.store(y_ptr + at + HALF, second, mask=inside)


def rope(qkv: Tensor, tokens: int, heads: Heads) -> Tensor:
    """`reference.rope` of a CUDA matrix."""
    if not heads.turned:
        return qkv.clone()
    qkv = qkv.contiguous()
    rows, cols = qkv.shape
    y = torch.empty_like(qkv)
    cos, sin = heads.tables(tokens, qkv.device)
    half = heads.dim // 2
    width = triton.next_power_of_2(half)
    height = max(1, 2048 // width)
    rope_heads[(triton.cdiv(rows, height) * heads.total,)](
        qkv, y, cos, sin, rows, cols, tokens, heads.total, heads.turned, HALF=half, BM=height, BN=width,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return y


def rope_backward(dq: Tensor, dk: Tensor, dv: Tensor, heads: Heads, target: Target | None) -> Tensor | Codes:
    """`reference.rope_backward` on CUDA; a head's channels are a power of two from 16 to 128."""
    assert heads.dim in (16, 32, 64, 128)  # `both.cu` turns pairs within its 128 columns
    dq, dk, dv = (_readable(t) for t in (dq, dk, dv))
    rows, cols = dq.shape[0] * dq.shape[2], heads.total * heads.dim
    room = Room(dq, rows, cols, target)
    tables = heads.tables(dq.shape[2], dq.device) if heads.turned else (None, None)
    return both(room, rope_source(dq, dk, dv, heads, tables), rows, cols, DIM=heads.dim).result


def _readable(t: Tensor) -> Tensor:
    """Channels side by side, and 16 bytes readable at once."""
    aligned = t.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in t.stride()[:3])
    return t if t.stride(-1) == 1 and aligned else t.clone(memory_format=torch.contiguous_format)
