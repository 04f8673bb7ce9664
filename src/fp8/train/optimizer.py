"""AdamW over FP32 master weights, and the learning rate as a pure function of the step.

Because the rate depends on the step alone, and not on how often a scheduler was called, a resumed run cannot drift
from one that was never interrupted. The optimizer is torch's fused AdamW: it takes `found_inf`, so a gradient scaler
skips a step on the device, without waiting for it, and its hooks run for a skipped step too. `optimizer = "fp8"` takes
`fp8.AdamW` in its place: the same rule in another order of roundings, with the weight codes written in the same pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..fused.adamw import AdamW, moments
from .config import TrainConfig


def learning_rate(step: int, config: TrainConfig) -> float:
    """The rate of update number `step` (from 0): linear warm-up, then half a cosine down to `min_lr_ratio` at the end.

    >>> config = TrainConfig(lr=0.5, warmup_steps=2, steps=10, min_lr_ratio=0.1)
    >>> [learning_rate(step, config) for step in (0, 1, 2)], round(learning_rate(9, config), 6)
    ([0.25, 0.5, 0.5], 0.05)
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    length = max(config.steps - 1 - config.warmup, 1)
    progress = min((step - config.warmup) / length, 1.0)
    lowest = config.lr * config.min_lr_ratio
    return lowest + (config.lr - lowest) * (1 + math.cos(math.pi * progress)) / 2


def adjust_hyperparameters(lr: float, warmup: int) -> tuple[float, int]:
    """The articles' rule for a run that moves to FP8: 15 % less learning rate, 50 % more warm-up.

    The rate is rounded to 12 digits, so that 0.0006 gives 0.00051 and not 0.0005099999999999999.
    Source: "FP8 Training and Inference", `adjust_hyperparams_for_fp8`. A habit, not a law: measure on your own run.

    >>> adjust_hyperparameters(0.0006, 2000)
    (0.00051, 3000)
    """
    return float(f"{lr * 0.85:.12g}"), int(warmup * 1.5)


def trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that train, by name, matrices first: the order of the optimizer's groups and of a checkpoint."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    yield from (pair for pair in named if pair[1].ndim >= 2)
    yield from (pair for pair in named if pair[1].ndim < 2)


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW that decays matrices only; biases, norms and other vectors keep their size."""
    parameters = [p for _, p in trained(model)]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    betas = (config.beta1, config.beta2)
    if config.optimizer == "fp8":
        return AdamW(groups, config.lr, betas, config.eps, moments=config.moments, seed=config.seed % (1 << 32))
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)


def gradient_variance(optimizer: torch.optim.Optimizer) -> float:
    """The variance of a gradient element over recent steps, averaged over all elements; 0 before the first step.

    AdamW already holds a running mean m and a running mean square v of each element: v - m^2, each corrected for its
    start, is a variance over about 1 / (1 - beta2) steps, of the gradient as the optimizer got it (unscaled and
    clipped).
    """
    total, count = 0.0, 0
    for group in optimizer.param_groups:
        beta1, beta2 = group["betas"]
        for state in (optimizer.state[p] for p in group["params"] if p in optimizer.state):
            step = float(state["step"])
            if step:
                mean, square = moments.read(state, "exp_avg"), moments.read(state, "exp_avg_sq")
                mean, square = mean / (1 - beta1**step), square / (1 - beta2**step)
                total += float((square - mean * mean).clamp_(min=0).double().sum())
                count += mean.numel()
    return total / count if count else 0.0
