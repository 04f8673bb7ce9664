"""Quantizing is a pure function of the bits of x, the tile, the format and the rounding: held here, element by element,
against a slow definition in rational arithmetic, and in bulk against two independent implementations."""

from __future__ import annotations

import math
import sys
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fp8
from fp8.errors import FormatError, RecipeError, ShapeError, TensorError, TileError
from fp8.formats import Format, format_of
from fp8.tile import Tile

FORMATS = ("e4m3", "e5m2")
TILES = ("tensor", "row", "1x128", "128x128", "1x32")
ML_DTYPES = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}
INF, NAN = math.inf, math.nan
TINY = 2.0**-149  # the smallest FP32 subnormal
LARGEST = torch.finfo(torch.float32).max

formats = pytest.mark.parametrize("name", FORMATS)
tiles = pytest.mark.parametrize("tile", TILES)
scale_roundings = pytest.mark.parametrize("scale_rounding", ["power_of_two", "none"])

# x under scale 1 -> code. Ties lie halfway between two codes and go to the one whose last bit is 0.
HARD = {
    "e4m3": [
        (0.0, 0x00), (-0.0, 0x80), (TINY, 0x00), (-TINY, 0x80), (1e-40, 0x00),
        (2.0**-10, 0x00), (2.0**-10 + 2.0**-33, 0x01), (-(2.0**-10), 0x80),
        (2.0**-9, 0x01), (1.5 * 2.0**-9, 0x02), (2.5 * 2.0**-9, 0x02), (3.5 * 2.0**-9, 0x04),
        (7.0 * 2.0**-9, 0x07), (7.5 * 2.0**-9, 0x08), (2.0**-6, 0x08),
        (1.0, 0x38), (1.0625, 0x38), (1.0626, 0x39), (1.1875, 0x3A), (-1.0625, 0xB8), (1.9375, 0x40),
        (300.0, 0x79), (416.0, 0x7D), (432.0, 0x7E), (431.9, 0x7D),
        (447.0, 0x7E), (448.0, 0x7E), (449.0, 0x7E), (464.0, 0x7E), (465.0, 0x7E), (-465.0, 0xFE), (480.0, 0x7E),
        (1e9, 0x7E), (-1e9, 0xFE), (LARGEST, 0x7E), (-LARGEST, 0xFE),
        (INF, 0x7F), (-INF, 0x7F), (NAN, 0x7F), (-NAN, 0x7F),
    ],
    "e5m2": [
        (0.0, 0x00), (-0.0, 0x80), (TINY, 0x00), (-1e-40, 0x80),
        (2.0**-17, 0x00), (2.0**-17 + 2.0**-40, 0x01), (2.0**-16, 0x01), (1.5 * 2.0**-16, 0x02),
        (2.5 * 2.0**-16, 0x02), (3.5 * 2.0**-16, 0x04), (2.0**-14, 0x04),
        (1.0, 0x3C), (1.125, 0x3C), (1.126, 0x3D), (1.375, 0x3E), (-1.375, 0xBE), (1.875, 0x40),
        (448.0, 0x5F), (449.0, 0x5F), (464.0, 0x5F), (465.0, 0x5F), (480.0, 0x60),
        (57344.0, 0x7B), (57345.0, 0x7B), (61440.0, 0x7B), (61441.0, 0x7B), (65536.0, 0x7B), (-65536.0, 0xFB),
        (LARGEST, 0x7B), (-LARGEST, 0xFB), (INF, 0x7C), (-INF, 0xFC), (NAN, 0x7F), (-NAN, 0x7F),
    ],
}  # fmt: skip


def bytes_of(q: fp8.Quantized) -> Tensor:
    return q.codes.view(torch.uint8)


# --------------------------------------------------------------------------- the slow definition


def expected_scale(amax: float, row: Format, scale_rounding: str) -> float:
    """The smallest power of two, not below 2^-126, under which the amax fits; or the IEEE quotient, clamped."""
    if amax == 0:
        return 1.0
    if scale_rounding == "none":
        return float(np.clip(np.float32(amax) / np.float32(row.max), np.float32(2.0**-126), np.float32(2.0**126)))
    k = max(-126, math.frexp(amax)[1] - 20)
    while Fraction(amax) / Fraction(2) ** k > Fraction(row.max):
        k += 1
    return 2.0**k


