"""The quantizer on a GPU: are its bytes the reference's, and how much of the memory's speed does it reach?

    python -m fp8.bench.quantize --out DIR [--no-check] [--variants]

**Bytes.** Every kernel, in every form that its flags can take, runs three times on hard values (zeros, subnormals,
all codes and the midpoints between them, 448/449/464/465, Inf, NaN, partial tiles) and is compared with the CPU
reference. Compiling the forms is what takes time, so worker processes share the cases. A matrix of more than 2^31
elements is compared with its own last rows.

**Speed.** A CUDA graph calls an operation on inputs in turn that together exceed the L2; the figure is the median
share of a call, so the host's launch cost is left out (it is given apart, in microseconds a call). Bytes count each
input and output once, whatever is read twice. Data is normal. The copy's speed is measured in the same run.
`--variants` also times other rectangles than the plan's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

from ..formats import FORMATS
from ..tile import NAMES, Tile
from .machine import machine, save
from .quantize_bytes import check, check_long

PEAK = 4.27e12  # bytes a second that a copy reaches on an H200, read and write
SIZES = ((16384, 4096), (16384, 14336), (8192, 8192))


# --------------------------------------------------------------------------- speed


@dataclass(frozen=True)
class Timing:
    """One operation: microseconds a call, and the bytes that it must move."""

    operation: str
    shape: tuple[int, int]
    microseconds: float
    bytes: int

    def line(self, copy: float) -> str:
        """A row of the table."""
        speed = self.bytes / self.microseconds / 1e3
        where = f"{self.shape[0]}x{self.shape[1]}"
        share = f"{speed / copy:8.2f}{speed * 1e9 / PEAK:7.2f}"
        return f"{self.operation:58}{where:>13}{self.microseconds:9.1f}{speed:8.0f}{share}"


HEAD = f"{'operation':58}{'shape':>13}{'us':>9}{'GB/s':>8}{'of copy':>8}{'of 4.27':>7}"


def microseconds(call: Callable[[Tensor], Any], inputs: list[Tensor], rounds: int = 15) -> float:
    """The median time of a call in a CUDA graph that goes through the inputs."""
    for x in inputs:
        call(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for x in inputs:
            call(x)
    times = []
    for _ in range(rounds + 2):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / len(inputs))
    return statistics.median(times[2:])


def timed(name: str, call: Callable[[Tensor], Any], inputs: list[Tensor], moved: int) -> Timing | None:
    """A timing, or None with the reason printed."""
    try:
        return Timing(name, tuple(inputs[0].shape), microseconds(call, inputs), moved)  # type: ignore[arg-type]
    except Exception as error:  # noqa: BLE001 - one operation that fails must not cost the other figures
        print("FAILED", name, repr(error)[-400:], flush=True)
        torch.cuda.synchronize()
        return None


def normal(shape: tuple[int, int], dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Inputs that together exceed the L2 several times."""
    count = max(2, int(300e6 / (shape[0] * shape[1] * dtype.itemsize)) + 1)
    return [torch.randn(shape, device="cuda").to(dtype) for _ in range(count)]


def moved_bytes(x: Tensor, written: int) -> int:
    """The input and the codes, once each (scales are less than a hundredth); `written` bytes an element."""
    return x.numel() * (x.element_size() + written)


def operations() -> Iterator[tuple[str, bool, str, bool, str, bool, int | None]]:
    """(name, both, tile, given, format, power of two, seed)."""
    for both in (False, True):
        for tile in NAMES:
            for given in (True, False) if tile == "tensor" else (False,):
                name = f"{'both' if both else 'one'} {tile}" + (" given" if given else "")
                yield name, both, tile, given, "e4m3", True, None


def extras() -> Iterator[tuple[str, bool, str, bool, str, bool, int | None]]:
    """Other formats and roundings, for one size."""
    for tile, given in (("tensor", True), ("1x128", False)):
        yield f"both {tile} e5m2", True, tile, given, "e5m2", True, None
        yield f"both {tile} scale by division", True, tile, given, "e4m3", False, None
        yield f"both {tile} stochastic", True, tile, given, "e4m3", True, 5


