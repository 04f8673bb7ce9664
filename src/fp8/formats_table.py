"""How formats look to a person: the comparison table, one number drawn by its fields, and the list of all codes.

`explain` and `rows` return plain data, which is what `--json` prints; `draw`, `table` and `listing` turn it into
something for a terminal. A number is drawn as its code is built, field by field:

    3.14 in e4m3 is 3.25, code 0x45
        0     1000      101
        +     2^1   x   1.625

Powers of two are written 2^-9 and not 0.00195, because that is what they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .errors import FormatError
from .formats import FORMATS, Format

FIELD_STYLES = {"sign": "red", "exponent": "green", "mantissa": "blue"}


@dataclass(frozen=True)
class Explained:
    """One number in one format: what was given, what became of it, and what lies to both sides of it.

    `error` is `value - given`, `relative_error` its size over that of `given`; NaN where they mean nothing.
    """

    given: float
    format: str
    code: int
    bits: str
    value: float
    error: float
    relative_error: float
    below: float
    above: float


def explain(given: float, row: Format) -> Explained:
    """Encode `given` and report on it.

    >>> from fp8.formats import E4M3
    >>> explain(3.14, E4M3).value
    3.25
    """
    return _report(given, row.encode(given), row)


def explain_code(code: int, row: Format) -> Explained:
    """Decode `code` and report on it."""
    return _report(row.decode(code), code, row)


def _report(given: float, code: int, row: Format) -> Explained:
    value = row.decode(code)
    error = 0.0 if value == given else value - given
    relative = abs(error / given) if given and math.isfinite(given) else abs(error)
    return Explained(given, row.name, code, row.bits_of(code), value, error, relative, *row.neighbours(given))


def number(text: str) -> float:
    """A number as typed: 3.14, 1e-6, 2^-9, inf, nan.

    >>> number("2^-9")
    0.001953125
    """
    try:
        base, power, exponent = text.partition("^")
        return math.pow(float(base), float(exponent)) if power else float(text)
    except (ValueError, OverflowError):
        raise FormatError(f"{text!r} is not a number. Write 3.14, 1e-6, 2^-9, inf or nan.") from None


def code_of(text: str) -> int:
    """A code as typed: 126, 0x7e or 0b1111110."""
    try:
        return int(text, 0)
    except ValueError:
        raise FormatError(f"{text!r} is not a code. Write 126, 0x7e or 0b1111110.") from None


def rows(formats: Iterable[Format] = FORMATS.values()) -> list[dict[str, Any]]:
    """The comparison table as data."""
    return [
        {
            "name": row.name,
            "bits": row.bits,
            "exponent_bits": row.exponent_bits,
            "mantissa_bits": row.mantissa_bits,
            "bias": row.bias,
            "max": row.max,
            "smallest_normal": row.smallest_normal,
            "smallest_subnormal": row.smallest_subnormal,
            "values_per_binade": row.values_per_binade,
            "relative_step": row.relative_step,
            "binades": row.binades,
            "infinity": row.has_infinity,
            "nan": row.has_nan,
            "note": row.note,
        }
        for row in formats
    ]


def plain(explained: Explained) -> dict[str, Any]:
    """An `Explained` as JSON can hold it: infinities and NaN become the words inf, -inf and nan."""
    entries = asdict(explained).items()
    return {key: str(v) if isinstance(v, float) and not math.isfinite(v) else v for key, v in entries}


def power(value: float) -> str:
    """2^-9 for a power of two below one (or far above), else the number in few digits."""
    fraction, exponent = math.frexp(value)
    if fraction == 0.5 and not 0.25 < value < 1e5:
        return f"2^{exponent - 1}"
    return f"{value:.7g}"


def table(formats: Iterable[Format] = FORMATS.values(), notes: bool = True) -> Table:
    """The comparison table for a terminal; without `notes` it fits into 100 columns."""
    out = Table(box=None, pad_edge=False, header_style="bold")
    out.add_column("format", style="bold")
    for title in ("bits", "exp+man", "bias", "max", "smallest\nnormal", "smallest\nsubnormal", "values a\nbinade"):
        out.add_column(title, justify="right", no_wrap=True)
    for title in ("relative\nstep", "binades", "inf", "NaN"):
        out.add_column(title, justify="right", no_wrap=True)
    if notes:
        out.add_column("note", style="dim")
    for row in formats:
        out.add_row(*_cells(row), *([row.note] if notes else []), style="cyan" if row.name in ("e4m3", "e5m2") else "")
    return out


def _cells(row: Format) -> list[str]:
    integer = row.specials == "integer"
    subnormal = "-" if row.specials == "exponent" else power(row.smallest_subnormal)
    return [
        row.name,
        str(row.bits),
        f"{row.exponent_bits}+{row.mantissa_bits}",
        "-" if integer else str(row.bias),
        power(row.max),
        "-" if integer else power(row.smallest_normal),
        subnormal,
        f"{'<=' if integer else ''}{row.values_per_binade}",
        f"1/{row.values_per_binade}",
        str(row.binades),
        "yes" if row.has_infinity else "no",
        "yes" if row.has_nan else "no",
    ]


def listing(row: Format, columns: int = 4) -> Table:
    """All codes of a format of at most 16 bits, read downwards."""
    codes = row.codes()
    height = math.ceil(len(codes) / columns)
    out = Table(box=None, pad_edge=False, show_header=False)
    for _ in range(columns):
        out.add_column(style="dim")
        out.add_column()
        out.add_column(justify="right", style="bold")
    for start in range(height):
        picked = codes[start::height]
        out.add_row(*(cell for c in picked for cell in (hex_of(c, row), row.bits_of(c), f"{row.decode(c):.6g}  ")))
    return out


def hex_of(code: int, row: Format) -> str:
    """A code in as many hexadecimal digits as the format needs."""
    return f"0x{code:0{math.ceil(row.bits / 4)}x}"


def draw(explained: Explained, row: Format) -> RenderableType:
    """One number for a terminal: its fields, its value, its error, its neighbours."""
    head = Text.assemble(
        (f"{explained.given:.9g}", "bold"), f" in {row.name} is ", (f"{explained.value:.9g}", "bold cyan")
    )
    head.append(f", code {hex_of(explained.code, row)}")
    lines: list[RenderableType] = [head, _fields(explained, row)]
    if math.isfinite(explained.given) and math.isfinite(explained.value):
        lines.append(
            Text(f"error       {explained.error:+.6g}  ({100 * explained.relative_error:.4g} %){_lost(explained, row)}")
        )
    below, above = (f"{side:.9g}" if math.isfinite(side) else "none" for side in (explained.below, explained.above))
    lines.append(Text(f"neighbours  {below} below, {above} above"))
    return Group(*lines)


def _lost(explained: Explained, row: Format) -> str:
    """What a scale would have prevented, if anything."""
    if explained.given and not explained.value:
        return ", flushed to zero"
    return ", saturated" if explained.given > row.max or explained.given < row.min else ""


def _fields(explained: Explained, row: Format) -> Table:
    """The bits, and below each field what it contributes."""
    out = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2))
    names = [name for name, width in _widths(row) if width]
    for _ in names:
        out.add_column(justify="center")
    digits = explained.bits.split(".")
    out.add_row(*(Text(f, style=f"bold {FIELD_STYLES[n]}") for n, f in zip(names, digits, strict=True)))
    out.add_row(*(Text(name, style="dim") for name in names))
    out.add_row(*(Text(meaning) for meaning in _meanings(explained, row, names)))
    return out


def _widths(row: Format) -> list[tuple[str, int]]:
    return [("sign", int(row.signed)), ("exponent", row.exponent_bits), ("mantissa", row.mantissa_bits)]


def _meanings(explained: Explained, row: Format, names: list[str]) -> list[str]:
    if not math.isfinite(explained.value):
        return ["", f"{explained.value}", ""][-len(names) :]
    if row.specials == "integer":
        return ["-" if explained.code >> row.mantissa_bits else "+", "two's complement"]
    if row.specials == "exponent":
        return [f"2^({explained.code} - {row.bias})"]
    field = (explained.code >> row.mantissa_bits) & ((1 << row.exponent_bits) - 1)
    mantissa = explained.code & ((1 << row.mantissa_bits) - 1)
    significand = (mantissa / row.values_per_binade) + (field > 0)
    exponent = max(field, 1) - row.bias
    scale = f"2^{exponent}" + ("" if field else " (subnormal)")
    return ["-" if math.copysign(1.0, explained.value) < 0 else "+", scale, f"x {significand:g}"]
