"""A number format is a row of data.

What. Every format below, from FP32 down to INT4, is one `Format` row: how many exponent and mantissa bits, which bias,
and what its topmost codes are spent on. All else (the limits, the decoder, the encoder, the comparison table) is
derived from the row. E4M3 and E5M2 are the two that compute; the others stand beside them so that one can see what was
chosen.

The mathematics. Read the magnitudes of a format as rungs of a ladder, counted from zero. A rung of rank r, with
exponent field E = r >> m and mantissa field M = r & (2^m - 1), stands at height

    (2^m + M) * 2^(E - bias - m)    where E > 0      (normal: the leading 1 is not stored)
    M         * 2^(1 - bias - m)    where E = 0      (subnormal: evenly spaced down to zero)

so the rank of a positive number *is* its code, and going one rung up is adding one, also where a mantissa overflows
into the exponent. Encoding turns it round: measure u in steps of its binade, round to an integer k, and the rank is `k
+ ((e - e_min) << m)`. If k reached 2^(m+1), that sum has already carried into the next binade. Everything here is
exact: a Python float holds each value, and `frexp`, `ldexp` and `round` (half to even) lose nothing.

    e4m3   S EEEE MMM       0 ... 2^-9 ... 2^-6 ... 448      3.14 lies between 3 and 3.25, and becomes 0.1000.101 = 3.25
    e5m2   S EEEEE MM       0 ... 2^-16 .. 2^-14 .. 57344    3.14 lies between 3 and 3.5, and becomes 0.10000.10 = 3

`specials` says what the topmost codes mean, and is the one thing in which formats of the same widths differ:

    ieee       exponent all ones: infinity (mantissa 0) and NaN           e5m2, fp16, bf16, tf32, fp32, e4m3_ieee
    fn         exponent and mantissa all ones: NaN; no infinity           e4m3: hence 448 and not 240
    fnuz       the code of -0 is the only NaN; no infinity, no -0         the two formats of MI300
    finite     neither infinity nor NaN                                   FP6 and FP4
    exponent   no sign, mantissa or zero; 0xFF is NaN; ties go up         e8m0, which stores power-of-two scales
    integer    two's complement, spaced by one                            int8, int4

Encoding rounds to nearest even and saturates at the largest finite value. It hides nothing: NaN stays NaN (with the
sign dropped), an infinity stays one where the format has it and becomes NaN where not, and a format with neither
raises.

What was left out. Tensors: `fp8.quantize` is for those. Here one number at a time is explained, not computed fast.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from .errors import FormatError, suggest

Specials = Literal["ieee", "fn", "fnuz", "finite", "exponent", "integer"]


@dataclass(frozen=True)
class Format:
    """One row: a number format of up to 32 bits. Values are plain reals; nothing here knows of scales."""

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    specials: Specials
    note: str = ""

    @property
    def signed(self) -> bool:
        return self.specials != "exponent"

    @property
    def bits(self) -> int:
        return self.exponent_bits + self.mantissa_bits + self.signed

    @property
    def has_infinity(self) -> bool:
        return self.specials == "ieee"

    @property
    def has_nan(self) -> bool:
        return self.specials not in ("finite", "integer")

    @property
    def exponent_min(self) -> int:
        """The exponent of the smallest normal number. An integer is one long run of subnormals with step 1."""
        if self.specials == "integer":
            return self.mantissa_bits
        return -self.bias if self.specials == "exponent" else 1 - self.bias

    @property
    def max(self) -> float:
        """The largest finite value."""
        return self._height(self._top)

    @property
    def min(self) -> float:
        """The lowest finite value: -max, but -128 for int8 and 2^-127 for e8m0."""
        return self._height(self._bottom)

    @property
    def smallest_normal(self) -> float:
        return 1.0 if self.specials == "integer" else math.ldexp(1.0, self.exponent_min)

    @property
    def smallest_subnormal(self) -> float:
        """The smallest positive value (e8m0, which has no subnormals, repeats its smallest normal)."""
        return math.ldexp(1.0, self.exponent_min - self.mantissa_bits)

    @property
    def values_per_binade(self) -> int:
        """How many values lie in [2^e, 2^(e+1)) of a normal binade; for an integer, in its widest one."""
        return 1 << (self.mantissa_bits - (self.specials == "integer"))

    @property
    def relative_step(self) -> float:
        """The spacing at the bottom of a binade over the value there; rounding errs by at most half of it."""
        return 1.0 / self.values_per_binade

    @property
    def binades(self) -> int:
        """How many powers of two, from the smallest positive value to the largest, have a value of their own."""
        return math.frexp(self.max)[1] - math.frexp(self.smallest_subnormal)[1] + 1

    @property
    def dtype(self) -> torch.dtype | None:
        """The torch type whose elements are this format's codes, or None."""
        name = _TORCH_NAMES.get(self.name)
        return getattr(torch, name, None) if name else None

    @property
    def nan_code(self) -> int | None:
        """The code that NaN is written as: all ones below the sign (the code of -0 in the `fnuz` formats)."""
        if not self.has_nan:
            return None
        return 1 << (self.bits - 1) if self.specials == "fnuz" else (1 << (self.bits - self.signed)) - 1

    def decode(self, code: int) -> float:
        """The value of a code.

        >>> E4M3.decode(0x7E)
        448.0
        """
        if not 0 <= code < 1 << self.bits:
            raise FormatError(f"{self.name} has codes 0 to {(1 << self.bits) - 1:#x}; {code:#x} is outside.")
        if self.specials == "exponent":
            return math.nan if code == self.nan_code else self._height(code + 1)
        negative, magnitude = code >> (self.bits - 1), code & self._magnitude_mask
        if self.specials == "integer":
            return float(magnitude - (negative << self.mantissa_bits))
        if self.specials == "fnuz" and negative and not magnitude:
            return math.nan
        if magnitude > self._top:
            return self._special(magnitude, negative)
        return math.copysign(self._height(magnitude), -1.0 if negative else 1.0)

    def encode(self, value: float) -> int:
        """The code of the value nearest to `value`: ties to even, saturating, NaN and infinity as the essay says.

        >>> f"{E4M3.encode(3.14):#04x}", E4M3.decode(E4M3.encode(3.14))
        ('0x45', 3.25)
        """
        value = float(value)
        if not math.isfinite(value) or (not self.signed and value <= 0):
            return self._encode_special(value)
        rank = min(max(self._rank(value, round), self._bottom), self._top)
        if self.specials == "exponent":
            return rank - 1
        if self.specials == "integer":
            return rank & ((1 << self.bits) - 1)
        keeps_sign = rank != 0 or self.specials != "fnuz"
        negative = keeps_sign and math.copysign(1.0, value) < 0
        return abs(rank) | (negative << (self.bits - 1))

    def neighbours(self, value: float) -> tuple[float, float]:
        """The nearest values strictly below and strictly above `value`.

        Beyond the ends of the ladder there is infinity in the formats that have it, and NaN ("nothing") in the others.

        >>> E4M3.neighbours(3.14), E4M3.neighbours(448)
        ((3.0, 3.25), (416.0, nan))
        """
        value = float(value)
        if math.isnan(value):
            return math.nan, math.nan
        if math.isinf(value):
            return (math.nan, self.min) if value < 0 else (self.max, math.nan)
        below = min(self._rank(value, math.ceil) - 1, self._top)
        above = max(self._rank(value, math.floor) + 1, self._bottom)
        nothing = math.inf if self.has_infinity else math.nan
        return (
            self._height(below) if below >= self._bottom else -nothing,
            self._height(above) if above <= self._top else nothing,
        )

    def bits_of(self, code: int) -> str:
        """The bits of a code, its fields parted by dots.

        >>> E4M3.bits_of(0x7E)
        '0.1111.110'
        """
        self.decode(code)
        digits, fields, start = f"{code:0{self.bits}b}", [], 0
        for width in (int(self.signed), self.exponent_bits, self.mantissa_bits):
            fields.append(digits[start : start + width])
            start += width
        return ".".join(field for field in fields if field)

    def codes(self) -> list[int]:
        """All codes in order, for formats of at most 16 bits."""
        if self.bits > 16:
            raise FormatError(f"{self.name} has 2^{self.bits} codes: too many to list. List one of 16 bits or fewer.")
        return list(range(1 << self.bits))

    @property
    def _magnitude_mask(self) -> int:
        return (1 << (self.exponent_bits + self.mantissa_bits)) - 1

    @property
    def _top(self) -> int:
        """The rank of `max`."""
        taken = {"ieee": 1 << self.mantissa_bits, "fn": 1}.get(self.specials, 0)
        return self._magnitude_mask - taken

    @property
    def _bottom(self) -> int:
        """The rank of `min`. Rank 0 is zero, which e8m0 lacks, so there the rank is the code plus one."""
        if self.specials == "exponent":
            return 1
        return -self._top - (self.specials == "integer")

    def _height(self, rank: int) -> float:
        """The value of a rank; the integer scale has a single, subnormal, binade."""
        m, magnitude = self.mantissa_bits, abs(rank)
        if self.specials == "exponent":
            return math.ldexp(1.0, magnitude - 1 - self.bias)
        binade = 0 if self.specials == "integer" else max((magnitude >> m) - 1, 0)
        steps = magnitude - (binade << m)
        return math.copysign(math.ldexp(steps, binade + self.exponent_min - m), rank)

    def _rank(self, value: float, to_integer: Callable[[float], int]) -> int:
        """The rank of a finite value, rounded by `to_integer`; it may lie beyond the ends."""
        m = self.mantissa_bits
        if abs(value) > 2 * self.max:  # far outside: any rank beyond the end will do
            return int(math.copysign(self._top + 2, value))
        binade = max(math.frexp(value)[1] - 1 - self.exponent_min, 0) if value else 0
        steps = to_integer(math.ldexp(value, m - self.exponent_min - binade))
        return steps + int(math.copysign(binade << m, value))

    def _special(self, magnitude: int, negative: int) -> float:
        if self.has_infinity and magnitude == self._top + 1:
            return -math.inf if negative else math.inf
        return math.nan

    def _encode_special(self, value: float) -> int:
        """The code of a NaN or an infinity, and in e8m0 also of what is not positive."""
        if self.has_infinity and math.isinf(value):
            return (self._top + 1) | ((value < 0) << (self.bits - 1))
        if self.nan_code is None:
            raise FormatError(f"{self.name} has no code for {value}. Clean the value first, or use a format with NaN.")
        return self.nan_code


