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
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

from ..formats import FORMATS
from ..quantize import reference
from ..tile import NAMES, Tile
from .machine import machine, save

PEAK = 4.27e12  # bytes a second that a copy reaches on an H200, read and write
SIZES = ((16384, 4096), (16384, 14336), (8192, 8192))
BIG_SEED = (1 << 63) + 12345


# --------------------------------------------------------------------------- bytes


@dataclass(frozen=True)
class Case:
    """One call of one kernel form."""

    shape: tuple[int, int]
    dtype: str
    tile: str
    format: str
    power_of_two: bool
    stochastic: bool
    both: bool
    given: bool
    calm: bool = True


def cases() -> Iterator[Case]:
    """All forms on BF16 at an even and an uneven shape; other types and shapes take the forms in turn."""
    doors = [(tile, False, given) for tile in NAMES for given in (False, True)]
    doors += [(tile, True, False) for tile in NAMES] + [("tensor", True, True)]
    forms = list(itertools.product(("e4m3", "e5m2"), (True, False), (False, True)))
    for shape, form, door in itertools.product(((384, 512), (300, 392)), forms, doors):
        yield _case(shape, "bfloat16", form, door, len(door[0]) % 2 == 0)
    few = [(130, 264), (257, 129), (64, 20000), (1, 1), (3, 16), (1000, 256)]
    rest = [(shape, "bfloat16") for shape in few]
    rest += [(shape, dtype) for shape in [(384, 512), (300, 392), (257, 129)] for dtype in ("float32", "float16")]
    for number, ((shape, dtype), door) in enumerate(itertools.product(rest, doors)):
        yield _case(shape, dtype, forms[number * 5 % len(forms)], door, number % 3 > 0)


def _case(shape, dtype, form, door, calm):  # type: ignore[no-untyped-def]
    return Case(shape, dtype, door[0], *form, both=door[1], given=door[2], calm=calm)


def hard_values(shape: tuple[int, int], dtype: torch.dtype, calm: bool = True, seed: int = 0) -> Tensor:
    """A matrix of `shape` with whatever breaks quantizers. `calm`: finite values stay below 500, so that a scale of the
    whole tensor does not flush the rest."""
    draw = torch.Generator().manual_seed(seed)
    rows = shape[0]
    codes = torch.tensor([FORMATS[f].decode(c) for f in ("e4m3", "e5m2") for c in range(0x78)], dtype=torch.float64)
    codes = codes[codes.abs() <= 500].unique()
    middle = (codes[1:] + codes[:-1]) / 2
    table = torch.cat([codes, -codes, middle, -middle, middle * (1 + 2**-20), middle * (1 - 2**-20)]).float()
    edges = [0.0, -0.0, 448, 449, 464, 465, -464, -465, 1e-45, -1e-45, 1e-38, torch.inf, -torch.inf, torch.nan]
    edges = torch.tensor(edges if calm else [*edges, 3.4e38, -3.4e38, 57344, 61439, 61440, 65504])
    pick = lambda values: values[torch.randint(len(values), shape, generator=draw)]  # noqa: E731
    x = torch.randn(shape, generator=draw) * torch.exp2(torch.randint(-30, 6, (rows, 1), generator=draw).float())
    chance = torch.rand(shape, generator=draw)
    x = torch.where(chance < 0.4, pick(table), x)
    x = torch.where((chance > 0.97) & (torch.arange(rows)[:, None] % 3 == 0), pick(edges), x)
    x = torch.where(torch.arange(rows)[:, None] % 7 == 1, pick(torch.tensor([0.0, -0.0])), x)
    x = torch.where(torch.arange(rows)[:, None] % 7 == 2, pick(torch.tensor([torch.inf, -torch.inf, torch.nan])), x)
    x = torch.where(torch.arange(rows)[:, None] % 7 == 4, x * 1e-38, x)
    return x.to(dtype)


def differing_bytes(case: Case, device: str = "cuda", repeats: int = 3) -> int:
    """How many bytes of codes, scales and amax differ from the reference's, over `repeats` calls."""
    from ..quantize import triton

    x = hard_values(case.shape, getattr(torch, case.dtype), case.calm, seed=sum(case.shape))
    tile, form, scale = Tile.of(case.tile), FORMATS[case.format], None
    if case.given:
        draw = torch.Generator().manual_seed(1)
        scale = torch.exp2(torch.randint(-4, 4, tile.scale_shape(*case.shape), generator=draw).float())
        scale = scale if case.power_of_two else scale * 1.3
    seed = BIG_SEED if case.stochastic else None
    rest = (form, tile, case.power_of_two, seed, 7)
    name = "quantize_both" if case.both else "quantize"
    want = getattr(reference, name)(x, scale, *rest)
    on_device = x.to(device), None if scale is None else scale.to(device)
    count = 0
    for _ in range(repeats):
        got = getattr(triton, name)(*on_device, *rest)
        count += sum(_differ(a, b) for a, b in zip(want, got, strict=True))
    return count


