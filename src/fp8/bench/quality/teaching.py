"""How a small decoder is taught to find needles (`needles.py`).

Every row asks for all of its needles, in an order of its own, one after the other at its end; an evaluation asks for
one. What counts is the cross entropy of the answers, and a tenth of that of the text. Looking up a key is learnt all at
once, after a while in which nothing seems to happen, and sooner the more of a row asks for it: first rows are short,
and needles and questions alone. When `known` of the answers have come right, on average over the last steps, rows
become twice as long, up to the longest, and the learning rate falls to zero over the last `cooldown` updates. Each step
has equally many tokens, and every other one, drawn anew each time, repeats a shorter length, so that what was learnt is
kept.
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
    tokens: int = 1 << 15
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


class Course:
    """Where the lessons stand: the length of rows, the share of answers that come right, and the end."""

    def __init__(self, lessons: Lessons) -> None:
        self.lessons, self.began = lessons, time.perf_counter()
        self.dice = torch.Generator().manual_seed(lessons.seed)
        self.level, self.share, self.left = 0, torch.zeros(()), lessons.updates

    @property
    def length(self) -> int:
        """Of the newest rows."""
        return self.lessons.lengths[self.level]

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began

    @property
    def ending(self) -> bool:
        return self.left <= self.lessons.cooldown

    def rate(self, update: int) -> float:
        """The learning rate of an update; the cooldown begins when time is up, if it has not begun."""
        if self.seconds > self.lessons.seconds:
            self.left = min(self.left, self.lessons.cooldown)
        self.left -= 1
        return self.lessons.lr * min(1.0, (update + 1) / self.lessons.warmup, (self.left + 1) / self.lessons.cooldown)

    def drawn_length(self) -> int:
        """The newest length, or as often a shorter one."""
        if self.level == 0 or float(torch.rand((), generator=self.dice)) < 0.5:
            return self.length
        return self.lessons.lengths[int(torch.randint(self.level, (), generator=self.dice))]

    def saw(self, length: int, right: Tensor) -> None:
        if length == self.length:
            self.share = self.share.to(right.device) * 0.95 + right * 0.05

    def go_on(self) -> None:
        """To longer rows, where the newest ones are known."""
        if not self.ending and float(self.share) >= self.lessons.known and self.level + 1 < len(self.lessons.lengths):
            self.level, self.share = self.level + 1, torch.zeros(())


def teach(
    model: Decoder, text: Tensor, lessons: Lessons, say: Callable[[str], Any] | None = None, every: int = 50
) -> Taught:
    """Train a decoder on the device that it and the text (uint8 [N]) are on, under BF16 autocast on a GPU."""
    generator = torch.Generator(text.device).manual_seed(lessons.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lessons.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    taught, course = Taught(model.train()), Course(lessons)
    while course.left > 0:
        for group in optimizer.param_groups:
            group["lr"] = course.rate(taught.updates)
        length = course.drawn_length()
        loss, right = update(model, hide(text, max(1, lessons.tokens // length), length, generator), optimizer)
        course.saw(length, right)
        taught.updates += 1
        if taught.updates % every == 0:
            line = (taught.updates, round(course.seconds, 1), course.length, float(loss), float(course.share))
            taught.log.append(line)
            if say:
                say("update {}, {} s, rows of {}: loss {:.3f}, {:.1%} right".format(*line))
            course.go_on()
    taught.reached, taught.seconds = course.length, course.seconds
    model.eval()
    return taught


def update(model: Decoder, rows: Rows, optimizer: torch.optim.Optimizer) -> tuple[Tensor, Tensor]:
    """One step: its loss, and the share of right answers before it."""
    with torch.autocast(rows.tokens.device.type, torch.bfloat16, enabled=rows.tokens.is_cuda):
        loss, right = loss_of(model, rows)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach(), right
