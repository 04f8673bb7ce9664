"""A recipe says how the three operands of a layer's three products become FP8.

A linear layer multiplies three times, each time with K, the summed dimension, last in both operands:

    forward     y      [T, N]  =  x      [T, K] · w      [N, K]
    grad_x      dx     [T, K]  =  grad   [T, N] · w^T    [K, N]
    grad_w      dw     [N, K]  =  grad^T [N, T] · x^T    [K, T]

`x`, `w` and `grad` each have a format and a tile; a transposed operand is quantized with the same tile, laid along its
own last dimension. `Accumulate` says, for each product, whether Hopper's short accumulator runs over all of K (`fast`)
or hands its partial sum to FP32 every 128 products (`promoted`). `delayed`, where set, replaces each operand's own amax
by a history of the amaxes of earlier steps, so that a kernel needs no pass over its input before it casts.

A recipe is plain data: frozen, comparable, hashable, written to and read from JSON.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
from dataclasses import dataclass, field
from typing import Any

from .errors import RecipeError, suggest
from .formats import COMPUTE, format_of
from .tile import Tile

PRODUCTS = ("forward", "grad_x", "grad_w")
OPERANDS = ("x", "w", "grad")
ACCUMULATE = ("fast", "promoted")
CPU_MODELS = ("exact", "fp32", "hopper_fast", "hopper_promoted")
SCALE_ROUNDING = ("power_of_two", "none")
REDUCE = ("max", "most_recent", "mean")
RULES = ("amax", "article")


def one_of(word: Any, known: tuple[str, ...], what: str) -> None:
    """Refuse a word that is not in the list, naming the nearest."""
    if word not in known:
        raise RecipeError(f"{what} cannot be {word!r}. {suggest(word, known)}")


@dataclass(frozen=True)
class Operand:
    """How one operand is quantized: its format (`e4m3` or `e5m2`) and its tile."""

    format: str = "e4m3"
    tile: Tile = Tile(0, 0)

    def __post_init__(self) -> None:
        name = format_of(self.format).name
        one_of(name, COMPUTE, "an operand's format")
        object.__setattr__(self, "format", name)
        object.__setattr__(self, "tile", Tile.of(self.tile))


@dataclass(frozen=True)
class Accumulate:
    """How each of the three products sums: `fast`, `promoted`, or one of the CPU models by name."""

    forward: str = "fast"
    grad_x: str = "promoted"
    grad_w: str = "promoted"

    def __post_init__(self) -> None:
        for product in PRODUCTS:
            one_of(getattr(self, product), ACCUMULATE + CPU_MODELS, f"accumulate.{product}")


@dataclass(frozen=True)
class Delayed:
    """Scales from the amaxes of earlier steps.

    `window`: steps remembered. `reduce`: how they become one amax. `update_every`: steps between two new scales.
    `margin`: spare binades above the amax. `rule="article"` is the scaler of the article "FP8 Training and Inference",
    word for word, kept to show what it does; with it only `window` and `update_every` count.
    """

    window: int = 32
    reduce: str = "max"
    update_every: int = 1
    margin: int = 0
    rule: str = "amax"

    def __post_init__(self) -> None:
        one_of(self.reduce, REDUCE, "delayed.reduce")
        one_of(self.rule, RULES, "delayed.rule")
        for name, low, high in (("window", 1, 65536), ("update_every", 1, 65536), ("margin", 0, 64)):
            value = getattr(self, name)
            if not isinstance(value, int) or not low <= value <= high:
                raise RecipeError(f"delayed.{name} must be a whole number from {low} to {high}, not {value!r}.")


@dataclass(frozen=True)
class Recipe:
    """One way to train in FP8. `Recipe.of("tensorwise")` gives a preset; `replace` changes a field.

    `overrides` are pairs of a name pattern (as in `fnmatch`: `*.mlp.down`) and what the layers it matches get instead:
    a recipe, a preset's name, or None for high precision. The first match counts.
    """

    name: str = "tensorwise"
    x: Operand = Operand()
    w: Operand = Operand()
    grad: Operand = Operand("e5m2")
    scale_rounding: str = "power_of_two"
    accumulate: Accumulate = Accumulate()
    delayed: Delayed | None = None
    overrides: tuple[tuple[str, Recipe | None], ...] = field(default=())

    def __post_init__(self) -> None:
        one_of(self.scale_rounding, SCALE_ROUNDING, "scale_rounding")
        self._check_parts()
        rules = tuple((pattern, None if rule is None else Recipe.of(rule)) for pattern, rule in self.overrides)
        object.__setattr__(self, "overrides", rules)
        if self.delayed and self.delayed.rule == "article" and self.power_of_two:
            raise RecipeError(
                "the article's scales are no powers of two: use scale_rounding='none' with rule='article'."
            )
        for name in OPERANDS:
            if self.delayed and getattr(self, name).tile != Tile(0, 0):
                tile = getattr(self, name).tile
                raise RecipeError(
                    f"delayed scaling needs one scale a tensor, but {name} has tile {tile}: use 'tensor'."
                )
        blocks = [p for p in PRODUCTS if self.blocked(p) and getattr(self.accumulate, p) == "fast"]
        if blocks:
            raise RecipeError(f"scales that change along K are promoted block by block: accumulate.{blocks[0]}='fast' "
                              "cannot be had; use 'promoted'.")  # fmt: skip

    def _check_parts(self) -> None:
        """Refuse what a newcomer may write in place of a part."""
        kinds = [(name, Operand, "Operand('e5m2')") for name in OPERANDS]
        kinds += [("accumulate", Accumulate, "Accumulate('promoted')"), ("delayed", Delayed | None, "Delayed()")]
        for name, kind, example in kinds:
            if not isinstance(value := getattr(self, name), kind):
                raise RecipeError(f"a recipe's {name} is made like {example}; got {value!r}.")
        pairs = isinstance(self.overrides, (tuple, list)) and all(
            isinstance(pair, (tuple, list)) and len(pair) == 2 and isinstance(pair[0], str) for pair in self.overrides
        )
        if not pairs:
            raise RecipeError(f"overrides are pairs like (('*.mlp.down', 'rowwise'), ...); got {self.overrides!r}.")
        defaults = (f.name == "name" or getattr(self, f.name) == f.default for f in dataclasses.fields(self))
        if self.name in ("delayed", "delayed_article", "rowwise", "blockwise") and all(defaults):
            raise RecipeError(
                f"Recipe({self.name!r}) would only carry the name; the preset is Recipe.of({self.name!r})."
            )

    @staticmethod
    def of(recipe: str | Recipe) -> Recipe:
        """A preset by name; a recipe is returned as it is.

        >>> Recipe.of("blockwise").grad
        Operand(format='e4m3', tile=Tile(rows=1, cols=128))
        """
        if isinstance(recipe, Recipe):
            return recipe
        if not isinstance(recipe, str) or recipe not in PRESETS:
            raise RecipeError(f"there is no recipe {recipe!r}. {suggest(recipe, PRESETS)}")
        return PRESETS[recipe]

    def blocked(self, product: str) -> bool:
        """Whether a scale changes along K in this product."""
        pair = {"forward": (self.x, self.w), "grad_x": (self.grad, self.w), "grad_w": (self.grad, self.x)}[product]
        return not all(operand.tile.constant_along_k for operand in pair)

    @property
    def power_of_two(self) -> bool:
        return self.scale_rounding == "power_of_two"

    def for_layer(self, name: str) -> Recipe | None:
        """The recipe of the layer called `name`: the first override whose pattern matches, else this one."""
        for pattern, rule in self.overrides:
            if fnmatch.fnmatchcase(name, pattern):
                return rule
        return self if not self.overrides else self.replace(overrides=())

    def replace(self, **changes: Any) -> Recipe:
        """A copy with some fields changed."""
        unknown = set(changes) - {f.name for f in dataclasses.fields(self)}
        if unknown:
            names = [f.name for f in dataclasses.fields(self)]
            raise RecipeError(f"a recipe has no field {sorted(unknown)[0]!r}. {suggest(sorted(unknown)[0], names)}")
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: strings, numbers, lists and dictionaries, as JSON holds them."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name in OPERANDS:
            plain[name] = {"format": plain[name].format, "tile": str(plain[name].tile)}
        plain["accumulate"] = dataclasses.asdict(self.accumulate)
        plain["delayed"] = dataclasses.asdict(self.delayed) if self.delayed else None
        plain["overrides"] = [[pattern, rule and rule.to_dict()] for pattern, rule in self.overrides]
        return plain

    @staticmethod
    def from_dict(plain: dict[str, Any]) -> Recipe:
        """The recipe that `to_dict` wrote. A field that is missing keeps its default, an unknown one is refused."""
        if not isinstance(plain, dict):
            raise RecipeError(f"a recipe is read from a dictionary, not from {type(plain).__name__}.")
        changes = dict(plain)
        try:
            for name in OPERANDS:
                if name in changes:
                    changes[name] = Operand(**changes[name])
            if "accumulate" in changes:
                changes["accumulate"] = Accumulate(**changes["accumulate"])
            if changes.get("delayed"):
                changes["delayed"] = Delayed(**changes["delayed"])
            changes["overrides"] = tuple(_override(*pair) for pair in changes.get("overrides", ()))
        except TypeError as error:
            raise RecipeError(f"this is not a recipe: {error}") from None
        return Recipe().replace(**changes)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    @staticmethod
    def from_json(text: str) -> Recipe:
        try:
            return Recipe.from_dict(json.loads(text))
        except json.JSONDecodeError as error:
            raise RecipeError(f"a recipe must be JSON: {error}") from None


def _override(pattern: str, rule: Any) -> tuple[str, Any]:
    """One pair of `overrides` as `to_dict` wrote it."""
    return pattern, Recipe.from_dict(rule) if isinstance(rule, dict) else rule


_promoted = Accumulate("promoted", "promoted", "promoted")
PRESETS: dict[str, Recipe] = {
    preset.name: preset
    for preset in (
        Recipe("tensorwise"),
        Recipe("delayed", delayed=Delayed()),
        Recipe("delayed_article", delayed=Delayed(32, update_every=4, rule="article"), scale_rounding="none"),
        Recipe("rowwise", x=Operand(tile=Tile(1, 0)), w=Operand(tile=Tile(1, 0)), grad=Operand(tile=Tile(1, 0))),
        Recipe("blockwise", x=Operand(tile=Tile(1, 128)), w=Operand(tile=Tile(128, 128)),
               grad=Operand(tile=Tile(1, 128)), accumulate=_promoted),
    )
}  # fmt: skip
