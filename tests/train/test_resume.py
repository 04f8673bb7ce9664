"""A run killed at any step and resumed is, bit for bit, the run that was never interrupted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fp8.train.loss_scale
from fp8.errors import CheckpointError, ConfigError
from fp8.recipe import Recipe
from fp8.train import Result, TrainConfig, Trainer, checkpoint, read_metrics, train

Make = Callable[..., TrainConfig]
Write = Callable[[TrainConfig], Path]

RUNS: dict[str, dict[str, Any]] = {
    "high": {"recipe": "none", "precision": "fp32"},
    "tensorwise": {"recipe": "tensorwise", "checkpoint_interval": 3},
    "delayed": {"recipe": "delayed", "gradient_accumulation": 2, "loss_scale": "dynamic", "loss_scale_interval": 3},
    "delayed_article": {"recipe": "delayed_article", "loss_scale": 64},
    "blockwise": {"recipe": "blockwise", "skip": ("layers.1.*",)},
    "fp8.AdamW": {"recipe": "blockwise", "optimizer": "fp8", "moments": "fp8", "loss_scale": "dynamic"},
}


class Killed(BaseException):
    """Stands for a process that ends without any clean-up of ours."""


def kill_at(step: int) -> Callable[[Trainer, dict[str, Any]], None]:
    def callback(trainer: Trainer, record: dict[str, Any]) -> None:
        if record["step"] == step:
            raise Killed

    return callback


def run(config: TrainConfig, *kills: int) -> Result:
    """Train, killed after each of these steps and resumed."""
    for i, step in enumerate(kills):
        with pytest.raises(Killed):
            train(config, resume=i > 0, callbacks=[kill_at(step)])
    return train(config, resume=bool(kills))


def content(result: Result) -> tuple[list[dict[str, Any]], list[bytes]]:
    """All that must be equal: the log without its clock, and the last checkpoint's tensors."""
    clock = ("time", "tokens_per_second")
    timeless = [{k: v for k, v in r.items() if k not in clock} for r in read_metrics(result.metrics)]
    assert result.checkpoint is not None
    return timeless, [(result.checkpoint / name).read_bytes() for name in ("model.safetensors", "training.safetensors")]


@pytest.mark.parametrize("name", RUNS)
def test_resumed_is_uninterrupted(name: str, make: Make, tmp_path: Path) -> None:
    whole = run(make(out=str(tmp_path / "whole"), **RUNS[name]))
    parts = run(make(out=str(tmp_path / "parts"), **RUNS[name]), 5, 7, 11)
    assert content(parts) == content(whole)
    assert parts.losses == whole.losses
    assert len(whole.losses) == 12
    assert whole.losses[-1] < whole.losses[0]