Call = tuple[str, Callable[[Tensor], Any], int]  # name, call, bytes written for each element


def calls(more: bool) -> Iterator[Call]:
    """The operations as calls of one matrix; `more`: the extras too."""
    from ..quantize import triton

    for name, both, tile, given, form, power, seed in [*operations(), *(extras() if more else ())]:
        scale = torch.full((1, 1), 2.0**-6, device="cuda") if given else None
        function = triton.quantize_both if both else triton.quantize
        rest = (scale, FORMATS[form], Tile.of(tile), power, seed)
        yield name, lambda x, f=function, rest=rest: f(x, *rest), 1 + both


def speed(sizes: tuple[tuple[int, int], ...]) -> list[Timing]:
    """All operations on BF16, a copy beside them, and the weights' FP32."""
    from ..quantize import triton

    found = []
    for number, shape in enumerate(sizes):
        inputs = normal(shape)
        found.append(timed("copy", lambda x: x.clone(), inputs, 2 * inputs[0].numel() * inputs[0].element_size()))
        for name, call, written in calls(number == 0):
            found.append(timed(name, call, inputs, moved_bytes(inputs[0], written)))
        del inputs
    inputs = normal((6144, 4096), torch.float32)
    for tile in ("128x128", "tensor", "row"):
        rest = (None, FORMATS["e4m3"], Tile.of(tile), True, None)
        call = lambda x, rest=rest: triton.quantize_both(x, *rest)  # noqa: E731
        found.append(timed(f"both {tile} FP32", call, inputs, moved_bytes(inputs[0], 2)))
    return [f for f in found if f is not None]


def variants(shape: tuple[int, int]) -> list[Timing]:
    """Other rectangles, block sizes and warps than the plan's, for the choice of the plan."""
    inputs = normal(shape)
    found = [timed(n, call, inputs, moved_bytes(inputs[0], w)) for n, call, w in variant_calls(inputs[0])]
    return [f for f in found if f is not None]


def variant_calls(x: Tensor) -> Iterator[Call]:
    """What `variants` times, on matrices like x."""
    from ..quantize import triton

    form = FORMATS["e4m3"]
    codes, turned = torch.empty_like(x, dtype=form.dtype), x.new_empty(x.shape[::-1], dtype=form.dtype)
    given = torch.full((1, 1), 2.0**-6, device=x.device)
    free = [(64, 128, 4, 4), (128, 128, 4, 8), (128, 128, 4, 4), (128, 64, 4, 4), (256, 64, 4, 8)]
    free += [(64, 64, 4, 2), (64, 256, 4, 8), (64, 128, 4, 8)]
    fixed = [(128, 128, 4, w) for w in (4, 8, 16)]
    todo = [("tensor", True, p, band) for p in free for band in (1, 8)]
    todo += [("row", False, p, 1) for p in free] + [("tensor", False, p, 1) for p in free[:5]]
    todo += [(tile, False, p, 1) for tile in ("1x128", "128x128", "1x32") for p in fixed]
    todo += [("1x128", False, fixed[1], 8)]
    for tile, has_scale, (rows, cols, pack, warps), band in todo:
        use, scale = triton.Plan(rows, cols, pack, warps, band), given if has_scale else None
        rest = (scale, form, Tile.of(tile), True, None, 0, use)
        name = f"both {tile}{' given' if has_scale else ''} {rows}x{cols} J{pack} w{warps} band{band}"
        yield name, lambda x, rest=rest: triton._tiles(x, codes, turned, *rest), 2
    for tile, rows, warps in itertools.product(("1x128", "1x32"), (16, 32, 64, 128), (2, 4, 8)):
        rest = (None, form, Tile.of(tile), True, None, 0, triton.Plan(rows, 128, 1, warps))
        yield f"one {tile} {rows}x128 w{warps}", lambda x, rest=rest: triton._tiles(x, codes, None, *rest), 1
    for block, warps in ((2048, 4), (4096, 4), (4096, 8), (8192, 8), (8192, 16)):
        rest = (given, form, True, None, 0, block, warps)
        yield f"one tensor given line {block} w{warps}", lambda x, rest=rest: triton._line(x, codes, *rest), 1
    for block, warps, parts in itertools.product((4096, 8192, 16384), (4, 8), (264, 512, 1024, 2048)):
        rest = (block, warps, parts)
        name = f"first pass {block} w{warps} parts {parts}"
        yield name, lambda x, rest=rest: triton._first_pass(x, *rest), 0
    yield "(us only) zero of the amax", lambda x: triton._zero(x), 0


