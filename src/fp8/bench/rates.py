"""What `fp8 plan` and `convert(only_if_faster=True)` go by, measured: products, casts, copies, attention, launches.

    python -m fp8.bench.rates --out DIR [--table] [--fused fp8]

About two minutes on an H200, of which compiling takes half. Writes `rates.json`, fits the table that the package
ships, and prints every point beside its prediction; with `--table` the package's own table (`src/fp8/cost/rates.json`)
is replaced by the fit. Shapes in `HELD` are never fitted.

Products run one after another in a CUDA graph, on operands that together exceed the L2, for some tens of milliseconds:
as warm as in a step, and without the host's part. Gradients' shapes are among them, because a weight gradient has few
outputs and a long K. Two steps of two Llama-3-8B layers, compiled, give what a step sustains. Whole steps of other
shapes come from `plan.json` (`fp8 bench plan`) beside it, and are only compared.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fp8 import quantize
from fp8.attention import attention
from fp8.cost import fit, traffic
from fp8.cost import rates as shipped
from fp8.formats import format_of
from fp8.matmul import matmul, run_matmul
from fp8.quantize import run_quantize_both
from fp8.tile import Tile

from .machine import machine, save

Shape = tuple[int, int, int]
LLAMA: tuple[Shape, ...] = (
    (16384, 6144, 4096),
    (16384, 4096, 4096),
    (16384, 28672, 4096),
    (16384, 4096, 14336),
    (16384, 4096, 28672),
    (28672, 4096, 16384),
    (4096, 14336, 16384),
    (8192, 8192, 8192),
    (8192, 57344, 8192),
)
MIDDLE: tuple[Shape, ...] = ((16384, 3072, 2048), (16384, 2048, 8192), (2048, 2048, 16384), (16384, 2048, 2048))
SMALL: tuple[Shape, ...] = (
    (65536, 4096, 768),
    (65536, 768, 768),
    (768, 768, 65536),
    (4096, 1024, 1024),
    (4096, 768, 768),
)
DECODE: tuple[Shape, ...] = ((16, 6144, 4096), (16, 4096, 4096), (16, 28672, 4096), (16, 4096, 14336))
HELD = {(16384, 4096, 14336), (8192, 8192, 8192), (4096, 14336, 16384), (16384, 2048, 2048), (65536, 768, 768),
        (4096, 768, 768), (16, 4096, 4096), (16, 28672, 4096)}  # fmt: skip
KINDS = {  # name: (tile of a, tile of b, accumulation)
    "tensor fast": ("tensor", "tensor", "fast"),
    "tensor promoted": ("tensor", "tensor", "promoted"),
    "row fast": ("row", "row", "fast"),
    "row promoted": ("row", "row", "promoted"),
    "1x128 128x128": ("1x128", "128x128", "promoted"),
    "1x128 1x128": ("1x128", "1x128", "promoted"),
}
CASTS = {"both tensor": "tensor", "both tensor given": "tensor", "both row": "row", "both 1x128": "1x128",
         "both 128x128": "128x128"}  # fmt: skip
ATTENTION = ((128, (1024, 2048, 4096, 8192, 16384)), (64, (1024, 2048, 8192)))
FITTED_LENGTHS = (1024, 8192)
DEVICE = "cuda"
E4M3 = format_of("e4m3")
TOKENS = 16384  # of attention, in sequences of each length
L2 = 120e6  # bytes of operands that no L2 holds
BUSY = 15e-3  # seconds that a graph keeps the GPU busy
SOURCE = "bench rates"


def graph_seconds(calls: list[Callable[[], Any]], least: float = BUSY) -> float:
    """Median seconds of a call in a CUDA graph that goes through the calls, over and over, for `least` seconds."""
    for call in calls[:2]:
        call()
    once = _timed(lambda: [call() for call in calls]) / len(calls)
    times = max(1, min(200, math.ceil(least / max(once, 2e-6) / len(calls))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            for call in calls:
                call()
    graph.replay()
    return statistics.median(_timed(graph.replay) for _ in range(3)) / times / len(calls)


def _timed(run: Callable[[], Any]) -> float:
    """Seconds on the GPU."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) * 1e-3


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16)


# --------------------------------------------------------------------------- one measurement each


