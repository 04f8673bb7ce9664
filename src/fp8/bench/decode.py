"""The kernels of one decode step at the shapes of an 8B model, each against the bytes it must read.

    python -m fp8.bench.decode --out DIR [--variants]

**Products.** Every matrix of a layer, and the head, for few rows: our kernels, cuBLASLt (`torch._scaled_mm`, scales a
row) and BF16 (cuBLAS). A CUDA graph goes through copies of the weight that together exceed the L2 several times, so
that each read comes from memory; the figure is the median share of a call. `early` is programmatic dependent launch:
the next product fetches its first weights while this one ends. `norm` makes the norm and the codes of x in the product,
where K is not too long for that.

**Attention.** A decode step over a paged FP8 cache, 32 query heads, 8 key heads, a scale a token and head.

**A layer.** The four products of a layer, eight layers in a row, in one graph: what the launches cost, with early
launch and without.

The floor is the bytes of weights, or of keys and values, at 4.37 TB/s, which an H200 reads at best. `--variants` times
other plans than ours.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..attention.paged import LayerPages
from ..attention.paged import cuda as paged
from ..backends import function
from ..matmul.skinny import cuda
from ..quantize import quantize
from ..quantize.record import Quantized
from ..serve.batch import Batch
from .machine import machine, save
from .quantize import microseconds

PEAK = 4.37e12  # bytes a second
MATRICES = {"qkv": (6144, 4096), "out": (4096, 4096), "gate, up": (28672, 4096), "down": (4096, 14336)}
HEAD = {"head": (128256, 4096)}
ROWS = (1, 4, 16, 32, 64)
APART = 400e6  # bytes of copies that are gone through
Product = Callable[[Any], Tensor]
CACHES = ((16, 1024), (64, 1024), (16, 16384), (64, 8192))  # sequences, keys
E4M3 = torch.float8_e4m3fn
HEADS, KV, WIDTH, PAGE = 32, 8, 128, 64
TRITON, PAGED_TRITON = "fp8.matmul.skinny.triton", "fp8.attention.paged.triton"


def weights(shape: tuple[int, int], fp8: bool) -> list[Any]:
    """Copies of a matrix that together exceed the L2: one is random, the others hold its bytes elsewhere."""
    first = torch.randn(shape, device="cuda", dtype=torch.bfloat16) / shape[1] ** 0.5
    copies = max(2, round(APART / (first.numel() * (1 if fp8 else 2))))
    if not fp8:
        return [first.clone() for _ in range(copies)]
    q = quantize(first, "e4m3", "row")
    return [Quantized(q.codes.view(torch.uint8).clone().view(q.codes.dtype), q.scale, q.tile, q.format)
            for _ in range(copies)]  # fmt: skip


def products(rows: int, depth: int) -> Iterator[tuple[str, bool, Product]]:
    """(name, whether in FP8, product) of each implementation that takes so many rows."""
    x = torch.randn(rows, depth, device="cuda", dtype=torch.bfloat16)
    codes = quantize(x, "e4m3", "row")
    for early in (True, False):
        name = "cuda early" if early else "cuda"
        yield name, True, lambda w, early=early: cuda.skinny(codes, w, torch.bfloat16, None, None, early=early)
    if rows <= cuda.MOST_PREPARED:
        norm = torch.rand(depth, device="cuda").bfloat16(), 1e-5

        def prepared(w: Quantized) -> Tensor:
            if depth > cuda.LONGEST:
                return cuda.skinny(codes, w, torch.bfloat16, None, None)
            return cuda.prepared(x, w, torch.bfloat16, None, None, norm)

        yield "cuda norm", True, prepared
    if find_spec(TRITON) is not None:
        run = function(TRITON, "skinny")
        yield "triton", True, lambda w: run(codes, w, torch.bfloat16, None, None)
        yield "triton bf16", False, lambda w: run(x, w, torch.bfloat16, None, None)
    yield (
        "cublaslt",
        True,
        lambda w: torch._scaled_mm(  # type: ignore[attr-defined]
            codes.codes, w.codes.t(), codes.scale, w.scale.t(), out_dtype=torch.bfloat16, use_fast_accum=True
        ),
    )
    yield "cuda bf16", False, lambda w: cuda.skinny(x, w, torch.bfloat16, None, None)
    yield "cublas bf16", False, lambda w: torch.nn.functional.linear(x, w)


def timed(call: Product, over: list[Any]) -> float | str:
    """Microseconds, or why there are none."""
    try:
        return microseconds(call, over)
    except Exception as error:  # noqa: BLE001 - one product that fails must not cost the other figures
        return repr(error)[:160]


def measure(name: str, shape: tuple[int, int]) -> list[dict[str, Any]]:
    """Every number of rows and implementation, for one matrix."""
    over = {fp8: weights(shape, fp8) for fp8 in (True, False)}
    found = []
    for rows in ROWS:
        for which, fp8, call in products(rows, shape[1]):
            moved = shape[0] * shape[1] * (1 if fp8 else 2)
            us = timed(call, over[fp8])
            share = moved / us / 1e-6 / PEAK if isinstance(us, float) else None
            found.append({"matrix": name, "rows": rows, "product": which, "us": us, "share": share})
    return found


def layers(rows: int, count: int = 8) -> list[dict[str, Any]]:
    """Microseconds a layer of its four products in a row."""
    each = {fp8: {name: weights(shape, fp8)[:count] for name, shape in MATRICES.items()} for fp8 in (True, False)}
    runs = {name: list(products(rows, depth)) for name, (_, depth) in MATRICES.items()}
    found = []
    for place, (which, fp8, _) in enumerate(runs["qkv"]):

        def layer(i: int, place: int = place, fp8: bool = fp8) -> None:
            for name, made in runs.items():
                copies = each[fp8][name]
                made[place][2](copies[i % len(copies)])

        moved = sum(n * k for n, k in MATRICES.values()) * (1 if fp8 else 2)
        us = timed(layer, list(range(count)))  # type: ignore[arg-type]
        share = moved / us / 1e-6 / PEAK if isinstance(us, float) else None
        found.append({"matrix": "a layer", "rows": rows, "product": which, "us": us, "share": share})
    return found


# --------------------------------------------------------------------------- attention


def cache_of(sequences: int, length: int) -> tuple[list[LayerPages], Batch, Tensor]:
    """Layers that together exceed the L2, full of codes; a batch that decodes; its queries."""
    pages = sequences * length // PAGE
    layer = 2 * pages * PAGE * KV * WIDTH
    layers = []
    for _ in range(max(2, min(16, round(APART / layer)))):
        keys, values = (
            (torch.randint(0, 256, (pages, KV, PAGE, WIDTH), dtype=torch.uint8, device="cuda") & 0xFE).view(E4M3)
            for _ in range(2)
        )
        scales = [torch.full((pages, KV, PAGE), 2.0**-9, device="cuda") for _ in range(2)]
        saturated = torch.zeros(1, dtype=torch.int64, device="cuda")
        layers.append(LayerPages(keys, values, scales[0], scales[1], saturated))
    table = torch.randperm(pages, device="cuda").view(sequences, -1).int()
    every = torch.arange(sequences + 1, device="cuda")
    lengths = torch.full((sequences,), length, dtype=torch.int32, device="cuda")
    slots = table[:, -1].long() * PAGE + PAGE - 1
    batch = Batch(every[:-1], lengths - 1, slots, every.int(), lengths, table, every[:-1], True)
    return layers, batch, torch.randn(sequences, HEADS, WIDTH, device="cuda").bfloat16()


def attention(sequences: int, length: int, others: bool) -> list[dict[str, Any]]:
    """Every implementation, and with `others` other plans of ours, over an FP8 cache with a scale a token and head."""
    layers, batch, q = cache_of(sequences, length)
    scale = WIDTH**-0.5
    runs: dict[str, Product] = {
        "cuda early": lambda p: paged.attend(q, p, batch, scale),
        "cuda": lambda p: paged.attend(q, p, batch, scale, early=False),
    }
    if find_spec(PAGED_TRITON) is not None:
        run = function(PAGED_TRITON, "attend")
        runs["triton"] = lambda p: run(q, p, batch, scale)
    if others:
        for keys, warps, stages in itertools.product((256, 512), (4, 8), (3, 4)):
            use = paged.Plan(keys, warps, stages)
            runs[f"{keys} {warps} {stages}"] = lambda p, use=use: paged.attend(q, p, batch, scale, use)
    moved = 2 * sequences * length * KV * (WIDTH + 4)
    found = []
    for name, call in runs.items():
        us = timed(call, layers)
        share = moved / us / 1e-6 / PEAK if isinstance(us, float) else None
        found.append({"matrix": f"{length} keys", "rows": sequences, "product": name, "us": us, "share": share})
    return found


def variants(name: str, shape: tuple[int, int]) -> list[dict[str, Any]]:
    """Other plans of the CUDA kernel, with early launch."""
    over, found = weights(shape, True), []
    for rows, sixteens, warps, stages in itertools.product((1, 16), (1, 2), (8, 16), (3, 4, 6)):
        use, tokens = cuda.Plan(sixteens, warps, stages), max(8, rows)
        if use.shared(tokens) > cuda.SHARED:
            continue
        codes = quantize(torch.randn(rows, shape[1], device="cuda", dtype=torch.bfloat16), "e4m3", "row")
        us = timed(lambda w, c=codes, u=use: cuda.skinny(c, w, torch.bfloat16, None, None, u), over)
        share = shape[0] * shape[1] / us / 1e-6 / PEAK if isinstance(us, float) else None
        found.append(
            {"matrix": name, "rows": rows, "product": f"{sixteens} {warps} {stages}", "us": us, "share": share}
        )
    return found


def table(found: list[dict[str, Any]]) -> str:
    """A line for each matrix and number of rows: microseconds, and the share of the floor's speed."""
    lines = []
    for (name, rows), group in itertools.groupby(found, lambda row: (row["matrix"], row["rows"])):
        cells = [
            f"{row['product']} {row['us']:.1f} ({row['share']:.0%})"
            if row["share"]
            else f"{row['product']} {row['us']}"
            for row in group
        ]
        lines.append(f"{name:9}{rows:3}  " + "  ".join(cells))
    return "\n".join(lines)