def _warm(part: int, parts: int, with_variants: bool) -> list[str]:
    """Compiles a share of the forms to be timed, so that the timing process finds them on disk."""
    x = torch.randn(SIZES[0], device="cuda").to(torch.bfloat16)
    todo = [*calls(True), *(variant_calls(x) if with_variants else ())][part::parts]
    failed = []
    for name, call, _ in todo:
        try:
            call(x)
        except Exception as error:  # noqa: BLE001
            failed.append(f"{name}: {error!r}"[-300:])
    return failed


def prepare(workers: int, with_check: bool, with_variants: bool) -> dict[str, Any]:
    """Compiles what will be timed and compares bytes, in `workers` processes."""
    results: dict[str, Any] = {}
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        warm = [pool.submit(_warm, part, workers, with_variants) for part in range(workers)]
        results["not compiled"] = sorted({line for share in warm for line in share.result()})
        if with_check:
            results["bytes"] = check(pool)
    if with_check:
        results["differing bytes beyond 2^31 elements"] = check_long()
        torch.cuda.empty_cache()
    return results


def best(found: list[Timing], count: int = 3) -> Iterator[Timing]:
    """The quickest few variants of each operation and shape."""
    kind = lambda t: (t.shape, re.split(r" \d", t.operation)[0])  # noqa: E731
    for _, group in itertools.groupby(sorted(found, key=kind), kind):
        yield from sorted(group, key=lambda t: t.microseconds)[:count]


def host_cost() -> dict[str, float]:
    """Microseconds of the host for each eager call, on a matrix too small to wait for."""
    from ..quantize import triton

    x, costs = torch.randn(256, 256, device="cuda", dtype=torch.bfloat16), {}
    for name, both, tile, given, form, power, seed in operations():
        scale = torch.ones(1, 1, device="cuda") if given else None
        function = triton.quantize_both if both else triton.quantize
        for times in (20, 300):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(times):
                function(x, scale, FORMATS[form], Tile.of(tile), power, seed)
            costs[name] = (time.perf_counter() - start) / times * 1e6
    return costs


def main(arguments: list[str] | None = None) -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", default="bench/results", help="folder for quantize.json")
    parser.add_argument("--no-check", action="store_true", help="speed only")
    parser.add_argument("--variants", action="store_true", help="also time other rectangles than the plan's")
    parser.add_argument("--workers", type=int, default=max(1, min(14, (os.cpu_count() or 2) - 2)))
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    results: dict[str, Any] = {}
    try:
        results |= prepare(options.workers, not options.no_check, options.variants)
    except Exception as error:  # noqa: BLE001 - a worker that dies must not cost the timings
        results["check broke off"] = repr(error)
    print({k: v for k, v in results.items() if k != "bytes"}, f"{time.perf_counter() - start:.0f} s", flush=True)
    found = speed(SIZES)
    more = [v for shape in SIZES[:2] for v in variants(shape)] if options.variants else []
    copies = {f.shape: f.bytes / f.microseconds / 1e3 for f in found if f.operation == "copy"}
    copy = statistics.median(copies.values())
    results["speed"] = [asdict(f) for f in found]
    results["variants"] = [asdict(f) for f in more]
    try:
        results["host microseconds"] = host_cost()
    except Exception as error:  # noqa: BLE001
        results["host microseconds"] = repr(error)
    print(json.dumps(machine()))
    print("host microseconds a call:", results["host microseconds"])
    for title, rows in (("the best variants (all are in the JSON)", list(best(more))), ("speed", found)):
        if rows:
            print(f"\n{title}\n{HEAD}")
        for row in rows:
            print(row.line(copies.get(row.shape, copy)))
    print(f"\n{time.perf_counter() - start:.0f} s; written to {save(options.out, 'quantize', results)}")


if __name__ == "__main__":
    main()
