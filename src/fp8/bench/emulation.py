"""Does the emulated accumulator equal the tensor core? Whole outputs, bit for bit, on a Hopper GPU.

    python -m fp8.bench.emulation --out DIR [--seconds 75] [--only WORD]

For each case the GPU's product (cuBLASLt, or our Triton kernel) is compared with `fp8.matmul.emulate`, run on the same
GPU. Where they differ, alternatives are tried: K split over 2 to 16 workers, scales multiplied in another order,
multiply and add fused or not; the one that matches, or comes nearest, is named. Where K is long or bits differ, the
kernels that ran are recorded: their names tell whether K was split. A line a case on screen and in `emulation.jsonl`
as it goes; `emulation.json` at the end.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fp8 import Quantized, Tile, quantize
from fp8.matmul import cublas, emulate
from fp8.matmul.emulate import Fold
from fp8.matmul.reference import alpha

from .machine import machine, save

WORDS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
SPLITS = (2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16)
FOLDS = tuple(Fold(fused, order) for order in ("pair", "a", "b") for fused in (True, False))
PATIENCE = 4.0  # seconds of alternatives for one case

SMALL = (256, 256, 1024)
SHAPES = (
    SMALL,
    (1024, 1024, 1024),
    (2048, 2048, 4096),
    (512, 512, 8192),
    (128, 4096, 4096),
    (16, 4096, 4096),
    (16, 4096, 14336),
    (256, 256, 4096),
    (256, 256, 16384),
    (100, 200, 300),
    (33, 1040, 2064),
    (4096, 4096, 4096),
)
SPLIT_SHAPES = (
    (128, 128, 32768),
    (256, 256, 65536),
    (512, 512, 16384),
    (1024, 1024, 16384),
    (64, 6144, 8192),
    (1, 4096, 14336),
)
BLOCK_SHAPES = (
    SMALL,
    (1024, 1024, 1024),
    (512, 512, 8192),
    (256, 256, 16384),
    (104, 200, 300),
    (2048, 2048, 4096),
    (16, 4096, 4096),
)
PAIRS = (("e4m3", "e4m3"), ("e4m3", "e5m2"), ("e5m2", "e4m3"))
BLOCKS = (("1x128", "128x128"), ("128x128", "1x128"), ("1x128", "1x128"))
OWN = (("128x128", "128x128"), ("1x32", "1x32"), ("1x128", "row"), ("1x128", "128x128"))


@dataclass(frozen=True)
class Case:
    """One product. `scale` is "one", "power_of_two" or "none" (the contract's name for amax / max)."""

    shape: tuple[int, int, int]
    accumulate: str = "promoted"
    formats: tuple[str, str] = ("e4m3", "e4m3")
    tiles: tuple[str, str] = ("tensor", "tensor")
    scale: str = "none"
    out: torch.dtype = torch.float32
    positive: bool = False
    bias: torch.dtype | None = None
    backend: str = "cublas"  # or "triton", or "epilogue": cuBLASLt's own bias

    def __str__(self) -> str:
        words = ["x".join(map(str, self.shape)), self.accumulate, "*".join(self.formats), "*".join(self.tiles)]
        words += [f"scale={self.scale}", str(self.out)[6:], "positive" if self.positive else "normal", self.backend]
        return " ".join(words + ([f"bias={str(self.bias)[6:]}"] if self.bias else []))


def cases() -> Iterator[Case]:
    """Everything that is claimed, the plainest first."""
    both, scales, outs = ("fast", "promoted"), ("one", "power_of_two", "none"), (torch.float32, torch.bfloat16)
    for shape, accumulate in product(SHAPES, both):
        yield Case(shape, accumulate)
    for accumulate, tiles, scale in product(both, (("tensor", "tensor"), ("row", "row"), ("row", "tensor")), scales):
        yield Case(SMALL, accumulate, tiles=tiles, scale=scale)
    for shape, tiles, scale in product(BLOCK_SHAPES, BLOCKS, ("power_of_two", "none")):
        yield Case(shape, tiles=tiles, scale=scale)
    for shape, accumulate in product(SHAPES, both):
        yield Case(shape, accumulate, tiles=("row", "row"))
    for shape, accumulate in product(SPLIT_SHAPES, both):
        yield Case(shape, accumulate, positive=True)
    for accumulate, bias, out in product(both, (torch.float32, torch.bfloat16), outs):
        yield Case(SMALL, accumulate, bias=bias, out=out)
    for accumulate, tiles in product(both, (("tensor", "tensor"), ("row", "row"))):
        yield Case(
            (1024, 1024, 1024), accumulate, tiles=tiles, bias=torch.bfloat16, out=torch.bfloat16, backend="epilogue"
        )
    for tiles in OWN:
        yield from (Case(shape, tiles=tiles, backend="triton") for shape in (SMALL, (100, 200, 300), (16, 1024, 2048)))
    for shape, accumulate in product((SMALL, (100, 200, 300), (1024, 1024, 1024)), both):
        yield Case(shape, accumulate, ("e5m2", "e5m2"), backend="triton", bias=torch.float32)
    for formats, accumulate, scale, out, positive in product(PAIRS, both, scales, outs, (False, True)):
        yield Case(SMALL, accumulate, formats, ("tensor", "tensor"), scale, out, positive)
        yield Case(SMALL, accumulate, formats, ("row", "row"), scale, out, positive)
    for formats, tiles, out, positive in product(PAIRS, BLOCKS, outs, (False, True)):
        yield Case(SMALL, "promoted", formats, tiles, "none", out, positive)
    for accumulate in both:
        yield Case((16384, 6144, 4096), accumulate, out=torch.bfloat16, scale="power_of_two")


def operands(case: Case, device: str = "cuda") -> tuple[Quantized, Quantized, Tensor | None]:
    """Random operands; the same for the same case."""
    generator = torch.Generator(device).manual_seed(sum(case.shape))
    rows, cols, depth = case.shape
    sides = []
    for size, kind, tile in zip((rows, cols), case.formats, case.tiles, strict=True):
        x = torch.randn(size, depth, device=device, generator=generator)
        x = x * torch.exp2(torch.randint(-3, 4, (size, 1), device=device, generator=generator).float())
        x = x.abs() if case.positive else x
        ones = torch.ones(Tile.of(tile).scale_shape(size, depth), device=device) if case.scale == "one" else None
        rounding = "power_of_two" if case.scale == "one" else case.scale
        sides.append(quantize(x * 4 if ones is not None else x, kind, tile, rounding, scale=ones, backend="reference"))
    bias = torch.randn(cols, device=device, generator=generator) if case.bias else None
    return sides[0], sides[1], None if bias is None else bias.to(case.bias)


def on_device(case: Case, a: Quantized, b: Quantized, bias: Tensor | None) -> Tensor:
    """What the GPU says."""
    if case.backend == "triton":
        from fp8.matmul.triton import matmul

        return matmul(a, b, case.out, case.accumulate, bias)
    if case.backend == "epilogue":
        scale_a, scale_b, fast = a.scale, b.scale.t(), case.accumulate == "fast"
        return torch.ops.aten._scaled_mm(
            a.codes, b.codes.t(), scale_a=scale_a, scale_b=scale_b, bias=bias, out_dtype=case.out, use_fast_accum=fast
        )
    return cublas.matmul(a, b, case.out, case.accumulate, bias)


Alternative = tuple[str, Callable[[], Tensor]]


def alternatives(case: Case, a: Quantized, b: Quantized, bias: Tensor | None) -> Iterator[Alternative]:
    """The model first, then what else the hardware might do, by name."""
    model = f"hopper_{case.accumulate}"
    if a.tile.constant_along_k and b.tile.constant_along_k:
        for splits in (1, *SPLITS):
            total = _once(lambda s=splits: emulate.accumulate(a.codes, b.codes, case.accumulate == "promoted", s))
            for name, finish in _epilogues(a, b, bias, case.out):
                yield f"splits={splits} {name}", lambda t=total, f=finish: f(t())
        return
    for splits in (1, *SPLITS):
        for fold in FOLDS:
            name = f"splits={splits} fused={fold.fused} order={fold.order}"
            yield name, lambda s=splits, f=fold: emulate.matmul(a, b, case.out, model, bias, splits=s, fold=f)


def _once(make: Callable[[], Tensor]) -> Callable[[], Tensor]:
    kept: list[Tensor] = []

    def value() -> Tensor:
        if not kept:
            kept.append(make())
        return kept[0]

    return value


def _epilogues(a: Quantized, b: Quantized, bias: Tensor | None, out: torch.dtype) -> Iterator[tuple[str, Callable]]:
    scale_a, scale_b, pair = a.scale, b.scale.t(), alpha(a.scale, b.scale)
    if bias is None:
        yield "alpha=pair", lambda t: (t * pair).to(out)
        yield "alpha=a,b", lambda t: (t * scale_a * scale_b).to(out)
        yield "alpha=b,a", lambda t: (t * scale_b * scale_a).to(out)
        return
    wide = bias.float().expand(a.codes.shape[0], -1)
    fused = emulate.fused_multiply_add
    yield "alpha=pair, bias after", lambda t: (t * pair + wide).to(out)
    yield "alpha=pair, bias fused", lambda t: fused(t, pair.expand_as(t), wide).to(out)
    yield "alpha=pair, rounded, bias after", lambda t: ((t * pair).to(out).float() + wide).to(out)
    yield "alpha=a,b, bias fused", lambda t: fused(t * scale_a, scale_b.expand_as(t), wide).to(out)
    yield "alpha=b,a, bias fused", lambda t: fused(t * scale_b, scale_a.expand_as(t), wide).to(out)


def differing(x: Tensor, y: Tensor) -> Tensor:
    """Which elements differ in bits; NaN equals NaN."""
    word = WORDS[x.dtype]
    return (x.contiguous().view(word) != y.contiguous().view(word)) & ~(x.isnan() & y.isnan())


def probe(case: Case, run: Callable[..., Tensor] = on_device, device: str = "cuda") -> dict[str, Any]:
    """Compare one case; where it differs, look for the alternative that does not."""
    a, b, bias = operands(case, device)
    given = run(case, a, b, bias)
    row: dict[str, Any] = {"case": str(case), "total": given.numel()}
    start, best = time.monotonic(), None
    for name, compute in alternatives(case, a, b, bias):
        model = compute()
        wrong = differing(given, model)
        count = int(wrong.sum())
        if best is None:
            row |= {"differ": count, "seconds": round(time.monotonic() - start, 3)}
            row |= {} if count == 0 else {"examples": _examples(given, model, wrong)}
        if best is None or count < best[1]:
            best = (name, count)
        if count == 0 or time.monotonic() - start > PATIENCE:
            break
    assert best is not None
    if row["differ"] or case.shape[2] > 4096:
        row["kernels"] = kernels(lambda: run(case, a, b, bias))
    return row | {"best": best[0], "best_differ": best[1]}


def _examples(device: Tensor, model: Tensor, wrong: Tensor) -> list[dict[str, Any]]:
    return [
        {"at": at, "device": device[tuple(at)].item(), "model": model[tuple(at)].item()}
        for at in wrong.nonzero()[:4].tolist()
    ]


def kernels(run: Callable[[], Tensor]) -> list[str]:
    """The names of the kernels behind a call, where the profiler can say."""
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            run()
            torch.cuda.synchronize()
        names = {e.name for e in profile.events() or () if "CUDA" in str(e.device_type)}
    except (RuntimeError, AttributeError) as error:
        return [f"no profile: {error}"]
    return sorted(name[:120] for name in names if "elementwise" not in name and "Mem" not in name)


def non_finite() -> dict[str, Any]:
    """NaN and infinity codes through cuBLASLt against the model."""
    found = {}
    for kind, byte, name in (("e4m3", 0x7F, "e4m3 NaN"), ("e5m2", 0x7F, "e5m2 NaN"), ("e5m2", 0x7C, "e5m2 Inf")):
        case = Case(SMALL, formats=(kind, "e4m3"), scale="power_of_two")
        a, b, _ = operands(case)
        a.codes.view(torch.uint8)[3, 5] = byte
        b.codes.view(torch.uint8)[7, 5] = 0
        pair = [cublas.matmul(a, b, torch.float32, "promoted", None)]
        pair.append(emulate.matmul(a, b, torch.float32, "hopper_promoted", None, splits=1))
        found[name] = {"differ": int(differing(*pair).sum()), "device_nan": int(pair[0].isnan().sum())}
    return found


def repeats() -> dict[str, int]:
    """Elements that differ between two runs of the same product: 0 where the order of addition is fixed."""
    found = {}
    for shape in (SMALL, (256, 256, 16384), (16, 4096, 14336)):
        a, b, _ = operands(Case(shape))
        first = cublas.matmul(a, b, torch.float32, "fast", None)
        found["x".join(map(str, shape))] = sum(
            int(differing(first, cublas.matmul(a, b, torch.float32, "fast", None)).sum()) for _ in range(5)
        )
    return found


def main(arguments: list[str] | None = None) -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="bench/results", help="folder for emulation.jsonl and emulation.json")
    parser.add_argument("--seconds", type=float, default=75, help="start no case after this time")
    parser.add_argument("--only", default="", help="only cases whose line holds this word")
    options = parser.parse_args(arguments)
    folder, start, rows = Path(options.out), time.monotonic(), []
    folder.mkdir(parents=True, exist_ok=True)
    print(json.dumps(machine()), flush=True)
    seen: set[Case] = set()
    with (folder / "emulation.jsonl").open("w") as log:
        for case in cases():
            if case in seen or options.only not in str(case):
                continue
            seen.add(case)
            row = _guarded(case, time.monotonic() - start > options.seconds)
            rows.append(row)
            log.write(json.dumps(row) + "\n")
            log.flush()
            print(_line(row), flush=True)
    extra = {}
    for check in (non_finite, repeats):
        try:
            extra[check.__name__] = check()
        except Exception as error:  # noqa: BLE001 - a probe reports what happened and goes on
            extra[check.__name__] = {"error": repr(error)[:400]}
        print(check.__name__, json.dumps(extra[check.__name__]), flush=True)
    _summary(rows)
    save(folder, "emulation", {"cases": rows, **extra})


