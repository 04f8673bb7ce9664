"""A checkpoint is whole or absent; what is damaged is refused with the way out."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from fp8.errors import CheckpointError
from fp8.train import TrainConfig, Trainer, checkpoint, train

Make = Callable[..., TrainConfig]
Write = Callable[[TrainConfig], Path]


def test_written_read_and_written_again_is_the_same_bytes(make: Make, tmp_path: Path) -> None:
    """Law 6 of the numerics."""
    first = train(make(steps=3, recipe="delayed", loss_scale="dynamic")).checkpoint
    assert first is not None
    trainer = Trainer(make(recipe="delayed", loss_scale="dynamic"))
    assert trainer.resume(first)[0].startswith("steps")
    facts = {key: json.loads((first / "state.json").read_text())[key] for key in ("fp8", "torch", "threads", "device")}
    saved = checkpoint.read(first)
    rest = {key: saved.state[key] for key in ("config", "data", "conversion")}
    second = checkpoint.save(tmp_path / "again", trainer.run, facts | rest, 1)
    for file in sorted(path.name for path in first.iterdir()):
        assert (first / file).read_bytes() == (second / file).read_bytes(), file


def test_random_generators_go_on(make: Make) -> None:
    trainer = Trainer(make())
    torch.rand(3)
    random.random()
    folder = trainer.save()
    expected = torch.rand(3).tolist(), random.random()
    other = Trainer(make(seed=9))
    other.resume(folder)
    assert (torch.rand(3).tolist(), random.random()) == expected


def test_tied_weights_are_written_once(make: Make) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(257, 8), nn.Linear(8, 257, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.head(self.embedding(tokens))

    whole = train(make(out=make().out + "1"), model=Tied())
    first = train(make(steps=6), model=Tied())
    assert first.checkpoint is not None
    assert list(checkpoint.read(first.checkpoint).state["aliases"]) == ["head.weight"]
    assert len(whole.losses) == 12
    again = train(make(steps=6), model=Tied(), resume=True)
    assert again.losses == first.losses


def test_only_the_last_ones_are_kept(make: Make) -> None:
    train(make(keep_last=2, checkpoint_interval=3))
    assert [path.name for path in checkpoint.checkpoints(Path(make().out))] == ["step_00000009", "step_00000012"]


def test_files_can_be_read_by_others(make: Make) -> None:
    folder = train(make(steps=1)).checkpoint
    assert folder is not None
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(raw)


DAMAGE = [
    ("model.safetensors", Path.unlink, "model.safetensors is missing"),
    ("training.safetensors", Path.unlink, "training.safetensors is missing"),
    ("state.json", Path.unlink, "state.json: No such file"),
    ("model.safetensors", cut, r"model.safetensors has \d+ bytes of \d+"),
    ("training.safetensors", cut, r"training.safetensors has \d+ bytes of \d+"),
    ("state.json", cut, "state.json is cut or no JSON"),
    ("model.safetensors", flip, "other content than was written"),
    ("training.safetensors", flip, "other content than was written"),
]


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGE)
def test_damaged_files(name: str, damage: Callable[[Path], Any], message: str, make: Make) -> None:
    folder = train(make(steps=8)).checkpoint
    assert folder is not None
    damage(folder / name)
    with pytest.raises(CheckpointError, match=message) as caught:
        train(make(steps=9), resume=True)
    assert "Delete that folder to resume from step_00000004" in str(caught.value)
    shutil.rmtree(folder)
    assert train(make(steps=8), resume=True).step == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [({"format": 2, "fp8": "9.9"}, r"pip install fp8==9\.9"), ({"step": None, "files": None}, "lacks files, step")],
)
def test_another_version(change: dict[str, Any], message: str, make: Make) -> None:
    folder = train(make(steps=1)).checkpoint
    assert folder is not None
    state = json.loads((folder / "state.json").read_text()) | change
    absent = [name for name, value in change.items() if value is None]
    (folder / "state.json").write_text(json.dumps({k: v for k, v in state.items() if k not in absent}))
    with pytest.raises(CheckpointError, match=message):
        train(make(steps=2), resume=True)


def test_a_full_disk_is_seen_before_writing(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    before = train(make(steps=4)).checkpoint
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(CheckpointError, match=r"0\.0 MB are free\. It needs 1\.\d MB\. step_00000004, .* is whole"):
        train(make(steps=8), resume=True)
    assert checkpoint.latest(Path(make().out)) == before


FULL = """
import resource, signal, sys, torch
from fp8.errors import CheckpointError
from fp8.train import TrainConfig, train
torch.set_num_threads(1)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
def limit(trainer, record):
    if record["step"] == 5:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
try:
    train(TrainConfig.from_toml(sys.argv[1]), callbacks=[limit])
except CheckpointError as error:
    print(error)
"""


def test_a_disk_that_fills_while_writing(make: Make, write: Write) -> None:
    """The kernel refuses to let a file grow, as a full disk does; the checkpoint before is whole."""
    command = [sys.executable, "-c", FULL, str(write(make()))]
    child = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "cannot write the checkpoint" in child.stdout, child.stderr
    assert "File too large" in child.stdout
    assert "step_00000004, written before, is whole" in child.stdout
    assert [path.name for path in (Path(make().out) / "checkpoints").iterdir()] == ["step_00000004"]
    assert train(make(), resume=True).step == 12
