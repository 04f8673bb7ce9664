"""Texts of one length, a chunk of positions at a time, as batches of the serving engine."""

from __future__ import annotations

import torch
from torch import Tensor

from ...serve import Batch

PAGE = 64


def equal_rows(tokens: Tensor, start: int, length: int) -> Batch:
    """The next tokens [B, n] of B texts, at the positions from `start` on; all their logits are wanted.

    A text owns the pages of `length` positions, those of the first text first, in a cache that is theirs alone.
    """
    (texts, new), device = tokens.shape, tokens.device
    each = pages_of(length)
    positions = torch.arange(start, start + new, device=device).repeat(texts)
    text = torch.arange(texts, device=device)
    return Batch(
        tokens=tokens.flatten(),
        positions=positions.int(),
        slots=(text * each * PAGE).repeat_interleave(new) + positions,
        starts=(torch.arange(texts + 1, device=device) * new).int(),
        lengths=torch.full_like(text, start + new, dtype=torch.int32),
        pages=(text[:, None] * each + torch.arange(each, device=device)).int(),
        wanted=torch.arange(texts * new, device=device),
        decode=new == 1,
    )


def pages_of(length: int) -> int:
    """Pages that hold so many positions.

    >>> pages_of(64), pages_of(65)
    (1, 2)
    """
    return -(-length // PAGE)
