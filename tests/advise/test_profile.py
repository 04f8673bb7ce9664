"""Recording a step: on the CPU, and on a GPU what the host waits for."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fp8
from fp8.advise import Profile, profile
from fp8.advise.events import events_of
from fp8.advise.findings import Facts, Sync, analyse
from fp8.advise.profile import modules_of
from fp8.advise.script import load_step
from fp8.advise.syncs import find_syncs
from fp8.errors import ConfigError


def training(attach: bool, batches: int = 1) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
    fp8.convert(model)
    optimizer = torch.optim.AdamW(model.parameters())
    if attach:
        fp8.attach(model, optimizer)
    x = torch.randn(16, 32)

    def step() -> None:
        for _ in range(batches):
            model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


@pytest.mark.parametrize("attach", [False, True])
def test_the_model_of_a_step_is_found_and_looked_at(attach: bool) -> None:
    found = profile(training(attach, batches=2), warmup=1, steps=2)
    assert found.facts.fp8 == ("0", "2")
    assert found.facts.refreshed == (("0", "2") if attach else ())
    assert found.facts.forwards == {"0": 2, "2": 2}
    assert found.facts.recipe == "tensorwise"
    assert any("2 weights are quantized 2 times" in f.what for f in found.findings) != attach


def test_where_the_time_goes_is_the_whole_step() -> None:
    found = profile(training(True), warmup=1, steps=3)
    kinds = {row.kind: row for row in found.analysis.rows}
    assert {"BF16 products", "norm, activation, elementwise"} <= set(kinds)
    assert 0 < found.analysis.busy_ms <= found.analysis.step_ms
    assert sum(row.share for row in found.analysis.rows) == pytest.approx(1)
    assert "3 steps on CPU" in str(found) or torch.cuda.is_available()


def test_a_report_is_written_and_the_trace_with_it(tmp_path: Path) -> None:
    found = profile(training(True), warmup=0, steps=1, trace=tmp_path / "deep" / "trace.json")
    found.save(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(found.to_dict()))
    assert "traceEvents" in json.loads((tmp_path / "deep" / "trace.json").read_text())


def test_a_layer_under_another_autocast_has_fallen_back() -> None:
    layer = fp8.Linear(32, 32, recipe="tensorwise")
    x = torch.randn(16, 32)

    def step() -> None:
        with fp8.autocast(enabled=False):
            layer(x).sum().backward()

    assert any("did not multiply in FP8" in f.what for f in profile(step, warmup=0, steps=1).findings)


def test_modules_are_found_through_what_a_step_refers_to() -> None:
    model = nn.Linear(2, 2)

    class Trainer:
        def __init__(self) -> None:
            self.model = model

        def step(self) -> None: ...

    def inner() -> None:
        model(torch.zeros(1, 2))

    def outer() -> None:
        inner()

    assert list(modules_of(model)) == [model]
    assert list(modules_of(Trainer().step)) == [model]
    assert list(modules_of(outer)) == [model]
    assert list(modules_of(lambda: None)) == []


@pytest.mark.parametrize(
    ("step", "options", "message"),
    [
        (3, {}, "not int"),
        (lambda batch: None, {}, r"lambda: step\(batch\)"),
        (lambda: None, {"steps": 0}, "steps=0"),
        (lambda: None, {"warmup": -1}, "warmup=-1"),
    ],
)
def test_what_is_no_step_is_refused(step: Any, options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        profile(step, **options)


def test_a_wait_is_told_with_its_line_and_other_warnings_go_on() -> None:
    """What torch says on a GPU, said here by hand: the line is the user's, not the library's."""
    shown = []

    def step() -> None:
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation (Triggered internally at ...)", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *rest: shown.append(str(message))
        (sync,) = find_syncs(step)
    assert sync.times == 2
    assert sync.line.startswith("test_profile.py:")
    assert " in step: warnings.warn(" in sync.line
    assert shown == ["something else"]


def test_an_explicit_synchronization_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    kept = torch.cuda.synchronize
    (sync,) = find_syncs(lambda: torch.cuda.synchronize())
    assert sync.what == "torch.cuda.synchronize()"
    assert torch.cuda.synchronize is kept


SCRIPT = """
import torch
calls = []
def step():
    calls.append(1)
