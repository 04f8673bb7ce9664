"""The great law, through the whole engine and real models: in any traffic a request gets the bits it gets alone."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8.models import Decoder, DecoderConfig
from fp8.serve import Engine, EngineOptions, Output, Request, SamplingParams
from fp8.serve.models import load_model
from fp8.serve.tokenizer import Bytes
from toy_engine import all_free, finish, tokens_of

TEXTS = (list(b"Call me Ishmael. Some years ago"), list(b"Call me Ishmael. Some"), list(b"The whale"), list(b"x"))


@cache
def model(quantization: str | None) -> Any:
    """Random weights whose largest logit seldom leads by much, so that a wrong bit shows."""
    torch.manual_seed(0)
    return load_model(Decoder(DecoderConfig(257, 48, 64, 2, 4, 2, max_positions=256)), quantization=quantization)


def engine(quantization: str | None, cache_dtype: str, **options: Any) -> Engine:
    return Engine(model(quantization), Bytes(), EngineOptions(page_size=16, **options), kv_cache_dtype=cache_dtype)


def parameters(i: int) -> SamplingParams:
    return SamplingParams(temperature=0.0 if i % 2 else 1.0, seed=i, max_tokens=6 + 5 * i, logprobs=1)


@cache
def alone(quantization: str | None, cache_dtype: str, text: int, i: int) -> list[Output]:
    e = engine(quantization, cache_dtype, pages=8, max_running=1, prefix_caching=False)
    e.add(Request("alone", TEXTS[text], parameters(i)))
    return finish(e)["alone"]


def seen(outputs: list[Output]) -> tuple[list[int], str, list[Any]]:
    """Tokens, text, and the bits of the log-probabilities."""
    return tokens_of(outputs), "".join(o.new_text for o in outputs), [o.logprobs for o in outputs]


@pytest.mark.parametrize(("quantization", "cache_dtype"), [("fp8", "fp8"), (None, "bf16"), (None, "e5m2")])
@settings(max_examples=6)
@given(
    traffic=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 9)), min_size=1, max_size=6),
    pages=st.integers(5, 12),
    max_running=st.integers(1, 5),
    budget=st.sampled_from([3, 16, 200]),
    caching=st.booleans(),
    deterministic=st.booleans(),
    aborted=st.booleans(),
)
def test_a_request_gets_the_same_bits_in_any_traffic(
    quantization: str | None,
    cache_dtype: str,
    traffic: list[tuple[int, int, int]],
    aborted: bool,
    caching: bool,
    budget: int,
    **options: Any,
) -> None:
    e = engine(quantization, cache_dtype, prefix_caching=caching, max_step_tokens=budget, **options)
    outputs: dict[str, list[Output]] = {}
    step = 0
    while step < 10 or e.has_work():
        for name, (text, i, arrival) in enumerate(traffic):
            if arrival == step:
                e.add(Request(str(name), TEXTS[text], parameters(i)))
        if aborted and step == 5:
            e.abort("0")
        for output in e.step():
            outputs.setdefault(output.id, []).append(output)
        step += 1
    for name, (text, i, _) in enumerate(traffic):
        if outputs[str(name)][-1].finished != "abort":
            assert seen(outputs[str(name)]) == seen(alone(quantization, cache_dtype, text, i))
    assert all_free(e)


def test_pages_run_out_and_nothing_changes() -> None:
    """The way of the law that random traffic may miss: preempted in the middle of an answer, behind shared pages."""
    e = engine("fp8", "fp8", pages=5, max_running=4, max_step_tokens=16)
    for i in range(4):
        e.add(Request(str(i), TEXTS[i % 2], parameters(3)))
    outputs = finish(e)
    assert e.stats().preemptions > 0 and e.stats().prefix_hit_tokens > 0
    for i in range(4):
        assert seen(outputs[str(i)]) == seen(alone("fp8", "fp8", i % 2, 3))


@pytest.mark.gpu
@pytest.mark.parametrize("quantization", ["fp8", None])
def test_graphs_give_the_tokens_of_launches(quantization: str | None) -> None:
    """On a GPU, with products of one shape: replayed, launched one by one, alone and in company."""
    device = torch.device("cuda")
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(257, 256, 512, 2, 4, 2, max_positions=256))
    served = load_model(decoder, device=device, quantization=quantization)

    def answers(count: int, graphs: bool) -> list[Any]:
        options = EngineOptions(pages=40, max_running=16, deterministic=True, graphs=graphs, prefix_caching=count > 1)
        e = Engine(served, Bytes(), options)
        assert (e.forward.graphs is not None) == graphs
        for i in range(count):
            e.add(Request(str(i), TEXTS[i % 4], parameters(i % 4)))
        outputs = finish(e)
        return [tokens_of(outputs[str(i)]) for i in range(count)]

    together = answers(8, graphs=True)
    assert together == answers(8, graphs=False) and together[:4] == together[4:]
    assert answers(1, graphs=True) == together[:1]


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.gpu
def test_a_step_does_not_wait_for_the_one_before() -> None:
    """Launching asks nothing of the device: torch would raise on a synchronizing copy."""
    served = load_model(
        Decoder(DecoderConfig(257, 256, 512, 2, 4, 2, max_positions=256)), device="cuda", quantization="fp8"
    )
    e = Engine(served, Bytes(), EngineOptions(pages=40, max_running=8))
    for i in range(4):
        e.add(Request(str(i), TEXTS[i], SamplingParams(seed=i, top_p=0.9, max_tokens=40, presence_penalty=0.5)))
    for _ in range(4):
        e.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        e._launch(e.scheduler.plan())
    finally:
        torch.cuda.set_sync_debug_mode("default")