def products() -> Iterator[dict[str, Any]]:
    """Every shape in every kind; one that fails is told and left out."""
    for shape in (*LLAMA, *MIDDLE, *SMALL, *DECODE):
        m, n, k = shape
        copies = max(1, min(24, math.ceil(L2 / (2.0 * (m * k + n * k)))))
        pairs = [(normal(m, k), normal(n, k)) for _ in range(copies)]
        for kind in ("bf16", *KINDS):
            try:
                seconds = graph_seconds(_calls(kind, pairs))
            except Exception as error:  # noqa: BLE001 - one kind that fails must not cost the others
                print(f"{shape} {kind}: {type(error).__name__}: {error}"[:200])
                continue
            yield {"shape": list(shape), "kind": kind, "seconds": seconds, "held": shape in HELD, "source": SOURCE}
        del pairs
        torch.cuda.empty_cache()


def _calls(kind: str, pairs: list[tuple[Tensor, Tensor]]) -> list[Callable[[], Any]]:
    if kind == "bf16":
        return [lambda x=x, w=w: x @ w.t() for x, w in pairs]
    tile_a, tile_b, accumulate = KINDS[kind]
    codes = [(quantize(x, "e4m3", tile_a), quantize(w, "e4m3", tile_b)) for x, w in pairs]
    return [lambda a=a, b=b: matmul(a, b, torch.bfloat16, accumulate) for a, b in codes]


def copies() -> list[dict[str, Any]]:
    found = []
    for n in (1 << 26, 235 << 20, 1 << 27):
        x, y = normal(n), normal(n)
        seconds = graph_seconds([lambda x=x, y=y: y.copy_(x)])
        found.append({"bytes": 4 * n, "seconds": seconds, "held": n == 1 << 27, "source": SOURCE})
    return found


def elementwise() -> list[dict[str, Any]]:
    """r4 w2, as a residual addition."""
    found = []
    for n in (1 << 26, 235 << 20, 1 << 27):
        x, y, z = normal(n), normal(n), normal(n)
        seconds = graph_seconds([lambda x=x, y=y, z=z: torch.add(x, y, out=z)])
        found.append({"what": "addition", "bytes": 6 * n, "seconds": seconds, "held": n == 1 << 27, "source": SOURCE})
    return found


def casts() -> Iterator[dict[str, Any]]:
    for rows, cols in ((16384, 4096), (16384, 14336), (8192, 8192)):
        x = normal(rows, cols)
        given = torch.full((1, 1), 2.0**-6, device=DEVICE)
        for kind, name in CASTS.items():
            scale, tile = given if kind.endswith("given") else None, Tile.of(name)
            seconds = graph_seconds([lambda x=x, t=tile, s=scale: run_quantize_both(x, s, E4M3, t, True)])
            yield {"kind": kind, "elements": rows * cols, "seconds": seconds, "held": rows == cols, "source": SOURCE}


