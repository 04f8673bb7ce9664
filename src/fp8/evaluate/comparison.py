"""The same run twice, in high precision and in FP8, with the same seed, the same first weights and the same data.

The two arms differ in one setting, the recipe. On a CPU all that is not an FP8 product is FP32 in both: where no
instruction multiplies BF16 matrices FP32 is faster than BF16, and it is the stricter yardstick, for the FP8 arm is then
charged with all of the rounding. On a GPU both run under BF16 autocast, as such models are trained, compiled, and
replayed from a CUDA graph.

`settings` is the one place where the demo and the study get their run from; `run_arm` trains it, or goes on from where
it was interrupted.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..errors import CheckpointError
from ..recipe import Recipe
from ..train import Result, TrainConfig, checkpoints, train
from ..train.checkpoint import read_state
from ..train.loop import Callback, device_of
from ..train.resume import device_name

CPU: dict[str, Any] = {
    "model": "small", "precision": "fp32", "sequence_length": 128, "batch_size": 8, "steps": 250, "lr": 1.5e-3,
    "eval_batches": 32, "checkpoint_interval": 50, "keep_last": 1,
}  # fmt: skip
GPU: dict[str, Any] = CPU | {
    "model": "medium", "precision": "bf16", "compile": True, "graph": True, "sequence_length": 1024, "batch_size": 16,
    "steps": 300, "lr": 6e-4, "eval_batches": 3,
}  # fmt: skip


def settings(
    recipe: str | Recipe | None, out: Path, *, device: str = "auto", seed: int = 0, **changes: Any
) -> TrainConfig:
    """The settings of one arm: small on a CPU, larger on a GPU; `changes` that are not None replace numbers.

    `recipe` None is the high-precision arm. Raises `ConfigError`, as `TrainConfig` does.
    """
    where = device_of(device)
    given = {name: value for name, value in changes.items() if value is not None}
    plain = (GPU if where.type == "cuda" else CPU) | given
    plain.setdefault("eval_interval", max(plain["steps"] // 2, 1))
    return TrainConfig.from_dict(plain | {"recipe": recipe, "out": str(out), "device": str(where), "seed": seed})


def run_arm(config: TrainConfig, *, callbacks: Sequence[Callback] = (), console: Console | None = None) -> Result:
    """Train the settings; on from the newest checkpoint under `config.out` where the same settings wrote it."""
    going_on = unfinished(config)
    return train(config, resume=going_on, overwrite=not going_on, callbacks=callbacks, console=console)


def unfinished(config: TrainConfig) -> bool:
    """Whether `config.out` holds a readable checkpoint of these very settings."""
    found = checkpoints(Path(config.out))
    if not found:
        return False
    try:
        return read_state(found[-1])["config"] == config.to_dict()
    except CheckpointError:
        return False


def difference(value: float, high: float) -> float:
    """How far a value lies above that of the high-precision run, in percent.

    >>> difference(2.02, 2.0)
    1.0
    """
    return round(100 * (value / high - 1), 12)


def surroundings(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on: processor, versions, threads."""
    from .. import __version__

    return {
        "device": device_name(device) if device.type == "cuda" else f"{processor()}, {os.cpu_count()} cores",
        "platform": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fp8": __version__,
    }


def processor() -> str:
    """The name of the processor, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def peak_memory() -> int | None:
    """The most bytes of memory that this process has held; None where the system does not tell."""
    try:
        import resource
    except ImportError:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