def expected_code(x: float, scale: float, row: Format) -> int:
    """NaN and Inf are read from x; a finite quotient that overflowed FP32 is clipped."""
    if not math.isfinite(x):
        return row.encode(x)
    with np.errstate(over="ignore"):
        v = float(np.float32(x) / np.float32(scale))
    return row.encode(math.copysign(min(abs(v), row.max), v))


def expected(x: Tensor, row: Format, tile: Tile, scale_rounding: str) -> tuple[list[list[int]], list[list[float]]]:
    values = x.float().tolist()
    rows, cols = x.shape
    height, width = tile.shape(rows, cols)
    down, across = tile.scale_shape(rows, cols)
    scales = [[1.0] * across for _ in range(down)]
    for i in range(down):
        for j in range(across):
            inside = [v for r in values[i * height : (i + 1) * height] for v in r[j * width : (j + 1) * width]]
            amax = max((abs(v) for v in inside if math.isfinite(v)), default=0.0)
            scales[i][j] = expected_scale(amax, row, scale_rounding)
    codes = [
        [expected_code(v, scales[i // height][j // width], row) for j, v in enumerate(r)] for i, r in enumerate(values)
    ]
    return codes, scales


def hard_matrix(rows: int, cols: int) -> Tensor:
    """Random magnitudes over many binades, with the hard values of both formats strewn in."""
    generator = torch.Generator().manual_seed(rows * 1000 + cols)
    x = (
        torch.randn(rows, cols, generator=generator)
        * torch.randint(-18, 9, (rows, 1), generator=generator).float().exp2()
    )
    hard = torch.tensor([v for name in FORMATS for v, _ in HARD[name] if abs(v) < 1e30 or not math.isfinite(v)])
    where = torch.randperm(rows * cols, generator=generator)[: len(hard)]
    x.view(-1)[where] = hard[: len(where)]
    if rows > 2:
        x[0] = 0.0
        x[1] = torch.tensor([NAN, INF, -INF]).repeat(cols)[:cols]
        x[2] = TINY
    return x


# --------------------------------------------------------------------------- codes


@formats
def test_hard_values_have_these_codes(name: str, device: torch.device) -> None:
    x = torch.tensor([[v for v, _ in HARD[name]]], device=device)
    q = fp8.quantize(x, name, scale=torch.ones(1, 1, device=device))
    wrong = [(v, hex(c), hex(got)) for (v, c), got in zip(HARD[name], bytes_of(q)[0].tolist(), strict=True) if c != got]
    assert wrong == []


@formats
@tiles
@scale_roundings
@pytest.mark.parametrize("shape", [(1, 1), (5, 131), (131, 37), (3, 300)])
def test_codes_and_scales_equal_the_slow_definition(
    name: str, tile: str, scale_rounding: str, shape: tuple[int, int]
) -> None:
    x = hard_matrix(*shape)
    q = fp8.quantize(x, name, tile, scale_rounding)
    codes, scales = expected(x, format_of(name), Tile.of(tile), scale_rounding)
    assert q.scale.tolist() == scales
    assert bytes_of(q).tolist() == codes


@formats
@tiles
@given(data=st.data())
@settings(max_examples=25)
def test_any_small_matrix_equals_the_slow_definition(name: str, tile: str, data: st.DataObject) -> None:
    rows, cols = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 40)))
    floats = st.floats(width=32) | st.sampled_from([v for v, _ in HARD[name]])
    x = torch.tensor(data.draw(st.lists(floats, min_size=rows * cols, max_size=rows * cols))).view(rows, cols)
    scale_rounding = data.draw(st.sampled_from(["power_of_two", "none"]))
    q = fp8.quantize(x, name, tile, scale_rounding)
    codes, scales = expected(x, format_of(name), Tile.of(tile), scale_rounding)
    assert q.scale.tolist() == scales
    assert bytes_of(q).tolist() == codes


