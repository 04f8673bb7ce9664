"""Formats against two independent implementations (torch and ml_dtypes), and against their own definition."""

from __future__ import annotations

import itertools
import math

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fp8.errors import FormatError, Fp8Error
from fp8.formats import COMPUTE, E4M3, E5M2, FORMATS, Format, format_of

ML_DTYPES: dict[str, type] = {
    "fp16": np.float16,
    "bf16": ml_dtypes.bfloat16,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e4m3_ieee": ml_dtypes.float8_e4m3,
    "e4m3_fnuz": ml_dtypes.float8_e4m3fnuz,
    "e5m2_fnuz": ml_dtypes.float8_e5m2fnuz,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e8m0": ml_dtypes.float8_e8m0fnu,
    "int8": np.int8,
    "int4": ml_dtypes.int4,
}
SMALL = [row for row in FORMATS.values() if row.bits <= 8]
by_name = pytest.mark.parametrize("name", ML_DTYPES)
small = pytest.mark.parametrize("row", SMALL, ids=lambda row: row.name)


def same(a: float, b: float) -> bool:
    """Equal as bits would be: NaN equals NaN, and -0 is not 0."""
    return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))


def storage(row: Format) -> type:
    return np.uint16 if row.bits > 8 else np.uint8


def reference_values(row: Format) -> np.ndarray:
    codes = np.array(row.codes(), dtype=storage(row))
    if row.name == "int4":  # stored sign-extended
        codes = ((codes.astype(np.int8) ^ 8) - 8).astype(np.uint8)
    with np.errstate(invalid="ignore"):  # signalling NaNs
        return codes.view(ML_DTYPES[row.name]).astype(np.float64)


@by_name
def test_every_code_decodes_as_in_ml_dtypes(name: str) -> None:
    row = FORMATS[name]
    expected = reference_values(row)
    wrong = [c for c in row.codes() if not same(row.decode(c), float(expected[c]))]
    assert wrong == []


@pytest.mark.parametrize("name", [*COMPUTE, "e4m3_fnuz", "e5m2_fnuz", "e8m0"])
def test_every_code_decodes_as_in_torch(name: str) -> None:
    row = FORMATS[name]
    assert row.dtype is not None
    expected = torch.arange(256, dtype=torch.uint8).view(row.dtype).to(torch.float32).tolist()
    assert all(same(row.decode(code), value) for code, value in enumerate(expected))


def hard_values(row: Format) -> np.ndarray:
    """Every value, every midpoint and the floats just beside it, of both signs, and random ones; none beyond max.

    They are FP32, since `ml_dtypes` casts an FP64 through FP32 and so rounds it twice.
    """
    grid = sorted({row.decode(c) for c in row.codes()[:: 7 if row.bits > 8 else 1]} - {math.inf, -math.inf})
    finite = np.array([v for v in grid if math.isfinite(v)])
    middle = (finite[:-1] / 2 + finite[1:] / 2).astype(np.float32)
    beside = [np.nextafter(middle, np.float32(np.inf)), np.nextafter(middle, np.float32(-np.inf))]
    random = np.random.default_rng(0).standard_normal(2000) * np.exp2(np.random.default_rng(1).uniform(-20, 9, 2000))
    values = np.concatenate([finite, middle, *beside, random]).astype(np.float32)
    floor = 2.0**-126 if row.specials == "exponent" else 0.0  # ml_dtypes rounds e8m0 up below, where FP32 is subnormal
    return values[(values != 0) & (np.abs(values) <= row.max) & (values >= row.min) & (np.abs(values) > floor)]


@pytest.mark.parametrize("name", [name for name in ML_DTYPES if not name.startswith("int")])
def test_encode_agrees_with_ml_dtypes(name: str) -> None:
    row = FORMATS[name]
    values = hard_values(row)
    expected = values.astype(ML_DTYPES[name]).view(storage(row))
    wrong = [(v, row.encode(v), int(c)) for v, c in zip(values.tolist(), expected, strict=True) if row.encode(v) != c]
    assert wrong == []


@small
def test_a_code_survives_decode_and_encode(row: Format) -> None:
    for code in row.codes():
        value = row.decode(code)
        assert row.encode(value) == (row.nan_code if math.isnan(value) else code)


