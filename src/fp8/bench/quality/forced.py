"""A text given to a served model token by token, through its cache: the loss of each token, and the likeliest one.

Texts of one length enter together, a chunk of positions at a time, so that every position after the first chunk attends
to codes that earlier steps stored. Within a chunk a layer stores before it reads: keys and values are read as codes by
the token that made them, as in the engine, whose steps these are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...evaluate.perplexity import token_losses
from .chunks import PAGE, equal_rows, pages_of


@dataclass(frozen=True)
class Forced:
    """Of each target, [windows, T]: its loss in nats, FP32, and the token that was likeliest in its place, int32.

    clipped   elements that static scales clipped when they were stored
    """

    losses: Tensor
    best: Tensor
    clipped: int


@torch.no_grad()
def forced(model: Any, rows: Tensor, *, at_once: int = 1 << 13, chunk: int = 512) -> Forced:
    """Force tokens [windows, T + 1] through a model with caches of its own (`Cached`, or a served model).

    at_once   tokens of a step, about: as many windows as fit are read together
    chunk     positions of a step
    """
    length = rows.shape[1] - 1
    chunk = min(chunk, length)
    together = max(1, at_once // chunk)
    losses, best, clipped = [], [], 0
    for windows in rows.to(model.embedding.device).split(together):
        cache = model.new_cache(len(windows) * pages_of(length), PAGE)
        found = [step(model, cache, windows, start, min(start + chunk, length)) for start in range(0, length, chunk)]
        losses.append(torch.cat([loss for loss, _ in found], 1).cpu())
        best.append(torch.cat([top for _, top in found], 1).int().cpu())
        clipped += int(cache.saturated)
    return Forced(torch.cat(losses), torch.cat(best), clipped)


def step(model: Any, cache: Any, windows: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Losses and likeliest tokens [windows, stop - start] of the targets of some positions."""
    logits = model(equal_rows(windows[:, start:stop], start, windows.shape[1] - 1), cache)
    losses = token_losses(logits, windows[:, start + 1 : stop + 1].flatten())
    return losses.view(len(windows), -1), logits.argmax(-1).view(len(windows), -1)
