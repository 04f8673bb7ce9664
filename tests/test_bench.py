"""The measurements on a machine that cannot make them, and the table that is made from those that were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_models
from fp8.bench import optimizer, plan, rates
from fp8.bench.command import command
from fp8.bench.table import markdown
from fp8.cost import fit
from fp8.errors import BackendError, ConfigError
from fp8.models.llama import DecoderConfig

HERE = Path(__file__).parent.parent


def test_the_readme_shows_what_was_measured() -> None:
    assert markdown(HERE / "bench" / "results") in (HERE / "README.md").read_text(encoding="utf-8")


def test_an_unknown_measurement_is_named_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'gemm'"):
        command(["gem"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_runs_instead() -> None:
    with pytest.raises(BackendError, match=r"needs a CUDA device.*`fp8 demo` runs on any machine"):
        command(["gemm"])


TINY = DecoderConfig(64, 32, 64, 2, 2, 1, 32, tie_embeddings=True)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("recipe", [None, "tensorwise"])
def test_the_steps_of_bench_plan_train(whole: bool, recipe: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The very functions that are timed on a GPU, run once on the CPU, uncompiled."""
    monkeypatch.setattr(plan, "DEVICE", "cpu")
    monkeypatch.setattr(torch, "compile", lambda function: function)
    monkeypatch.setattr(plan, "timed", lambda run: {"seconds": 1.0, "peak_gib": float(run() is None)})
    case = plan.Case("tiny", TINY, 2, 16, whole)
    found = plan.row(case, recipe, held=True)
    assert fit.architecture(found) == case.model
    assert fit.setting(found) == case.setting(recipe, fused=False)
    assert "tiny" in plan.line(found, *plan.predicted(case, recipe, fused=False))


def test_bench_plan_has_five_shapes_of_which_one_is_fitted() -> None:
    assert len(plan.cases()) == 5
    assert all(not case.whole or case.config.vocab_size > 50000 for case in plan.cases())


def test_what_bench_rates_writes_is_what_the_fit_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole measurement with clocks that lie, on the CPU: every section there, every kind, and a table from it."""
    steps: list[dict[str, Any]] = json.loads((HERE / "bench/results/rates.json").read_text())["results"]["steps"]
    monkeypatch.setattr(rates, "DEVICE", "cpu")
    monkeypatch.setattr(rates, "TOKENS", 32)
    monkeypatch.setattr(rates, "ATTENTION", ((64, (8, 16, 32)), (128, (8, 32))))
    monkeypatch.setattr(rates, "FITTED_LENGTHS", (8, 32))
    monkeypatch.setattr(rates, "normal", lambda *shape: torch.zeros(1, device="meta").expand(*shape))
    monkeypatch.setattr(rates, "graph_seconds", lambda calls, least=0.0: 1e-3)
    monkeypatch.setattr(rates, "_calls", lambda kind, pairs: [])
    monkeypatch.setattr(rates, "_repeated", lambda run, times=8: 1e-3)
    monkeypatch.setattr(rates, "HOST", {"op": lambda: 5e-6, "cast": lambda: 1 / 0})
    monkeypatch.setattr(rates, "steps", lambda out, fused: steps)
    monkeypatch.setattr(rates, "machine", dict)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: type("P", (), {"multi_processor_count": 132})
    )
    results = json.loads(json.dumps(rates.measure(tmp_path)))
    assert {row["kind"] for row in results["gemm"]} == {"bf16", *rates.KINDS}
    known = fit.fit(results)
    assert known.host["op"] == 5e-6
    assert "ZeroDivisionError" in known.estimates["host cast"]
    assert len(list(fit.errors(results, known))) > 150


def test_a_shape_that_is_held_out_is_measured() -> None:
    assert {*rates.LLAMA, *rates.MIDDLE, *rates.SMALL, *rates.DECODE} >= rates.HELD


def test_the_optimizers_are_measured_on_any_device_and_leave_no_stale_codes() -> None:
    rows = optimizer.measure(1, torch.float32, "cpu", matrices=((64, 32), (32, 64)), only=["blockwise", "no codes"])
    assert {row.stale for row in rows} == {None, 0}
    assert [row.recipe for row in rows].count("blockwise") == 5


def test_the_bytes_of_a_step() -> None:
    """By hand: FP32 weights and moments 28; codes and, where it is not in the same pass, another read."""
    of = lambda *rest: optimizer.bytes_of(1, *rest)  # noqa: E731
    assert of(torch.float32, None, None, False) == of(torch.float32, "fp32", None, False) == 28
    assert of(torch.float32, None, "blockwise", False) == 28 + 4 + 2
    assert of(torch.float32, "fp32", "blockwise", True) == 28 + 2
    assert of(torch.float32, "bf16", "tensorwise", True) == 20 + 4 + 2
    assert of(torch.bfloat16, "bf16", None, False) == 2 + 8 + 2 + 8


@pytest.mark.filterwarnings("default")
def test_quantization_aware_training_is_measured_beside_plain_rounding(tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    """On any machine: trainings compared by held-out rows, three models judged by the same windows of another text."""
    from fp8.bench import qat
    from fp8.train.text import moby_dick

    model = tiny_models.build(tmp_path / "model", "llama")
    test = tmp_path / "test.txt"
    test.write_text(moby_dick().read_text()[:400])
    sizes = ("--steps", "2", "--batch", "2", "--length", "24", "--window", "64", "--device", "cpu")
    rates = ("--lr", "1e-5", "1e-4", "--out", str(tmp_path))
    qat.main([str(model), "--train", "moby-dick", "--test", str(test), *sizes, *rates])
    found = json.loads((tmp_path / "qat.json").read_text())["results"]
    chosen = [row for row in found["trainings"] if row["chosen"]]
    assert len(found["trainings"]) == 2 and len(chosen) == 1
    assert chosen[0]["held_out"]["trained"] == min(row["held_out"]["trained"] for row in found["trainings"])
    judged = {row["which"]: row["figures"][0] for row in found["judged"]}
    assert list(judged) == ["model", "plain rounding", "rounded in training"]
    assert all(200 < figure["value"]["value"] < 400 for figure in judged.values())
    assert judged["plain rounding"]["loss"] is not None
