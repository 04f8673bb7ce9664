"""The GPU's Hadamard transform: a program holds some rows of one run of channels and does every stage on them.

A stage splits the tile into its pairs and joins sums and differences again; Triton turns what crosses threads into
shuffles and trips through shared memory. Each element is read and written once: 4 bytes in BF16. A product with the
matrix on tensor cores would spare the shuffles, but adds in another order, and its bits would not be the definition's.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def butterflies(x_ptr, y_ptr, rows, cols, factor, BM: tl.constexpr, B: tl.constexpr, STAGES: tl.constexpr):
    """A block of rows of one run of B = 2^STAGES channels of x [rows, cols] to y."""
    runs = cols // B
    r = tl.program_id(0) // runs * BM + tl.arange(0, BM)
    inside = (r < rows)[:, None]
    at = r.to(tl.int64)[:, None] * cols + tl.program_id(0) % runs * B + tl.arange(0, B)[None, :]
    y = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    for stage in tl.static_range(STAGES):
        pairs = tl.permute(tl.reshape(y, (BM, B >> (stage + 1), 2, 1 << stage)), (0, 1, 3, 2))
        first, second = tl.split(pairs)
        y = tl.reshape(tl.permute(tl.join(first + second, first - second), (0, 1, 3, 2)), (BM, B))
    tl.store(y_ptr + at, (y * factor).to(y_ptr.dtype.element_ty), mask=inside)


def hadamard(x: Tensor, block: int) -> Tensor:
    """`reference.hadamard` of a CUDA matrix."""
    x = x.contiguous()
    rows, cols = x.shape
    y = torch.empty_like(x)
    if not x.numel():
        return y
    height = plan(block)
    butterflies[(triton.cdiv(rows, height) * (cols // block),)](
        x, y, rows, cols, 1 / math.sqrt(block), BM=height, B=block, STAGES=block.bit_length() - 1, num_warps=4,
        enable_fp_fusion=False,
    )  # fmt: skip
    return y


def plan(block: int) -> int:
    """The rows of a program: 4096 elements, 32 a thread."""
    return max(4096 // block, 1)