@formats
def test_ten_million_floats_agree_with_ml_dtypes_and_torch(name: str) -> None:
    """Five million random bit patterns (NaN and Inf among them), and five million numbers within the range. Beyond
    the largest code the others overflow (to NaN or Inf) where we saturate; NaN they may write with a sign."""
    row = format_of(name)
    random = np.random.default_rng(8)
    one, span = torch.ones(1, 1), math.log2(row.max) + 1
    for chunk in range(10):
        if chunk % 2:
            x = random.integers(0, 1 << 32, 1_000_000, dtype=np.uint32).view(np.float32)
        else:
            size = np.exp2(random.uniform(-18, span, 1_000_000)) * random.choice([-1, 1], 1_000_000)
            x = size.astype(np.float32)
        ours = bytes_of(fp8.quantize(torch.from_numpy(x).view(1000, 1000), name, scale=one)).numpy().reshape(-1)
        with np.errstate(invalid="ignore", over="ignore"):
            theirs = x.astype(ML_DTYPES[name]).view(np.uint8)
        torchs = torch.from_numpy(x).to(row.dtype).view(torch.uint8).numpy()
        inside = np.abs(x) <= row.max
        assert np.array_equal(ours[inside], theirs[inside])
        assert np.array_equal(ours[inside], torchs[inside])
        beyond = np.isfinite(x) & ~inside
        top = row.encode(row.max)
        assert np.array_equal(ours[beyond], np.where(x[beyond] < 0, top | 0x80, top))
        assert (ours[np.isnan(x)] == 0x7F).all()


@formats
@tiles
def test_bf16_and_fp16_are_quantized_as_the_fp32_numbers_they_are(name: str, tile: str) -> None:
    x = hard_matrix(5, 131)
    for dtype in (torch.bfloat16, torch.float16):
        narrow = x.to(dtype)
        short, wide = fp8.quantize(narrow, name, tile), fp8.quantize(narrow.float(), name, tile)
        assert torch.equal(bytes_of(short), bytes_of(wide))
        assert torch.equal(short.scale, wide.scale)


@formats
@tiles
@scale_roundings
def test_quantizing_what_was_quantized_changes_nothing(name: str, tile: str, scale_rounding: str) -> None:
    x = torch.randn(40, 300)
    q = fp8.quantize(x, name, tile, scale_rounding)
    again = fp8.quantize(q.dequantize(), name, tile, scale_rounding, scale=q.scale)
    assert torch.equal(bytes_of(again), bytes_of(q))


@formats
@pytest.mark.parametrize("shift", [-40, -1, 1, 7, 60])
def test_a_power_of_two_moves_into_the_scale(name: str, shift: int) -> None:
    """x and x * 2^k have the same codes, and scales that differ by 2^k."""
    x = torch.randn(7, 200)
    q, moved = fp8.quantize(x, name, "1x128"), fp8.quantize(x * 2.0**shift, name, "1x128")
    assert torch.equal(bytes_of(q), bytes_of(moved))
    assert torch.equal(q.scale * 2.0**shift, moved.scale)


@formats
def test_the_rounding_error_is_within_half_a_step(name: str) -> None:
    """|x - code * scale| <= |x| * 2^-(m + 1), or half the smallest subnormal times the scale."""
    row = format_of(name)
    x = torch.randn(300, 300) * torch.randn(300, 1).exp()
    q = fp8.quantize(x, name)
    bound = torch.maximum(x.abs() * 2.0 ** -(row.mantissa_bits + 1), row.smallest_subnormal / 2 * q.scale)
    assert bool(((q.dequantize() - x).abs() <= bound).all())


# --------------------------------------------------------------------------- scales


@formats
def test_the_power_of_two_is_the_smallest_that_fits(name: str) -> None:
    """E4M3: amax 448 needs 1, the next float above 448 needs 2, 224 needs 1/2. Around every power of two and 1.75 times
    it, where the formula carries; subnormal amaxes get 2^-126, the smallest scale there is."""
    row = format_of(name)
    amaxes = [TINY, 1e-40, LARGEST]
    for e in range(-126, 128):
        for m in (1.0, 1.5, 1.75, 1.9375):
            middle = np.float32(m * 2.0**e)
            amaxes += [
                float(v)
                for v in (middle, np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(np.inf)))
            ]
    x = torch.tensor(amaxes).view(-1, 1)
    q = fp8.quantize(x, name, "row")
    assert q.scale.view(-1).tolist() == [expected_scale(a, row, "power_of_two") for a in amaxes]