_ROWS = (
    Format("fp32", 8, 23, 127, "ieee", "master weights, accumulation, scales"),
    Format("tf32", 8, 10, 127, "ieee", "FP32 range, FP16 precision; inside tensor cores only"),
    Format("bf16", 8, 7, 127, "ieee", "FP32 range; what activations are stored in"),
    Format("fp16", 5, 10, 15, "ieee", "more precise than BF16, but overflows at 65504"),
    Format("e4m3", 4, 3, 7, "fn", "OCP FP8: weights, activations, KV cache"),
    Format("e5m2", 5, 2, 15, "ieee", "OCP FP8: gradients; the range of FP16"),
    Format("e4m3_ieee", 4, 3, 7, "ieee", "E4M3 with infinities: why some texts say 240"),
    Format("e4m3_fnuz", 4, 3, 8, "fnuz", "MI300: half the value of the OCP code"),
    Format("e5m2_fnuz", 5, 2, 16, "fnuz", "MI300: half the value of the OCP code"),
    Format("e3m2", 3, 2, 3, "finite", "OCP FP6"),
    Format("e2m3", 2, 3, 1, "finite", "OCP FP6"),
    Format("e2m1", 2, 1, 1, "finite", "OCP FP4"),
    Format("e8m0", 8, 0, 127, "exponent", "scales of 1x32 tiles: powers of two only"),
    Format("int8", 0, 7, 0, "integer", "evenly spaced; relative step shown for the top binade"),
    Format("int4", 0, 3, 0, "integer", "evenly spaced; relative step shown for the top binade"),
)