@pytest.mark.parametrize(
    ("value", "e4m3", "e5m2"),
    [
        (0.0, 0x00, 0x00),
        (-0.0, 0x80, 0x80),
        (-1e-30, 0x80, 0x80),  # underflow keeps its sign
        (448, 0x7E, 0x5F),
        (449, 0x7E, 0x5F),
        (464, 0x7E, 0x5F),  # the tie to what would be 480
        (465, 0x7E, 0x5F),  # torch up to 2.11 says NaN here
        (-1e300, 0xFE, 0xFB),
        (57344, 0x7E, 0x7B),
        (61440, 0x7E, 0x7B),  # the tie to what would be 65536
        (2**-10, 0x00, 0x14),  # half of E4M3's smallest: ties to even
        (3 * 2**-10, 0x02, 0x1A),
        (2**-17, 0x00, 0x00),
        (math.inf, 0x7F, 0x7C),
        (-math.inf, 0x7F, 0xFC),
        (math.nan, 0x7F, 0x7F),
        (-math.nan, 0x7F, 0x7F),
    ],
)
def test_hard_values(value: float, e4m3: int, e5m2: int) -> None:
    assert (E4M3.encode(value), E5M2.encode(value)) == (e4m3, e5m2)


@pytest.mark.parametrize(
    ("name", "most", "least", "normal", "subnormal", "per_binade", "step", "binades"),
    [
        ("fp32", 3.4028234663852886e38, -3.4028234663852886e38, 2.0**-126, 2.0**-149, 2**23, 2.0**-23, 277),
        ("tf32", 2.0**128 - 2.0**117, -(2.0**128 - 2.0**117), 2.0**-126, 2.0**-136, 1024, 2.0**-10, 264),
        ("bf16", 2.0**128 - 2.0**120, -(2.0**128 - 2.0**120), 2.0**-126, 2.0**-133, 128, 2.0**-7, 261),
        ("fp16", 65504, -65504, 2.0**-14, 2.0**-24, 1024, 2.0**-10, 40),
        ("e4m3", 448, -448, 2.0**-6, 2.0**-9, 8, 0.125, 18),
        ("e5m2", 57344, -57344, 2.0**-14, 2.0**-16, 4, 0.25, 32),
        ("e4m3_ieee", 240, -240, 2.0**-6, 2.0**-9, 8, 0.125, 17),
        ("e4m3_fnuz", 240, -240, 2.0**-7, 2.0**-10, 8, 0.125, 18),
        ("e5m2_fnuz", 57344, -57344, 2.0**-15, 2.0**-17, 4, 0.25, 33),
        ("e3m2", 28, -28, 0.25, 0.0625, 4, 0.25, 9),
        ("e2m3", 7.5, -7.5, 1, 0.125, 8, 0.125, 6),
        ("e2m1", 6, -6, 1, 0.5, 2, 0.5, 4),
        ("e8m0", 2.0**127, 2.0**-127, 2.0**-127, 2.0**-127, 1, 1, 255),
        ("int8", 127, -128, 1, 1, 64, 2.0**-6, 7),
        ("int4", 7, -8, 1, 1, 4, 0.25, 3),
    ],
)
def test_limits(name, most, least, normal, subnormal, per_binade, step, binades) -> None:
    row = FORMATS[name]
    assert (row.max, row.min, row.smallest_normal, row.smallest_subnormal) == (most, least, normal, subnormal)
    assert (row.values_per_binade, row.relative_step, row.binades) == (per_binade, step, binades)


def test_every_row_is_tested_and_the_limits_agree_with_torch() -> None:
    assert list(FORMATS) == [row.name for row in FORMATS.values()]
    assert set(FORMATS) - set(ML_DTYPES) == {"fp32", "tf32"}
    for row in FORMATS.values():
        if row.dtype is not None:
            info = torch.iinfo(row.dtype) if row.name == "int8" else torch.finfo(row.dtype)
            assert (row.max, row.min, row.bits) == (info.max, info.min, info.bits)


def test_fp32_and_tf32_decode_by_their_bits() -> None:
    for code in (0, 1, 0x007FFFFF, 0x00800000, 0x3F800001, 0x7F7FFFFF, 0x80000001, 0xC2F70000, 0x7F800000, 0xFF800000):
        assert same(FORMATS["fp32"].decode(code), float(np.uint32(code).view(np.float32)))
        assert same(FORMATS["tf32"].decode(code >> 13), float(np.uint32(code & 0xFFFFE000).view(np.float32)))


finite = st.floats(allow_nan=False, allow_infinity=False)
rows = st.sampled_from(list(FORMATS.values()))


