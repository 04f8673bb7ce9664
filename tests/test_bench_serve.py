"""`fp8 bench serve` where it cannot be timed: every arm runs, what is counted is what was asked, and it is told."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fp8.advise.models import named
from fp8.bench import serve, serve_peers, serve_row
from fp8.bench.apart import apart
from fp8.bench.serve import ARMS, Budget, article, config_of, floor_seconds, row_of
from fp8.bench.serve_row import Clock, LateError, Row, percentiles
from fp8.cost.datasheets import SHEETS
from fp8.errors import BackendError, ConfigError
from fp8.models.huggingface import to_config
from fp8.models.llama import DecoderConfig
from fp8.serve import Output
from fp8.serve.models import random_model

TINY = to_config(DecoderConfig(260, 64, 96, 2, 4, 2, max_positions=256), torch.bfloat16)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    return tmp_path


def test_every_arm_runs_and_is_written_and_drawn(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    serve.main(["--model", str(folder), "--rows", "1x20", "16x8", "--tokens", "4", "--out", str(folder / "out"),
                "--device", "cpu"])  # fmt: skip
    out = capsys.readouterr().out
    arms = json.loads((folder / "out" / "serve.json").read_text())["results"]["arms"]
    assert list(arms) == list(ARMS)
    for arm in arms.values():
        assert list(arm["rows"]) == ["1 x 20", "16 x 8"]
        assert all(0 < got["itl"]["p50"] <= got["itl"]["p99"] for got in arm["rows"].values())
        assert all(got["ttft"]["p50"] <= got["prefill_seconds"] < got["e2e"]["p50"] for got in arm["rows"].values())
    matrices = [arms[name]["matrix_bytes"] for name in ("BF16", "FP8")]
    assert 0.5 < matrices[1] / matrices[0] < 0.56, "codes, and a scale a channel"
    assert "-36.8%" in out and "+58.7%" in out
    assert (folder / "out" / "serve.png").stat().st_size > 1000


@pytest.mark.parametrize(("batch", "prompt"), [(3, 40), (16, 33), (1, 100)])
def test_every_sequence_is_in_as_many_steps_as_were_asked(
    batch: int, prompt: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts enter in chunks, and the first sequence must not end before the last has begun."""
    monkeypatch.setattr(serve_row, "CHUNK", 48)
    model, clocks = random_model(TINY), []

    class Kept(Clock):
        def __init__(self, row: Row) -> None:
            super().__init__(row)
            clocks.append(self)

    monkeypatch.setattr(serve_row, "Clock", Kept)
    found = serve_row.run_row(model, Row(batch, prompt, 6), "fp8")
    assert len(clocks[-1].steps) >= 6
    assert len(clocks[-1].ended) == batch
    assert found["cache_bytes"] > 0


def test_a_clock_counts_only_steps_that_have_all() -> None:
    clock = Clock(Row(2, 4, 4))
    for came in (["a"], ["a", "b"], ["a", "b"]):
        clock.tick([Output(name, [1], "", None) for name in came])
    assert clock.waiting and not clock.steps, "what passes before the clock is opened is not counted"
    clock.open()
    for came in (["a", "b"], ["a", "b"], ["b"]):
        clock.tick([Output(name, [1], "", None) for name in came])
    assert len(clock.steps) == 2
    clock.tick([Output(name, [1], "", "length") for name in ("a", "b")])
    assert clock.figures()["tokens_per_second"] == pytest.approx(6 / sum(clock.steps))


def test_percentiles_are_values_that_were_measured() -> None:
    assert percentiles([float(i) for i in range(1, 101)]) == {"p50": 50.5, "p90": 90.0, "p99": 99.0}
    assert percentiles([3.0]) == {"p50": 3.0, "p90": 3.0, "p99": 3.0}


def test_a_floor_is_half_where_bytes_are_half() -> None:
    row, sizes = Row(64, 8192), named("llama-3-8b")
    high, _, weights, both = (floor_seconds(sizes, arm, row, SHEETS["H200"]) for arm in ARMS)
    assert 1.85 < high / both < 2
    assert high > weights > both


def test_names_and_files_become_the_same_shape(folder: Path) -> None:
    assert config_of(str(folder)) == config_of(str(folder / "config.json")) == TINY
    made = config_of("llama-3-8b")
    assert (made["hidden_size"], made["num_hidden_layers"], made["num_key_value_heads"]) == (4096, 32, 8)
    with pytest.raises(ConfigError, match="Did you mean 'llama-3-8b'"):
        config_of("llama-3-8")


@pytest.mark.parametrize("text", ["16", "x4", "0x4", "axb", "-1x4"])
def test_what_is_no_row_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match="batch x prompt"):
        row_of(text, 64)


