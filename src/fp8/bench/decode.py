"""The kernels of one decode step at the shapes of an 8B model, each against the bytes it must read.

    python -m fp8.bench.decode --out DIR [--only products attention rows layers plans steps]

**Products.** Every matrix of a layer, and the head, for few rows: our kernels, cuBLASLt (`torch._scaled_mm`, scales a
row) and BF16 (cuBLAS). A CUDA graph goes through copies of the weight that together exceed the L2 several times, so
that each read comes from memory; the figure is the median share of a call. `early` is programmatic dependent launch:
the next product fetches its first weights while this one ends.

**Attention.** A decode step over a paged FP8 cache, 32 query heads, 8 key heads, a scale a token and head.

**Rows.** What a layer does between its products: the norm or the gate, and codes.

**Layers.** Eight layers of four products, each with the row kernel before it, in one graph: what the launches cost.

**Steps.** A whole decode step of a random 8B model with FP8 weights and cache, and the kernels it spends its time in.

The floor is the bytes of weights, or of keys and values, at 4.37 TB/s, which an H200 reads at best. `plans` times other
plans than ours.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from .. import triton_launch
from ..attention.paged import LayerPages
from ..attention.paged import cuda as paged
from ..backends import function
from ..formats import format_of
from ..fused.rows import Into
from ..fused.rows import cuda as rows_in_cuda
from ..matmul.skinny import cuda
from ..quantize import quantize
from ..quantize.record import Quantized
from ..serve.batch import Batch
from ..serve.models import random_model
from ..tile import Tile
from .machine import machine, save
from .quantize import microseconds

PEAK = 4.37e12  # bytes a second
MATRICES = {"qkv": (6144, 4096), "out": (4096, 4096), "gate, up": (28672, 4096), "down": (4096, 14336)}
HEAD = {"head": (128256, 4096)}
ROWS = (1, 4, 16, 32, 64)
APART = 400e6  # bytes of copies that are gone through
Product = Callable[..., Tensor]
CACHES = ((16, 1024), (64, 1024), (16, 16384), (64, 8192))  # sequences, keys
E4M3 = torch.float8_e4m3fn
HEADS, KV, WIDTH, PAGE = 32, 8, 128, 64
TRITON, PAGED_TRITON = "fp8.matmul.skinny.triton", "fp8.attention.paged.triton"
ROWS_TRITON = "fp8.fused.rows.triton"
ROW = Into(format_of("e4m3"), Tile.of("row"))
STEPS = ((1, 1024), (16, 1024), (64, 1024))  # sequences, keys
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": HEADS, "num_key_value_heads": KV, "head_dim": WIDTH,
    "vocab_size": 128256, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "tie_word_embeddings": False, "hidden_act": "silu", "torch_dtype": "bfloat16", "attention_bias": False,
    "mlp_bias": False,
}  # fmt: skip


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
    for name, early in (("cuda early", True), ("cuda", False)) if rows <= cuda.MOST_ROWS else ():
        yield name, True, lambda w, early=early: cuda.skinny(codes, w, torch.bfloat16, None, None, early=early)
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
    if rows <= cuda.MOST_ROWS:
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


def row_kernels(rows: int) -> dict[str, dict[str, Callable[[], Any]]]:
    """Each implementation's call before each product of a layer."""
    h, x, weight = (torch.randn(n, device="cuda").bfloat16() for n in ((rows, 4096), (rows, 4096), (4096,)))
    gate_up = torch.randn(rows, 2 * 14336, device="cuda").bfloat16()
    made = {"cuda": rows_in_cuda}
    if find_spec(ROWS_TRITON) is not None:
        made["triton"] = importlib.import_module(ROWS_TRITON)
    return {
        name: {
            "qkv": lambda k=k: k.norm_codes(h, weight, 1e-5, ROW), "out": lambda k=k: k.row_codes(x, ROW),
            "gate, up": lambda k=k: k.norm_codes(h, weight, 1e-5, ROW), "down": lambda k=k: k.gated_codes(gate_up, ROW),
        }
        for name, k in made.items()
    }  # fmt: skip


