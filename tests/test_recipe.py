"""A recipe is plain data: frozen, hashable, the same after JSON, and it refuses what contradicts itself."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp8.errors import FormatError, Fp8Error, RecipeError, TileError
from fp8.recipe import ACCUMULATE, CPU_MODELS, PRESETS, REDUCE, Accumulate, Delayed, Operand, Recipe
from fp8.tile import NAMES, Tile

presets = pytest.mark.parametrize("name", PRESETS)


def summary(recipe: Recipe) -> list[str]:
    operands = [f"{operand.format} {operand.tile}" for operand in (recipe.x, recipe.w, recipe.grad)]
    return [*operands, *dataclasses.astuple(recipe.accumulate)]


def test_the_presets_are_these() -> None:
    tensor = ["e4m3 tensor", "e4m3 tensor", "e5m2 tensor", "fast", "promoted", "promoted"]
    assert {name: summary(recipe) for name, recipe in PRESETS.items()} == {
        "tensorwise": tensor,
        "delayed": tensor,
        "delayed_article": tensor,
        "rowwise": ["e4m3 row"] * 3 + ["fast", "promoted", "promoted"],
        "blockwise": ["e4m3 1x128", "e4m3 128x128", "e4m3 1x128"] + ["promoted"] * 3,
    }
    assert PRESETS["delayed"].delayed == Delayed(window=32, reduce="max", update_every=1, margin=0, rule="amax")
    article = PRESETS["delayed_article"].delayed
    assert article is not None
    assert (article.window, article.update_every, article.rule) == (32, 4, "article")
    exact = {name for name, recipe in PRESETS.items() if not recipe.power_of_two}
    assert exact == {"delayed_article"}


@presets
def test_a_preset_is_found_by_name_and_a_recipe_is_itself(name: str) -> None:
    assert Recipe.of(name) is PRESETS[name]
    assert Recipe.of(PRESETS[name]) is PRESETS[name]
    assert PRESETS[name].name == name


@presets
def test_json_and_back_is_the_same_recipe(name: str) -> None:
    recipe = PRESETS[name]
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


operands = st.builds(Operand, st.sampled_from(["e4m3", "e5m2"]), st.sampled_from([Tile.of(name) for name in NAMES]))
sums = st.sampled_from(["promoted", *CPU_MODELS])
recipes = st.builds(
    Recipe,
    name=st.text(max_size=5),
    x=operands,
    w=operands,
    grad=operands,
    scale_rounding=st.sampled_from(["power_of_two", "none"]),
    accumulate=st.builds(Accumulate, sums, sums, sums),
)
delays = st.builds(Delayed, st.integers(1, 99), st.sampled_from(REDUCE), st.integers(1, 9), st.integers(0, 9))


@given(recipes, st.lists(st.tuples(st.text(max_size=4), st.none() | recipes), max_size=3), st.none() | delays)
def test_any_recipe_survives_json(recipe: Recipe, overrides: list, delayed: Delayed | None) -> None:
    recipe = recipe.replace(overrides=tuple(overrides))
    if delayed is not None:
        tensor = Tile(0, 0)
        changes = {key: dataclasses.replace(getattr(recipe, key), tile=tensor) for key in ("x", "w", "grad")}
        recipe = recipe.replace(delayed=delayed, **changes)
    again = Recipe.from_json(recipe.to_json())
    assert again == recipe
    assert hash(again) == hash(recipe)


def test_a_missing_field_keeps_its_default() -> None:
    assert Recipe.from_dict({}) == Recipe()
    assert Recipe.from_dict({"grad": {"format": "e4m3"}}).grad == Operand("e4m3")


def test_the_first_override_that_matches_a_name_counts() -> None:
    recipe = Recipe(overrides=(("*.mlp.down", None), ("*.mlp.*", "rowwise"), ("head", "blockwise")))
    assert recipe.for_layer("layers.0.mlp.down") is None
    assert recipe.for_layer("layers.0.mlp.up") == PRESETS["rowwise"]
    assert recipe.for_layer("head") == PRESETS["blockwise"]
    assert recipe.for_layer("layers.0.attention.qkv") == Recipe()
    assert recipe.for_layer("Head") == Recipe()


def test_a_product_is_blocked_where_either_of_its_operands_is() -> None:
    """Row-wise x with block-wise w: forward and grad_x read w, grad_w does not."""
    recipe = Recipe(
        x=Operand(tile=Tile(1, 0)),
        w=Operand(tile=Tile(128, 128)),
        grad=Operand(tile=Tile(1, 0)),
        accumulate=Accumulate("promoted", "promoted", "fast"),
    )
    assert [recipe.blocked(product) for product in ("forward", "grad_x", "grad_w")] == [True, True, False]


def test_frozen_means_frozen_and_replace_makes_another() -> None:
    recipe = Recipe.of("tensorwise")
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.name = "other"  # type: ignore[misc]
    other = recipe.replace(scale_rounding="none")
    assert (recipe.scale_rounding, other.scale_rounding) == ("power_of_two", "none")
    assert len({recipe, other, Recipe()}) == 2


@pytest.mark.parametrize(
    ("error", "words", "make"),
    [
        (RecipeError, "Did you mean 'tensorwise'", lambda: Recipe.of("tensorwize")),
        (RecipeError, "there is no recipe None", lambda: Recipe.of(None)),
        (RecipeError, "there is no recipe", lambda: Recipe.of(["tensorwise"])),
        (FormatError, "Did you mean 'e4m3'", lambda: Operand("e4m")),
        (RecipeError, "e4m3, e5m2", lambda: Operand("bf16")),
        (TileError, "no scale layout", lambda: Operand(tile=(2, 2))),
        (RecipeError, "Did you mean 'promoted'", lambda: Accumulate("promote")),
        (RecipeError, "Did you mean 'most_recent'", lambda: Delayed(reduce="recent")),
        (RecipeError, "whole number from 1 to 65536, not 0", lambda: Delayed(window=0)),
        (RecipeError, "whole number from 1 to 65536, not 2.5", lambda: Delayed(update_every=2.5)),
        (RecipeError, "whole number from 0 to 64, not -1", lambda: Delayed(margin=-1)),
        (RecipeError, "but w has tile row", lambda: Recipe(w=Operand(tile=(1, 0)), delayed=Delayed())),
        (RecipeError, "accumulate.forward='fast'", lambda: Recipe(x=Operand(tile=(1, 128)))),
        (RecipeError, "Did you mean 'scale_rounding'", lambda: Recipe().replace(scale_roundin="none")),
        (RecipeError, "Did you mean 'overrides'", lambda: Recipe.from_dict({"override": []})),
        (RecipeError, "must be JSON", lambda: Recipe.from_json("{")),
        (RecipeError, "not from list", lambda: Recipe.from_dict([])),
        (RecipeError, "this is not a recipe", lambda: Recipe.from_dict({"x": {"formt": "e4m3"}})),
        (RecipeError, "this is not a recipe", lambda: Recipe.from_dict({"x": 3})),
        (RecipeError, "this is not a recipe", lambda: Recipe.from_dict({"overrides": [["a"]]})),
        (RecipeError, "this is not a recipe", lambda: Recipe.from_dict({"overrides": 3})),
        (RecipeError, r"Operand\('e5m2'\); got 'e5m2'", lambda: Recipe(grad="e5m2")),
        (RecipeError, r"Accumulate\('promoted'\); got 'fast'", lambda: Recipe(accumulate="fast")),
        (RecipeError, r"Delayed\(\); got True", lambda: Recipe(delayed=True)),
        (RecipeError, "overrides are pairs", lambda: Recipe(overrides={"*.down": "rowwise"})),
        (RecipeError, "overrides are pairs", lambda: Recipe(overrides=("lm_head",))),
        (RecipeError, "overrides are pairs", lambda: Recipe(overrides=[(1, None)])),
        (RecipeError, r"the preset is Recipe\.of\('rowwise'\)", lambda: Recipe("rowwise")),
        (RecipeError, r"the preset is Recipe\.of\('delayed'\)", lambda: Recipe.from_dict({"name": "delayed"})),
        (RecipeError, "use scale_rounding='none'", lambda: Recipe(delayed=Delayed(rule="article"))),
        (RecipeError, "there is no recipe 'x'", lambda: Recipe(overrides=(("*", "x"),))),
    ],
)  # fmt: skip
def test_what_contradicts_itself_is_refused(error: type[Fp8Error], words: str, make) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=words):
        make()


def test_every_word_for_a_sum_is_accepted() -> None:
    for word in ACCUMULATE + CPU_MODELS:
        assert Accumulate(word, word, word).grad_w == word