def _differ(want: Tensor, got: Tensor) -> int:
    assert want.shape == got.shape, f"shape {tuple(got.shape)} for {tuple(want.shape)}"
    assert want.dtype == got.dtype, f"{got.dtype} for {want.dtype}"
    left, right = (t.cpu().contiguous().view(-1).view(torch.uint8) for t in (want, got))
    return int((left != right).sum())


def _work(case: Case) -> tuple[Case, int | str]:
    torch.set_num_threads(1)
    try:
        return case, differing_bytes(case)
    except Exception as error:  # noqa: BLE001 - one form that fails must not hide the others
        return case, f"{type(error).__name__}: {error}"[-400:]


def check(workers: int) -> dict[str, Any]:
    """Runs all cases; prints each one that differs or fails."""
    todo, wrong = list(cases()), []
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for done in as_completed([pool.submit(_work, case) for case in todo]):
            case, found = done.result()
            if found:
                wrong.append({**asdict(case), "found": found})
                print("DIFFERS" if isinstance(found, int) else "FAILED", found, case, flush=True)
    counted = sum(w["found"] for w in wrong if isinstance(w["found"], int))
    failed = sum(isinstance(w["found"], str) for w in wrong)
    print(f"bytes: {len(todo)} cases, {counted} differing bytes, {failed} failures", flush=True)
    return {"cases": len(todo), "differing_bytes": counted, "failures": failed, "wrong": wrong}


def check_long(rows: int = 32776, cols: int = 65664) -> int | str:
    """Differing bytes in the last rows of a matrix of more than 2^31 elements, against those rows alone."""
    from ..quantize import triton

    try:
        x = torch.randn(rows, cols, device="cuda", dtype=torch.bfloat16)
        scale = torch.full((1, 1), 2.0**-6, device="cuda")
        rest = (FORMATS["e4m3"], Tile.of("tensor"), True, None)
        tail = triton.quantize(x[-72:].contiguous(), scale, *rest)[0]
        count = _differ(tail, triton.quantize(x, scale, *rest)[0][-72:])
        codes, _, turned, _, amax = triton.quantize_both(x, scale, *rest)
        count += _differ(tail, codes[-72:]) + _differ(tail.t().contiguous(), turned[:, -72:])
        count += _differ(amax, triton.quantize(x, None, *rest)[2])
        rest = (FORMATS["e4m3"], Tile.of("1x128"), True, None)
        want = triton.quantize(x[-72:].contiguous(), None, *rest)
        codes, scale, _, _, _ = triton.quantize_both(x, None, *rest)
        return count + _differ(want[0], codes[-72:]) + _differ(want[1], scale[-72:])
    except Exception as error:  # noqa: BLE001
        return repr(error)[-400:]


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
        return f"{self.operation:44}{where:>13}{self.microseconds:9.1f}{speed:8.0f}{share}"


HEAD = f"{'operation':44}{'shape':>13}{'us':>9}{'GB/s':>8}{'of copy':>8}{'of 4.27':>7}"


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


def moved_bytes(x: Tensor, both: bool) -> int:
    """The input and the codes, once each (scales are less than a hundredth)."""
    return x.numel() * (x.element_size() + 1 + both)


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


def speed(sizes: tuple[tuple[int, int], ...]) -> list[Timing]:
    """All operations on BF16, a copy beside them, and the weights' FP32."""
    from ..quantize import triton

    found = []
    for number, shape in enumerate(sizes):
        inputs = normal(shape)
        found.append(timed("copy", lambda x: x.clone(), inputs, 2 * inputs[0].numel() * inputs[0].element_size()))
        todo = [*operations(), *(extras() if number == 0 else ())]
        for name, both, tile, given, form, power, seed in todo:
            scale = torch.full((1, 1), 2.0**-6, device="cuda") if given else None
            function = triton.quantize_both if both else triton.quantize
            rest = (scale, FORMATS[form], Tile.of(tile), power, seed)
            call = lambda x, f=function, rest=rest: f(x, *rest)  # noqa: E731
            found.append(timed(name, call, inputs, moved_bytes(inputs[0], both)))
        del inputs
    inputs = normal((6144, 4096), torch.float32)
    for tile in ("128x128", "tensor", "row"):
        rest = (None, FORMATS["e4m3"], Tile.of(tile), True, None)
        call = lambda x, rest=rest: triton.quantize_both(x, *rest)  # noqa: E731
        found.append(timed(f"both {tile} FP32", call, inputs, moved_bytes(inputs[0], True)))
    return [f for f in found if f is not None]


