"""A run small enough to take a second: one thread, a few kilobytes of Moby-Dick, a decoder of two narrow blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fp8.train import TrainConfig, moby_dick

Make = Callable[..., TrainConfig]
SMALL: dict[str, Any] = {
    "hidden_size": 32, "ffn_hidden_size": 48, "num_layers": 2, "num_attention_heads": 2, "num_kv_heads": 1,
    "sequence_length": 16, "batch_size": 2, "steps": 12, "eval_interval": 6, "eval_batches": 2,
    "checkpoint_interval": 4, "keep_last": 10, "device": "cpu", "precision": "bf16", "recipe": "none", "lr": 0.01,
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def book(tmp_path: Path) -> Path:
    """The first chapter and a half."""
    path = tmp_path / "book.txt"
    path.write_text(moby_dick().read_text(encoding="utf-8")[:20_000], encoding="utf-8")
    return path


@pytest.fixture
def make(tmp_path: Path, book: Path) -> Make:
    """Settings of a small run in a folder of this test; changes as arguments."""
    return lambda **changes: TrainConfig.from_dict(SMALL | {"text": str(book), "out": str(tmp_path / "run")} | changes)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[TrainConfig], Path]:
    """Writes settings as a TOML file."""

    def to_toml(config: TrainConfig) -> Path:
        lines = [f"{k} = {str(v).lower() if isinstance(v, bool) else repr(v)}" for k, v in config.to_dict().items()]
        path = tmp_path / "run.toml"
        path.write_text("\n".join(lines))
        return path

    return to_toml