@given(rows, finite)
def test_encode_finds_the_nearest_value(row: Format, value: float) -> None:
    if not row.signed and value <= 0:
        return
    got = row.decode(row.encode(value))
    clamped = min(max(value, row.min), row.max)
    below, above = row.neighbours(got)
    assert all(abs(got - clamped) <= abs(other - clamped) for other in (below, above) if math.isfinite(other))


@small
def test_ties_go_to_the_even_code(row: Format) -> None:
    if row.specials == "exponent":  # no mantissa, so there is no even one: ties go up
        assert row.encode(1.5) == row.encode(2.0)
        return
    values = sorted({v for v in map(row.decode, row.codes()) if math.isfinite(v)})
    for below, above in itertools.pairwise(values):
        code = row.encode((below + above) / 2)
        assert code % 2 == 0
        assert row.decode(code) in (below, above)


@given(rows, finite)
def test_neighbours_are_adjacent(row: Format, value: float) -> None:
    below, above = row.neighbours(value)
    if math.isfinite(below):
        assert below < value and any(same(row.neighbours(below)[1], next_one) for next_one in (value + 0.0, above))
    if math.isfinite(above):
        assert above > value and any(same(row.neighbours(above)[0], next_one) for next_one in (value + 0.0, below))


@given(st.sampled_from(SMALL), finite, finite)
def test_encode_is_monotone_and_symmetric(row: Format, a: float, b: float) -> None:
    if row.specials in ("exponent", "integer"):
        return
    low, high = sorted((a, b))
    assert row.decode(row.encode(low)) <= row.decode(row.encode(high))
    assert abs(row.decode(row.encode(-a))) == abs(row.decode(row.encode(a)))


@small
def test_neighbours_walk_the_whole_ladder(row: Format) -> None:
    values = sorted({v for v in map(row.decode, row.codes()) if math.isfinite(v)})
    assert all(row.neighbours(a)[1] == b and row.neighbours(b)[0] == a for a, b in itertools.pairwise(values))
    end = math.inf if row.has_infinity else math.nan
    assert same(row.neighbours(values[-1])[1], end) and same(row.neighbours(values[0])[0], -end)
    assert row.neighbours(math.inf)[0] == row.max and row.neighbours(-math.inf)[1] == row.min
    assert all(map(math.isnan, row.neighbours(math.nan)))


def test_bits_are_drawn_by_field() -> None:
    assert E4M3.bits_of(0x7E) == "0.1111.110"
    assert E5M2.bits_of(0xFC) == "1.11111.00"
    assert FORMATS["e8m0"].bits_of(127) == "01111111"
    assert FORMATS["int4"].bits_of(0b1000) == "1.000"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["e3m2", "e2m3", "e2m1", "int8", "int4"])
def test_a_format_without_nan_refuses_rather_than_hides(name: str, value: float) -> None:
    with pytest.raises(FormatError, match="has no code for"):
        FORMATS[name].encode(value)


def test_e8m0_has_no_zero_and_no_sign() -> None:
    row = FORMATS["e8m0"]
    assert [row.encode(v) for v in (0.0, -0.0, -1.0, math.inf, math.nan)] == [0xFF] * 5
    assert (row.encode(1.0), row.encode(1e-300), row.encode(1e300)) == (127, 0, 254)


def test_format_of() -> None:
    assert format_of("e4m3") is format_of("E4M3") is format_of(E4M3) is format_of(torch.float8_e4m3fn) is E4M3
    with pytest.raises(FormatError, match="Did you mean 'e4m3'"):
        format_of("e4m33")
    for wrong in ("", "float", None, 8, torch.complex64):
        with pytest.raises(Fp8Error):
            format_of(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("code", [-1, 256])
def test_a_code_outside_the_format_is_refused(code: int) -> None:
    with pytest.raises(FormatError, match="outside"):
        E4M3.decode(code)
    with pytest.raises(FormatError, match="outside"):
        E4M3.bits_of(code)


def test_too_many_codes_to_list() -> None:
    assert len(FORMATS["fp16"].codes()) == 65536
    with pytest.raises(FormatError, match="too many"):
        FORMATS["fp32"].codes()


@pytest.mark.parametrize(("given", "name"), [("float8_e4m3fn", "e4m3"), ("E4M3FN", "e4m3"), ("bfloat16", "bf16")])
def test_torchs_names_are_understood(given: str, name: str) -> None:
    """The nearest of our names to "e4m3fn" would be MI300's e4m3_fnuz, half the value."""
    assert format_of(given).name == name