def rows_to_codes(rows: int) -> list[dict[str, Any]]:
    """Microseconds of each row kernel, one after the other; the share means nothing."""
    return [
        {"matrix": f"to {place}", "rows": rows, "product": name, "us": timed(lambda _, c=call: c(), [0] * 64),
         "share": None}
        for place in ("out", "gate, up", "down") for name, calls in row_kernels(rows).items()
        for call in (calls[place],)
    ]  # fmt: skip


def layers(rows: int, count: int = 8) -> list[dict[str, Any]]:
    """Microseconds a layer of its row kernels and products in a row; `ahead` launches Triton's kernels early too."""
    each = {name: weights(shape, True)[:count] for name, shape in MATRICES.items()}
    run = {"triton": function(TRITON, "skinny")} if find_spec(TRITON) is not None else {}
    if rows <= cuda.MOST_ROWS:
        run["cuda"] = cuda.skinny
    found = []
    for (of_rows, calls), (of_products, product), ahead in itertools.product(
        row_kernels(rows).items(), run.items(), (False, True)
    ):

        def layer(i: int, calls: Any = calls, product: Any = product) -> None:
            for name, copies in each.items():
                product(calls[name](), copies[i % len(copies)], torch.bfloat16, None, None)

        if ahead and of_rows == of_products == "cuda":
            continue
        triton_launch.LAUNCH = ahead
        us = timed(layer, list(range(count)))  # type: ignore[arg-type]
        triton_launch.LAUNCH = False
        share = sum(n * k for n, k in MATRICES.values()) / us / 1e-6 / PEAK if isinstance(us, float) else None
        name = f"{of_rows}+{of_products}{' ahead' if ahead else ''}"
        found.append({"matrix": "a layer", "rows": rows, "product": name, "us": us, "share": share})
    return found


# --------------------------------------------------------------------------- a whole step


def steps(
    quantization: str | None = "fp8", kv: str = "fp8", over: tuple[tuple[int, int], ...] = STEPS
) -> list[dict[str, Any]]:
    """Microseconds of decode steps of an 8B model; prints them, and the kernels that take the most."""
    model, found = random_model(LLAMA, device=torch.device("cuda"), quantization=quantization), []
    for sequences, length in over:
        for ahead in (False, True):
            triton_launch.LAUNCH = ahead
            cache, batch = decode_batch(model, sequences, length, kv)
            us = timed(lambda _, b=batch, c=cache: model(b, c), [0])
            triton_launch.LAUNCH = False
            name = f"{quantization or 'bf16'}+{kv}{' ahead' if ahead else ''}"
            found.append({"matrix": f"a step, {length}", "rows": sequences, "product": name, "us": us, "share": None})
        print(table(found[-2:]), "|", hottest(lambda b=batch, c=cache: model(b, c)), flush=True)
    return found