@given(st.floats(min_value=TINY, max_value=LARGEST, width=32), st.sampled_from(FORMATS))
def test_any_amax_fits_under_its_scale_and_not_under_half_of_it(amax: float, name: str) -> None:
    row = format_of(name)
    scale = Fraction(fp8.quantize(torch.tensor([[amax]]), name).scale.item())
    assert Fraction(amax) / scale <= Fraction(row.max)
    assert Fraction(amax) / (scale / 2) > Fraction(row.max) or scale == Fraction(2) ** -126


@formats
@tiles
def test_a_tile_with_nothing_finite_has_scale_one(name: str, tile: str) -> None:
    for value in (0.0, -0.0, NAN, INF):
        q = fp8.quantize(torch.full((3, 200), value), name, tile)
        assert bool((q.scale == 1).all())


def test_padding_and_neighbours_do_not_enter_a_tile() -> None:
    """Row 0: 128 ones, then one 896: scales 2^-8 (1 / 2^-8 = 256) and 2. Row 1 is zero: scale 1."""
    x = torch.zeros(2, 129)
    x[0, :128], x[0, 128] = 1.0, 896.0
    assert fp8.quantize(x, tile=(1, 128)).scale.tolist() == [[2.0**-8, 2.0], [1.0, 1.0]]


def test_a_stale_scale_clips_and_says_so() -> None:
    """Scale 1: 1000 is clipped to 448, 2^-11 is flushed, one of eight each; 448 is not clipped, and what was zero
    not flushed. 1e38 overflows FP32 under a scale of 2^-20: clipped too."""
    x = torch.tensor([[1000.0, 2.0**-11, 1.0, NAN, 448.0, -448.0, 0.0, -0.0]])
    q = fp8.quantize(x, scale=torch.ones(1, 1), statistics=True)
    assert q.dequantize()[0, :3].tolist() == [448.0, 0.0, 1.0]
    assert q.statistics is not None
    told = (q.statistics.amax, q.statistics.saturated, q.statistics.flushed, q.statistics.non_finite)
    assert [float(v) for v in told] == [1000.0, 0.125, 0.125, 1.0]
    assert bytes_of(fp8.quantize(torch.tensor([[1e38]]), scale=torch.full((1, 1), 2.0**-20))).item() == 0x7E


# --------------------------------------------------------------------------- shapes and orientations


@tiles
def test_leading_dimensions_are_rows(tile: str) -> None:
    x = torch.randn(2, 3, 5, 140)
    q, flat = fp8.quantize(x, tile=tile), fp8.quantize(x.view(30, 140), tile=tile)
    assert q.shape == x.shape
    assert torch.equal(bytes_of(q).view(30, 140), bytes_of(flat))
    assert torch.equal(q.dequantize(), flat.dequantize().view(x.shape))


@tiles
@pytest.mark.parametrize("shape", [(), (7,), (0,), (0, 5), (5, 0), (2, 0, 3)])
def test_scalars_vectors_and_nothing_quantize(tile: str, shape: tuple[int, ...]) -> None:
    x = torch.full(shape, 3.0)
    q = fp8.quantize(x, tile=tile)
    assert torch.equal(q.dequantize(), x)
    if len(shape) == 2:
        _, turned = fp8.quantize_both(x, tile=tile)
        assert turned.shape == x.t().shape


@formats
@tiles
@scale_roundings
@pytest.mark.parametrize("shape", [(5, 131), (131, 5), (129, 130)])
def test_both_orientations_are_the_two_quantizations(
    name: str, tile: str, scale_rounding: str, shape: tuple[int, int]
) -> None:
    x = hard_matrix(*shape)
    straight, turned = fp8.quantize_both(x, name, tile, scale_rounding)
    for both, one in (
        (straight, fp8.quantize(x, name, tile, scale_rounding)),
        (turned, fp8.quantize(x.t(), name, tile, scale_rounding)),
    ):
        assert torch.equal(bytes_of(both), bytes_of(one))
        assert torch.equal(both.scale, one.scale)
        assert both.codes.is_contiguous()
    if Tile.of(tile).transposes:
        assert torch.equal(bytes_of(turned), bytes_of(straight).t())


def test_a_given_scale_serves_both_orientations() -> None:
    x, scale = torch.randn(6, 9), torch.full((1, 1), 0.25)
    straight, turned = fp8.quantize_both(x, scale=scale)
    assert torch.equal(straight.dequantize(), turned.dequantize().t())
    assert straight.scale.item() == turned.scale.item() == 0.25


