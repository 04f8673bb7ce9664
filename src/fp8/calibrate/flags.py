"""The flags that `fp8 quantize` and `fp8 qat` have in common: what is made FP8, and how text becomes tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

OUT = Annotated[Path, typer.Argument(help="The folder to make; it appears when it is complete.")]
SCHEME = Annotated[str, typer.Option("--scheme", "-s", help="dynamic, static, block or weight-only.")]
SKIP = Annotated[
    list[str] | None, typer.Option(help="Layers that stay: a name with *, or re:EXPRESSION; may be repeated.")
]
HEAD = Annotated[bool, typer.Option("--head", help="The output head in FP8 too.")]
SCALES = Annotated[str, typer.Option(help="power_of_two, none (amax / 448), or search: a channel's best.")]
TOKENIZER = Annotated[str | None, typer.Option(help="'bytes', a tokenizer.json or its folder; else the model's.")]
