"""The model behind `convert(only_if_faster=True)`: which way it decides, and on what."""

from __future__ import annotations

import pytest

from fp8.nn.break_even import predict
from fp8.recipe import Recipe


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", "rowwise", "blockwise"])
def test_large_layers_pay_and_small_ones_do_not(recipe: str) -> None:
    rule = Recipe.of(recipe)
    gains = [predict(size, size, size, rule) for size in (64, 512, 2048, 8192, 32768)]
    assert gains == sorted(gains)
    assert gains[0] < 1 < gains[-2]


def test_no_layer_gains_more_than_its_rates() -> None:
    """Fast 1300 and promoted 1250 over 660: below 3 / (1 / 1.97 + 2 / 1.89) = 1.92."""
    assert predict(1 << 20, 1 << 20, 1 << 20, Recipe.of("delayed")) < 1.92


def test_few_tokens_do_not_pay_for_reading_the_weight() -> None:
    assert predict(128, 4096, 4096, Recipe.of("tensorwise")) < 1
