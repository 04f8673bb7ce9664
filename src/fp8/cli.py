"""The command `fp8`: each command is a few lines over a public function.

A command imports what it needs inside its body, so that `fp8 --help` stays quick, and raises `Fp8Error` for whatever a
user can put right: `main` prints that as one line and exits with 2. To add a command, write a function below with
`@app.command()`; its docstring is its help, and ends with examples.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType

from . import __version__
from .advise.command import estimate_command, plan_command, profile_command
from .bench.command import OWN_OPTIONS
from .bench.command import command as bench_command
from .calibrate.command import quantize_command, verify_command
from .calibrate.qat_command import qat_command
from .checkpoint.command import convert_command, lint_command
from .errors import Fp8Error
from .evaluate.command import command as eval_command
from .report.command import report_command
from .serve.command import chat_command, generate_command
from .serve.http.command import serve_command
from .train.command import command as train_command

app = typer.Typer(
    name="fp8",
    help="Train, quantize and serve transformer models in 8-bit floating point.",
    epilog="Start with `fp8 demo`. `fp8 COMMAND --help` shows examples.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; a mistake of the user's ends in one line on stderr and exit code 2."""
    try:
        app(args=list(argv) if argv is not None else None, prog_name="fp8")
    except Fp8Error as error:
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {_escaped(error)}", highlight=False)
        sys.exit(2)


def console() -> Console:
    """Standard output; wide where it is not a terminal, so that a pipe gets whole lines."""
    out = Console(highlight=False)
    return out if out.is_terminal else Console(highlight=False, width=160)


def print_json(data: Any) -> None:
    """Strict JSON on standard output."""
    typer.echo(json.dumps(data, indent=2, allow_nan=False))


def _print(as_json: bool, data: Callable[[], Any], drawing: Callable[[], RenderableType]) -> None:
    print_json(data()) if as_json else console().print(drawing())


def _escaped(error: Exception) -> str:
    return str(error).replace("[", r"\[")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fp8 {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Train, quantize and serve transformer models in 8-bit floating point."""


@app.command(context_settings={"ignore_unknown_options": True})  # so that -3.14 is a number
def formats(
    value: Annotated[str | None, typer.Argument(help="A number to encode: 3.14, 1e-6, 2^-9, inf, nan.")] = None,
    format_name: Annotated[str | None, typer.Option("--format", "-f", help="Which format; e4m3 if not given.")] = None,
    code: Annotated[str | None, typer.Option(help="A code to decode instead: 126, 0x7e, 0b1111110.")] = None,
    list_codes: Annotated[bool, typer.Option("--list", help="List every code of the format.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print data instead of a drawing.")] = False,
) -> None:
    """Compare number formats, or see what one number becomes in one of them.

    [bold]Examples[/]

    [cyan]fp8 formats[/]  the comparison table

    [cyan]fp8 formats 3.14 --format e4m3[/]  bits, value, error and neighbours

    [cyan]fp8 formats --code 0x7e -f e5m2[/]  what a code means

    [cyan]fp8 formats --list -f e2m1[/]  all codes of a format
    """
    from . import formats_table as show
    from .formats import FORMATS, format_of

    row = format_of(format_name or "e4m3")
    if value is not None and code is not None:
        raise Fp8Error("Give a number or --code, not both.")
    if value is not None or code is not None:
        told = (
            show.explain(show.number(value), row)
            if value is not None
            else show.explain_code(show.code_of(code or ""), row)
        )
        _print(as_json, lambda: show.plain(told), lambda: show.draw(told, row))
    elif list_codes:
        every = (show.explain_code(c, row) for c in row.codes())
        _print(as_json, lambda: [show.plain(told) for told in every], lambda: show.listing(row))
    else:
        chosen = [row] if format_name else list(FORMATS.values())
        _print(as_json, lambda: show.rows(chosen), lambda: show.table(chosen, notes=console().width >= 140))


@app.command()
def demo(
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="Preset of the FP8 run.")] = "tensorwise",
    all_recipes: Annotated[bool, typer.Option("--all-recipes", help="One FP8 run each for all four presets.")] = False,
    steps: Annotated[
        int | None, typer.Option("--steps", "-n", help="Steps of each run; else 250, on a GPU 300.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the weights and of the order of the data.")] = 0,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for everything that is made.")] = Path("runs/demo"),
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Train a small decoder on Moby-Dick in high precision and in FP8, write and reload the FP8 checkpoint, generate.

    Ends with one table, and a report for the browser. After Ctrl-C the same command goes on where it stopped.

    [bold]Examples[/]

    [cyan]fp8 demo[/]  about three minutes on two CPU cores

    [cyan]fp8 demo --recipe blockwise --seed 1[/]  another recipe

    [cyan]fp8 demo --all-recipes --out runs/recipes[/]  all of them, side by side
    """
    from . import demo as room

    changes = {} if steps is None else {"steps": steps}
    recipes = room.ALL if all_recipes else (recipe,)
    try:
        room.run(room.Demo(recipes, out, seed, device, changes=changes, console=Console(highlight=False)))
    except room.StoppedError as stopped:
        typer.echo(str(stopped))
        raise typer.Exit(130) from None


# In the order in which a user meets them: before a training, the training, a finished model, a judgement.
app.command("plan")(plan_command)
app.command("train")(train_command())  # its flags are the settings of TrainConfig
app.command("profile")(profile_command)
app.command("quantize")(quantize_command)
app.command("qat")(qat_command)
app.command("convert")(convert_command)
app.command("lint")(lint_command)
app.command("verify")(verify_command)
app.command("eval")(eval_command)
app.command("report")(report_command)
app.command("estimate")(estimate_command)
app.command("generate")(generate_command)
app.command("chat")(chat_command)
app.command("serve")(serve_command)
app.command("bench", context_settings=OWN_OPTIONS)(bench_command)


if __name__ == "__main__":
    main()
