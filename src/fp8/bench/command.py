"""`fp8 bench`: the measurements, by name."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated

import torch
import typer

from ..backends import why_not_triton
from ..errors import BackendError, ConfigError, suggest

MEASUREMENTS = {
    "quantize": "bytes against the reference, and bandwidth",
    "gemm": "FP8 products beside BF16",
    "decode": "the products of a decode step, against the bytes of their weights",
    "optimizer": "AdamW and the weights' codes, beside torch's fused AdamW",
    "train": "training steps beside BF16, torchao and TransformerEngine",
    "conv": "FP8 convolutions, forward and backward, beside cuDNN's BF16",
    "serve": "decoding and prompts in BF16, INT8, FP8 and FP8 with an FP8 cache, against their floors",
    "rates": "what `fp8 plan` goes by: products, casts, attention, launches",
    "plan": "five steps, predicted beside measured",
    "emulation": "the emulated accumulator against the real one, whole outputs",
}
ANYWHERE = {
    "checkpoint": "quantizing a checkpoint of 8 billion weights: peak memory, time (any machine, 25 GB of disk)"
}


def command(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help=f"{', '.join(MEASUREMENTS)}; all of these without a name. On any machine: {', '.join(ANYWHERE)}"
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="folder for the JSON files")] = Path("bench/results"),
) -> None:
    """Measure, on a Hopper GPU: a table on screen, JSON with versions on disk.

    BF16, and each peer that is installed, are measured in the same run: ratios count, times move with the GPU's power.

    [bold]Examples[/]

        fp8 bench
        fp8 bench gemm train --out runs/bench
    """
    chosen = names or list(MEASUREMENTS)
    for name in chosen:
        if name not in MEASUREMENTS | ANYWHERE:
            raise ConfigError(f"there is no measurement {name!r}. {suggest(name, MEASUREMENTS | ANYWHERE)}")
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if not ANYWHERE.keys() >= set(chosen) and (reason := why_not_triton(device)) is not None:
        raise BackendError(f"fp8 bench measures FP8 tensor cores, and {reason}. `fp8 demo` runs on any machine.")
    for name in chosen:
        typer.echo(f"\n{name}: {(MEASUREMENTS | ANYWHERE)[name]}")
        importlib.import_module(f"fp8.bench.{name}").main(["--out", str(out)])
