"""The model behind `convert(only_if_faster=True)`: which way it decides, and on what."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fp8.cost import rates
from fp8.nn.break_even import gain, predict
from fp8.recipe import Recipe


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", "rowwise", "blockwise"])
def test_large_layers_pay_and_small_ones_do_not(recipe: str) -> None:
    rule = Recipe.of(recipe)
    gains = [predict(size, size, size, rule) for size in (64, 512, 2048, 8192, 32768)]
    assert gains == sorted(gains)
    assert gains[0] < 1 < gains[-2]


def test_no_layer_gains_more_than_its_rates() -> None:
    """A layer of any size stays below the ratio of what both kinds of product sustain."""
    known = rates()
    high = known.gemm["bf16"].peak * known.sustained["bf16"]
    low = known.gemm["tensor fast"].peak * known.sustained["fp8"]
    assert predict(1 << 18, 1 << 16, 1 << 16, Recipe.of("delayed")) < low / high


def test_few_tokens_do_not_pay_for_reading_the_weight() -> None:
    assert predict(128, 4096, 4096, Recipe.of("tensorwise")) < 1


def test_a_copied_convolution_gains_less_than_a_layer() -> None:
    rule = Recipe.of("tensorwise")
    assert predict(65536, 2048, 2048, rule, copied=True) < predict(65536, 2048, 2048, rule)


@pytest.mark.gpu
def test_wide_convolutions_stay_and_say_why() -> None:
    conv = nn.Conv2d(512, 512, 3, device="cuda", dtype=torch.bfloat16)
    assert gain(conv, Recipe.of("tensorwise"), 65536) == (
        0.0, "not faster: no 3 x 3 convolution has been measured faster than cuDNN's BF16",
    )  # fmt: skip
