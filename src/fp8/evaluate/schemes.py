"""What a loaded model becomes when a scheme is to be judged before anything is exported.

    none          the model as it is (with --kv-cache: only its cache of keys and values changes)
    dynamic       E4M3 weights, one scale a channel; activations one scale a token; scales amax / 448, as servers have
    block         E4M3 weights in blocks of 128 x 128, activations in groups of 128, scales amax / 448
    weight-only   weights as in `dynamic`; activations stay
    int8          W8A8: weights one scale a channel, activations one scale a token, both symmetric, amax / 127
    rowwise ...   any preset of `fp8.Recipe`, or a JSON file of one; scales are then powers of two unless it says other

FP8 products are those of `fp8.convert`, weights quantized once: exact sums on a CPU, tensor cores on a Hopper GPU. A
recipe whose activations share one scale a tensor is served one scale a token, as a checkpoint is: a result must not
depend on who else is in the batch. INT8 goes into exactly the layers that FP8 goes into, so that the two can be held
side by side; it is computed in plain torch on integers, whose FP64 sums are exact, as the INT32 accumulator's are.
Embeddings, norms and the head stay. `static` is not here: its activation scales come from calibration, so that it
exists only as an exported checkpoint, which is judged as a model of its own.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ..checkpoint import quantize as exported
from ..errors import ConfigError, suggest
from ..nn import convert, refresh, revert
from ..quantize import quantize
from ..recipe import PRESETS, Operand, Recipe
from ..tile import Tile

DYNAMIC, BLOCK = (
    scheme.recipe(scheme.tile).replace(name=name, scale_rounding="none")
    for name, scheme in exported.SCHEMES.items()
    if name in ("dynamic", "block")
)
SCHEMES = ("none", "dynamic", "block", "weight-only", "int8")
INT8_MAX = 127.0


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
    if scheme in ("dynamic", "weight-only", "int8"):
        return DYNAMIC
    if scheme == "block":
        return BLOCK
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
            setattr(model.get_submodule(parent), child, Int8Linear(layer))
        else:
            rounded = quantize(layer.weight.detach(), "e4m3", "row", "none").dequantize(layer.weight.dtype)
            layer.weight = nn.Parameter(rounded, requires_grad=False)


class Int8Linear(nn.Module):
    """`y = x W^T + b` as INT8 W8A8 computes it: x [..., K], W [N, K], both as whole numbers in [-127, 127] times a
    scale a row."""

    codes: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        codes, scale = int8_rows(layer.weight.detach())
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())

    @property
    def weight(self) -> Tensor:
        """What the codes stand for; some models ask a layer for the type and place of its weight."""
        return self.codes.float() * self.scale

    def forward(self, x: Tensor) -> Tensor:
        codes, scale = int8_rows(x.reshape(-1, x.shape[-1]))
        y = (codes.double() @ self.codes.double().t()).float() * scale * self.scale.t()
        y = y if self.bias is None else y + self.bias.float()
        return y.to(x.dtype).view(*x.shape[:-1], y.shape[-1])


def int8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """INT8 codes `[R, K]`, rounded to nearest even, and FP32 scales `[R, 1]` of a matrix; a row of zeros has scale 1.

    >>> codes, scale = int8_rows(torch.tensor([[127.0, 0.5, -63.5]]))
    >>> codes.tolist(), scale.tolist()
    ([[127, 0, -64]], [[1.0]])
    """
    amax = x.float().abs().amax(1, keepdim=True)
    scale = torch.where(amax > 0, amax / INT8_MAX, torch.ones_like(amax))
    return (x.float() / scale).round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8), scale
