"""`fp8 report`: what there is to know of an FP8 checkpoint, as a page and as data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..errors import ConfigError


def report_command(
    checkpoint: Annotated[Path, typer.Argument(metavar="OUT", help="An FP8 checkpoint.")],
    against: Annotated[
        Path | None, typer.Option(help="The model that it was made of: adds what rounding lost.")
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option(help="Run this text (a file, or moby-dick): adds sensitivity and inputs.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Rows of text.")] = 4,
    length: Annotated[int, typer.Option(help="Tokens a row.")] = 256,
    evals: Annotated[
        list[Path] | None, typer.Option("--eval", help="What `fp8 eval --json` printed, in a file.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="'bytes', a tokenizer.json or its folder; else the model's.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where the text is run: auto, cpu, cuda or cuda:N.")] = "cpu",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The page to write; else OUT.html beside OUT.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print data, and write no page.")] = False,
) -> None:
    """Draw an FP8 checkpoint layer by layer: noise, scales, outliers, KV heads, sensitivity, size, predicted speed.

    Writes one HTML file that needs no network, and the same as JSON beside it.

    [bold]Examples[/]

    [cyan]fp8 report out[/]  what the file alone tells: out.html and out.json

    [cyan]fp8 report out --against models/SmolLM2 --text moby-dick[/]  what rounding lost, and what that costs

    [cyan]fp8 report out --against models/SmolLM2 --eval eval.json -o smollm2.html[/]  with perplexity and tasks
    """
    from ..calibrate.survey import Reading, survey
    from .checkpoint_page import judged, page
    from .page import finite, write_json, written

    where = checkpoint.resolve()
    target = out or where.with_name(where.name + ".html")
    if target.suffix != ".html":
        raise ConfigError(f"--out names the page, a file that ends with .html, not {target}.")
    rows = judged(evals or [], where.name)
    reading = Reading(tuple(text), samples, length, tokenizer, device) if text else None
    console = Console(highlight=False, stderr=True)
    with console.status("reading", spinner="line") as status:
        data = survey(checkpoint, against, reading, lambda done, total: status.update(f"sensitivity {done} of {total}"))
    data = finite(data | {"judged": rows})
    if as_json:
        typer.echo(json.dumps(data, indent=2, allow_nan=False))
        return
    written(target, page(data))
    write_json(target.with_suffix(".json"), data)
    typer.echo(f"{target}\n{target.with_suffix('.json')}")
