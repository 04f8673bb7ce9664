"""FP8 products beside BF16, in one run on one GPU.

    python -m fp8.bench.gemm --out DIR

Large shapes in TFLOP/s (2 M N K / time), each call alone, medians, cold L2. Decode shapes (M = 16) in microseconds: a
CUDA graph walks through copies of the weight that together exceed the L2, as a model's layers do, and the figure is a
call's share. Data is normal: zeros would run cooler and faster. The ratio is to BF16 in the same run; absolute figures
move with the GPU's power. Operands are quantized beforehand and multiplied through the public `fp8.matmul`. DeepGEMM
is shown where installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fp8 import matmul, quantize

from .machine import machine, save

LARGE = (
    (16384, 6144, 4096),
    (16384, 4096, 4096),
    (16384, 28672, 4096),
    (16384, 4096, 14336),
    (8192, 8192, 8192),
    (4096, 1024, 1024),
)
DECODE = ((16, 6144, 4096), (16, 4096, 4096), (16, 28672, 4096), (16, 4096, 14336))
MODES = {  # name: (tile of x, tile of w, accumulation, format)
    "tensor fast": ("tensor", "tensor", "fast", "e4m3"),
    "tensor promoted": ("tensor", "tensor", "promoted", "e4m3"),
    "row fast": ("row", "row", "fast", "e4m3"),
    "row promoted": ("row", "row", "promoted", "e4m3"),
    "1x128 128x128": ("1x128", "128x128", "promoted", "e4m3"),
    "1x128 1x128": ("1x128", "1x128", "promoted", "e4m3"),
}
OWN = {  # what only our Triton kernel computes; on one shape
    "e5m2 e5m2": ("tensor", "tensor", "promoted", "e5m2"),
    "128x128 128x128": ("128x128", "128x128", "promoted", "e4m3"),
    "1x32 1x32": ("1x32", "1x32", "promoted", "e4m3"),
}
L2_BYTES = 60e6
REPEATS = 20


def milliseconds(run: Callable[[], Any]) -> float:
    """The median time of a call that finds nothing in the L2."""
    from triton.testing import do_bench

    return float(do_bench(run, warmup=10, rep=40, return_mode="median"))  # type: ignore[arg-type]


def share_of_graph(calls: list[Callable[[], Any]]) -> float:
    """Milliseconds a call, for calls that follow one another in one CUDA graph."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(REPEATS):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times) / len(calls)


def prepared(mode: tuple[str, str, str, str], x: Tensor, weights: list[Tensor]) -> list[Callable[[], Tensor]]:
    """A product for each weight, its operands quantized."""
    tile_x, tile_w, accumulate, kind = mode
    a = quantize(x, kind, tile_x)
    sides = [quantize(w, kind, tile_w) for w in weights]
    return [lambda b=b: matmul(a, b, torch.bfloat16, accumulate) for b in sides]


def peers(x: Tensor, weights: list[Tensor]) -> Iterator[tuple[str, list[Callable[[], Any]] | str]]:
    """Other libraries on the same data: calls, or the reason why there are none."""
    if importlib.util.find_spec("deep_gemm") is None:
        yield "deep_gemm 1x128 128x128", "not installed"
        return
    import deep_gemm  # type: ignore[import-not-found]

    a = quantize(x, "e4m3", "1x128")
    out = torch.empty(x.shape[0], weights[0].shape[0], device=x.device, dtype=torch.bfloat16)
    sides = [quantize(w, "e4m3", "128x128") for w in weights]
    yield (
        "deep_gemm 1x128 128x128",
        [lambda b=b: deep_gemm.fp8_gemm_nt((a.codes, a.scale), (b.codes, b.scale), out) for b in sides],
    )


def measure(shape: tuple[int, int, int], modes: dict[str, tuple[str, str, str, str]]) -> dict[str, Any]:
    """One shape: milliseconds of BF16, of each mode and of each peer; a string where there is none."""
    rows, cols, depth = shape
    small = rows <= 64
    copies = min(64, int(3 * L2_BYTES / (cols * depth)) + 2) if small else 1
    x = torch.randn(rows, depth, device="cuda", dtype=torch.bfloat16)
    weights = [torch.randn(cols, depth, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
    timed: dict[str, Any] = {"shape": list(shape), "bf16": _time([lambda w=w: x @ w.t() for w in weights], small)}
    for name, mode in modes.items():
        timed[name] = _time(lambda mode=mode: prepared(mode, x, weights), small)
    for name, calls in peers(x, weights):
        timed[name] = calls if isinstance(calls, str) else _time(calls, small)
    return timed


def _time(calls: Any, small: bool) -> float | str:
    try:
        calls = calls() if callable(calls) else calls
        return share_of_graph(calls) if small else milliseconds(calls[0])
    except Exception as error:  # noqa: BLE001 - one mode that fails must not cost the other figures
        return repr(error)[:200]


def line(timed: dict[str, Any]) -> str:
    """A row of the table: TFLOP/s (or microseconds) and the ratio to BF16."""
    rows, cols, depth = timed["shape"]
    cells = [f"{rows}, {cols}, {depth}".ljust(20)]
    for name, ms in timed.items():
        if name == "shape":
            continue
        if isinstance(ms, str):
            cells.append(f"{name}: {ms}")
            continue
        figure = f"{ms * 1e3:.1f} us" if rows <= 64 else f"{2 * rows * cols * depth / ms / 1e9:.0f}"
        known = isinstance(timed["bf16"], float) and name != "bf16"
        cells.append(f"{name}: {figure}" + (f" ({timed['bf16'] / ms:.2f}x)" if known else ""))
    return " | ".join(cells)


def main(arguments: list[str] | None = None) -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="bench/results", help="folder for gemm.json")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    print(json.dumps(machine()), flush=True)
    print("TFLOP/s (times BF16); M = 16 in microseconds")
    results = []
    for shape in LARGE + DECODE:
        results.append(measure(shape, {**MODES, **OWN} if shape == (16384, 4096, 4096) else MODES))
        print(line(results[-1]), flush=True)
        torch.cuda.empty_cache()
    print(save(options.out, "gemm", results))


if __name__ == "__main__":
    main()
