"""The error budget holds for what is right, and fails for what is wrong."""

from __future__ import annotations

import pytest
import torch

from fp8 import Quantized, matmul, quantize
from fp8.matmul.budget import budget, exact_product

TILES = [("tensor", "tensor"), ("row", "row"), ("1x128", "128x128"), ("1x128", "1x128"), ("1x32", "1x32")]
MODELS = ["exact", "fp32", "hopper_promoted", "hopper_fast"]


def operands(tiles: tuple[str, str], positive: bool, depth: int = 600) -> tuple[Quantized, Quantized]:
    torch.manual_seed(0)
    x, w = torch.randn(20, depth), torch.randn(24, depth)
    x, w = (x.abs(), w.abs()) if positive else (x, w)
    return quantize(x, "e4m3", tiles[0], "none"), quantize(w, "e5m2" if positive else "e4m3", tiles[1], "none")


def without_last_mantissa_bit(q: Quantized) -> Quantized:
    codes = (q.codes.view(torch.uint8) & 0xFE).view(q.codes.dtype)
    return Quantized(codes, q.scale, q.tile, q.format)


@pytest.mark.parametrize("positive", [False, True], ids=["normal", "positive"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("tiles", TILES, ids="*".join)
def test_every_model_stays_inside(tiles, model, positive):
    a, b = operands(tiles, positive)
    bias = torch.randn(24)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        error = (matmul(a, b, dtype, model, bias).double() - exact_product(a, b, bias)).abs()
        assert bool((error <= budget(a, b, dtype, model, bias)).all())
        assert bool((error <= budget(a, b, dtype, model, bias, certain=True)).all())


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("tiles", TILES, ids="*".join)
def test_a_wrong_scale_and_a_lost_mantissa_bit_fall_outside(tiles, model):
    a, b = operands(tiles, positive=False)
    exact, allowed = exact_product(a, b), budget(a, b, torch.float32, model)
    off = Quantized(a.codes, a.scale * (1 + 2.0**-4), a.tile, a.format)
    for wrong in (off, without_last_mantissa_bit(a)):
        error = (matmul(wrong, b, torch.float32, model).double() - exact).abs()
        assert (error > allowed).double().mean() > 0.5


def test_one_wrong_block_scale_falls_outside():
    a, b = operands(("1x128", "128x128"), positive=False)
    scale = a.scale.clone()
    scale[3, 2] *= 2
    wrong = matmul(Quantized(a.codes, scale, a.tile, a.format), b, torch.float32, "hopper_promoted")
    outside = (wrong.double() - exact_product(a, b)).abs() > budget(a, b, torch.float32, "hopper_promoted")
    assert outside[3].double().mean() > 0.5 and not outside[:3].any() and not outside[4:].any()


def test_exact_costs_a_few_roundings():
    """One rounding each for the sum, for alpha and for their product: 3 units of 2^-24."""
    a, b = operands(("tensor", "tensor"), positive=False)
    assert bool((budget(a, b) <= 3.1 * 2.0**-24 * exact_product(a, b).abs() + 2.0**-150).all())


def test_the_truncated_sum_is_allowed_more_the_longer_its_chain():
    bounds = {}
    for depth in (512, 2048):
        a, b = operands(("tensor", "tensor"), positive=True, depth=depth)
        relative = budget(a, b, accumulate="hopper_fast") / exact_product(a, b)
        bounds[depth] = relative.median().item()
        promoted = budget(a, b, accumulate="hopper_promoted") / exact_product(a, b)
        assert promoted.median() < relative.median()
    assert bounds[2048] > 2 * bounds[512]
