"""May a checkpoint go on under these settings? What must be equal, what may change, and what is said about it."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import CheckpointError
from .checkpoint import Saved
from .config import DIMENSIONS, TrainConfig

# What fixes the meaning of a checkpoint's tensors. All else may change; a change that moves the losses is told.
FIXED = ("recipe", "skip", "only_if_faster", "precision")
SILENT = (
    "model", *DIMENSIONS, "text", "tokenizer", "validation_text", "out",
    "eval_interval", "eval_batches", "checkpoint_interval", "keep_last",
)  # fmt: skip


def facts(config: TrainConfig, data: str, device: torch.device) -> dict[str, Any]:
    """What a checkpoint tells about the run that wrote it."""
    from .. import __version__

    here = {"torch": torch.__version__, "threads": torch.get_num_threads(), "device": device_name(device)}
    return {"fp8": __version__, **here, "config": config.to_dict(), "data": data}


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def compare(saved: Saved, now: dict[str, Any]) -> list[str]:
    """The differences that are allowed but move the losses, a sentence each.

    Raises `CheckpointError` for other dimensions, another recipe, or another text: those cannot go on.
    """
    then, config = TrainConfig.from_dict(saved.state["config"]), TrainConfig.from_dict(now["config"])
    for name, size in then.sizes.items():
        refuse(saved, name, size, config.sizes[name])
    old, new = then.to_dict(), config.to_dict()
    for name in FIXED:
        refuse(saved, name, old[name], new[name])
    if saved.state["data"] != now["data"]:
        raise CheckpointError(
            f"{saved.folder} was trained on another text or tokenizer ({saved.state['data']}, not {now['data']}). "
            f"Give it back its text ({then.text!r}, tokenizer {then.tokenizer!r}), or start a new run in another out."
        )
    changed = [
        name
        for name in sorted(old.keys() | new.keys())
        if name not in FIXED + SILENT and old.get(name) != new.get(name)
    ]
    notes = [f"{name} changed from {old.get(name)} to {new.get(name)}" for name in changed]
    moved = [key for key in ("fp8", "torch", "threads", "device") if saved.state.get(key) != now[key]]
    return notes + [f"{key} was {saved.state.get(key)}, is {now[key]}" for key in moved]


def refuse(saved: Saved, name: str, then: Any, now: Any) -> None:
    if then != now:
        then, now = (value["name"] if isinstance(value, dict) and "name" in value else value for value in (then, now))
        raise CheckpointError(
            f"{saved.folder} was trained with {name}={then!r}, the settings say {now!r}. "
            f"Resume with {name}={then!r}, or start a new run in another out."
        )