def test_a_given_scale_may_be_any_number_for_every_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """`power_of_two` tells a kernel that the reciprocal of the scale is exact (it makes it from the bits), so it must
    not be told so of a scale that somebody gave: 0.3 has no exact reciprocal."""
    told, room = [], sys.modules["fp8.quantize"]

    def listening(right):  # type: ignore[no-untyped-def]
        return lambda *args, **keywords: told.append(args[4]) or right(*args, **keywords)

    for name in ("run_quantize", "run_quantize_both"):
        monkeypatch.setattr(room, name, listening(getattr(room, name)))
    x = torch.randn(4, 8)
    for scale in (torch.full((1, 1), 0.3), None):
        fp8.quantize(x, scale=scale)
        fp8.quantize_both(x, scale=scale)
    assert told == [False, False, True, True]


def test_strides_do_not_matter() -> None:
    x = torch.randn(64, 130)
    for view in (x[::2, 1::3], x.t(), x[:, 5:100]):
        assert torch.equal(bytes_of(fp8.quantize(view)), bytes_of(fp8.quantize(view.contiguous())))


# --------------------------------------------------------------------------- what is refused


def test_flushed_subnormals_are_refused() -> None:
    """Under FTZ a scale of 2^-126 and an amax of 1e-40 would read as zero: other codes, so an error instead."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormals")
    try:
        with pytest.raises(TensorError, match="set_flush_denormal"):
            fp8.quantize(torch.ones(2, 2))
    finally:
        torch.set_flush_denormal(False)


def test_a_mistake_is_named_and_the_way_out_shown() -> None:
    x, scale = torch.ones(4, 300), torch.ones(1, 1)
    cases = [
        (TensorError, "cast it to float32 yourself", lambda: fp8.quantize(x.double())),
        (TensorError, "not int64", lambda: fp8.quantize(x.long())),
        (TensorError, "not complex64", lambda: fp8.quantize(x.to(torch.complex64))),
        (TensorError, "not float8_e4m3fn", lambda: fp8.quantize(fp8.quantize(x).codes)),
        (TensorError, "torch.as_tensor", lambda: fp8.quantize([1.0, 2.0])),  # type: ignore[arg-type]
        (FormatError, "Did you mean 'e4m3'", lambda: fp8.quantize(x, "e4m4")),
        (FormatError, "e4m3 and e5m2", lambda: fp8.quantize(x, "e2m1")),
        (TileError, "no scale layout has the tile", lambda: fp8.quantize(x, tile=(1, 64))),
        (TileError, "Did you mean '128x128'", lambda: fp8.quantize(x, tile="128x12")),
        (RecipeError, "Did you mean 'power_of_two'", lambda: fp8.quantize(x, scale_rounding="power_of_to")),
        (RecipeError, "Did you mean 'stochastic'", lambda: fp8.quantize(x, rounding="stochastics", seed=1)),
        (TensorError, "needs a seed", lambda: fp8.quantize(x, rounding="stochastic")),
        (ShapeError, r"\(4, 3\)", lambda: fp8.quantize(x, tile=(1, 128), scale=scale)),
        (TensorError, "torch.as_tensor", lambda: fp8.quantize_both([[1.0]])),
        (TensorError, "use x.to_dense", lambda: fp8.quantize(x.to_sparse())),
        (TensorError, r"torch\.full\(\(1, 1\)", lambda: fp8.quantize(x, scale=0.5)),
        (TensorError, "Got 1.5", lambda: fp8.quantize(x, rounding="stochastic", seed=1.5)),
        (TensorError, "Got -1", lambda: fp8.quantize(x, rounding="stochastic", seed=-1)),
        (TileError, "no scale layout", lambda: fp8.quantize(x, tile=Tile(3, 5))),
        (ShapeError, "float32 scale", lambda: fp8.quantize(x, scale=scale.double())),
        (ShapeError, "needs a matrix", lambda: fp8.quantize_both(x.view(2, 2, 300))),
        (ShapeError, "only with tile 'tensor'", lambda: fp8.quantize_both(x, tile="row", scale=torch.ones(4, 1))),
    ]  # fmt: skip
    for error, words, call in cases:
        with pytest.raises(error, match=words):
            call()
