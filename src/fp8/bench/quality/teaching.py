"""How a small decoder is taught to find needles (`needles.py`).

Every row asks for all of its needles, in an order of its own, one after the other at its end; an evaluation asks for
one. What counts is the cross entropy of the answers, and a tenth of that of the text. Looking up a key is learnt all at
once, after a while in which nothing seems to happen, and sooner the more of a row asks for it. So the first rows are
short, and needles and questions alone. When `known` of the
answers have come right, on average over the last steps, rows become twice as long, up to the longest, and the
learning rate falls to zero over the last `cooldown` updates. Each step has equally many tokens, and every other one,
drawn anew each time, repeats a shorter length, so that what was learnt is kept.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...models import Decoder
from .needles import MARK, NEEDLE, Rows, hide

TEXT_WEIGHT = 0.1


@dataclass(frozen=True)
class Lessons:
    """How long rows are, and when they become longer.

    lengths    of rows, ascending
    tokens     of a step
    known      the share of right answers from which on rows become longer
    updates    in all, at most; the last `cooldown` of them let the learning rate fall to 0
    seconds    after so many, the cooldown begins wherever the curriculum stands
    """

    lengths: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048, 4096)
    tokens: int = 1 << 16
    known: float = 0.9
    updates: int = 6000
    cooldown: int = 600
    warmup: int = 100
    lr: float = 1e-3
    seconds: float = math.inf
    seed: int = 0


def loss_of(model: Decoder, rows: Rows) -> tuple[Tensor, Tensor]:
    """What is minimized, and the share of answers that are right (both symbols), of one step's rows."""
    logits = model(rows.tokens[:, :-1]).float()
    targets = rows.tokens[:, 1:]
    each = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
    questions = NEEDLE * rows.asked
    tail = each[:, -questions:].unflatten(1, (rows.asked, NEEDLE))[..., 2:]  # its last two are the answer
    hit = (logits[:, -questions:].argmax(-1) == targets[:, -questions:]).unflatten(1, (rows.asked, NEEDLE))[..., 2:]
    text = (targets < MARK)[:, :-questions]
    loss = tail.mean() + TEXT_WEIGHT * (each[:, :-questions] * text).sum() / text.sum().clamp(min=1)
    return loss, hit.all(-1).float().mean()


@dataclass
class Taught:
    """A model that was taught, and what became of it: lines of (update, seconds, length, loss, share right)."""

    model: Decoder
    log: list[tuple[int, float, int, float, float]] = field(default_factory=list)
    reached: int = 0
    updates: int = 0
    seconds: float = 0.0


def teach(
    model: Decoder, text: Tensor, lessons: Lessons, say: Callable[[str], Any] | None = None, every: int = 50
) -> Taught:
    """Train a decoder on the device that it and the text (uint8 [N]) are on, under BF16 autocast on a GPU."""
    device, began = text.device, time.perf_counter()
    generator = torch.Generator(device).manual_seed(lessons.seed)
    dice = torch.Generator().manual_seed(lessons.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lessons.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    taught, level, ending = Taught(model.train()), 0, None
    share = torch.zeros((), device=device)
    for update in range(lessons.updates):
        left = lessons.updates - update
        if ending is None and (left <= lessons.cooldown or time.perf_counter() - began > lessons.seconds):
            ending = min(left, lessons.cooldown)
        if ending is not None and (ending := ending - 1) < 0:
            break
        fade = 1.0 if ending is None else ending / lessons.cooldown
        for group in optimizer.param_groups:
            group["lr"] = lessons.lr * min(1.0, (update + 1) / lessons.warmup) * fade
        newest = level == 0 or float(torch.rand((), generator=dice)) < 0.5
        length = lessons.lengths[level if newest else int(torch.randint(level, (), generator=dice))]
        rows = hide(text, max(1, lessons.tokens // length), length, generator)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss, right = loss_of(model, rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        share = share + (right - share) * 0.05 if newest else share
        if (update + 1) % every == 0:
            line = (update + 1, round(time.perf_counter() - began, 1), lessons.lengths[level], float(loss.detach()), float(share))
            taught.log.append(line)
            if say:
                say("update {}, {} s, rows of {}: loss {:.3f}, {:.1%} right".format(*line))
            if ending is None and line[-1] >= lessons.known and level + 1 < len(lessons.lengths):
                level, share = level + 1, torch.zeros((), device=device)
    taught.reached, taught.updates = lessons.lengths[level], update + 1
    taught.seconds = time.perf_counter() - began
    model.eval()
    return taught