def attentions() -> Iterator[dict[str, Any]]:
    """16384 tokens, causal, 32 query and 8 key heads."""
    for width, lengths in ATTENTION:
        for s in lengths:
            b = max(1, TOKENS // s)
            q, k, v = (normal(b, h, s, width).requires_grad_() for h in (32, 8, 8))
            grad = normal(b, 32, s, width)
            run = lambda q=q, k=k, v=v: attention(q, k, v, causal=True)  # noqa: E731
            y = run()
            back = lambda q=q, k=k, v=v, y=y, g=grad: torch.autograd.grad(y, (q, k, v), g, retain_graph=True)  # noqa: E731
            ahead, after = (_repeated(call) for call in (run, back))
            yield {"batch": b, "heads": 32, "kv_heads": 8, "sequence": s, "head_dim": width, "forward": ahead,
                   "backward": after, "held": s not in FITTED_LENGTHS, "source": SOURCE}  # fmt: skip


def _repeated(run: Callable[[], Any], times: int = 8) -> float:
    """Seconds a call, several in a row, median of three."""
    run()
    return statistics.median(_timed(lambda: [run() for _ in range(times)]) for _ in range(3)) / times


# --------------------------------------------------------------------------- launches


def launches() -> tuple[dict[str, Any], dict[str, str]]:
    """The least time of a kernel in a row, what the host spends on each kind of call, and what could not be measured
    (which keeps the shipped figure)."""
    tiny = torch.zeros(256, device=DEVICE)
    known, failed = dict(shipped().host), {}
    for name, measure in HOST.items():
        try:
            known[name] = measure()
        except Exception as error:  # noqa: BLE001 - an estimate stays where a measurement fails
            failed[f"host {name}"] = f"not measured: {type(error).__name__}: {error}"[:200]
    return {"kernel": graph_seconds([lambda: tiny.add_(1)] * 64, 1e-3), "host": known}, failed


def host_seconds(run: Callable[[], Any], calls: int) -> float:
    """Seconds that the host spends on each of the `calls` that `run` makes; the GPU's work is small and comes after."""
    for _ in range(3):
        run()
    times = []
    for _ in range(7):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return statistics.median(times) / calls


def _ops(compiled: bool) -> float:
    x, w = normal(64, 64), normal(64, 64)

    def run() -> Tensor:
        y = x
        for _ in range(32):
            y = torch.relu(y @ w)
        return y

    return host_seconds(torch.compile(run) if compiled else run, 64)


def _casts(compiled: bool) -> float:
    many, tile = [normal(256, 256) for _ in range(32)], Tile.of("tensor")

    def run() -> list[Tensor]:
        return [run_quantize_both(x, None, E4M3, tile, True)[0] for x in many]

    return host_seconds(torch.compile(run) if compiled else run, len(many))


def _products(compiled: bool) -> float:
    a, b = quantize(normal(256, 256)), quantize(normal(256, 256))

    def run() -> list[Tensor]:
        return [run_matmul(a, b, torch.bfloat16, "fast") for _ in range(32)]

    return host_seconds(torch.compile(run) if compiled else run, 32)


HOST: dict[str, Callable[[], float]] = {
    "op": lambda: _ops(False),
    "cast": lambda: _casts(False),
    "product": lambda: _products(False),
    "compiled op": lambda: _ops(True),
    "compiled cast": lambda: _casts(True),
    "compiled product": lambda: _products(True),
}


# --------------------------------------------------------------------------- everything


def steps(out: Path, fused: str = "no", layers: int = 2) -> list[dict[str, Any]]:
    """Two compiled steps that are fitted, and those of `plan.json`, or of the last run, that are not."""
    from . import plan

    case = plan.llama(layers)
    fitted = [plan.row(case, arm, held=False, fused=plan.is_fused(fused, arm)) for arm in plan.FITTED]
    name = out / "plan.json"
    if name.is_file():
        return fitted + json.loads(name.read_text(encoding="utf-8"))["results"]["steps"]
    before = out / "rates.json"
    if before.is_file():
        return fitted + [r for r in json.loads(before.read_text(encoding="utf-8"))["results"]["steps"] if r["held"]]
    return fitted


def measure(out: Path, fused: str = "no") -> dict[str, Any]:
    start = time.perf_counter()
    launch, failed = launches()
    results: dict[str, Any] = {
        "source": f"fp8 bench rates on one {torch.cuda.get_device_name()}, torch {torch.__version__}",
        "multiprocessors": torch.cuda.get_device_properties(0).multi_processor_count,
    }
    for name, make in (("gemm", products), ("copy", copies), ("elementwise", elementwise), ("cast", casts),
                       ("attention", attentions), ("steps", lambda: steps(out, fused))):  # fmt: skip
        results[name] = list(make())
        print(f"{name}: {len(results[name])} points, {time.perf_counter() - start:.0f} s", flush=True)
    results["launch"] = launch
    results["estimates"] = {
        name: why for name, why in shipped().estimates.items() if name in ("fused", "H100")
    } | failed
    return results


def main(arguments: list[str] | None = None) -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="bench/results", help="folder for rates.json")
    parser.add_argument("--table", action="store_true", help="replace the package's table by the fit")
    parser.add_argument("--fused", choices=("no", "fp8", "all"), default="no", help="which steps run fused producers")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    print(json.dumps(machine()), flush=True)
    results = measure(Path(options.out), options.fused)
    path = save(options.out, "rates", results)
    table = fit.TABLE if options.table else Path(options.out) / "rates_table.json"
    print(fit.main(str(path), table))
    print(f"measured: {path}\ntable: {table}")


assert set(CASTS) == set(traffic.CAST_BYTES), "every cast of the model is measured"

if __name__ == "__main__":
    main()
