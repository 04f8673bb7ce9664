"""The loss scale: torch's `GradScaler` for a dynamic one, and the same object, held at its number, for a static one.

FP8 gradients carry their own scales, so a loss scale is not what keeps them from underflow; it is here for runs that
had one before, and for the tensors that stay in FP16. A step whose gradients overflow is skipped; dynamic scaling
then halves.
"""

from __future__ import annotations

import torch
from torch.amp.grad_scaler import GradScaler

from .config import TrainConfig

START = 65536.0


def make_scaler(config: TrainConfig, device: torch.device) -> GradScaler | None:
    """The scaler that the settings ask for; None for `none`."""
    if config.loss_scale == "none":
        return None
    start = START if config.loss_scale == "dynamic" else float(config.loss_scale)
    scaler = GradScaler(device.type, init_scale=start, growth_interval=config.loss_scale_interval)
    scaler.scale(torch.ones((), device=device))  # torch makes the scale at its first use; a checkpoint needs it before
    return scaler


def update_scaler(scaler: GradScaler, config: TrainConfig) -> None:
    """After a step: let a dynamic scale move, hold a static one."""
    if config.loss_scale == "dynamic":
        scaler.update()
    else:
        scaler.update(new_scale=float(config.loss_scale))
