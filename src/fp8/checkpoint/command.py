"""`fp8 convert` and `fp8 lint`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, Group

from ..errors import ConfigError


def convert_command(
    source: Annotated[Path, typer.Argument(help="An FP8 checkpoint.")],
    out: Annotated[Path, typer.Argument(help="The folder to make.")],
    to: Annotated[str | None, typer.Option(help="compressed-tensors, huggingface-fp8 or bf16.")] = None,
    reader: Annotated[str | None, typer.Option("--for", help="vllm, sglang or transformers.")] = None,
) -> None:
    """Write an FP8 checkpoint in another format, or for a certain reader; no code is rounded anew.

    [bold]Examples[/]

    [cyan]fp8 convert out out-sglang --for sglang[/]  one KV scale a tensor

    [cyan]fp8 convert out out-bf16 --to bf16[/]  decoded

    [cyan]fp8 convert out out-hf --to huggingface-fp8[/]  128x128 blocks under other names
    """
    from .convert import convert_folder

    if to is None and reader is None:
        raise ConfigError("say what to write: --to compressed-tensors, huggingface-fp8 or bf16, or --for a reader.")
    try:
        typer.echo(str(convert_folder(source, out, to, reader)))
    except KeyboardInterrupt:
        typer.echo(f"stopped; what was written is kept in {out}.partial, and the same command goes on.", err=True)
        raise typer.Exit(130) from None


def lint_command(
    folder: Annotated[Path, typer.Argument(help="An FP8 checkpoint.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print data instead of tables.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Warnings fail as well.")] = False,
) -> None:
    """Say what is wrong with an FP8 checkpoint, and who can load it. Exit code 1 where there is an error.

    [bold]Examples[/]

    [cyan]fp8 lint out[/]

    [cyan]fp8 lint out --strict --json[/]
    """
    from .lint import lint

    report = lint(folder)
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2, allow_nan=False))
    else:
        console = Console(highlight=False)
        (console if console.is_terminal else Console(highlight=False, width=200)).print(drawing(report))
    if report.errors or (strict and report.warnings):
        raise typer.Exit(1)


COLOURS = {"error": "bold red", "warning": "yellow", "note": "dim", "yes": "green", "with care": "yellow", "no": "red"}


def drawing(report: Any) -> Group:
    """The findings and the readers, as two tables."""
    from rich import box
    from rich.table import Table

    found = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for head in ("", "what", "where", ""):
        found.add_column(head)
    for finding in report.findings:
        found.add_row(_coloured(finding.level), finding.kind, finding.where, finding.what)
    who = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for head in ("reader", "loads it", "because"):
        who.add_column(head)
    for reader in report.readers:
        who.add_row(reader.name, _coloured(reader.verdict), "; ".join(reader.reasons))
    count = f"{report.folder}: {counted(report.errors, 'error')}, {counted(report.warnings, 'warning')}"
    return Group(*([found] if report.findings else []), *([who] if report.readers else []), count)


def counted(count: int, what: str) -> str:
    """
    >>> counted(1, "error"), counted(0, "error")
    ('1 error', '0 errors')
    """
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _coloured(word: str) -> str:
    return f"[{COLOURS[word]}]{word}[/]"