def variants(shape: tuple[int, int]) -> list[Timing]:
    """Other rectangles, block sizes and warps than the plan's, for the choice of the plan."""
    from ..quantize import triton

    inputs, found = normal(shape), []
    x = inputs[0]
    form = FORMATS["e4m3"]
    codes, turned = torch.empty_like(x, dtype=form.dtype), torch.empty(x.shape[::-1], dtype=form.dtype, device="cuda")
    given = torch.full((1, 1), 2.0**-6, device="cuda")
    free = [(64, 128, 4, 4), (128, 128, 4, 8), (128, 128, 4, 4), (128, 64, 4, 4), (256, 64, 4, 8), (64, 128, 1, 4)]
    free += [(64, 128, 2, 4), (128, 128, 1, 8), (128, 128, 2, 8), (64, 64, 4, 2), (64, 256, 4, 8), (64, 128, 4, 8)]
    fixed = [(128, 128, j, w) for j in (4, 2, 1) for w in (4, 8, 16)]
    todo = [("tensor", True, p, band) for p in free for band in (1, 8)]
    todo += [("row", False, p, 1) for p in free] + [("tensor", False, p, 1) for p in free[:5]]
    todo += [(tile, False, p, 1) for tile in ("1x128", "128x128", "1x32") for p in fixed]
    todo += [("1x128", False, fixed[1], 8)]
    for tile, has_scale, shape_of, band in todo:
        use = triton.Plan(*shape_of, band=band)
        scale = given if has_scale else None
        call = lambda x, t=tile, s=scale, u=use: triton._tiles(x, codes, turned, s, form, Tile.of(t), True, None, 0, u)  # noqa: E731
        rows, cols, pack, warps = shape_of
        name = f"both {tile}{' given' if has_scale else ''} {rows}x{cols} J{pack} w{warps} band{band}"
        found.append(timed(name, call, inputs, moved_bytes(x, True)))
    for tile, rows, warps in itertools.product(("1x128", "1x32"), (16, 32, 64, 128), (2, 4, 8)):
        use = triton.Plan(rows, 128, 1, warps)
        call = lambda x, t=tile, u=use: triton._tiles(x, codes, None, None, form, Tile.of(t), True, None, 0, u)  # noqa: E731
        found.append(timed(f"one {tile} {rows}x128 w{warps}", call, inputs, moved_bytes(x, False)))
    for block, warps in ((2048, 4), (4096, 4), (4096, 8), (8192, 8), (8192, 16)):
        call = lambda x, b=block, w=warps: triton._line(x, codes, given, form, True, None, 0, b, w)  # noqa: E731
        found.append(timed(f"one tensor given line {block} w{warps}", call, inputs, moved_bytes(x, False)))
    for block, warps, parts in itertools.product((4096, 8192, 16384), (4, 8), (264, 512, 1024, 2048)):
        call = lambda x, b=block, w=warps, p=parts: triton._first_pass(x, b, w, p)  # noqa: E731
        found.append(timed(f"first pass {block} w{warps} parts {parts}", call, inputs, 2 * x.numel()))
    found.append(timed("zero of the amax", lambda x: triton._zero(x), inputs, 4))
    return [f for f in found if f is not None]


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
    if not options.no_check:
        results["bytes"] = check(options.workers)
        results["more than 2^31 elements"] = check_long()
        print(f"more than 2^31 elements: {results['more than 2^31 elements']} differing bytes", flush=True)
        torch.cuda.empty_cache()
        print(f"checked after {time.perf_counter() - start:.0f} s", flush=True)
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
    for title, rows in (("variants", more), ("speed", found)):
        if rows:
            print(f"\n{title}\n{HEAD}")
        for row in sorted(rows, key=lambda r: (r.shape, r.microseconds)) if rows is more else rows:
            print(row.line(copies.get(row.shape, copy)))
    print(f"\n{time.perf_counter() - start:.0f} s; written to {save(options.out, 'quantize', results)}")


if __name__ == "__main__":
    main()
