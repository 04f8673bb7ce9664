"""Reading prompts with an 8B model: attention of chunks, what stands between the products, and the whole.

    python -m fp8.bench.prefill --out DIR [--prompts 16] [--length 16384] [--steps 16384 8192] [--parts attention ...]

**attention** TFLOP/s, 32 query heads and 8 key heads of 128, a chunk of some new tokens after some that are stored,
over pages in disorder: taken apart (`attention/paged/chunks.py`), by the kernel that reads pages, and cuDNN alone over
keys that lie ready. (4 * 128 * 32) operations a pair of row and key that it sees.

**shapes** milliseconds that the host spends on the first call of a shape that cuDNN has not met, and on the second.

**between** microseconds of each step of a layer for a chunk, in a CUDA graph, and TB/s of the bytes that it must move;
the four products, and TFLOP/s.

**whole** seconds until every prompt has its first token, all given at once, prompts of random tokens that share
nothing; then its kernels by the profiler, and the gaps between them.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..attention.paged import Chunk, LayerPages, PagedCache, chunks, rope_write
from ..backends import function
from ..formats import E4M3
from ..fused.rope.reference import tables
from ..fused.rows import Into, add_norm_codes, gated_codes, norm_codes, row_codes
from ..matmul import run_matmul
from ..quantize import quantize
from ..serve import Engine, EngineOptions, Request, SamplingParams
from ..serve.batch import Batch
from ..serve.models import ServedModel, random_model
from ..tile import Tile
from .machine import machine, save
from .quantize import microseconds
from .serve import config_of

HEADS, KV, WIDTH, PAGE, HIDDEN, FFN = 32, 8, 128, 64, 4096, 14336
SCALE = WIDTH**-0.5
MATRICES = {"qkv": (6144, 4096), "out": (4096, 4096), "gate, up": (28672, 4096), "down": (4096, 14336)}
CASES = ((8192, 0), (8192, 8192), (16384, 0), (4096, 12288), (2048, 30000))  # new, stored
KERNELS = "fp8.attention.paged.triton_chunks"


def milliseconds(call: Callable[[], Any], rounds: int = 7) -> float:
    """The median time of a call, launched like a step launches it, in a row of `rounds`."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    call()
    torch.cuda.synchronize()
    for mark in marks:
        mark.record()
        call()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks))


# --------------------------------------------------------------------------- attention