def _guarded(case: Case, late: bool) -> dict[str, Any]:
    if late:
        return {"case": str(case), "skipped": "out of time"}
    try:
        return probe(case)
    except Exception as error:  # noqa: BLE001 - a probe reports what happened and goes on
        return {"case": str(case), "error": repr(error)[:400]}


def _line(row: dict[str, Any]) -> str:
    if "differ" not in row:
        return f"{'SKIP' if 'skipped' in row else 'FAIL'}  {row['case']}  {row.get('skipped') or row.get('error')}"
    if row["differ"] == 0:
        return f"same  {row['case']}  0/{row['total']}  {row['seconds']}s"
    found = "matches" if row["best_differ"] == 0 else f"nearest, {row['best_differ']} differ"
    return f"DIFF  {row['case']}  {row['differ']}/{row['total']}  {row['best']}: {found}  {row.get('kernels')}"


def _summary(rows: list[dict[str, Any]]) -> None:
    same = sum(row.get("differ") == 0 for row in rows)
    explained = sum(row.get("differ", 0) > 0 and row["best_differ"] == 0 for row in rows)
    open_ = sum(row.get("best_differ", 0) > 0 for row in rows)
    failed, skipped = sum("error" in row for row in rows), sum("skipped" in row for row in rows)
    print(f"{len(rows)} cases: {same} same, {explained} by an alternative, {open_} unexplained", end=", ")
    print(f"{failed} failed, {skipped} skipped")


if __name__ == "__main__":
    main()
