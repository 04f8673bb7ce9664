"""The exact product, held against rational arithmetic: nothing is lost before the roundings that the contract names."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

import fp8
from fp8.errors import BackendError, FormatError, Fp8Error, ShapeError, TensorError
from fp8.formats import format_of
from fp8.quantize.record import spread

PAIRS = [("e4m3", "e4m3"), ("e4m3", "e5m2"), ("e5m2", "e4m3"), ("e5m2", "e5m2")]
pairs = pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: "x".join(pair))


def round_to_float32(x: Fraction) -> float:
    """The FP32 number nearest to a rational, ties to even, by integer arithmetic alone."""
    if x == 0:
        return 0.0
    exponent = x.numerator.bit_length() - x.denominator.bit_length()
    exponent -= abs(x) < Fraction(2) ** exponent
    unit = Fraction(2) ** (max(exponent, -126) - 23)
    return float(round(x / unit) * unit)  # Python rounds a Fraction half to even


def quantized(values: Tensor, name: str = "e4m3", scale: float = 1.0) -> fp8.Quantized:
    """Codes of the values themselves under a scale that only dequantizes: what is multiplied is in plain sight."""
    return fp8.Quantized(
        values.to(format_of(name).dtype), torch.full((1, 1), scale), fp8.Tile.of("tensor"), format_of(name)
    )


def random_codes(rows: int, cols: int, name: str, seed: int) -> fp8.Quantized:
    """Finite codes, each bit pattern as likely as the others: magnitudes over the whole range of the format."""
    raw = torch.randint(0, 256, (rows, cols), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    row = format_of(name)
    codes = raw.view(row.dtype)
    codes = torch.where(codes.float().isfinite(), raw, 0x3C).view(row.dtype)
    return fp8.Quantized(codes, torch.ones(1, 1), fp8.Tile.of("tensor"), row)


def rational(q: fp8.Quantized) -> list[list[Fraction]]:
    return [[Fraction(v) for v in row] for row in q.matrix.double().tolist()]


def exact_sums(a: fp8.Quantized, b: fp8.Quantized) -> list[list[Fraction]]:
    """The sum of products of codes, without scales."""
    left, right = rational(a), rational(b)
    return [[sum((x * y for x, y in zip(r, s, strict=True)), Fraction(0)) for s in right] for r in left]


# --------------------------------------------------------------------------- the sum


@pairs
@pytest.mark.parametrize("depth", [1, 7, 96])
def test_a_product_is_the_rational_sum_rounded_once_to_fp32(pair: tuple[str, str], depth: int) -> None:
    a, b = random_codes(5, depth, pair[0], 1), random_codes(6, depth, pair[1], 2)
    expected = [[round_to_float32(x) for x in row] for row in exact_sums(a, b)]
    assert fp8.matmul(a, b, torch.float32).tolist() == expected


def test_a_sum_just_above_a_tie_is_rounded_up() -> None:
    """2^12 * 2^12 + 1 * 1 + 2^-16 * 2^-16 = 2^24 + 1 + 2^-32: 57 bits. FP64 drops the last one and would see the tie
    between 2^24 and 2^24 + 2, which goes to the even 2^24; nearest in FP32 is 2^24 + 2. With - 2^-32 it is 2^24."""
    row = torch.tensor([[2.0**12, 1.0, 2.0**-16]])
    below = torch.tensor([[2.0**12, 1.0, -(2.0**-16)]])
    a, up, down = quantized(row, "e5m2"), quantized(row, "e5m2"), quantized(below, "e5m2")
    assert (2.0**24 + 1.0 + 2.0**-32) == 2.0**24 + 1.0  # what FP64 sees
    assert fp8.matmul(a, up, torch.float32).item() == 2.0**24 + 2
    assert fp8.matmul(a, down, torch.float32).item() == 2.0**24


@pairs
def test_large_terms_that_cancel_leave_the_smallest_one(pair: tuple[str, str]) -> None:
    """max * max - max * max + smallest * smallest is smallest * smallest, 2^-18 for two E4M3, 2^-32 for two E5M2."""
    left, right = format_of(pair[0]), format_of(pair[1])
    a = quantized(torch.tensor([[left.max, left.smallest_subnormal, -left.max]]), pair[0])
    b = quantized(torch.tensor([[right.max, right.smallest_subnormal, right.max]]), pair[1])
    assert fp8.matmul(a, b, torch.float32).item() == left.smallest_subnormal * right.smallest_subnormal


@pairs
def test_k_beyond_2_to_the_17_is_exact_too(pair: tuple[str, str]) -> None:
    """Two runs of 2^17 of max * max and one smallest * smallest, then the same negated. The total is above 2^53
    of its smallest units, so FP64 alone loses the one term that does not cancel: it is the answer."""
    left, right = format_of(pair[0]), format_of(pair[1])
    run = 1 << 17
    x = torch.full((1, 4 * run + 1), left.max)
    x[:, 2 * run : 4 * run] = -left.max
    x[:, 0] = x[:, -1] = left.smallest_subnormal
    y = torch.full((1, 4 * run + 1), right.max)
    y[:, 0] = right.smallest_subnormal
    y[:, 2 * run] = 0.0
    y[:, -1] = 0.0
    result = fp8.matmul(quantized(x, pair[0]), quantized(y, pair[1]), torch.float32).item()
    assert result == left.smallest_subnormal * right.smallest_subnormal


def test_an_integer_sum_over_a_long_k() -> None:
    """2^17 + 1000 ones times ones: 132072."""
    ones = quantized(torch.ones(1, (1 << 17) + 1000))
    assert fp8.matmul(ones, ones, torch.float32).item() == 132072


@pairs
def test_the_bits_do_not_depend_on_threads_or_on_the_company_a_row_keeps(pair: tuple[str, str]) -> None:
    a, b = random_codes(33, 700, pair[0], 3), random_codes(40, 700, pair[1], 4)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = fp8.matmul(a, b, torch.float32)
        torch.set_num_threads(2)
        two = fp8.matmul(a, b, torch.float32)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, two)
    alone = fp8.Quantized(a.codes[7:8], a.scale, a.tile, a.format)
    assert torch.equal(fp8.matmul(alone, b, torch.float32), one[7:8])


@pairs
def test_infinities_and_nan_follow_ieee(pair: tuple[str, str]) -> None:
    """NaN anywhere in a row makes its outputs NaN; Inf * 2 is Inf, Inf * 0 and Inf - Inf are NaN (E5M2 only)."""
    inf, nan = float("inf"), float("nan")
    a = quantized(torch.tensor([[nan, 1.0], [2.0, 0.5], [2.0, -0.5]]), pair[0])
    rows = [[2.0, 0.25], [nan, 1.0]] + ([[inf, 0.25], [inf, inf], [-inf, 0.25]] if pair[1] == "e5m2" else [])
    b = quantized(torch.tensor(rows), pair[1])
    y = fp8.matmul(a, b, torch.float32)
    expected = a.codes.double() @ b.codes.double().t()
    assert torch.equal(y.double().nan_to_num(123.0), expected.nan_to_num(123.0))
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(fp8.matmul(b, a, torch.float32).isinf(), y.t().isinf())
    if pair[1] == "e5m2":
        zero = quantized(torch.tensor([[0.0, 1.0]]), pair[0])
        assert fp8.matmul(zero, b, torch.float32)[0, 2].isnan()


# --------------------------------------------------------------------------- scales, bias, output type


def test_scales_leave_the_sum_and_are_multiplied_first() -> None:
    """acc = 3 * 3 = 9, scales 0.1 and 0.3 in FP32: alpha = RN(0.1 * 0.3), y = RN(9 * alpha)."""
    a, b = quantized(torch.tensor([[3.0]]), scale=0.1), quantized(torch.tensor([[3.0]]), scale=0.3)
    alpha = np.float32(0.1) * np.float32(0.3)
    assert fp8.matmul(a, b, torch.float32).item() == np.float32(9) * alpha


def test_row_scales_belong_to_rows_of_each_operand() -> None:
    x, w = torch.tensor([[1.0, 1.0], [4.0, 4.0]]), torch.tensor([[2.0, 2.0], [0.5, 0.5], [1.0, 1.0]])
    a, b = fp8.quantize(x, tile="row"), fp8.quantize(w, tile="row")
    assert torch.equal(fp8.matmul(a, b, torch.float32), x @ w.t())


@pytest.mark.parametrize(
    "tiles", [("1x128", "128x128"), ("1x128", "1x128"), ("1x32", "1x32"), ("row", "1x128"), ("1x32", "tensor")]
)
@pytest.mark.parametrize("shape", [(3, 5, 128), (130, 131, 257), (2, 3, 40)])
def test_blocks_along_k_are_added_in_ascending_order_in_fp32(
    tiles: tuple[str, str], shape: tuple[int, int, int]
) -> None:
    """y = sum over blocks of RN(RN(scale_a * scale_b) * RN(partial)), each addition rounded to FP32."""
    m, n, k = shape
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(m, k, generator=generator) * torch.randn(m, k, generator=generator).exp2()
    w = torch.randn(n, k, generator=generator)
    a = fp8.quantize(x, tile=tiles[0], scale_rounding="none")
    b = fp8.quantize(w, tile=tiles[1], scale_rounding="none")
    width = min(q.tile.shape(*q.matrix.shape)[1] for q in (a, b))
    sa, sb = spread(a.scale, a.tile, m, k), spread(b.scale, b.tile, n, k)
    sa, sb = sa.expand(m, k), sb.expand(n, k)
    total = torch.zeros(m, n)
    for start in range(0, k, width):
        part = slice(start, start + width)
        partial = (a.codes[:, part].double() @ b.codes[:, part].double().t()).float()  # exact: E4M3, a short K
        total = total + partial * (sa[:, start : start + 1] * sb[:, start : start + 1].t())
    assert torch.equal(fp8.matmul(a, b, torch.float32), total)


def test_the_bias_is_added_in_fp32_before_the_one_rounding() -> None:
    """256 + 1 = 257 is a tie in BF16 (8 bits: 256 or 258) and goes to 256; with a bias of 0.25 the FP32 sum 257.25 goes
    to 258. Rounding before the bias would give 256.25 and then 256."""
    a = quantized(torch.tensor([[16.0, 1.0]]))
    assert fp8.matmul(a, a).item() == 256.0
    assert fp8.matmul(a, a, bias=torch.tensor([0.25])).item() == 258.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_output_type_is_the_one_asked_for(dtype: torch.dtype) -> None:
    a, b = fp8.quantize(torch.randn(4, 20)), fp8.quantize(torch.randn(3, 20))
    y = fp8.matmul(a, b, dtype)
    assert y.dtype == dtype
    assert torch.equal(y, fp8.matmul(a, b, torch.float32).to(dtype))


def test_leading_dimensions_are_kept() -> None:
    x, w = torch.randn(2, 3, 20), torch.randn(5, 20)
    y = fp8.matmul(fp8.quantize(x), fp8.quantize(w))
    assert y.shape == (2, 3, 5)
    flat = fp8.matmul(fp8.quantize(x.view(6, 20)), fp8.quantize(w))
    assert torch.equal(y.view(6, 5), flat)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0)])
@pytest.mark.parametrize("tile", ["tensor", "row", "1x128"])
def test_empty_operands_give_empty_or_zero(shape: tuple[int, int, int], tile: str) -> None:
    m, n, k = shape
    y = fp8.matmul(fp8.quantize(torch.zeros(m, k), tile=tile), fp8.quantize(torch.zeros(n, k), tile=tile))
    assert y.shape == (m, n)
    assert not y.any()


def test_fp32_is_near_and_says_which_it_is() -> None:
    a, b = fp8.quantize(torch.randn(8, 300)), fp8.quantize(torch.randn(9, 300))
    exact, quick = (fp8.matmul(a, b, torch.float32, accumulate) for accumulate in ("exact", "fp32"))
    magnitude = a.dequantize().abs() @ b.dequantize().abs().t()
    assert bool(((exact - quick).abs() <= 300 * 2.0**-24 * magnitude).all())
    assert str(fp8.explain_matmul(a, b)).startswith("reference (cublas: the tensors are on cpu")


# --------------------------------------------------------------------------- what is refused


def good() -> tuple[fp8.Quantized, fp8.Quantized]:
    return fp8.quantize(torch.ones(2, 4)), fp8.quantize(torch.ones(3, 4))


def test_a_mistake_is_named() -> None:
    a, b = good()
    cases = [
        (ShapeError, "K last", lambda: fp8.matmul(a, fp8.quantize(torch.ones(4, 3)))),
        (ShapeError, "bias must have shape", lambda: fp8.matmul(a, b, bias=torch.ones(4))),
        (TensorError, "fp8.quantize it first", lambda: fp8.matmul(torch.ones(2, 4), b)),  # type: ignore[arg-type]
        (TensorError, "bfloat16, float16 or float32", lambda: fp8.matmul(a, b, torch.float64)),
        (Fp8Error, "Did you mean 'promoted'", lambda: fp8.matmul(a, b, accumulate="promotd")),
        (BackendError, "Did you mean 'cublas'", lambda: fp8.matmul(a, b, backend="cublaslt")),
        (BackendError, "it needs a CUDA device", lambda: fp8.matmul(a, b, backend="cublas")),
        (ShapeError, "K last", lambda: fp8.matmul(a, fp8.quantize(torch.ones(2, 3, 4)))),
    ]
    for error, words, call in cases:
        with pytest.raises(error, match=words):
            call()


def test_a_record_put_together_by_hand_is_looked_at() -> None:
    """Types, shapes and devices are; values are not, which would wait for the device."""
    _, b = good()
    tensor, block, row = fp8.Tile.of("tensor"), fp8.Tile.of("1x128"), format_of("e4m3")
    codes, one = torch.ones(2, 4).to(torch.float8_e4m3fn), torch.ones(1, 1)
    cases = [
        (TensorError, "holds float8_e5m2", (codes.view(torch.float8_e5m2), one, tensor, row)),
        (TensorError, "holds uint8", (codes.view(torch.uint8), one, tensor, row)),
        (TensorError, "holds float8_e4m3fn", (codes, one, tensor, format_of("e5m2"))),
        (FormatError, "a row of the table only", (codes, one, tensor, format_of("bf16"))),
        (ShapeError, r"shape \(1, 1\); got float32 \(2, 1\)", (codes, torch.ones(2, 1), tensor, row)),
        (ShapeError, r"shape \(2, 1\); got float32 \(1, 1\)", (codes, one, block, row)),
        (ShapeError, "got float64", (codes, one.double(), tensor, row)),
        (TensorError, "has the scale 1.0", (codes, 1.0, tensor, row)),
        (TensorError, "codes on cpu and scales on meta", (codes, one.to("meta"), tensor, row)),
    ]
    for error, words, parts in cases:
        for pair in ((fp8.Quantized(*parts), b), (b, fp8.Quantized(*parts))):
            with pytest.raises(error, match=words):
                fp8.matmul(*pair)
    assert fp8.matmul(fp8.Quantized(codes, one, tensor, row), b).shape == (2, 3)


def test_row_scales_multiply_one_after_the_other_the_second_operands_first() -> None:
    """As cuBLASLt does: RN(RN(acc * scale_b) * scale_a), for scales that are no powers of two."""
    torch.manual_seed(0)
    a, b = (fp8.quantize(torch.randn(20, 40), tile="row", scale_rounding="none") for _ in range(2))
    total = (a.codes.double() @ b.codes.double().t()).float()
    assert torch.equal(fp8.matmul(a, b, torch.float32), total * b.scale.t() * a.scale)
    assert not torch.equal(fp8.matmul(a, b, torch.float32), total * (a.scale * b.scale.t()))


def test_a_bias_that_is_no_tensor_is_refused() -> None:
    a, b = good()
    with pytest.raises(TensorError, match=r"bias must be a tensor, not list"):
        fp8.matmul(a, b, bias=[1.0, 2.0, 3.0])