def decode_batch(model: Any, sequences: int, length: int, kv: str) -> tuple[Any, Batch]:
    width = -(-length // PAGE)
    cache = model.new_cache(sequences * width, PAGE, kv)
    pages = torch.arange(sequences * width, device="cuda").int().view(sequences, width)
    every = torch.arange(sequences + 1, device="cuda")
    lengths = torch.full((sequences,), length, dtype=torch.int32, device="cuda")
    slots = pages[:, -1].long() * PAGE + (length - 1) % PAGE
    return cache, Batch(every[:-1], lengths - 1, slots, every.int(), lengths, pages, every[:-1], True)


def hottest(call: Callable[[], Any], most: int = 7) -> str:
    """The kernels of a call that take the most time: name, launches, microseconds each."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    events = sorted(profile.key_averages(), key=lambda e: -e.self_device_time_total)[:most]
    return "; ".join(f"{e.key[:24]} {e.count}x{e.self_device_time_total / e.count:.1f}" for e in events if e.count)


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


def attention(sequences: int, length: int) -> list[dict[str, Any]]:
    """Every implementation, and other plans of ours, over an FP8 cache with a scale a token and head."""
    layers, batch, q = cache_of(sequences, length)
    scale = WIDTH**-0.5
    runs: dict[str, Product] = {
        "cuda early": lambda p: paged.attend(q, p, batch, scale),
        "cuda": lambda p: paged.attend(q, p, batch, scale, early=False),
    }
    if find_spec(PAGED_TRITON) is not None:
        run = function(PAGED_TRITON, "attend")
        runs["triton"] = lambda p: run(q, p, batch, scale)
    for other in ({"few": 128}, {"keys": 1024}, {"stages": 3}, {"warps": 8}):
        use, name = paged.Plan(**other), " ".join(f"{key} {value}" for key, value in other.items())
        runs[name] = lambda p, use=use: paged.attend(q, p, batch, scale, use)
    moved = 2 * sequences * length * KV * (WIDTH + 4)
    found = []
    for name, call in runs.items():
        us = timed(call, layers)
        share = moved / us / 1e-6 / PEAK if isinstance(us, float) else None
        found.append({"matrix": f"{length} keys", "rows": sequences, "product": name, "us": us, "share": share})
    return found


def plans(name: str, shape: tuple[int, int], rows: int, fp8: bool = True) -> list[dict[str, Any]]:
    """Other plans of the CUDA kernel, with early launch; ours is marked."""
    over, found, size = weights(shape, fp8), [], 1 if fp8 else 2
    x = torch.randn(rows, shape[1], device="cuda", dtype=torch.bfloat16)
    operand, tokens, depth = quantize(x, "e4m3", "row") if fp8 else x, max(8, rows), shape[1] * size
    for r, s, k in itertools.product((2, 3), (2, 3, 4), (False, True)):
        use = cuda.Plan(r, 16, s, k)
        if use.shared(tokens, depth) > cuda.SHARED:
            continue
        us = timed(lambda w, u=use: cuda.skinny(operand, w, torch.bfloat16, None, None, u), over)
        share = shape[0] * depth / us / 1e-6 / PEAK if isinstance(us, float) else None
        ours = "*" if use == cuda.plan(shape[0], depth, tokens) else ""
        which = ours + " ".join(str(int(part)) for part in vars(use).values())
        found.append({"matrix": name, "rows": rows, "product": which, "us": us, "share": share})
    return found


def table(found: list[dict[str, Any]]) -> str:
    """A line for each matrix and number of rows: microseconds, and the share of the floor's speed."""
    lines = []
    for (name, rows), group in itertools.groupby(found, lambda row: (row["matrix"], row["rows"])):
        lines.append(f"{name:9}{rows:3}  " + "  ".join(map(cell, group)))
    return "\n".join(lines)


def cell(row: dict[str, Any]) -> str:
    """One implementation's figures, or what it said."""
    return f"{row['product']} " + (
        f"{row['us']:.1f}" + (f" ({row['share']:.0%})" if row["share"] else "")
        if isinstance(row["us"], float)
        else str(row["us"])
    )


def best(found: list[dict[str, Any]], most: int = 6) -> list[dict[str, Any]]:
    """The fastest few of each matrix and number of rows."""
    kept = []
    for _, group in itertools.groupby(found, lambda row: (row["matrix"], row["rows"])):
        kept += sorted((row for row in group if row["share"]), key=lambda row: row["us"])[:most]
    return kept


SECTIONS: dict[str, Callable[[], Iterator[list[dict[str, Any]]]]] = {
    "products": lambda: (measure(name, shape) for name, shape in (MATRICES | HEAD).items()),
    "attention": lambda: (attention(*cache) for cache in CACHES),
    "rows": lambda: (rows_to_codes(rows) for rows in (1, 16, 64)),
    "layers": lambda: (layers(rows) for rows in (1, 16, 64)),
    "plans": lambda: (
        plans(name, shape, rows, fp8) for fp8 in (True, False) for rows in (1, 16) for name, shape in MATRICES.items()
    ),
    "steps": lambda: (run() for run in (steps, lambda: steps(None, "bf16", STEPS[:1]))),
}


def main(arguments: list[str] | None = None) -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="bench/results", help="folder for decode.json")
    parser.add_argument("--only", nargs="+", default=list(SECTIONS), choices=SECTIONS, help="what to measure")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    print(json.dumps(machine()), flush=True)
    print("microseconds a call (share of 4.37 TB/s)")
    found: list[dict[str, Any]] = []
    for name in options.only:
        for part in SECTIONS[name]():
            found += part
            if name != "steps":
                print(table(best(part) if name == "plans" else part), flush=True)
            torch.cuda.empty_cache()
    print(save(options.out, "decode", found))


if __name__ == "__main__":
    main()
