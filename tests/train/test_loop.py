"""The loop: what it computes, what it logs, when it stops."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from fp8.errors import ConfigError, Fp8Error
from fp8.train import DivergedError, TrainConfig, Trainer, checkpoint, learning_rate, train

Make = Callable[..., TrainConfig]


def test_the_log_has_a_line_a_step(make: Make) -> None:
    config = make(recipe="tensorwise", loss_scale=128, gradient_accumulation=2)
    result = train(config)
    records = [json.loads(line) for line in result.metrics.read_text().splitlines()]
    steps = [record for record in records if record["kind"] == "step"]
    assert [record["step"] for record in steps] == list(range(1, 13))
    assert [record["lr"] for record in steps] == [learning_rate(step, config) for step in range(12)]
    assert {record["loss_scale"] for record in steps} == {128.0}
    assert all(record["grad_norm"] > 0 and record["tokens_per_second"] > 0 and record["time"] > 1e9 for record in steps)
    assert [record["step"] for record in records if record["kind"] == "evaluation"] == [6, 12]
    assert result.losses == [record["loss"] for record in steps]
    assert result.perplexity == math.exp(result.validation_loss) == records[-1]["perplexity"]
    assert result.gradient_variance > 0


def test_fp8_products_run_and_the_head_stays_high(make: Make) -> None:
    import fp8.nn

    trainer = Trainer(make(recipe="tensorwise"))
    with fp8.nn.count_products() as products:
        trainer.train_step()
    layers = {f"layers.{i}.{part}" for i in (0, 1) for part in ("attention.qkv", "attention.out", "mlp.up", "mlp.down")}
    assert {name for name, _ in products.counts} == layers
    assert {product for _, product in products.counts} == {"forward", "grad_x", "grad_w"}


@pytest.mark.parametrize("recipe", ["none", "rowwise"])
def test_the_same_seed_is_the_same_run(recipe: str, make: Make, tmp_path: Path) -> None:
    runs = [
        train(make(recipe=recipe, steps=4, seed=s, out=str(tmp_path / f"{i}"))).losses for i, s in enumerate((3, 3, 4))
    ]
    assert runs[0] == runs[1] != runs[2]


def test_accumulation_adds_up_to_the_larger_batch(make: Make, tmp_path: Path) -> None:
    """In FP32 the two differ by rounding only."""
    settings: dict[str, Any] = {"precision": "fp32", "steps": 4}
    whole = train(make(batch_size=4, out=str(tmp_path / "a"), **settings))
    parts = train(make(batch_size=1, gradient_accumulation=4, out=str(tmp_path / "b"), **settings))
    assert parts.losses == pytest.approx(whole.losses, rel=1e-5)


def test_a_loss_scale_that_is_a_power_of_two_changes_no_bit(make: Make, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"recipe": "none", "precision": "fp32"}
    plain = train(make(out=str(tmp_path / "a"), **settings)).losses
    assert train(make(out=str(tmp_path / "b"), loss_scale=1024, **settings)).losses == plain


def test_clipping_bounds_the_gradient(make: Make) -> None:
    trainer = Trainer(make(clip=0.01))
    seen: list[torch.Tensor] = []

    def look(*_: Any) -> None:
        seen.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]).norm())

    trainer.run.optimizer.register_step_pre_hook(look)
    record = trainer.train_step()
    assert float(seen[0]) == pytest.approx(0.01, rel=1e-3)
    assert record["grad_norm"] > 0.01


def test_evaluation_leaves_no_trace(make: Make, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"recipe": "delayed", "steps": 5}
    often = train(make(eval_interval=1, out=str(tmp_path / "a"), **settings))
    never = train(make(eval_interval=0, out=str(tmp_path / "b"), **settings))
    assert often.losses == never.losses
    assert len(often.evaluations) == 5
    assert often.evaluations[-1]["loss"] == never.validation_loss


class Spoiled(nn.Module):
    """A model whose forward gives NaN from its third call in training on, or whose gradient does."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(257, 8), nn.Linear(8, 257)
        self.where, self.calls = where, 0

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.calls += self.training
        logits = self.head(self.embedding(tokens))
        if self.calls > 2 and self.training:
            if self.where == "loss":
                return logits * math.nan
            logits.register_hook(lambda grad: grad * math.inf)
        return logits


LOST = [("loss", "the loss of step 3 is nan"), ("gradient", "the gradient of step 3")]


@pytest.mark.parametrize(("where", "message"), LOST)
def test_a_lost_run_stops_and_keeps_its_last_checkpoint(where: str, message: str, make: Make) -> None:
    config = make(checkpoint_interval=1)
    with pytest.raises(DivergedError, match=message) as caught:
        train(config, model=Spoiled(where))
    assert "Resume from it with a lower lr" in str(caught.value)
    assert isinstance(caught.value, Fp8Error)
    folders = checkpoint.checkpoints(Path(config.out))
    assert [folder.name for folder in folders] == ["step_00000001", "step_00000002"]
    assert all(bool(tensor.isfinite().all()) for tensor in checkpoint.read(folders[-1]).model.values())


def test_overflow_under_a_loss_scale_is_skipped_and_at_last_refused(make: Make) -> None:
    trainer = Trainer(make(loss_scale="dynamic"), model=Spoiled("gradient"))
    before = [trainer.train_step()["skipped"] for _ in range(2)]
    weight = trainer.model.get_parameter("head.weight").clone()
    assert before == [False, False]
    assert trainer.train_step()["skipped"]
    assert torch.equal(trainer.model.get_parameter("head.weight"), weight)
    assert trainer.train_step()["loss_scale"] == 32768.0
    for _ in range(47):
        trainer.train_step()
    with pytest.raises(DivergedError, match="the gradients of 50 steps up to step 52"):
        trainer.train_step()


def test_steps_to_a_loss(make: Make) -> None:
    result = train(make())
    assert result.steps_to(100.0) == 10
    assert result.steps_to(100.0, window=1) == 1
    assert result.steps_to(0.1) is None


def test_a_person_sees_bar_and_evaluations(make: Make) -> None:
    for terminal in (True, False):
        stream = io.StringIO()
        train(make(), overwrite=True, console=Console(file=stream, force_terminal=terminal, width=120))
        assert "step 12: validation loss" in stream.getvalue()
        assert ("tokens/s" in stream.getvalue()) == terminal


@pytest.mark.parametrize("device", ["tpu", "cuda:99", "gpu"])
def test_a_device_that_is_not_here(device: str, make: Make) -> None:
    with pytest.raises(ConfigError, match="device"):
        Trainer(make(device=device))
