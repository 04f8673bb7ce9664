"""Settings: read from TOML and flags, checked, written back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fp8.errors import ConfigError, RecipeError
from fp8.recipe import Recipe
from fp8.train import TrainConfig

TOML = """
model = "medium"
num_layers = 3
steps = 400
lr = 0.0006
skip = ["layers.0.*"]
loss_scale = 1024

[recipe]
name = "mine"
x = { format = "e4m3", tile = "row" }
w = { format = "e4m3", tile = "row" }
"""


def test_a_file_is_read_and_flags_win(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(TOML)
    config = TrainConfig.from_toml(path, steps=50, lr=None)
    assert (config.steps, config.lr, config.skip, config.loss_scale) == (50, 0.0006, ("layers.0.*",), 1024.0)
    assert config.sizes["num_layers"] == 3
    assert config.sizes["hidden_size"] == 768
    assert config.fp8_recipe is not None
    assert str(config.fp8_recipe.x.tile) == "row"


@pytest.mark.parametrize("recipe", ["none", "bf16", "delayed", Recipe.of("blockwise").replace(scale_rounding="none")])
def test_settings_written_and_read_are_the_same(recipe: str | Recipe) -> None:
    config = TrainConfig(recipe=recipe, skip=("a.*",), hidden_size=64, warmup_steps=7, loss_scale="dynamic")
    plain = json.loads(json.dumps(config.to_dict()))
    assert TrainConfig.from_dict(plain) == config


def test_a_recipe_comes_from_a_json_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(Recipe.of("rowwise").to_json())
    assert TrainConfig(recipe=str(path)).fp8_recipe == Recipe.of("rowwise")


def test_an_unknown_setting_names_the_nearest(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("warmup = 5")
    with pytest.raises(ConfigError, match=r"run\.toml called 'warmup'\. Did you mean 'warmup_steps'\?"):
        TrainConfig.from_toml(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [("steps", 0), ("steps", 1.5), ("steps", True), ("lr", "fast"), ("lr", -1), ("lr", float("nan")), ("beta2", 1.0),
     ("min_lr_ratio", 2), ("precision", "fp16"), ("model", "smal"), ("skip", "head"), ("compile", "yes"), ("clip", -1),
     ("loss_scale", "dynamc"), ("loss_scale", 0), ("loss_scale", True), ("keep_last", 0), ("seed", -1), ("text", 3)],
)  # fmt: skip
def test_a_value_out_of_range_names_the_setting(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=name):
        TrainConfig().replace(**{name: value})


@pytest.mark.parametrize(
    ("changes", "word"),
    [({"hidden_size": 130}, "hidden_size"), ({"num_kv_heads": 3}, "num_kv_heads"),
     ({"steps": 10, "warmup_steps": 20}, "warmup_steps")],
)  # fmt: skip
def test_settings_that_contradict_each_other(changes: dict[str, int], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        TrainConfig().replace(**changes)


def test_a_recipe_that_is_none() -> None:
    with pytest.raises(RecipeError, match="Did you mean 'tensorwise'"):
        TrainConfig(recipe="tensorwize")
    with pytest.raises(RecipeError, match=r"absent\.json: No such file"):
        TrainConfig(recipe="absent.json")


def test_a_file_that_is_missing_or_no_toml(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the settings"):
        TrainConfig.from_toml(tmp_path / "absent.toml")
    (tmp_path / "broken.toml").write_text("steps = ")
    with pytest.raises(ConfigError, match="is not TOML"):
        TrainConfig.from_toml(tmp_path / "broken.toml")
