"""What a loaded model becomes when a scheme is to be judged before anything is exported.

    none          the model as it is (with --kv-cache: only its cache of keys and values changes)
    dynamic       E4M3 weights, one scale a channel; activations one scale a token
    block         E4M3 weights in blocks of 128 x 128, activations in groups of 128
    weight-only   weights as in `dynamic`; activations stay
    int8          W8A8: weights one scale a channel, activations one scale a token, both symmetric, amax / 127
    rowwise ...   any preset of `fp8.Recipe`, or a JSON file of one

The first three mean what `fp8 quantize` writes under these names: tiles, rounding of scales (powers of two) and sums
are read from its table (`checkpoint/quantize.py`, `SCHEMES`). A recipe's file may say amax / 448 (`"scale_rounding":
"none"`), which is what `fp8 quantize --scales none` writes.

FP8 products are those of `fp8.convert`, weights quantized once: exact sums on a CPU, tensor cores on a Hopper GPU. A
recipe whose activations share one scale a tensor is served one scale a token, as a checkpoint is: a result must not
depend on who else is in the batch. INT8 goes into exactly the layers that FP8 goes into, so that the two can be held
side by side; it is computed in plain torch on integers, whose FP64 sums are exact, as the INT32 accumulator's are.
Embeddings, norms and the head stay. `static` is not here: its activation scales come from calibration, so that it
exists only as an exported checkpoint, which is judged as a model of its own.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from ..checkpoint.quantize import SCHEMES as EXPORTED
from ..checkpoint.quantize import quantize_weight
from ..errors import ConfigError, suggest
from ..nn import convert, refresh, revert
from ..nn.int8_linear import Int8Linear
from ..recipe import PRESETS, Operand, Recipe
from ..tile import Tile

TILES = {"dynamic": Tile(1, 0), "weight-only": Tile(1, 0), "block": Tile(128, 128), "int8": Tile(1, 0)}
SCHEMES = ("none", "dynamic", "block", "weight-only", "int8")


def apply_scheme(model: nn.Module, scheme: str) -> str:
    """Change a model in place, and say in one line what became of it. Raises `ConfigError` for an unknown scheme."""
    if scheme == "none":
        return "as it is"
    report = convert(model, served(recipe_of(scheme)))
    if not report.converted:
        raise ConfigError(f"scheme {scheme!r} found no linear layer to convert in {type(model).__name__}.")
    if scheme in ("weight-only", "int8"):
        revert(model)
        replace_weights(model, report.converted, scheme)
    else:
        refresh(model)
    kept = sorted({name.rpartition(".")[2] for name, why in report.kept.items() if "head" in why})
    return f"{len(report.converted)} layers ({report.share:.0%} of the parameters)" + (
        f"; kept: {', '.join(kept)}" if kept else ""
    )


def recipe_of(scheme: str) -> Recipe:
    """The recipe that a scheme's name, a preset's name, or a JSON file stands for."""
    if scheme in TILES:
        return EXPORTED["dynamic" if scheme == "int8" else scheme].recipe(TILES[scheme]).replace(name=scheme)
    if scheme in PRESETS:
        return Recipe.of(scheme)
    if scheme.endswith(".json") and Path(scheme).is_file():
        return Recipe.from_json(Path(scheme).read_text(encoding="utf-8"))
    hint = " Static scales need calibration: judge the exported checkpoint instead." if scheme == "static" else ""
    raise ConfigError(f"there is no scheme {scheme!r}.{hint} {suggest(scheme, [*SCHEMES, *PRESETS, 'FILE.json'])}")


def served(recipe: Recipe) -> Recipe:
    """The recipe as a server runs it: current scales, and activations one scale a token (or a group of its channels).

    >>> served(Recipe.of("delayed")).x.tile
    Tile(rows=1, cols=0)
    """
    overrides = tuple((pattern, None if rule is None else served(rule)) for pattern, rule in recipe.overrides)
    x = Operand(recipe.x.format, Tile(1, recipe.x.tile.cols))
    return recipe.replace(x=x, delayed=None, overrides=overrides)


def replace_weights(model: nn.Module, names: list[str], scheme: str) -> None:
    """Put INT8 layers in place of those named, or round their weights to E4M3."""
    for name in names:
        layer = model.get_submodule(name)
        if not isinstance(layer, nn.Linear):
            raise ConfigError(f"scheme {scheme!r} knows linear layers only; {name} is a {type(layer).__name__}.")
        if scheme == "int8":
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, Int8Linear(layer.weight, layer.bias))
        else:
            weight = quantize_weight(layer.weight.detach(), EXPORTED["weight-only"])
            rounded = weight.dequantize(layer.weight.dtype)
            layer.weight = nn.Parameter(rounded, requires_grad=False)
