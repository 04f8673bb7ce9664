"""`fp8 qat`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .flags import HEAD, OUT, SCALES, SCHEME, SKIP, TOKENIZER


def qat_command(
    model: Annotated[Path, typer.Argument(help="A Hugging Face folder with safetensors.")],
    out: OUT,
    scheme: SCHEME = "dynamic",
    skip: SKIP = None,
    head: HEAD = False,
    kv_cache: Annotated[
        str, typer.Option(help="Rounding of keys and values: head (as servers), token (as fp8 generate), or none.")
    ] = "head",
    text: Annotated[
        list[str] | None, typer.Option(help="A text, or JSON lines with a field 'text'; else Moby-Dick.")
    ] = None,
    steps: Annotated[int, typer.Option("--steps", "-n", help="Steps of the optimizer.")] = 100,
    batch: Annotated[int, typer.Option(help="Rows a step.")] = 8,
    length: Annotated[int, typer.Option(help="Tokens a row.")] = 256,
    lr: Annotated[float, typer.Option(help="The largest learning rate.")] = 1e-5,
    distill: Annotated[
        bool, typer.Option("--distill/--no-distill", help="Learn from the unrounded model, or from the text.")
    ] = True,
    scales: SCALES = "power_of_two",
    seed: Annotated[int, typer.Option(help="Seed of the order of the rows.")] = 0,
    tokenizer: TOKENIZER = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Train a model for a short while with weights, activations and KV cache rounded; write its FP8 checkpoint.

    OUT/high holds the trained weights, OUT/fp8 the checkpoint. After Ctrl-C the same command goes on.

    [bold]Examples[/]

    [cyan]fp8 qat models/SmolLM2 out --text my.txt[/]  100 steps of distillation from the model itself

    [cyan]fp8 eval out/fp8 --against models/SmolLM2 --text other.txt[/]  what is left of the loss

    [cyan]fp8 verify out/fp8 --against out/high[/]  the checkpoint is the trained model, in bytes
    """
    from ..checkpoint.quantize import Options
    from .short_qat import ShortQat, train_folder

    options = Options(scheme, tuple(skip or ()), head, scales)
    kv = None if kv_cache == "none" else kv_cache
    how = ShortQat(tuple(text or ("moby-dick",)), steps, batch, length, lr, distill, kv, seed, tokenizer, device)
    done = train_folder(model, out, options, how, Console(highlight=False, stderr=True))
    Console(highlight=False, soft_wrap=True).print(str(done))
    if done.interrupted:
        raise typer.Exit(130)
