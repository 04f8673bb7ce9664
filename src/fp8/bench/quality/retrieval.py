"""Needles found by the engine with keys and values in several caches, over context length and depth.

The model that `needles.py` taught is served in BF16. Every prompt hides as many needles as a row of training and asks
for one; the engine answers greedily, two tokens, and both must be right: the first comes out of the prompt's last
chunk, the second out of a decode step. Prompts are the same in every arm.

    found        the share of right answers, Wilson's interval
    difference   from BF16, prompt by prompt (Bonett and Price); `as_many`: its interval holds 0
    depths       the share by where the needle lies, in fifths of the row

A test that cannot fail shows nothing: the control's cache keeps three codes or so a value, and must find nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...evaluate.intervals import paired_difference, proportion
from .answers import answers
from .caches import CONTROL, HIGH, Cached, Calibration, arms
from .needles import ANSWER, Rows, hide

FIFTHS = 5
ASKED = (HIGH, "e4m3", "e4m3, static", "e5m2", CONTROL)
CALIBRATION_ROWS = 16


def found(arm: Cached, rows: Rows, together: int) -> list[int]:
    """Whether each prompt's needle was found: 1 or 0."""
    given = answers(arm, rows.prompts.tolist(), ANSWER, together=together, graphs=False)
    return [int(got == wanted) for got, wanted in zip(given, rows.answers[:, 0].tolist(), strict=True)]


def by_depth(right: Sequence[int], depths: Tensor) -> list[float | None]:
    """The share that is right in each fifth of the row."""
    fifth = (depths * FIFTHS).long().clamp(max=FIFTHS - 1).tolist()
    groups = [[r for r, f in zip(right, fifth, strict=True) if f == i] for i in range(FIFTHS)]
    return [sum(group) / len(group) if group else None for group in groups]


def retrieval(
    model: Any,
    text: Tensor,
    lengths: Sequence[int],
    count: int,
    *,
    kinds: Sequence[str] = ASKED,
    together: int = 64,
    seed: int = 1,
    say: Callable[[str], Any] = lambda line: None,
) -> dict[str, Any]:
    """Ask `count` prompts of each length. text: uint8 [N] that the model was not taught on."""  # fmt: skip
    generator = torch.Generator(text.device).manual_seed(seed)
    calibration = Calibration.of(model, hide(text, CALIBRATION_ROWS, max(lengths), generator).tokens)
    cached, out = arms(model, calibration, kinds), {}
    for length in lengths:
        rows = hide(text, count, length, generator, asked=1)
        right = {name: found(arm, rows, together) for name, arm in cached.items()}
        depths = rows.depths[:, 0].cpu()
        out[str(length)] = {name: told(right[HIGH], mine, depths) for name, mine in right.items()}
        say(f"{length}: " + ", ".join(f"{name} {sum(mine) / count:.1%}" for name, mine in right.items()))
    return {"prompts": count, "lengths": out}


def told(base: Sequence[int], mine: Sequence[int], depths: Tensor) -> dict[str, Any]:
    off = paired_difference(base, mine)
    return {
        "found": proportion(mine).to_dict(), "difference": off.to_dict(), "as_many": off.low <= 0 <= off.high,
        "depths": by_depth(mine, depths),
    }  # fmt: skip
