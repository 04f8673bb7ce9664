"""A deep `fast` product is measured on the data it meets; a warning where its terms share a sign, and only there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fp8
from fp8.evaluate import probe
from fp8.evaluate.accumulation import DEEP, deep_and_fast, fast_bias, some_rows
from fp8.recipe import Accumulate, Recipe

DEPTH = 4160


def linear(inputs: int, outputs: int, recipe: str | Recipe = "tensorwise") -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inputs, outputs, bias=False))
    fp8.convert(model, recipe)
    return model


def positive(model: nn.Sequential) -> nn.Sequential:
    with torch.no_grad():
        model[0].weight.abs_()
    return model


def codes(x: Tensor) -> Tensor:
    return some_rows(fp8.quantize(x))


def test_the_bias_is_that_of_the_accumulator() -> None:
    """Ones: every sum is K. 2^-4 is the last of 13 fraction bits once the sum has reached 2^9: adding products of 2^-10
    from there on adds nothing."""
    ones = torch.ones(1, DEPTH)
    assert fast_bias(codes(ones), codes(ones)) == 0.0
    falling = torch.full((1, DEPTH), 2.0**-5)
    falling[:, :32] = 4.0
    assert fast_bias(codes(falling), codes(falling)) == pytest.approx(
        -(DEPTH - 32) / (DEPTH - 32 + 512 * 1024), rel=1e-3
    )
    assert fast_bias(codes(torch.zeros(1, DEPTH)), codes(ones)) == 0.0


def test_few_rows_stand_for_all() -> None:
    assert some_rows(fp8.quantize(torch.randn(5, 8))).shape == (5, 8)
    assert some_rows(fp8.quantize(torch.randn(1000, 8))).shape == (16, 8)


def test_which_products_are_asked() -> None:
    """K is the input width forward, the output width for grad_x, the rows for grad_w; only `fast` ones count."""
    fast = Recipe(accumulate=Accumulate("fast", "fast", "fast"))
    big = DEEP + 1
    assert deep_and_fast(fast, (big, 8), (8, 8)) == ["grad_w"]
    assert deep_and_fast(fast, (8, big), (8, big)) == ["forward"]
    assert deep_and_fast(fast, (8, 8), (big, 8)) == ["grad_x"]
    assert deep_and_fast(Recipe(), (big, big), (big, big)) == ["forward"]
    assert deep_and_fast(Recipe.of("blockwise"), (big, big), (big, big)) == []
    assert deep_and_fast(fast, (DEEP, DEEP), (DEEP, DEEP)) == []


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "delayed"])
def test_one_signed_data_warns(recipe: str) -> None:
    model = positive(linear(DEPTH, 8, recipe))
    with pytest.warns(UserWarning, match=r"0: the terms of forward share a sign .* 4160 .* about 7% too small"):
        seen = probe(model, lambda: model(torch.rand(16, DEPTH)).sum())
    assert -0.08 < seen.to_dict()["bias"]["0"]["forward"] < -0.06


def test_data_of_both_signs_do_not() -> None:
    """Warnings are errors in these tests. One positive operand alone, as after a ReLU, shares no sign."""
    model = linear(DEPTH, 8)
    seen = probe(model, lambda: model(torch.rand(16, DEPTH)).sum())
    assert abs(seen.bias["0"]["forward"]) < 0.002


def test_nobody_is_asked_where_the_sum_is_promoted_or_short() -> None:
    for model, width in ((positive(linear(DEPTH, 8, "blockwise")), DEPTH), (positive(linear(64, 8)), 64)):
        assert probe(model, lambda m=model, w=width: m(torch.rand(16, w)).sum()).bias == {}  # type: ignore[misc]


def test_gradients_are_asked_too_where_a_recipe_makes_them_fast() -> None:
    """Weights and gradients of one sign: grad_x over 4160 outputs. Rows of x and gradients of one sign: grad_w."""
    fast = Recipe(accumulate=Accumulate("promoted", "fast", "fast"))
    wide = positive(linear(16, DEPTH, fast))
    with pytest.warns(UserWarning, match="the terms of grad_x share a sign"):
        seen = probe(wide, lambda: wide(torch.rand(8, 16).requires_grad_()).sum())
    assert list(seen.bias["0"]) == ["grad_x"]
    many = linear(16, 8, fast)
    factor = torch.rand(DEPTH, 8)
    with pytest.warns(UserWarning, match="the terms of grad_w share a sign"):
        seen = probe(many, lambda: (many(torch.rand(DEPTH, 16)) * factor).sum())
    assert list(seen.bias["0"]) == ["grad_w"]
