"""What servers do to layers that they multiply as one matrix, in plain torch, to see which codes survive it.

Per-channel and block scales are loaded as they are. With per-tensor scales, vLLM (and SGLang after it) decodes q, k and
v (gate and up) in FP16 and quantizes them anew by the largest of the three scales:

    w = fp16(code) * scale, rounded to FP16;   new code = E4M3(clip(float(w) * (1 / largest scale)))

Equal scales give equal codes, unless `code * scale` does not fit FP16: its smallest step is 2^-24, and 2^-9 * scale is
below that for scales under 2^-15. With unequal ones a power-of-two ratio changes only what becomes subnormal.

Source: vLLM 0.33.0, `w8a8_utils.py`, `requantize_with_max_scale`, `per_tensor_dequantize`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Changed:
    """What fusing changed: codes, and the numbers that they stand for, of how many."""

    codes: int
    values: int
    count: int


def requantized(codes: Sequence[Tensor], scales: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """The codes `[n, K]` of each shard after vLLM's rule, and their one scale."""
    largest = torch.stack([s.float().reshape(()) for s in scales]).max()
    new = []
    for code, scale in zip(codes, scales, strict=True):
        real = code.to(torch.float16) * scale.float().reshape(())
        assert real.dtype == torch.float16
        new.append((real.float() * (1.0 / largest)).clamp(-448, 448).to(torch.float8_e4m3fn))
    return new, largest


def changed_by_fusing(codes: Sequence[Tensor], scales: Sequence[Tensor]) -> Changed:
    """How much of some shards, each with its per-tensor scale, does not survive being fused."""
    new, largest = requantized(codes, scales)
    changed_codes = changed_values = count = 0
    for old, fresh, scale in zip(codes, new, scales, strict=True):
        changed_codes += int((old.view(torch.uint8) != fresh.view(torch.uint8)).sum())
        changed_values += int((old.float() * scale.float().reshape(()) != fresh.float() * largest).sum())
        count += old.numel()
    return Changed(changed_codes, changed_values, count)