def cell(row: dict[str, Any]) -> str:
    """One implementation's figures, or what it said."""
    return f"{row['product']} " + (f"{row['us']:.1f} ({row['share']:.0%})" if row["share"] else str(row["us"]))


def best(found: list[dict[str, Any]], most: int = 4) -> list[dict[str, Any]]:
    """The fastest few of each matrix and number of rows."""
    kept = []
    for _, group in itertools.groupby(found, lambda row: (row["matrix"], row["rows"])):
        kept += sorted((row for row in group if row["share"]), key=lambda row: row["us"])[:most]
    return kept


def main(arguments: list[str] | None = None) -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="bench/results", help="folder for decode.json")
    parser.add_argument("--variants", action="store_true", help="other plans too")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    print(json.dumps(machine()), flush=True)
    print("microseconds a call (share of 4.37 TB/s)")
    found: list[dict[str, Any]] = []
    for name, shape in (MATRICES | HEAD).items():
        found += (some := measure(name, shape))
        print(table(some), flush=True)
        torch.cuda.empty_cache()
    for sequences, length in CACHES:
        some = attention(sequences, length, options.variants)
        found += some
        print(table(some[:3]), "| best:", table(best(some[3:], 2)), flush=True)
        torch.cuda.empty_cache()
    for rows in (1, 16):
        found += (some := layers(rows))
        print(table(some), flush=True)
        torch.cuda.empty_cache()
    if options.variants:
        print("plans: sixteens of rows, warps, stages")
        for name, shape in MATRICES.items():
            found += (some := variants(name, shape))
            print(table(best(some)), flush=True)
            torch.cuda.empty_cache()
    print(save(options.out, "decode", found))


if __name__ == "__main__":
    main()