def build():
    return step
def pair():
    return step, None
def trains():
    calls.append(2)
    return 0.5
"""


@pytest.mark.parametrize(
    ("name", "made"), [("step", "step"), ("build", "step"), ("pair", "step"), ("trains", "trains")]
)
def test_a_step_comes_from_a_file(tmp_path: Path, name: str, made: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_training.py").write_text(SCRIPT)
    assert load_step(f"{tmp_path / 'my_training.py'}:{name}").__name__ == made


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("train.py", "write FILE.py:FUNCTION"),
        ("train.py:", "write FILE.py:FUNCTION"),
        ("absent.py:step", "there is no file absent.py"),
        ("{file}:stepp", "Did you mean 'step'"),
    ],
)
def test_a_target_that_is_none_is_refused(tmp_path: Path, target: str, message: str) -> None:
    (tmp_path / "other_training.py").write_text(SCRIPT)
    with pytest.raises(ConfigError, match=message):
        load_step(target.format(file=tmp_path / "other_training.py"))


def test_a_profile_of_a_gpu_is_drawn_whole() -> None:
    """From the trace on: a kernel, a wait of the host, and a kernel that was launched after it."""
    raw = [
        ("cuda_runtime", "cudaLaunchKernel", 0, 2, {"correlation": 1}),
        ("kernel", "nvjet_sm90_qqtst_192x192", 10, 990, {"correlation": 1, "stream": 7}),
        ("cuda_runtime", "cudaStreamSynchronize", 5, 997, {"correlation": 2}),
        ("cuda_driver", "cuLaunchKernelEx", 1100, 2, {"correlation": 3}),
        ("kernel", "cast_tiles", 1110, 900, {"correlation": 3, "stream": 7}),
    ]
    trace = {"traceEvents": [
        {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": 1, "args": args}
        for cat, name, ts, dur, args in raw
    ]}  # fmt: skip
    syncs = (Sync("a value is read on the host", "train.py:12 in step: loss.item()"),)
    analysis = analyse(events_of(trace), 1, syncs, Facts(("up",), (), {"up": 2}, {}, "delayed"))
    text = str(Profile(analysis, syncs, Facts(recipe="delayed"), "NVIDIA H200", "2.11.0"))
    words = ["2.00 ms a step", "FP8 recipe delayed", "FP8 products", "0.990", "0.110", "way out"]
    words += ["idle: the host waited for the GPU", "train.py:12 in step: loss.item()", "quantized 2 times a step"]
    for word in words:
        assert word in text, word
    assert analysis.busy_ms == pytest.approx(1.89)


@pytest.mark.gpu
def test_on_a_gpu_a_wait_is_found_in_the_line_that_asks_for_it() -> None:
    model = nn.Linear(4096, 4096, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    losses = []

    def step() -> None:
        loss = model(x).square().mean()
        loss.backward()
        losses.append(loss.item())  # the culprit

    found = profile(step, warmup=2, steps=3)
    assert found.analysis.device == "GPU"
    assert [s for s in found.syncs if "losses.append(loss.item())" in s.line]
    assert found.analysis.idle["synchronized"] > 0
    assert found.analysis.busy_ms + found.analysis.idle_ms == pytest.approx(found.analysis.step_ms)
    assert {"BF16 products"} <= {row.kind for row in found.analysis.rows}


@pytest.mark.gpu
def test_on_a_gpu_fp8_products_and_casts_are_told_apart() -> None:
    layer = fp8.Linear(4096, 4096, recipe="tensorwise", device="cuda", dtype=torch.bfloat16)
    x = torch.randn(8192, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    found = profile(lambda: layer(x).sum().backward(), model=layer, warmup=2, steps=3)
    calls = {row.kind: row.calls for row in found.analysis.rows}
    assert calls["FP8 products"] == 3
    assert calls["cast, quantize"] >= 3
    assert not found.syncs
