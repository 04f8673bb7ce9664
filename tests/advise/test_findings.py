"""The analysis on synthetic events: what it counts, why the GPU idles, and what it finds."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fp8.advise.events import Event
from fp8.advise.findings import Facts, Finding, Sync, analyse
from fp8.advise.gaps import busy, gaps

FP8, BF16 = "nvjet_sm90_qqtst_192x192", "nvjet_sm90_tst_320x128"


def launched(name: str, launch: float, start: float, duration: float, number: int) -> list[Event]:
    """A kernel, and the call of the host that launched it."""
    return [
        Event("cudaLaunchKernelExC", "runtime", launch, 2, 1, number),
        Event(name, "kernel", start, duration, 7, number),
    ]


def row(*kernels: tuple[str, float]) -> list[Event]:
    """Kernels without a gap, all launched ahead."""
    events, now = [], 100.0
    for number, (name, duration) in enumerate(kernels, 1):
        events += launched(name, number * 0.1, now, duration, number)
        now += duration
    return events


def found(events: list[Event], word: str, facts: Facts | None = None, syncs: tuple[Sync, ...] = ()) -> Finding | None:
    return next((f for f in analyse(events, 1, syncs, facts).findings if word in f.what), None)


def test_time_is_divided_among_kinds() -> None:
    a = analyse(row((FP8, 600), (BF16, 200), ("cast_tiles", 100), ("partial_keys", 100)), 2)
    assert (a.device, a.step_ms, a.busy_ms, a.idle_ms) == ("GPU", 0.5, 0.5, 0.0)
    assert {r.kind: (r.ms, r.calls) for r in a.rows} == {
        "FP8 products": (0.3, 0.5),
        "BF16 products": (0.1, 0.5),
        "cast, quantize": (0.1, 1.0),
    }
    assert sum(r.share for r in a.rows) == 1


def test_a_wait_of_the_host_is_told_from_slow_launches() -> None:
    events = launched("a", 0, 10, 90, 1)  # ends at 100
    events += [Event("cudaStreamSynchronize", "runtime", 5, 97, 1)]  # ends at 102
    events += launched("b", 110, 120, 80, 2)  # after the wait
    events += [Event("aten::topk", "op", 195, 40, 1)]
    events += launched("c", 236, 240, 60, 3)  # launched after b ended at 200, without a wait
    events += launched("d", 237, 310, 10, 4)  # in the queue long before
    assert [(g.cause, g.duration) for g in gaps(events)] == [("synchronized", 20), ("host", 40), ("queue", 10)]
    assert gaps(events)[1].during == "aten::topk"
    assert analyse(events, 1).idle == {"synchronized": 0.02, "host": 0.04, "queue": 0.01}


def test_an_old_wait_is_not_to_blame() -> None:
    events = [Event("cudaStreamSynchronize", "runtime", 0, 5, 1), *launched("a", 6, 10, 90, 1)]
    events += launched("b", 130, 140, 10, 2)
    assert [g.cause for g in gaps(events)] == ["host"]


def test_streams_that_overlap_are_busy_once() -> None:
    events = [Event("a", "kernel", 0, 50, 1), Event("b", "kernel", 10, 10, 2), Event("c", "kernel", 40, 30, 2)]
    assert busy(events) == [(0, 70)]


@given(st.lists(st.tuples(st.integers(0, 500), st.integers(1, 60), st.integers(1, 3)), min_size=1, max_size=30))
def test_busy_and_idle_make_the_whole(records: list[tuple[int, int, int]]) -> None:
    events = [Event("k", "kernel", start, length, stream, i) for i, (start, length, stream) in enumerate(records, 1)]
    whole = max(e.end for e in events) - min(e.start for e in events)
    assert sum(stop - start for start, stop in busy(events)) + sum(g.duration for g in gaps(events)) == whole
    a = analyse(events, 1)
    assert abs(a.busy_ms + a.idle_ms - a.step_ms) < 1e-9


def test_a_synchronization_is_named_with_its_line() -> None:
    events = [*launched("a", 0, 10, 90, 1), Event("cudaStreamSynchronize", "runtime", 5, 97, 1)]
    events += launched("b", 110, 120, 80, 2)
    one = found(
        events, "train.py:12", syncs=(Sync("a value is read on the host (.item() ...)", "train.py:12 in step"),)
    )
    assert one is not None
    assert one.ms == 0.02
    assert "read them once in many steps" in one.way_out
    unknown = found(events, "waits for the GPU 1 times")
    assert unknown is not None
    assert "cudaStreamSynchronize" in unknown.what


def test_launches_that_come_late_are_found_with_what_the_host_did() -> None:
    events = [*launched("a", 0, 10, 90, 1), Event("aten::sort", "op", 95, 60, 1), *launched("b", 160, 170, 30, 2)]
    one = found(events, "waits for launches")
    assert one is not None
    assert "aten::sort" in one.cause
    assert "CUDA graph" in one.way_out
    assert "compile" in one.way_out
    compiled = found([*events, Event("triton_poi_fused_add_0", "kernel", 200, 5, 7)], "waits for launches")
    assert compiled is not None
    assert "compile the model" not in compiled.way_out


def test_many_small_kernels_are_found() -> None:
    small = [("void at::native::vectorized_elementwise_kernel<4>", 2.0)] * 80
    one = found(row((FP8, 100), *small), "take less than 5 µs")
    assert one is not None
    assert one.what.startswith("80 of 81 kernels")
    assert found(row((FP8, 100), *small[:10]), "take less than") is None


def test_casts_are_counted_and_their_amax_apart() -> None:
    one = found(row((FP8, 100), (FP8, 100), ("partial_keys", 30), ("cast_tiles", 60)), "quantizing")
    assert one is not None
    assert one.what == "quantizing takes 0.09 ms a step in 1 casts, 0.5 for each FP8 product"
    assert "0.03 ms of it only look for the amax" in one.cause
    assert "delayed" in one.way_out
    given = found(row((FP8, 100), ("cast_tiles", 60)), "quantizing")
    assert given is not None
    assert "delayed" not in given.way_out


def test_a_weight_quantized_for_each_micro_batch_is_found() -> None:
    events = row((FP8, 300), ("cast_tiles", 90))
    four = Facts(("up", "down"), (), {"up": 4, "down": 4})
    one = found(events, "weights are quantized", four)
    assert one is not None
    assert one.what.startswith("2 weights are quantized 4 times a step")
    assert "fp8.attach" in one.way_out
    assert found(events, "weights are quantized", Facts(("up", "down"), ("up", "down"), {"up": 4, "down": 4})) is None
    assert found(events, "weights are quantized", Facts(("up",), (), {"up": 1})) is None


def test_a_compiled_model_tells_its_forwards_by_its_products() -> None:
    events = row(*[(FP8, 30.0)] * 6, ("cast_tiles", 90))  # one layer, three products, twice
    one = found(events, "weights are quantized", Facts(("up",), (), None))
    assert one is not None
    assert "2 times" in one.what


def test_layers_that_fell_back_are_found() -> None:
    one = found(row((FP8, 10)), "did not multiply in FP8", Facts(("a", "b"), ("a", "b"), {"a": 1}))
    assert one is not None
    assert one.what.endswith(": b")
    inside = Facts(("attention",), ("attention",), {"attention.q": 1})
    assert found(row((FP8, 10)), "did not multiply", inside) is None


def test_layers_left_in_bf16_are_found_where_they_would_gain() -> None:
    facts = Facts(("a",), ("a",), {"a": 1}, {"wide": 1.6, "narrow": 0.9})
    one = found(row((FP8, 10)), "in BF16 would gain", facts)
    assert one is not None
    assert one.what == "1 linear layers in BF16 would gain up to 1.60 times: wide"


def test_flash_attention_2_and_pageable_copies_are_found() -> None:
    flash = row((FP8, 100), ("void pytorch_flash::flash_fwd_kernel<>", 100))
    assert found(flash, "FlashAttention-2") is not None
    copied = [*row((FP8, 100)), Event("Memcpy HtoD (Pageable -> Device)", "memory", 200, 20, 7)]
    one = found(copied, "pageable")
    assert one is not None
    assert "pin_memory" in one.way_out


def test_a_fused_optimizer_is_left_alone() -> None:
    foreach = row((FP8, 100), *[("multi_tensor_apply_kernel<BinaryOp>", 8.0)] * 70)
    fused = row((FP8, 100), *[("multi_tensor_apply_kernel<FusedAdamMathFunctor>", 8.0)] * 70)
    assert found(foreach, "the optimizer takes") is not None
    assert found(fused, "the optimizer takes") is None


def test_a_step_without_faults_has_no_findings() -> None:
    assert analyse(row((FP8, 900), ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", 300)), 1).findings == ()


def test_without_a_gpu_operations_are_counted() -> None:
    mark = Event("fp8 step", "mark", 0, 1000, 1)
    events = [mark, Event("aten::linear", "op", 10, 500, 1), Event("aten::mul", "op", 600, 100, 1)]
    a = analyse(events, 1)
    assert (a.device, a.step_ms, a.idle) == ("CPU", 1.0, {})
    assert {r.kind: r.ms for r in a.rows} == {"BF16 products": 0.5, "norm, activation, elementwise": 0.1}
    assert analyse([], 1).rows == ()