def test_an_arm_without_room_says_so_and_the_table_leaves_it_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.\nmore")

    monkeypatch.setattr(serve, "run_row", fail)
    found: dict[str, Any] = {}
    serve.run_arm("FP8", str(folder), [Row(1, 8)], "cpu", math.inf, lambda: None, found)
    assert found["rows"]["1 x 8"] == {"why_not": "CUDA out of memory."}
    assert article({"BF16": found, "FP8 + FP8 KV": found}, [Row(16, 8)]) == []


def test_a_kernel_that_fails_costs_its_row(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = serve.run_row

    def fail_once(model: Any, row: Row, *rest: Any) -> Any:
        if row.batch == 1:
            raise RuntimeError("CUDA error: misaligned address")
        return real(model, row, *rest)

    monkeypatch.setattr(serve, "run_row", fail_once)
    found: dict[str, Any] = {}
    serve.run_arm("BF16", str(folder), [Row(1, 8, 4), Row(2, 8, 4)], "cpu", math.inf, lambda: None, found)
    assert "misaligned" in found["rows"]["1 x 8"]["why_not"] and "itl" in found["rows"]["2 x 8"]


def test_kernels_are_made_by_a_smaller_model_of_the_same_rows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layers, real = [], serve.random_model
    monkeypatch.setattr(
        serve, "random_model", lambda config, **more: layers.append(config["num_hidden_layers"]) or real(config, **more)
    )
    (folder / "config.json").write_text(json.dumps(TINY | {"num_hidden_layers": 5}))
    assert list(serve.compile_kernels("FP8", str(folder), [Row(1, 8), Row(3, 90)], "cpu")) == ["1 x 8", "3 x 90"]
    assert layers == [2]


def test_what_does_not_fit_into_the_time_is_said_to_be_skipped(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    serve.main(["--model", str(folder), "--rows", "1x8", "--arms", "BF16", "--seconds", "0", "--out", str(folder),
                "--device", "cpu"])  # fmt: skip
    rows = json.loads((folder / "serve.json").read_text())["results"]["arms"]["BF16"]["rows"]
    assert "skipped: no time is left" in rows["1 x 8"]["why_not"] and "skipped" in capsys.readouterr().out


def test_a_row_that_is_late_ends_and_leaves_an_engine_that_works() -> None:
    model, row = random_model(TINY), Row(2, 8, 4)
    engine = serve_row.engine_for(model, row, "fp8")
    with pytest.raises(LateError):
        serve_row.measure(engine, row, 0.0)
    assert serve_row.measure(engine, row)["itl"]["p50"] > 0


def test_time_is_divided_among_those_who_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(serve.time, "monotonic", lambda: now)
    budget = Budget(40.0, 4)
    assert budget.next() == 110
    now = 104.0  # six seconds were left over
    assert budget.next() == 116
    now = 200.0
    assert budget.next() == 200
    assert Budget(math.inf, 2).next() == math.inf


def test_an_interrupted_run_keeps_what_it_has(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = serve.run_row

    def stop(model: Any, row: Row, *rest: Any) -> Any:
        if row.batch == 2:
            raise KeyboardInterrupt
        return real(model, row, *rest)

    monkeypatch.setattr(serve, "run_row", stop)
    with pytest.raises(SystemExit) as left:
        serve.main(["--model", str(folder), "--rows", "1x8", "2x8", "--tokens", "4", "--out", str(folder),
                    "--device", "cpu"])  # fmt: skip
    assert left.value.code == 130
    assert list(json.loads((folder / "serve.json").read_text())["results"]["arms"]["BF16"]["rows"]) == ["1 x 8"]


def test_a_process_that_dies_or_raises_or_hangs_costs_only_itself(capfd: pytest.CaptureFixture[str]) -> None:
    got = apart(sends_and, "exits")
    assert next(got) == 1
    with pytest.raises(BackendError, match="ended with 3"):
        next(got)
    with pytest.raises(BackendError, match="ZeroDivisionError"):
        list(apart(sends_and, "raises"))
    with pytest.raises(BackendError, match="time was over"):
        list(apart(sends_and, "sleeps", until=time.monotonic() + 4))
    assert "ZeroDivisionError" in capfd.readouterr().err, "with its traceback"


def sends_and(does: str) -> Iterator[int]:
    yield 1
    if does == "exits":
        os._exit(3)
    if does == "sleeps":
        time.sleep(60)
    yield 1 // 0


def test_a_peer_that_is_missing_or_unknown_gives_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    assert serve_peers.run(None, TINY, [Row(1, 8)], "cpu") == {}
    found = serve_peers.run(["vLLM FP8", "llama.cpp"], TINY, [Row(1, 8)], "cpu")
    if "rows" not in found["vLLM FP8"]:
        assert "not installed" in found["vLLM FP8"]["why_not"]
    assert "known are" in found["llama.cpp"]["why_not"]


def test_transformers_answers_the_same_rows() -> None:
    pytest.importorskip("transformers")
    (found,) = serve_peers.transformers(TINY, [Row(2, 8, 4)], "cpu")
    assert found["2 x 8"]["prefill_seconds"] > 0
