"""The settings that both arms share, runs that go on, and the study over seeds."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from fp8.errors import ConfigError, DataError
from fp8.evaluate import run_arm, settings, study, validation_loss
from fp8.evaluate.perplexity import validation_rows
from fp8.train import TrainConfig

TINY: dict[str, Any] = {
    "hidden_size": 16, "ffn_hidden_size": 16, "num_layers": 1, "num_attention_heads": 1, "num_kv_heads": 1,
    "sequence_length": 8, "batch_size": 2, "eval_batches": 2, "steps": 4, "checkpoint_interval": 2, "device": "cpu",
}  # fmt: skip


def test_arms_differ_in_the_recipe_alone(tmp_path: Path) -> None:
    high, low = (settings(recipe, tmp_path, device="cpu") for recipe in (None, "rowwise"))
    assert low.replace(recipe=None) == high
    assert (high.precision, high.eval_interval) == ("fp32", high.steps // 2)
    with pytest.raises(ConfigError, match="steps"):
        settings(None, tmp_path, steps=0)


def test_a_run_goes_on_only_under_its_own_settings(tmp_path: Path) -> None:
    first = run_arm(settings(None, tmp_path, **TINY))
    assert run_arm(settings(None, tmp_path, **TINY)).losses == first.losses  # nothing was left to do
    other = run_arm(settings(None, tmp_path, **(TINY | {"lr": 0.5})))
    assert other.losses[-1] != first.losses[-1]
    assert other.config.lr == 0.5


def test_a_damaged_checkpoint_is_no_start(tmp_path: Path) -> None:
    first = run_arm(settings(None, tmp_path, **TINY))
    assert first.checkpoint is not None
    (first.checkpoint / "state.json").write_text("{")
    assert run_arm(settings(None, tmp_path, **TINY)).losses == first.losses


def test_the_loss_of_a_model_is_that_of_its_run(tmp_path: Path) -> None:
    result = run_arm(settings("tensorwise", tmp_path, **TINY))
    rows = validation_rows(result.trainer)
    assert validation_loss(result.trainer.model, rows) == pytest.approx(result.validation_loss, rel=1e-6)


def test_a_study_keeps_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = study.study([0, 1], ["rowwise"], tmp_path, **TINY)
    monkeypatch.setattr(study, "run_arm", lambda *_, **__: pytest.fail("a run that is there was made again"))
    assert study.study([0, 1], ["rowwise"], tmp_path, **TINY) == told
    row = told["recipes"]["rowwise"]
    assert row["products"] == {"forward": 4, "grad_x": 4, "grad_w": 4}
    assert row["mean"] == pytest.approx(sum(row["differences"].values()) / 2)
    assert row["interval"][0] < row["mean"] < row["interval"][1]
    assert json.loads((tmp_path / "study.json").read_text())["limit"] == 0.5
    assert study.drawing(told).row_count == 1


def test_a_recipe_misses_when_one_seed_does() -> None:
    def run(recipe: str | None, seed: int, loss: float) -> dict[str, Any]:
        plain = {"steps": 4, "out": ""}
        return {"recipe": recipe, "seed": seed, "validation_loss": loss, "machine": {}, "settings": plain,
                "products": {}, "seconds": 1.0}  # fmt: skip

    high = [run(None, 0, 2.0), run(None, 1, 2.0)]
    told = study.summary([*high, run("a", 0, 2.0), run("a", 1, 2.011), run("b", 0, 2.001), run("b", 1, 1.999)])
    assert [row["within"] for row in told["recipes"].values()] == [False, True]
    assert study.summary([high[0], run("a", 0, 2.0)])["recipes"]["a"]["interval"] is None
    half = study.drawing(study.summary([*high, run("a", 1, 2.002)]))  # what is missing stays empty, in its own column
    assert [next(iter(column.cells)) for column in half.columns][1:3] == ["–", "+0.10 %"]
    assert math.isinf(study.interval([1.0])[1])
    with pytest.raises(DataError, match="at least one"):
        study.summary(high)


def test_the_larger_model_of_a_gpu_is_a_run_that_can_be() -> None:
    from fp8.evaluate.comparison import GPU

    config = TrainConfig.from_dict(GPU | {"recipe": "tensorwise"})
    assert config.compile
    assert config.precision == "bf16"
