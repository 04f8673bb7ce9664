"""The loss of a model on text, in nats a token, and its perplexity.

A run's own evaluation and this one see the same rows, so that what was saved and read again can be held against the
model that was trained. `windows.py` cuts a text of any length; `token_losses` scores what it cut.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..train import TrainConfig, Trainer
from ..train.tokens import validation_batches


def token_loss(model: nn.Module, rows: Tensor, precision: str = "fp32", reduction: str = "mean") -> Tensor:
    """The cross entropy, in FP32, of each token after the first: rows `[B, T + 1]` (int64) -> a scalar.

    precision   "bf16" runs the model under BF16 autocast, "fp32" in the types that it has
    """
    rows = rows.to(next(model.parameters()).device)
    with torch.autocast(rows.device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        logits = model(rows[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten(), reduction=reduction)


@torch.no_grad()
def token_losses(logits: Tensor, targets: Tensor, at_once: int = 256) -> Tensor:
    """The cross entropy of each token, FP32 `[T]`: logits `[T, V]`, targets `[T]` (int64).

    `at_once` positions are converted to FP32 at a time, so that a large vocabulary is not held twice.
    """
    pairs = zip(logits.split(at_once), targets.split(at_once), strict=True)
    return torch.cat([F.cross_entropy(given.float(), wanted, reduction="none") for given, wanted in pairs])


@torch.no_grad()
def validation_loss(model: nn.Module, batches: Iterable[Tensor], precision: str = "fp32") -> float:
    """The mean loss over batches of rows `[B, T + 1]`, in evaluation mode."""
    was, total, count = model.training, 0.0, 0
    model.eval()
    for rows in batches:
        total += float(token_loss(model, rows, precision, "sum"))
        count += rows[:, 1:].numel()
    model.train(was)
    return total / count


def validation_rows(trainer: Trainer) -> Iterable[Tensor]:
    """The rows that a run validates on."""
    config: TrainConfig = trainer.config
    return validation_batches(trainer.tokens.validation, config)


def perplexity(loss: float) -> float:
    """How many tokens the model is, on average, undecided between.

    >>> round(perplexity(2.0), 3)
    7.389
    """
    return math.exp(min(loss, 700.0))