FORMATS: dict[str, Format] = {row.name: row for row in _ROWS}
E4M3 = FORMATS["e4m3"]
E5M2 = FORMATS["e5m2"]
COMPUTE = ("e4m3", "e5m2")

_TORCH_NAMES = {
    "fp32": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
    "e4m3": "float8_e4m3fn",
    "e5m2": "float8_e5m2",
    "e4m3_fnuz": "float8_e4m3fnuz",
    "e5m2_fnuz": "float8_e5m2fnuz",
    "e8m0": "float8_e8m0fnu",
    "int8": "int8",
}
_ALIASES = {"e4m3fn": "e4m3"} | {torch_name: name for name, torch_name in _TORCH_NAMES.items()}


def format_of(name: str | Format | torch.dtype) -> Format:
    """The row of a name (ours or torch's, in any case), of a torch type, or of a row itself; else `FormatError` with
    the nearest name.

    >>> format_of("E4M3").max
    448.0
    """
    if isinstance(name, Format):
        return name
    if isinstance(name, torch.dtype):
        found = next((row for row in _ROWS if row.dtype == name), None)
    else:
        found = FORMATS.get(_ALIASES.get(name.lower(), name.lower())) if isinstance(name, str) else None
    if found is None:
        raise FormatError(f"{name!r} is not a number format. {suggest(name, FORMATS)}")
    return found
