"""When a run is lost: a loss or a gradient that is not finite, and what to try then."""

from __future__ import annotations

import math

from ..errors import Fp8Error

PATIENCE = 50


class DivergedError(Fp8Error):
    """The loss or the gradient is no longer finite; the last checkpoint was written before that."""


class Health:
    """Watches loss and gradient norm. With a loss scale, a step whose gradient overflows is skipped, not lost."""

    def __init__(self) -> None:
        self._skipped = 0

    def skips(self, step: int, loss: float, norm: float, scaled: bool) -> bool:
        """Whether this step is skipped; `DivergedError` where going on has no sense."""
        if not math.isfinite(loss):
            raise DivergedError(message(f"the loss of step {step} is {loss}"))
        if math.isfinite(norm):
            self._skipped = 0
            return False
        if not scaled:
            raise DivergedError(message(f"the gradient of step {step} has the norm {norm} (its loss is {loss:.4g})"))
        self._skipped += 1
        if self._skipped == PATIENCE:
            raise DivergedError(
                message(f"the gradients of {PATIENCE} steps up to step {step} overflowed, at every loss scale tried")
            )
        return True


def message(what: str) -> str:
    return (
        f"{what}. Nothing was saved after it; the last checkpoint is whole. Resume from it with a lower lr, a longer "
        "warmup_steps or a smaller clip; if it fails again, a run with recipe='none' shows whether FP8 is the cause; "
        "skip keeps single layers in high precision."
    )