def a_chunk(new: int, stored: int, kind: str) -> tuple[LayerPages, Batch, Tensor]:
    """A full layer, a batch of one chunk, and its queries."""
    length = new + stored
    pages = -(-length // PAGE)
    scales = torch.full((1, 2, KV), 0.02) if kind == "static" else None
    cache = PagedCache(
        1, pages, PAGE, KV, WIDTH, dtype="fp8" if kind == "static" else kind, kv_scales=scales, device="cuda"
    )
    layer = cache.layers[0]
    table = torch.randperm(pages, device="cuda").int().view(1, -1)
    at = torch.arange(length, device="cuda")
    slots = table[0, at // PAGE].long() * PAGE + at % PAGE
    qkv = torch.randn(length, (HEADS + 2 * KV) * WIDTH, device="cuda").bfloat16()
    q = rope_write(qkv, at.int(), slots, layer, tables(length, WIDTH, 5e5, torch.device("cuda")))[stored:]
    starts, lengths = (torch.tensor(x, device="cuda", dtype=torch.int32) for x in ([0, new], [length]))
    batch = Batch(at[stored:], at[stored:].int(), slots[stored:], starts, lengths, table, at[:1], False,
                  (Chunk(stored, new),))  # fmt: skip
    return layer, batch, q.contiguous()


def calls_alone(new: int, stored: int) -> Callable[[], Any]:
    """cuDNN's part: the same calls over keys that lie ready."""
    made = []
    for call in chunks.calls_of(Chunk(stored, new)):
        q, k, v = (torch.randn(n, h, WIDTH, device="cuda").bfloat16() for n, h in
                   ((call.rows, HEADS), (call.keys, KV), (call.keys, KV)))  # fmt: skip
        made.append((q, k, v, call.causal))
    return lambda: [chunks.cudnn(q, k, v, causal, SCALE) for q, k, v, causal in made]


def attention() -> list[dict[str, Any]]:
    """TFLOP/s of each case and way."""
    found = []
    for new, stored in CASES:
        work = 4 * WIDTH * HEADS * (new * stored + new * (new + 1) / 2)
        row: dict[str, Any] = {"new": new, "stored": stored}
        for kind in ("fp8", "static", "bf16") if (new, stored) == CASES[1] else ("fp8",):
            layer, batch, q = a_chunk(new, stored, kind)
            row[kind] = work / milliseconds(lambda: chunks.attend(q, layer, batch, SCALE)) / 1e9  # noqa: B023
        attend_chunks = function("fp8.attention.paged.triton", "attend_chunks")
        row["pages"] = work / milliseconds(lambda: attend_chunks(q, layer, batch, SCALE), 3) / 1e9  # noqa: B023
        row["cudnn alone"] = work / milliseconds(calls_alone(new, stored)) / 1e9
        print("attention", {k: v if isinstance(v, int) else round(v) for k, v in row.items()}, flush=True)
        found.append(row)
    return found


def shapes() -> dict[str, list[float]]:
    """Host milliseconds of the first and second call of three new shapes of each kind."""
    found: dict[str, list[float]] = {}
    for causal in (True, False):
        for rows in (1536, 2560, 3584):
            q = torch.randn(rows, HEADS, WIDTH, device="cuda").bfloat16()
            k = torch.randn(rows if causal else 2048, KV, WIDTH, device="cuda").bfloat16()
            for nth in ("first", "second"):
                torch.cuda.synchronize()
                began = time.perf_counter()
                chunks.cudnn(q, k, k, causal, SCALE)
                found.setdefault(nth, []).append((time.perf_counter() - began) * 1e3)
    print("shapes", {k: [round(x, 2) for x in v] for k, v in found.items()}, flush=True)
    return found


# --------------------------------------------------------------------------- between


def between(rows: int = 8192) -> list[dict[str, Any]]:
    """Each step of a layer: microseconds, and TB/s or TFLOP/s."""
    h, wide = (torch.randn(rows, n, device="cuda").bfloat16() for n in (HIDDEN, 2 * FFN))
    weight, into = torch.rand(HIDDEN, device="cuda").bfloat16(), Into(E4M3, Tile.of("row"))
    layer, batch, _ = a_chunk(rows, 0, "fp8")
    qkv = torch.randn(rows, (HEADS + 2 * KV) * WIDTH, device="cuda").bfloat16()
    rope = tables(rows, WIDTH, 5e5, torch.device("cuda"))
    kv, parts = KV * WIDTH, calls_alone(rows, 8192)()
    out = torch.empty(rows, HIDDEN, device="cuda", dtype=torch.bfloat16)
    gather, join = function(KERNELS, "gathered"), function(KERNELS, "joined")
    steps: dict[str, tuple[Callable[[], Any], float]] = {
        "norm": (lambda: norm_codes(h, weight, 1e-5, into), 3 * HIDDEN),
        "codes": (lambda: row_codes(h, into), 3 * HIDDEN),
        "gate": (lambda: gated_codes(wide, into), 5 * FFN),
        "add": (lambda: h + out, 6 * HIDDEN),
        "add, norm": (lambda: add_norm_codes(h, out, weight, 1e-5, into), 7 * HIDDEN),
        "rope": (lambda: rope_write(qkv, batch.positions, batch.slots, layer, rope), 4 * HIDDEN + 6 * kv + 8 * KV),
        "gather": (lambda: gather(layer, batch.pages[0], 0, rows, rows), 6 * kv + 8 * KV),
        "join 2": (lambda: join(parts, out), 6 * HIDDEN + 8 * HEADS),
    }
    found = []
    for name, (call, moved) in steps.items():
        us = microseconds(lambda _: call(), [h] * 4)  # noqa: B023
        found.append({"step": name, "us": us, "TB/s": rows * moved / us / 1e6})
    for name, (n, k) in MATRICES.items():
        a, b = (quantize(torch.randn(m, k, device="cuda").bfloat16(), "e4m3", "row") for m in (rows, n))
        us = microseconds(lambda _: run_matmul(a, b, torch.bfloat16, "fast", None), [h] * 2)  # noqa: B023
        found.append({"step": name, "us": us, "TFLOP/s": 2 * rows * n * k / us / 1e6})
    print("between", rows, *(f"{r['step']} {r['us']:.0f} us {list(r.values())[2]:.4g};" for r in found), flush=True)
    return found


# --------------------------------------------------------------------------- the whole


def whole(model: ServedModel, prompts: int, length: int, step: int, rounds: int) -> list[float]:
    """Seconds until all prompts have their first token, `rounds` times."""
    options = EngineOptions(
        page_size=PAGE, pages=prompts * -(-(length + 2) // PAGE) + 1, max_running=prompts, max_step_tokens=step,
        prefix_caching=False, graphs=False, max_model_len=length + 2,
    )  # fmt: skip
    engine = Engine(model, options=options)
    drawn = torch.randint(model.config.vocab_size, (prompts, length)).tolist()
    found = []
    for _ in range(rounds):
        for i, prompt in enumerate(drawn):
            engine.add(Request(str(i), prompt, SamplingParams(temperature=0, max_tokens=1)))
        torch.cuda.synchronize()
        began = time.perf_counter()
        while engine.has_work():
            engine.step()
        found.append(time.perf_counter() - began)
    return found


def kernels(model: ServedModel, prompts: int, length: int, step: int) -> dict[str, Any]:
    """Seconds of all kernels and of the gaps between them (those of 20 ms and more are the host's, before the first
    step), and of the longest: calls, milliseconds, and microseconds of the 10th, 50th and 90th percentile call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        whole(model, prompts, length, step, 1)
    ran = [e for e in profile.events() or () if e.device_type == torch.autograd.DeviceType.CUDA]
    ran.sort(key=lambda e: e.time_range.start)
    gaps = [b.time_range.start - a.time_range.end for a, b in itertools.pairwise(ran)]
    times: dict[str, list[float]] = {}
    for event in ran:
        times.setdefault(event.name, []).append(event.time_range.elapsed_us())
    rows = {n: (len(t), sum(t) / 1e3, *(sorted(t)[int(len(t) * q)] for q in (0.1, 0.5, 0.9))) for n, t in times.items()}
    longest = dict(sorted(rows.items(), key=lambda row: -row[1][1])[:16])
    idle = sum(gap for gap in gaps if 0 < gap < 2e4) / 1e6
    return {"kernels": sum(sum(t) for t in times.values()) / 1e6, "gaps": idle, "longest": longest}


def main(arguments: list[str] | None = None) -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="bench/results", help="folder for prefill.json")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--steps", type=int, nargs="+", default=[16384, 8192])
    parser.add_argument("--parts", nargs="+", default=["attention", "shapes", "between", "whole"])
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    print(machine(), flush=True)
    found: dict[str, Any] = {name: part() for name, part in
                             (("attention", attention), ("shapes", shapes), ("between", between))
                             if name in options.parts}  # fmt: skip
    if "whole" in options.parts:
        model = random_model(config_of("llama-3-8b"), device="cuda", quantization="fp8")
        for step in options.steps:
            whole(model, 1, options.length, step, 1)
            found[f"whole {step}"] = seconds = whole(model, options.prompts, options.length, step, 2)
            print(f"whole {options.prompts} x {options.length}, {step} a step: {seconds} s", flush=True)
        found["profile"] = seen = kernels(model, options.prompts, options.length, options.steps[0])
        print(f"profile: kernels {seen['kernels']:.3f} s, gaps {seen['gaps']:.3f} s", flush=True)
        for name, (count, ms, *q) in seen["longest"].items():
            print(f"  {ms:8.2f} ms {count:6} {[round(x) for x in q]} {name[:60]}", flush=True)
    print(save(options.out, "prefill", found))


if __name__ == "__main__":
    main()
