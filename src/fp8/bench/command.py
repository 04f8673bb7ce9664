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
    "checkpoint": "quantizing a checkpoint of 8 billion weights: peak memory, time (any machine, 25 GB of disk)",
    "serve_online": "a server under Poisson arrivals: ours in each arm, or anybody's at --url",
}
OWN_OPTIONS = {"ignore_unknown_options": True}  # of the command: what it does not know is the measurement's


def command(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help=f"{', '.join(MEASUREMENTS)}; all of these without a name. On any machine: {', '.join(ANYWHERE)}. "
            "Behind a single name, options of its own"
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="folder for the JSON files")] = Path("bench/results"),
) -> None:
    """Measure, on a Hopper GPU: a table on screen, JSON with versions on disk.

    BF16, and each peer that is installed, are measured in the same run: ratios count, times move with the GPU's power.

    [bold]Examples[/]

    [cyan]fp8 bench[/]  everything

    [cyan]fp8 bench gemm train --out runs/bench[/]

    [cyan]fp8 bench serve --rows 1x1024 16x16384 --seconds 230[/]  options of the measurement's own

    [cyan]fp8 bench serve --model path/to/config.json --rows 2x64 --device cpu[/]  how it works, on any machine

    [cyan]fp8 bench serve -- --help[/]  what it measures, and its options
    """
    given = list(names or [])
    cut = next((i for i, word in enumerate(given) if word.startswith("-")), len(given))
    chosen, own = given[:cut] or list(MEASUREMENTS), given[cut:]
    for name in chosen:
        if name not in MEASUREMENTS | ANYWHERE:
            raise ConfigError(f"there is no measurement {name!r}. {suggest(name, MEASUREMENTS | ANYWHERE)}")
    if own and len(chosen) != 1:
        raise ConfigError(f"{own[0]} is an option of one measurement, and {len(chosen)} are named: give one name.")
    if {"-h", "--help"}.isdisjoint(own):
        check_gpu(chosen, own)
        typer.echo("\n".join(f"{name}: {(MEASUREMENTS | ANYWHERE)[name]}" for name in chosen))
    for name in chosen:
        importlib.import_module(f"fp8.bench.{name}").main(["--out", str(out), *own])


def check_gpu(chosen: list[str], own: list[str]) -> None:
    """Raises `BackendError` where a measurement needs a GPU that is not there."""
    on_cpu = chosen == ["serve"] and "cpu" in own  # --device cpu
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if not on_cpu and not ANYWHERE.keys() >= set(chosen) and (reason := why_not_triton(device)) is not None:
        raise BackendError(
            f"fp8 bench measures FP8 tensor cores, and {reason}. `fp8 demo` runs on any machine, and `fp8 bench serve "
            "--device cpu --model CONFIG.JSON` shows how serving is measured."
        )
