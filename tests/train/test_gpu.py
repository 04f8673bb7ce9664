"""On a Hopper GPU too, a run killed and resumed is, bit for bit, the run that was never interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fp8.train import TrainConfig, Trainer, train


class Killed(BaseException):
    """Stands for a process that ends without any clean-up of ours."""


def kill(trainer: Trainer, record: dict[str, Any]) -> None:
    if record["step"] == 7:
        raise Killed


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["none", "tensorwise", "delayed", "rowwise", "blockwise"])
def test_resumed_is_uninterrupted(recipe: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "model": "medium", "num_layers": 2, "sequence_length": 512, "batch_size": 4, "steps": 12, "recipe": recipe,
        "checkpoint_interval": 5, "loss_scale": "dynamic", "loss_scale_interval": 3, "device": "cuda",
    }  # fmt: skip
    whole = train(TrainConfig(out=str(tmp_path / "whole"), **settings))
    parts = TrainConfig(out=str(tmp_path / "parts"), **settings)
    with pytest.raises(Killed):
        train(parts, callbacks=[kill])
    resumed = train(parts, resume=True)
    assert resumed.losses == whole.losses
    assert whole.losses[-1] < whole.losses[0] - 1
    assert whole.checkpoint is not None
    assert resumed.checkpoint is not None
    for name in ("model.safetensors", "training.safetensors"):
        assert (resumed.checkpoint / name).read_bytes() == (whole.checkpoint / name).read_bytes(), name
