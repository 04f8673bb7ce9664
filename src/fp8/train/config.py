"""Every setting of a training run: one frozen row, read from a TOML file, from flags, or made in Python.

A setting is declared once, in `TrainConfig`: its type, its default, its help and its limits. The TOML reader, the flags
of `fp8 train` and the checks below are all made from that one line, so they cannot disagree.

    recipe = "delayed"          # or a path to a recipe's JSON, or a table [recipe] as Recipe.to_dict writes it
    model = "small"
    steps = 500
    skip = ["layers.0.*"]
"""

from __future__ import annotations

import dataclasses
import math
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigError, RecipeError, suggest
from ..recipe import PRESETS, Recipe
from .text import MOBY_DICK

HIGH = ("none", "bf16")
DIMENSIONS = ("hidden_size", "ffn_hidden_size", "num_layers", "num_attention_heads", "num_kv_heads")
SIZES: dict[str, dict[str, int]] = {
    "small": dict(zip(DIMENSIONS, (128, 384, 4, 4, 2), strict=True)),
    "medium": dict(zip(DIMENSIONS, (768, 2048, 12, 12, 4), strict=True)),
}


def setting(kind: type, default: Any, about: str, low: float | None = None, high: float | None = None,
            choices: tuple[str, ...] = ()) -> Any:  # fmt: skip
    """A field of `TrainConfig`: what it holds, what it is for, which values it can have (limits are allowed values)."""
    return field(default=default, metadata={"kind": kind, "about": about, "low": low, "high": high, "choices": choices})


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a run; `from_toml`, `from_dict` and `replace` make one, `to_dict` gives plain data back.

    Raises `ConfigError`, naming the setting, for a value out of range, and `RecipeError` for a recipe that is none.
    """

    model: str = setting(
        str, "small", "size of the decoder; the next five settings replace its numbers", choices=tuple(SIZES)
    )
    hidden_size: int | None = setting(int, None, "width of the residual stream", 2, 65536)
    ffn_hidden_size: int | None = setting(int, None, "width inside the MLP", 1, 262144)
    num_layers: int | None = setting(int, None, "number of blocks", 1, 1024)
    num_attention_heads: int | None = setting(int, None, "number of query heads", 1, 1024)
    num_kv_heads: int | None = setting(int, None, "number of key and value heads", 1, 1024)
    recipe: str | dict[str, Any] | Recipe | None = setting(  # noqa: RUF009
        str,
        "tensorwise",
        "FP8 recipe: a preset (tensorwise, delayed, rowwise, blockwise ...), a JSON file, or 'none' for high precision",
    )
    skip: tuple[str, ...] = setting(
        tuple, (), "name patterns of layers that stay in high precision, as in 'layers.0.*'"
    )
    only_if_faster: bool = setting(
        bool, False, "keep layers in high precision that FP8 would slow down where the run begins; resuming keeps to it"
    )
    precision: str = setting(str, "bf16", "of all that is not FP8: bf16 autocast, or fp32", choices=("bf16", "fp32"))
    text: str = setting(str, MOBY_DICK, "path of a UTF-8 text; 'moby-dick' ships with the package")
    validation_text: str = setting(str, "", "path of the validation text; none: the last 5 % of the text")
    tokenizer: str = setting(str, "bytes", "'bytes' (257 tokens), or the path of a tokenizer.json")
    sequence_length: int = setting(int, 128, "tokens a row", 1, 1 << 20)
    batch_size: int = setting(int, 8, "rows a micro-batch", 1, 1 << 20)
    gradient_accumulation: int = setting(int, 1, "micro-batches a step", 1, 1 << 16)
    steps: int = setting(int, 500, "optimizer steps of the whole run", 1, 1 << 40)
    lr: float = setting(float, 0.001, "highest learning rate", 1e-12, 100)
    min_lr_ratio: float = setting(float, 0.1, "the last learning rate as a share of the highest", 0, 1)
    warmup_steps: int | None = setting(int, None, "steps of linear warm-up; none: a tenth of the steps", 0, 1 << 40)
    weight_decay: float = setting(float, 0.1, "decay of the matrices (vectors have none)", 0, 10)
    beta1: float = setting(float, 0.9, "AdamW's first decay rate", 0, 0.9999999)
    beta2: float = setting(float, 0.95, "AdamW's second decay rate", 0, 0.9999999)
    eps: float = setting(float, 1e-8, "AdamW's epsilon", 1e-30, 1)
    optimizer: str = setting(
        str, "torch", "torch's AdamW, or fp8.AdamW, which writes the weight codes as well", choices=("torch", "fp8")
    )
    moments: str = setting(
        str, "fp32", "what fp8.AdamW keeps its moments in (optimizer = 'fp8')", choices=("fp32", "bf16", "fp8")
    )
    clip: float = setting(float, 1.0, "largest norm of the gradient; 0: no clipping", 0, 1e12)
    loss_scale: str | float = setting(str, "none", "none, dynamic, or a number that multiplies the loss")
    loss_scale_interval: int = setting(int, 2000, "good steps before a dynamic loss scale doubles", 1, 1 << 40)
    eval_interval: int = setting(int, 100, "steps between evaluations; 0: only at the end", 0, 1 << 40)
    eval_batches: int = setting(int, 8, "batches an evaluation, the same ones each time", 1, 1 << 20)
    checkpoint_interval: int = setting(int, 100, "steps between checkpoints; 0: only at the end", 0, 1 << 40)
    keep_last: int = setting(int, 2, "checkpoints kept", 1, 1 << 20)
    seed: int = setting(int, 0, "seed of the weights and of the order of the data", 0, (1 << 63) - 1)
    device: str = setting(str, "auto", "auto, cpu, cuda or cuda:N")
    deterministic: bool = setting(bool, True, "on a GPU, the same bits in every run (attention's backward is slower)")
    compile: bool = setting(bool, False, "run the model through torch.compile")
    graph: bool = setting(bool, False, "replay forward and backward as one CUDA graph: for small models on a GPU")
    out: str = setting(str, "runs/train", "folder for checkpoints, tokens and metrics")

    def __post_init__(self) -> None:
        object.__setattr__(self, "recipe", read_recipe(self.recipe))
        object.__setattr__(self, "loss_scale", read_loss_scale(self.loss_scale))
        for one in dataclasses.fields(self):
            if one.name not in ("recipe", "loss_scale"):
                object.__setattr__(self, one.name, checked(one, getattr(self, one.name)))
        self._check_heads()
        self._check_moments()
        self._check_graph()
        if self.warmup_steps is not None and self.warmup_steps > self.steps:
            raise ConfigError(
                f"warmup_steps={self.warmup_steps} is longer than the run of steps={self.steps}; lower it."
            )

    def _check_moments(self) -> None:
        if self.moments != "fp32" and self.optimizer != "fp8":
            raise ConfigError(f"moments={self.moments!r} is a setting of fp8.AdamW: add optimizer='fp8'.")

    def _check_graph(self) -> None:
        if self.graph and (self.device == "cpu" or self.loss_scale != "none"):
            raise ConfigError(
                "graph=True replays a CUDA graph, so it needs a GPU, and a loss scale is looked at between the kernels "
                f"that a graph replays: not with device={self.device!r}, loss_scale={self.loss_scale!r}."
            )

    def _check_heads(self) -> None:
        hidden, heads, kv = (self.sizes[k] for k in ("hidden_size", "num_attention_heads", "num_kv_heads"))
        if hidden % heads or (hidden // heads) % 2:
            raise ConfigError(
                f"hidden_size={hidden} does not cut into num_attention_heads={heads} heads of even width."
            )
        if heads % kv:
            raise ConfigError(f"num_attention_heads={heads} is no multiple of num_kv_heads={kv}.")

    @property
    def sizes(self) -> dict[str, int]:
        """The five numbers of the decoder: those of the preset, replaced by those given."""
        given = {name: getattr(self, name) for name in SIZES[self.model]}
        return SIZES[self.model] | {name: value for name, value in given.items() if value is not None}

    @property
    def fp8_recipe(self) -> Recipe | None:
        """The recipe, or None where the run is in high precision."""
        assert self.recipe is None or isinstance(self.recipe, Recipe), "__post_init__ has read it"
        return self.recipe

    @property
    def warmup(self) -> int:
        return self.steps // 10 if self.warmup_steps is None else self.warmup_steps

    @property
    def tokens_per_step(self) -> int:
        return self.sequence_length * self.batch_size * self.gradient_accumulation

    def replace(self, **changes: Any) -> TrainConfig:
        """A copy with some settings changed; `ConfigError` for one that does not exist."""
        refuse_unknown(changes, "setting")
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as JSON and TOML hold it (settings that are None are left out)."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plain["recipe"] = write_recipe(self.fp8_recipe)
        plain["skip"] = list(self.skip)
        return {name: value for name, value in plain.items() if value is not None}

    @staticmethod
    def from_dict(plain: dict[str, Any]) -> TrainConfig:
        """The settings that `to_dict` wrote."""
        return TrainConfig().replace(**plain)

    @staticmethod
    def from_toml(path: str | Path, **flags: Any) -> TrainConfig:
        """The settings in a TOML file; a flag that is not None wins over the file."""
        try:
            plain = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(
                f"cannot read the settings in {path}: {error.strerror}. Give the path of a TOML file."
            ) from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not TOML: {error}") from None
        refuse_unknown(plain, f"setting in {path}")
        return TrainConfig.from_dict(plain | {name: value for name, value in flags.items() if value is not None})


def refuse_unknown(plain: dict[str, Any], what: str) -> None:
    names = [one.name for one in dataclasses.fields(TrainConfig)]
    for name in plain:
        if name not in names:
            raise ConfigError(f"there is no {what} called {name!r}. {suggest(name, names)}")


def checked(one: dataclasses.Field[Any], value: Any) -> Any:
    """The value in the type of its field, or `ConfigError` that names the setting, the value and what is allowed."""
    kind, low, high, choices = (one.metadata[key] for key in ("kind", "low", "high", "choices"))
    if value is None and one.default is None:
        return None
    value = float(value) if kind is float and isinstance(value, int) and not isinstance(value, bool) else value
    value = str(value) if kind is str and isinstance(value, Path) else value
    value = tuple(value) if kind is tuple and isinstance(value, (list, tuple)) else value
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{one.name} must be {NAMES[kind]}, not {value!r}.")
    if choices and value not in choices:
        raise ConfigError(f"{one.name} cannot be {value!r}. {suggest(value, choices)}")
    if low is not None and not (math.isfinite(value) and low <= value <= high):
        raise ConfigError(f"{one.name} must be from {low:g} to {high:g}, not {value!r}.")
    return value


NAMES: dict[type, str] = {
    int: "a whole number",
    float: "a number",
    str: "a string",
    bool: "true or false",
    tuple: "a list",
}


def read_recipe(recipe: str | Path | dict[str, Any] | Recipe | None) -> Recipe | None:
    """A recipe from a preset's name, a table, a JSON file's path, or `none` / `bf16` for high precision."""
    if recipe is None or recipe in HIGH:
        return None
    if isinstance(recipe, dict):
        return Recipe.from_dict(recipe)
    if isinstance(recipe, (str, Path)) and (str(recipe).endswith(".json") or Path(recipe).is_file()):
        return read_recipe_file(Path(recipe))
    if isinstance(recipe, str) and recipe not in PRESETS:
        known = (*PRESETS, *HIGH)
        raise RecipeError(f"there is no recipe {recipe!r}; a path to one ends in .json. {suggest(recipe, known)}")
    return Recipe.of(recipe if isinstance(recipe, Recipe) else str(recipe))


def read_recipe_file(path: Path) -> Recipe:
    try:
        return Recipe.from_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"cannot read the recipe {path}: {error.strerror}. Recipe.to_json writes one.") from None


def write_recipe(recipe: Recipe | None) -> str | dict[str, Any]:
    """The preset's name where it is one as it stands, else the whole recipe."""
    if recipe is None:
        return "none"
    return recipe.name if PRESETS.get(recipe.name) == recipe else recipe.to_dict()


def read_loss_scale(value: Any) -> str | float:
    """`none`, `dynamic`, or a finite number above zero."""
    if value in ("none", "dynamic"):
        return value
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not (math.isfinite(number) and number > 0):
        raise ConfigError(f"loss_scale must be 'none', 'dynamic' or a number above 0, not {value!r}.")
    return number
