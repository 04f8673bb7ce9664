"""The outlier suite: what each way of sharing scales, and each remedy, makes of data with outliers as LLMs have them.

    python -m fp8.evaluate.outliers --out runs/outliers.json

One linear layer, X [512, 1024] through W [1024, 1024]; X normal, W normal / sqrt(K), then, by a factor f,

    channels    4 channels are f times as large in all tokens; W as it is
    balanced    the same, and their columns of W are f times smaller: y is that of the plain data. So it is in trained
                models, where the norm before a layer makes a channel large and the layer expects it so
    tokens      one token in 64 has 4 channels that are f times as large: the first token, and separators

Published factors are 20 to 200 for channels (LLM.int8(), SmoothQuant), up to ten thousand for tokens (massive
activations, arXiv:2402.17762). Beyond 200 the suite goes on, to find where each way breaks.

The error is that of a token's output, relative to that output, root of mean square over tokens. (Relative to the
whole matrix a few large tokens would hide all the others, and in `channels` the outliers hide everything in any
metric: y consists of them.) It is held against the error of per-tensor scales without any outlier; "breaks" is more
than 1.2 times that.

    tensor              one scale for X, one for W
    channel             one a token, one a row of W
    block               1x128 and 128x128
    + rotation          X Q and W Q, Q a randomized Hadamard matrix
    + smoothing         channels migrated by powers of two, alpha by measured error on other data
    static, OBSERVER    one scale for X, from other data of the same kind; "unguarded": a percentile as it is
    static, unseen      the same by max from data without outliers
    int8                beside them, against their own error without outliers

**What comes out** (power-of-two scales, seed 0; docs/log.md has the tables). At the published factors for channels,
per-tensor E4M3 does not break, where per-tensor INT8 errs 6 to 60 times as much: a float's error is relative, and the
plain data sink into subnormals only beside something about 10^4 times as large. There it breaks (1.2 to 2 times; 8 to
15 at 10^5), and a static scale that has not seen the outliers breaks at any factor. In `tokens`, channel, block and
rotation each bring the error of 10^4 back to that of plain data. In `balanced`, channel and block do, and smoothing
does at any factor, but **rotation makes it worse**, 12 times at a factor of 200: it spreads the outliers' energy over
all channels, whose rounding noise grows with it, while the outliers stood in columns that weigh little. What rotation
takes away from INT8's error there, from 63 to 11, it adds to E4M3's.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ..calibrate.hadamard import Rotation
from ..calibrate.observers import OBSERVERS, Magnitudes, choose, scales_of
from ..calibrate.smoothing import rounded_input, rounded_weight, row_errors, searched
from ..checkpoint.compressed_tensors import Scheme
from ..checkpoint.quantize import SCHEMES
from ..errors import ConfigError
from ..nn.int8_linear import int8_rows

CASES = ("channels", "balanced", "tokens")
FACTORS = (20.0, 50.0, 100.0, 200.0, 1e3, 1e4, 1e5)
PUBLISHED = 200.0
LIMIT = 1.2
OUTLIERS, EVERY = 4, 64
PERCENT = 99.99


@dataclass(frozen=True)
class Suite:
    """Sizes, seed, and how scales are rounded."""

    tokens: int = 512
    channels: int = 1024
    outputs: int = 1024
    seed: int = 0
    scales: str = "power_of_two"
    factors: tuple[float, ...] = FACTORS

    def __post_init__(self) -> None:
        if self.tokens < EVERY or self.channels < 128 or self.scales not in ("power_of_two", "none"):
            raise ConfigError(f"the suite needs {EVERY} tokens, 128 channels and scales power_of_two or none: {self}.")

    def data(self, case: str, factor: float) -> Data:
        """The data of a case, on the grid of BF16."""
        draw = torch.Generator().manual_seed(self.seed)
        x, other, unlike = (torch.randn(self.tokens, self.channels, generator=draw) for _ in range(3))
        w = torch.randn(self.outputs, self.channels, generator=draw) / self.channels**0.5
        where = torch.randperm(self.channels, generator=draw)[:OUTLIERS]
        rows = slice(None, None, EVERY) if case == "tokens" else slice(None)
        for each in (x, other):
            each[rows, where] = each[rows, where] * factor
        if case == "balanced":
            w[:, where] = w[:, where] / factor
        return Data(*(each.bfloat16().float() for each in (x, other, unlike, w)))


@dataclass(frozen=True)
class Data:
    """X, data of the same kind and data without outliers to calibrate on, and W."""

    x: Tensor
    other: Tensor
    unlike: Tensor
    w: Tensor

    def turned(self, turn: Callable[[Tensor], Tensor]) -> Data:
        return Data(*(turn(each).float() for each in (self.x, self.other, self.unlike, self.w)))


Way = Callable[[Data], Tensor]


def ways(suite: Suite) -> dict[str, Way]:
    """The ways, by the names of the table: functions of the data that give y."""
    named = {"tensor": "static", "channel": "dynamic", "block": "block"}
    schemes = {name: replace(SCHEMES[scheme], scale_rounding=suite.scales) for name, scheme in named.items()}
    out: dict[str, Way] = {name: partial(plain, scheme) for name, scheme in schemes.items()}
    turn, tensor = Rotation(suite.channels, suite.seed).turn, schemes["tensor"]
    out |= {f"{name} + rotation": rotated(way, turn) for name, way in list(out.items())}
    out |= {f"{name} + smoothing": partial(smoothed, schemes[name]) for name in ("tensor", "channel")}
    out |= {f"static, {observer}": partial(static, tensor, observer) for observer in OBSERVERS}
    out["static, percentile, unguarded"] = partial(static, tensor, "percentile", guarded=False)
    out["static, unseen"] = partial(static, tensor, "max", unseen=True)
    out["static, unseen + rotation"] = rotated(out["static, unseen"], turn)
    int8_ways: dict[str, Way] = {"int8 tensor": partial(int8, True), "int8 channel": partial(int8, False)}
    return out | int8_ways | {f"{name} + rotation": rotated(way, turn) for name, way in int8_ways.items()}


def plain(scheme: Scheme, data: Data) -> Tensor:
    return rounded_input(data.x, scheme) @ rounded_weight(data.w, scheme).t()


def rotated(way: Way, turn: Callable[[Tensor], Tensor]) -> Way:
    return lambda data: way(data.turned(turn))


def smoothed(scheme: Scheme, data: Data) -> Tensor:
    factor = torch.exp2(searched(data.other, [data.w], scheme)[0].float())
    return plain(scheme, replace(data, x=data.x / factor, w=data.w * factor))


def static(scheme: Scheme, observer: str, data: Data, guarded: bool = True, unseen: bool = False) -> Tensor:
    rounding, other = scheme.scale_rounding, data.unlike if unseen else data.other
    seen, check = (counted(part) for part in other.chunk(2))
    if observer == "auto":
        scale = choose(seen, check, PERCENT, rounding)[0]
    else:
        scale = scales_of(seen, observer, PERCENT, rounding, guarded)
    return rounded_input(data.x, scheme, scale.view(1, 1)) @ rounded_weight(data.w, scheme).t()


def int8(per_tensor: bool, data: Data) -> Tensor:
    def rounded(x: Tensor) -> Tensor:
        codes, scale = int8_rows(x.reshape(1, -1) if per_tensor else x)
        return (codes * scale).view(x.shape)

    return rounded(data.x) @ rounded(data.w).t()


def counted(x: Tensor) -> Magnitudes:
    seen = Magnitudes(1)
    seen.add(x.reshape(1, -1))
    return seen


# --------------------------------------------------------------------------- the suite


def run(suite: Suite) -> dict[str, Any]:
    """Every way on every case: `{"plain": {way: error}, "cases": {case: {factor: {way: error}}}}`, as JSON holds it."""
    found = {case: {f"{f:g}": errors(suite, case, f) for f in suite.factors} for case in CASES}
    return {"suite": asdict(suite), "limit": LIMIT, "plain": errors(suite, "channels", 1.0), "cases": found}


def errors(suite: Suite, case: str, factor: float) -> dict[str, float]:
    data = suite.data(case, factor)
    exact = (data.x.double() @ data.w.double().t()).float()
    return {name: float(row_errors(way(data), exact).square().mean().sqrt()) for name, way in ways(suite).items()}


def ratios(found: dict[str, Any], way: str) -> dict[str, dict[str, float]]:
    """The errors of a way over the error without outliers: of per-tensor FP8, or of the same INT8."""
    plain = found["plain"][beside(way)]
    return {case: {f: each[way] / plain for f, each in by.items()} for case, by in found["cases"].items()}


def beside(way: str) -> str:
    """The way whose error without outliers another is held against."""
    return " ".join(way.split()[:2]) if way.startswith("int8") else "tensor"


def table(found: dict[str, Any], case: str) -> Table:
    """One case: rows are ways, columns factors, numbers times the error without outliers."""
    factors = list(found["cases"][case])
    drawn = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, title=f"{case}: error / error without outliers", title_justify="left"
    )
    for head in ("", "none", *(f"x {f}" for f in factors)):
        drawn.add_column(head, justify="left" if not head else "right")
    for way in found["plain"]:
        own = found["plain"][way] / found["plain"][beside(way)]
        cells = [own, *ratios(found, way)[case].values()]
        drawn.add_row(way, *(f"[red]{r:.2f}[/]" if r > LIMIT else f"{r:.2f}" for r in cells))
    return drawn


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fp8.evaluate.outliers", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, help="also write JSON here")
    parser.add_argument("--scales", default="power_of_two", help="power_of_two or none (amax / 448)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(argv)
    found = run(Suite(seed=given.seed, scales=given.scales))
    console = Console(highlight=False)
    console = console if console.is_terminal else Console(highlight=False, width=120)
    for case in CASES:
        console.print(table(found, case))
    console.print(
        f"per-tensor FP8 without outliers errs by {found['plain']['tensor']:.4f}; red: more than {LIMIT} times that"
    )
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
