"""Perplexity of a text of any length: overlapping windows, each token scored once.

A text of N tokens t_0 ... t_(N-1) is read in windows of W tokens that begin every S tokens. A window that begins at b
reads t_b ... t_(b+W-1) and predicts the token after each; scored are those predictions that no earlier window has made:
W from the first window, the last S from each other one. So t_1 ... t_(N-1) are scored exactly once, and t_0, which
nothing precedes, is not. Every token of the second window and after has at least W - S + 1 tokens of context; with
S = W (cheapest, and pessimistic) the first of each window has one.

With `bos`, each window reads a begin-of-text token first, of which nothing is scored; t_0 then is, in the first window.

Memory is one batch of windows: B * W * V logits. Windows of a batch have one length, so a text's last window, which is
shorter, is a batch of its own; and batches are cut at the same places whether or not a run was interrupted, so that a
resumed evaluation equals an uninterrupted one to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..errors import ConfigError, DataError
from .perplexity import token_losses
from .subject import Causal

Record = dict[str, Any]


@dataclass(frozen=True)
class Window:
    """Tokens `start` to `stop` are read (`stop` itself only predicted); targets from `scored` to `stop` are new."""

    index: int
    start: int
    stop: int
    scored: int

    @property
    def tokens(self) -> int:
        """How many predictions it scores."""
        return self.stop - self.scored + 1


def cut(tokens: int, window: int, stride: int, *, bos: bool = False, limit: int | None = None) -> list[Window]:
    """The windows of a text of so many tokens; at most the first `limit`. Raises `ConfigError`, `DataError`.

    >>> [(w.start, w.stop, w.scored) for w in cut(11, window=4, stride=2)]
    [(0, 4, 1), (2, 6, 5), (4, 8, 7), (6, 10, 9)]
    """
    if not 1 <= stride <= window:
        raise ConfigError(f"stride={stride} must lie between 1 and window={window}, or tokens would be left out.")
    if tokens < 2:
        raise DataError(f"a text of {tokens} tokens has no token with another before it.")
    found, next_target, last = [], 0 if bos else 1, tokens - 1
    while next_target <= last and (limit is None or len(found) < limit):
        start = len(found) * stride
        stop = min(start + window, last)
        found.append(Window(len(found), start, stop, next_target))
        next_target = stop + 1
    return found


def batches(windows: Sequence[Window], size: int) -> Iterator[list[Window]]:
    """At most `size` neighbouring windows that read equally many tokens and score equally many."""
    batch: list[Window] = []
    for window in windows:
        same = batch and window.stop - window.start == batch[0].stop - batch[0].start
        if batch and not (same and window.tokens == batch[0].tokens and len(batch) < size):
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def score(model: Causal, tokens: np.ndarray, batch: Sequence[Window], bos: int | None = None) -> list[Record]:
    """One record a window: its `index`, the sum of its `nll` in nats, and how many `tokens` were scored."""
    begin = [] if bos is None else [bos]
    rows = torch.tensor([[*begin, *tokens[w.start : w.stop].tolist()] for w in batch])
    out, logits = [], model.logits(rows)
    for window, given in zip(batch, logits, strict=True):
        targets = torch.tensor(tokens[window.scored : window.stop + 1].astype(np.int64), device=given.device)
        losses = token_losses(given[-window.tokens :], targets)
        out.append({"id": window.index, "nll": float(losses.double().sum()), "tokens": window.tokens})
    return out