def test_skipped_steps_resume_too(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss scale that starts far too high: the first steps overflow, are skipped, and leave no trace in FP8 state."""
    monkeypatch.setattr(fp8.train.loss_scale, "START", 2.0**127)
    settings: dict[str, Any] = {"recipe": "delayed", "loss_scale": "dynamic", "checkpoint_interval": 1}
    whole = run(make(out=str(tmp_path / "whole"), **settings))
    parts = run(make(out=str(tmp_path / "parts"), **settings), 2, 3, 5)
    assert content(parts) == content(whole)
    skipped = [record["skipped"] for record in read_metrics(whole.metrics) if record["kind"] == "step"]
    assert skipped[:2] == [True, True]
    assert not all(skipped)


CHILD = """
import sys, torch
from fp8.train import TrainConfig, train
torch.set_num_threads(1)
def tell(trainer, record):
    print(record["kind"], record["step"], flush=True)
train(TrainConfig.from_toml(sys.argv[1]), callbacks=[tell])
"""


def test_kill_minus_nine(make: Make, write: Write, tmp_path: Path) -> None:
    """A real process, killed while it computes a step."""
    config = make(out=str(tmp_path / "parts"), recipe="delayed", steps=40, checkpoint_interval=3)
    command = [sys.executable, "-c", CHILD, str(write(config))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if line == "step 8\n":
                child.kill()
        assert child.wait() == -signal.SIGKILL
    assert 6 <= int(checkpoint.latest(Path(config.out)).name[-8:]) < 40
    whole = run(make(out=str(tmp_path / "whole"), recipe="delayed", steps=40, checkpoint_interval=3))
    assert content(train(config, resume=True)) == content(whole)


@pytest.mark.parametrize("moment", ["write_state", "publish", "flush"])
def test_killed_while_saving(moment: str, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make()

    def killed(*_: Any) -> None:
        raise Killed

    with pytest.raises(Killed):
        train(config, callbacks=[kill_at(5)])
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, moment, killed)
        with pytest.raises(Killed):
            train(config, resume=True)
    folder = Path(config.out) / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == [".step_00000008.partial", "step_00000004"]
    result = train(config, resume=True)
    assert sorted(path.name for path in folder.iterdir()) == ["step_00000004", "step_00000008", "step_00000012"]
    assert len(result.losses) == 12


def test_ctrl_c_saves_and_a_second_one_stops(make: Make, tmp_path: Path) -> None:
    def press(trainer: Trainer, record: dict[str, Any]) -> None:
        if record["step"] == 5 and record["kind"] == "step":
            os.kill(os.getpid(), signal.SIGINT)

    def press_twice(trainer: Trainer, record: dict[str, Any]) -> None:
        press(trainer, record)
        press(trainer, record)

    handler = signal.getsignal(signal.SIGINT)
    config = make(out=str(tmp_path / "parts"))
    with pytest.raises(KeyboardInterrupt):
        train(config, callbacks=[press_twice])
    stopped = train(config, callbacks=[press], overwrite=True)
    assert stopped.interrupted
    assert stopped.step == 5
    assert stopped.checkpoint is not None
    assert stopped.checkpoint.name == "step_00000005"
    assert signal.getsignal(signal.SIGINT) is handler
    whole = run(make(out=str(tmp_path / "whole")))
    assert train(config, resume=True).losses == whole.losses


def test_resuming_a_finished_run_changes_nothing(make: Make) -> None:
    first = train(make())
    again = train(make(), resume=True)
    assert content(again) == content(first)
    assert again.validation_loss == first.validation_loss


def test_half_a_line_of_the_log_is_dropped(make: Make) -> None:
    with pytest.raises(Killed):
        train(make(), callbacks=[kill_at(5)])
    with open(Path(make().out) / "metrics.jsonl", "a", encoding="utf-8") as stream:
        stream.write('{"kind": "step", "st')
    assert [record["step"] for record in read_metrics(train(make(), resume=True).metrics)][-3:] == [11, 12, 12]


def test_a_run_is_not_started_over_by_mistake(make: Make) -> None:
    train(make(steps=4))
    with pytest.raises(ConfigError, match=r"holds a run at step_00000004: resume it \(--resume\)"):
        train(make(steps=4))
    assert train(make(steps=2), overwrite=True).step == 2


def test_nothing_to_resume(make: Make) -> None:
    with pytest.raises(CheckpointError, match="there is no checkpoint under"):
        train(make(), resume=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"recipe": "tensorwise"}, "trained with recipe='delayed', the settings say 'tensorwise'"),
     ({"hidden_size": 48, "num_attention_heads": 2}, "trained with hidden_size=32"),
     ({"num_layers": 1}, "Resume with num_layers=2, or start a new run in another out"),
     ({"skip": ("layers.0.*",)}, "trained with skip="), ({"precision": "fp32"}, "trained with precision='bf16'")],
)  # fmt: skip
def test_other_settings_are_refused(changes: dict[str, Any], message: str, make: Make) -> None:
    train(make(steps=2, recipe="delayed"))
    with pytest.raises(CheckpointError, match=message):
        train(make(**({"steps": 4, "recipe": "delayed"} | changes)), resume=True)


def test_another_text_is_refused(make: Make, book: Path) -> None:
    train(make(steps=2))
    book.write_text(book.read_text(encoding="utf-8") + "!", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"another text or tokenizer .* Give it back its text"):
        train(make(steps=4), resume=True)


def test_what_moves_the_losses_is_told(make: Make) -> None:
    train(make(steps=2))
    trainer = Trainer(make(steps=4, lr=0.005, eval_interval=1))
    torch.set_num_threads(2)
    notes = trainer.resume(checkpoint.latest(Path(make().out)))
    assert notes == ["lr changed from 0.01 to 0.005", "steps changed from 2 to 4", "threads was 1, is 2"]


def test_what_was_decided_for_speed_holds_on_another_device(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run begins where the MLPs pay and the rest does not; resumed where nothing pays, its layers stay."""

    def mlps_pay(module: torch.nn.Module, recipe: Recipe, tokens: int) -> tuple[float, str]:
        pays = isinstance(module, torch.nn.Linear) and 96 in module.weight.shape  # up (with the gate): 2 x 48 rows
        return (1.5, "faster: 1.5") if pays else (0.5, "not faster: 0.5")

    config = make(recipe="delayed", only_if_faster=True)
    monkeypatch.setattr(sys.modules["fp8.nn.convert"], "gain", mlps_pay)
    whole = run(config.replace(out=config.out + "-whole"))
    with pytest.raises(Killed):
        train(config, callbacks=[kill_at(6)])
    saved = checkpoint.read(checkpoint.checkpoints(Path(config.out))[-1])
    told = {d["name"]: (d["fp8"], d["reason"]) for d in saved.state["conversion"]["decisions"]}
    assert told["layers.0.mlp.up"] == (True, "recipe delayed; faster: 1.5")
    assert told["layers.0.attention.out"] == (False, "not faster: 0.5")
    monkeypatch.undo()  # on a CPU nothing pays
    resumed = train(config, resume=True)
    assert resumed.trainer.report.to_dict() == saved.state["conversion"]
    assert resumed.trainer.report.converted == ["layers.0.mlp.up", "layers.1.mlp.up"]
    assert content(resumed) == content(whole)
    with pytest.raises(CheckpointError, match="trained with only_if_faster=True"):
        train(config.replace(only_if_faster=False), resume=True)
