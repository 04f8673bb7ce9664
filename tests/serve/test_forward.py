"""What an engine does before its first request: a GPU's memory is divided, kernels are run once, decode is captured.

The GPU is played by its few calls; the steps that are run are run on the CPU.
"""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fp8.errors import ConfigError
from fp8.models.huggingface import to_config
from fp8.models.llama import DecoderConfig
from fp8.serve import EngineOptions
from fp8.serve import forward as room
from fp8.serve.forward import SAMPLER, Forward
from fp8.serve.models import random_model

SHAPE = DecoderConfig(64, 32, 48, 1, 2, 1, max_positions=96)
VOCABULARY = 64


def forward(**options: Any) -> Forward:
    given = EngineOptions(**{"page_size": 16, "max_running": 8, "max_step_tokens": 200} | options)
    model = random_model(to_config(SHAPE, torch.bfloat16))
    return Forward(model, given, torch.zeros(8, dtype=torch.int64))


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("count", [1, 3, 8, 1000])
def test_steps_that_are_only_run_store_nothing_and_stay_in_their_bounds(count: int, deterministic: bool) -> None:
    f = forward(deterministic=deterministic)
    arrays, cache, work = f._prompts(count, 90, f.model.new_cache(1, 16, "fp8"), start=30)
    assert len(arrays["tokens"]) <= f.most and all(w.start == 30 for w in work)
    assert arrays["positions"].max() < 90 and len(arrays["wanted"]) <= 8
    before = cache.layers[0].key_codes.view(torch.uint8).clone()
    logits = f._run(arrays, cache, work)
    assert logits.shape == (len(arrays["wanted"]), VOCABULARY)
    assert torch.equal(before, cache.layers[0].key_codes.view(torch.uint8)) and int(cache.saturated) == 0


def test_the_memory_of_prompts_graphs_and_sampling_is_reckoned(monkeypatch: pytest.MonkeyPatch) -> None:
    f, rows, peaks = forward(graph_sizes=(4, 2)), [], iter([1_000, 30_000])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 0)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: next(peaks))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(f, "_run", lambda arrays, *_: rows.append((len(arrays["tokens"]), arrays["pages"].shape)))
    assert f._measured("fp8", 90) == 31_000 + 4 * VOCABULARY * (4 + 2) + SAMPLER * 8 * VOCABULARY
    assert rows == [(198, (3, 5)), (4, (4, 6))], "three prompts fill a step of 200; decode as wide as the longest needs"


def test_a_cache_gets_what_is_left_of_its_part(monkeypatch: pytest.MonkeyPatch) -> None:
    f = forward(memory_fraction=0.8)
    page = f.model.new_cache(1, 16, "fp8").nbytes
    f.device = SimpleNamespace(type="cuda")  # type: ignore[assignment]
    monkeypatch.setattr(f, "there", nullcontext)
    monkeypatch.setattr(f, "_measured", lambda *_: 5_000)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (25_000 + 7 * page + 1, 100_000))
    assert f.affordable("fp8", 90) == 7
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (24_000, 100_000))
    with pytest.raises(ConfigError, match="no memory is left for a cache"):
        f.affordable("fp8", 90)


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({}, [1, 2, 3, 4, 6, 8]),
        ({"graph_sizes": (8, 1)}, [1, 8]),
        ({"deterministic": True}, [8]),
        ({"graphs": False}, None),
    ],
)
def test_every_kind_of_step_is_run_and_decode_captured(
    options: dict[str, Any], sizes: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    f, run, captured = forward(**options), [], []
    f.device = SimpleNamespace(type="cuda")  # type: ignore[assignment]
    monkeypatch.setattr(f, "there", nullcontext)
    monkeypatch.setattr(f, "_run", lambda arrays, *_: run.append(len(arrays["wanted"])))
    monkeypatch.setattr(room, "DecodeGraphs", lambda *given, one_kernel: captured.append((*given[3:], one_kernel)))
    f.open(f.model.new_cache(6, 16), 90)
    assert run == ([1, 2, 4, 8] if "deterministic" not in options else [8] * 4)
    assert captured == ([] if sizes is None else [(sizes, 6, "deterministic" in options)])
