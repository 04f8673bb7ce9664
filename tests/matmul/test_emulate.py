"""The emulated accumulator: worked numbers, an independent oracle, and the laws that a sum must keep."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
import torch

from fp8 import Quantized, Tile, matmul, quantize
from fp8.formats import E4M3
from fp8.matmul import emulate
from fp8.matmul.emulate import Fold, accumulate, fused_multiply_add, runs

DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


def codes(values: list[float], dtype: torch.dtype = torch.float8_e4m3fn) -> torch.Tensor:
    return torch.tensor([values]).to(dtype)


def random_codes(rows: int, depth: int, dtype: torch.dtype, kind: str) -> torch.Tensor:
    x = torch.randn(rows, depth) * {"normal": 30, "positive": 30, "tiny": 2**-7}.get(kind, 1)
    if kind in ("normal", "positive", "tiny"):
        return (x.abs() if kind == "positive" else x).clamp(-448, 448).to(dtype)
    raw = torch.randint(0, 256, (rows, depth), dtype=torch.uint8)
    if kind == "finite":
        return torch.where(raw.view(dtype).float().isfinite(), raw, 0).view(dtype)
    rare = torch.rand(rows, depth) < 2 / depth
    return torch.where(rare, raw, raw & 0x3F).view(dtype)


def same(x: torch.Tensor, y: torch.Tensor) -> bool:
    return bool(((x.view(torch.int32) == y.view(torch.int32)) | (x.isnan() & y.isnan())).all())


# ------------------------------------------------------------------------------- worked numbers


def test_a_product_below_the_grid_of_the_largest_is_cut_off():
    """64 is aligned at E = 6, so the grid is 2^-7: 2^-8 disappears, 3 * 2^-8 becomes 2^-7, on either side of zero."""
    big, one = 64.0, 1.0
    for small, kept in ((2.0**-8, 0.0), (2.0**-7, 2.0**-7), (1.5 * 2.0**-7, 2.0**-7)):
        assert accumulate(codes([big, small]), codes([one, one]), False).item() == 64 + kept
        assert accumulate(codes([-big, -small]), codes([one, one]), False).item() == -64 - kept


def test_the_sum_keeps_13_fraction_bits_of_its_own_exponent():
    """128 + 2^-6 fits 13 fraction bits below 2^7 (grid 2^-6); adding another 128 leaves a grid of 2^-5."""
    assert accumulate(codes([128, 2.0**-6]), codes([1, 1]), False).item() == 128 + 2.0**-6
    assert accumulate(codes([128, 128, 2.0**-6]), codes([1, 1, 1]), False).item() == 256


def test_cancellation_leaves_what_survived_the_alignment_and_a_positive_zero():
    assert accumulate(codes([64, -64, 2.0**-8]), codes([1, 1, 1]), False).item() == 0
    assert accumulate(codes([64, -64, 2.0**-7]), codes([1, 1, 1]), False).item() == 2.0**-7
    zero = accumulate(codes([-64, 64]), codes([1, 1]), False)
    assert zero.item() == 0 and not zero.signbit().item()


def test_a_subnormal_factor_aligns_as_the_smallest_normal():
    """2^-9 * 2^-9 = 2^-18 is aligned at -12 and survives; beside 2^-5 (grid 2^-18) too; beside 2^-4 not."""
    tiny = 2.0**-9
    assert accumulate(codes([tiny]), codes([tiny]), False).item() == tiny**2
    assert accumulate(codes([tiny, 2.0**-5]), codes([tiny, 1]), False).item() == tiny**2 + 2.0**-5
    assert accumulate(codes([tiny, 2.0**-4]), codes([tiny, 1]), False).item() == 2.0**-4


def test_one_signed_sums_drift_towards_zero_unless_promoted():
    torch.manual_seed(0)
    a, b = (quantize(torch.rand(16, 4096)).codes for _ in range(2))
    exact = a.double() @ b.double().t()
    drift = {promoted: (accumulate(a, b, promoted) / exact - 1).mean().item() for promoted in (False, True)}
    assert -0.09 < drift[False] < -0.05 and -0.001 < drift[True] < 0


def test_a_subnormal_factor_raises_the_grid_that_others_are_cut_on():
    """2^-9 * 2^8 = 2^-1 is aligned at -6 + 8 = 2, not at -1: the grid is 2^-11, and 2^-12 beside it is cut off."""
    assert accumulate(codes([2.0**-9, 2.0**-6]), codes([256, 2.0**-6]), False).item() == 0.5
    assert accumulate(codes([2.0**-6, 2.0**-6]), codes([32, 2.0**-6]), False).item() == 0.5 + 2.0**-12


# ------------------------------------------------------------------------------- an independent oracle


@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, DTYPES)), ids=str)
@pytest.mark.parametrize("kind", ["normal", "positive", "tiny", "finite", "any"])
def test_equals_mmaemu_bit_for_bit(dtypes, kind):
    """`mmaemu` is a separate implementation, validated on H100s: both must agree on every bit, NaN and Inf included."""
    plan = pytest.importorskip("mmaemu.model.plan")
    from mmaemu.model import chain

    names = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}
    fa, fb = (names[d] for d in dtypes)
    torch.manual_seed(0)
    for depth, promoted, splits in itertools.product((1, 32, 160, 300, 1111), (False, True), (1, 2, 5)):
        a, b = random_codes(13, depth, dtypes[0], kind), random_codes(17, depth, dtypes[1], kind)
        scheme = "contiguous" if splits > 1 else "none"
        oracle = plan.execute_plan(
            plan.make_plan(depth, fast=not promoted, S=splits, scheme=scheme, preset="hopper"),
            a.view(torch.uint8),
            b.view(torch.uint8),
            fmt_a=fa,
            fmt_b=fb,
            chain_fn=lambda x, y: chain.chain_gemm(x, y, fmt_a=fa, fmt_b=fb, preset="hopper"),
        )
        assert same(accumulate(a, b, promoted, splits), oracle), (depth, promoted, splits)


# ------------------------------------------------------------------------------- laws


def test_promotion_changes_nothing_up_to_128():
    torch.manual_seed(0)
    a, b = random_codes(8, 128, DTYPES[0], "normal"), random_codes(8, 128, DTYPES[1], "normal")
    assert same(accumulate(a, b, False), accumulate(a, b, True))


def test_promoted_is_the_fp32_sum_of_chains_of_128():
    torch.manual_seed(0)
    a, b = random_codes(8, 500, DTYPES[0], "normal"), random_codes(8, 500, DTYPES[0], "normal")
    total = torch.zeros(8, 8)
    for k in range(0, 500, 128):
        total = total + accumulate(a[:, k : k + 128].contiguous(), b[:, k : k + 128].contiguous(), False)
    assert same(total, accumulate(a, b, True))


def test_split_k_deals_whole_slices_in_contiguous_runs():
    assert runs(1024, 3) == [(0, 384), (384, 768), (768, 1024)]
    assert runs(300, 2) == [(0, 256), (256, 300)]
    assert runs(256, 5) == [(0, 128), (128, 256)]


def test_the_result_does_not_depend_on_how_outputs_are_cut(monkeypatch):
    torch.manual_seed(0)
    a, b = random_codes(70, 200, DTYPES[0], "any"), random_codes(300, 200, DTYPES[1], "any")
    whole = accumulate(a, b, True)
    monkeypatch.setitem(emulate.AREA, "cpu", 600)
    assert same(whole, accumulate(a, b, True))
    assert same(whole[3:5], accumulate(a[3:5], b, True))


def test_infinities_follow_ieee():
    inf, nan = torch.inf, torch.nan
    a = torch.tensor([[inf, 1, 1], [inf, inf, 1], [nan, 1, 1], [1, 1, 1]]).to(torch.float8_e5m2)
    b = torch.tensor([[2.0, -1, 1], [0, 1, 1], [1, 1, 1]]).to(torch.float8_e5m2)
    found = accumulate(a, b, True).tolist()
    assert [[str(x) for x in row] for row in found] == [
        ["inf", "nan", "inf"],
        ["nan", "nan", "inf"],
        ["nan", "nan", "nan"],
        ["2.0", "2.0", "3.0"],
    ]


@pytest.mark.parametrize("tiles", [("1x128", "128x128"), ("1x128", "1x128"), ("1x32", "1x32"), ("row", "1x128")])
def test_with_power_of_two_scales_no_order_of_folding_matters(tiles):
    torch.manual_seed(0)
    a, b = (quantize(torch.randn(9, 300) * torch.rand(9, 300).exp(), "e4m3", tile) for tile in tiles)
    first, *others = (
        emulate.accumulate_blocks(a, b, Fold(fused, order)) for fused in (True, False) for order in ("pair", "a", "b")
    )
    assert all(same(first, other) for other in others)


def test_a_block_is_folded_in_by_one_rounding():
    """Two blocks of one product each, under scales that are no powers of two: RN(p2 * RN(s t) + RN(p1 * RN(s t)))."""
    torch.manual_seed(0)
    x, y = torch.zeros(64, 256), torch.zeros(1, 256)
    x[:, ::128], y[0, ::128] = torch.randn(64, 2), 1.0
    a = Quantized(x.to(DTYPES[0]), torch.rand(64, 2), Tile.of("1x128"), E4M3)
    b = Quantized(y.to(DTYPES[0]), torch.tensor([[0.3, 0.9]]), Tile.of("128x128"), E4M3)
    found, twice = matmul(a, b, torch.float32, "hopper_promoted").flatten().tolist(), 0
    for row, scales, result in zip(a.codes.float(), a.scale * b.scale, found, strict=True):
        first, second = (Fraction(row[k].item()) * Fraction(scales[k // 128].item()) for k in (0, 128))
        first = Fraction(nearest(first))
        assert result == nearest(first + second)
        twice += nearest(first + second) != nearest(first + Fraction(nearest(second)))
    assert twice > 5  # where rounding the product as well would show


def test_infinities_are_counted_exactly_inside_an_autocast():
    """1025 terms of Inf and one of -Inf are NaN: in BF16 1024 and 1026 would be the same number."""
    a, b = torch.full((1, 1026), torch.inf).to(DTYPES[1]), torch.ones(1, 1026)
    b[0, -1] = -1
    with torch.autocast("cpu", torch.bfloat16):
        assert accumulate(a, b.to(DTYPES[1]), True).isnan().all()


def test_blocks_of_equal_scales_are_the_promoted_sum_scaled():
    torch.manual_seed(0)
    a, b = (quantize(torch.randn(9, 300)) for _ in range(2))
    tiled = [Quantized(q.codes, torch.full((9, 3), 0.5), Tile.of("1x128"), E4M3) for q in (a, b)]
    assert same(emulate.accumulate_blocks(tiled[0], tiled[1]), accumulate(a.codes, b.codes, True) / 4)


def test_fused_multiply_add_rounds_once():
    torch.manual_seed(0)
    x, y = torch.randn(3000), torch.randn(3000)
    near = torch.exp2(torch.randint(-3, 30, (1000,)).float()) * (1 + torch.randint(0, 1 << 23, (1000,)) / 2**23)
    z = torch.cat([torch.randn(1000) * torch.exp2(torch.randint(-40, 40, (1000,)).float()), near, -(x * y)[2000:]])
    found = fused_multiply_add(x, y, z).tolist()
    for i, value in enumerate(found):
        assert value == nearest(Fraction(x[i].item()) * Fraction(y[i].item()) + Fraction(z[i].item()))


def nearest(exact: Fraction) -> float:
    """A fraction to FP32's nearest normal, ties to even."""
    if exact == 0:
        return 0.0
    size = abs(exact)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= Fraction(2) ** exponent > size
    units = round(size / Fraction(2) ** (exponent - 23))
    return float(units * Fraction(2) ** (exponent - 23)) * (1 if exact > 0 else -1)


@pytest.mark.parametrize("shape", [(0, 4, 32), (4, 0, 32), (4, 5, 0)])
def test_empty_dimensions(shape):
    rows, cols, depth = shape
    a, b = (quantize(torch.zeros(size, depth)) for size in (rows, cols))
    found = matmul(a, b, torch.float32, "hopper_promoted", torch.ones(cols))
    assert found.shape == (rows, cols) and bool((found == 1).all())


def test_the_public_door_reaches_the_model_by_name():
    torch.manual_seed(0)
    a, b = quantize(torch.rand(5, 300), "e5m2", "row", "none"), quantize(torch.rand(7, 300), "e4m3", "row", "none")
    for name, promoted in (("hopper_fast", False), ("hopper_promoted", True)):
        total = accumulate(a.codes, b.codes, promoted) * (a.scale * b.scale.t())
        assert torch.equal(matmul(a, b, torch.bfloat16, name), total.to(torch.bfloat16))
