"""One layer: which way the break-even falls, and on what."""

from __future__ import annotations

import pytest

from fp8.cost import linear_gain, rates
from fp8.recipe import PRESETS, Recipe

RECIPES = ["tensorwise", "delayed", "rowwise", "blockwise"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_fusing_never_costs(recipe: str) -> None:
    rule = Recipe.of(recipe)
    plain, fused = (
        linear_gain(16384, 4096, 4096, rule, fused=fused, x_from="activation", grad_from="rope")
        for fused in (False, True)
    )
    assert fused.fp8.gpu < plain.fp8.gpu
    assert fused.bf16 == plain.bf16


def test_delayed_saves_the_read_for_the_amax() -> None:
    current, delayed = (linear_gain(16384, 4096, 4096, Recipe.of(name)).fp8 for name in ("tensorwise", "delayed"))
    assert delayed.products == current.products
    assert delayed.activations < current.activations
    assert delayed.host > current.host


def test_micro_batches_share_the_weight() -> None:
    alone, shared = (linear_gain(4096, 8192, 8192, Recipe.of("tensorwise"), uses=uses).fp8 for uses in (1, 8))
    assert shared.weight == pytest.approx(alone.weight / 8)


def test_a_graph_has_no_host() -> None:
    small = linear_gain(2048, 1024, 1024, Recipe.of("tensorwise"))
    graph = linear_gain(2048, 1024, 1024, Recipe.of("tensorwise"), graph=True)
    assert small.fp8.host > small.fp8.gpu
    assert graph.fp8.host == 0
    assert graph.ratio > small.ratio
    assert "the host" in small.reason
    assert "the host" not in graph.reason


def test_the_reason_gives_what_is_saved_and_what_it_costs() -> None:
    assert "FP8 saves" in linear_gain(16384, 4096, 4096, Recipe.of("tensorwise")).reason
    slow = linear_gain(512, 8192, 8192, Recipe.of("rowwise"), graph=True)
    assert not slow.faster
    assert "would save" in slow.reason


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_its_rates(name: str) -> None:
    assert linear_gain(8192, 8192, 8192, Recipe.of(name), known=rates("H100")).ratio > 0.5
