"""The `compressed-tensors` schema, format `float-quantized`: how FP8 weights lie in a file that vLLM, SGLang and
Hugging Face read. `export.py` writes it, `load.py` reads it; here is what both must agree on.

For each linear layer `<m>`, under its Hugging Face name:

    <m>.weight          F8_E4M3   the codes, [N, K]
    <m>.weight_scale    F32       real = code * scale; per channel [N, 1], per tensor [1], in blocks of r x c
                                  [ceil(N / r), ceil(K / c)]
    <m>.input_scale     F32       [1], where activations have one calibrated scale
    <attention>.k_scale F32       of keys after the rotary embedding: [KV heads, 1, 1], or [1] for all heads
    <attention>.v_scale F32       of values, likewise

and in `config.json`, `quantization_config`: groups of layers with one scheme each, and the layers to `ignore`.

**The training codes survive unchanged.** That decides the layout.

    our weight tile    written as              why
    tensor             channel                 the one scale N times; servers would quantize per-tensor q, k and v anew
    row                channel                 it is that already
    128x128            block [r, 128]          r = 128 where shards begin at multiples of 128, else the largest r that
                                               divides 128 and every boundary; scales repeat
    1x128, 1x32        block [1, 128 or 32]    the schema has no other name for it

Their q, k and v (gate and up) are row ranges of our one matrix. Where a boundary cuts a 128-row block in two, smaller
blocks with the same scale on both sides say the same numbers, with no code rounded again. Readers whose kernels know
only 128 x 128 need heads whose rows are multiples of 128; compressed-tensors itself wants every K to be a multiple of
128 where activations have groups of 128.

Activations are quantized when served: one scale a token (`token`), or one for each group of channels (`group`, for
recipes with 1x128 or 1x32 activations). A per-tensor activation scale measured when served would depend on the batch,
so a per-tensor recipe is served per token; one that was calibrated (`tensor`, not dynamic) does not. Without
`input_activations` only the weight is FP8, and the format is called `naive-quantized`.

`kv_cache_scheme` says that the cache is FP8, with one scale a head (`attn_head`) or one for all (`tensor`).

**What the schema cannot say** stands in `config.json` under `fp8`, which other readers pass over: whether activation
scales are powers of two, how products are summed, and what `fp8.convert` decided about each layer, and why. A
checkpoint without it was made elsewhere: scales are amax / max, as there.

Source: compressed-tensors 0.20.0, `quant_args.py`, `quant_scheme.py`, `quant_config.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, Fp8Error, suggest
from ..formats import format_of
from ..models.huggingface import Shard
from ..quantize import Quantized
from ..recipe import Accumulate, Operand, Recipe
from ..tile import Tile

SCHEMA = "0.20.0"
VERSION = 1
E4M3 = format_of("e4m3")


@dataclass(frozen=True)
class Scheme:
    """How layers are stored and served: `block` None is per channel; `group` 0 is one activation scale a token.

    `per_tensor`: the weight has one scale. `inputs`: activation scales are "dynamic", "static" (one, calibrated), or
    there are "none": the weight is decoded and multiplied in high precision. `searched`: weights have not the scales of
    `scale_rounding`, but those that err least; a file that is read does not say.
    """

    block: tuple[int, int] | None
    group: int
    scale_rounding: str
    accumulate: str
    per_tensor: bool = False
    inputs: str = "dynamic"
    searched: bool = False

    @staticmethod
    def of(recipe: Recipe, tile: Tile, parts: Sequence[Shard]) -> Scheme:
        """The scheme of a layer whose weight has this tile and is cut into these shards."""
        block = None if tile.constant_along_k else (block_rows(tile.rows, parts), tile.cols)
        return Scheme(block, recipe.x.tile.cols, recipe.scale_rounding, recipe.accumulate.forward)

    @property
    def format(self) -> str:
        """The schema's name for it."""
        return "naive-quantized" if self.inputs == "none" else "float-quantized"

    @property
    def tile(self) -> Tile:
        """What shares a scale when a weight is quantized by this scheme."""
        return Tile(0, 0) if self.per_tensor else Tile(*self.block) if self.block else Tile(1, 0)

    def scale_shape(self, rows: int, cols: int) -> tuple[int, ...]:
        """The shape of `weight_scale`."""
        if self.per_tensor:
            return (1,)
        height, width = self.block or (1, cols)
        return -(-rows // height), -(-cols // width)

    def recipe(self, tile: Tile) -> Recipe:
        """The recipe of a loaded layer whose weight has this tile."""
        x = Operand("e4m3", Tile(1, self.group))
        sums = Accumulate(self.accumulate, "promoted", "promoted")
        return Recipe("loaded", x, Operand("e4m3", tile), scale_rounding=self.scale_rounding, accumulate=sums)


def block_rows(rows: int, parts: Sequence[Shard]) -> int:
    """The height of the blocks that a weight's shards can all be cut into."""
    return math.gcd(rows, *(part.start for part in parts))


# --------------------------------------------------------------------------- scales


def shard_scales(q: Quantized, scheme: Scheme, parts: Sequence[Shard]) -> list[Tensor]:
    """The scales of each shard: `[n, 1]`, or `[ceil(n / r), ceil(K / c)]`."""
    rows = row_scales(q)
    step = scheme.block[0] if scheme.block else 1
    return [rows[part.start : part.stop : step].contiguous() for part in parts]


def row_scales(q: Quantized) -> Tensor:
    """The scales of every row, `[N, columns of scales]`."""
    height = q.tile.shape(*q.shape)[0]
    return q.scale.repeat_interleave(height, 0)[: q.shape[0]]


def joined(codes: Sequence[Tensor], scales: Sequence[Tensor], scheme: Scheme) -> Quantized:
    """One weight out of its shards: codes and scales as they are; square tiles come back where they were cut."""
    height = scheme.block[0] if scheme.block else 1
    rows = [s.float().repeat_interleave(height, 0)[: c.shape[0]] for c, s in zip(codes, scales, strict=True)]
    weight, scale = torch.cat(list(codes)), torch.cat(rows)
    if scheme.block is None:
        return Quantized(weight, scale, Tile(1, 0), E4M3)
    every = scale[::128]
    if height > 1 and scheme.block[1] == 128 and torch.equal(every.repeat_interleave(128, 0)[: scale.shape[0]], scale):
        return Quantized(weight, every.contiguous(), Tile(128, 128), E4M3)
    return Quantized(weight, scale, Tile(1, scheme.block[1]), E4M3)


def check_shard(name: str, codes: Tensor, scale: Tensor, scheme: Scheme) -> None:
    """Refuse a weight or scales that are not what the scheme calls for."""
    if codes.dtype != torch.float8_e4m3fn:
        raise CheckpointError(
            f"{name}.weight is {str(codes.dtype)[6:]}; a float-quantized weight is float8_e4m3fn (F8_E4M3)."
        )
    if scale.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise CheckpointError(f"{name}.weight_scale is {str(scale.dtype)[6:]}; scales are float32 (or bfloat16).")
    need = scheme.scale_shape(*codes.shape)
    if tuple(scale.shape) != need:
        raise CheckpointError(f"{name}.weight_scale has shape {tuple(scale.shape)}; its scheme calls for {need}.")
    check_values(name, codes, scale)


def check_values(name: str, codes: Tensor, scale: Tensor) -> None:
    """Scales are finite, positive and normal; no code is NaN."""
    good = scale.isfinite() & (scale >= torch.finfo(torch.float32).tiny)
    if not good.all():
        row = int((~good).flatten(1).any(1).nonzero()[0, 0]) if scale.dim() > 1 else 0
        raise CheckpointError(
            f"{name}.weight_scale has {float(scale[~good][0])} in row {row}; scales are finite and positive."
        )
    if ((codes.view(torch.uint8) & 0x7F) == 0x7F).any():
        raise CheckpointError(f"{name}.weight has NaN codes: the weight was not finite when it was quantized.")


# --------------------------------------------------------------------------- config.json


NUMBER = {"num_bits": 8, "type": "float", "symmetric": True}


def quantization_config(
    groups: Mapping[Scheme, Sequence[str]], ignore: Sequence[str], kv: str | None = None
) -> dict[str, Any]:
    """`quantization_config` for layers by scheme: a single one is for all `Linear`, several are for layers by name.

    kv    None, or what has a scale in the KV cache: "attn_head" or "tensor"
    """
    single = len(groups) == 1
    formats = {scheme.format for scheme in groups}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "ignore": list(ignore),
        "kv_cache_scheme": kv and NUMBER | {"group_size": None, "strategy": kv, "dynamic": False},
        "config_groups": {
            f"group_{i}": _group(scheme, ["Linear"] if single else list(names))
            for i, (scheme, names) in enumerate(groups.items())
        },
        "sparsity_config": {},
        "transform_config": {},
        "version": SCHEMA,
    }


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    weights: dict[str, Any] = NUMBER | {"group_size": None, "strategy": "channel", "dynamic": False}
    if scheme.block:
        weights |= {"strategy": "block", "block_structure": list(scheme.block)}
    if scheme.per_tensor:
        weights |= {"strategy": "tensor"}
    return {"targets": targets, "format": scheme.format, "output_activations": None, "weights": weights,
            "input_activations": _inputs(scheme)}  # fmt: skip


def _inputs(scheme: Scheme) -> dict[str, Any] | None:
    if scheme.inputs == "none":
        return None
    inputs = NUMBER | {"group_size": None, "strategy": "token", "dynamic": True}
    if scheme.inputs == "static":
        return inputs | {"strategy": "tensor", "dynamic": False, "observer": "static_minmax"}
    return inputs | {"strategy": "group", "group_size": scheme.group} if scheme.group else inputs


def own_config(schemes: Iterable[Scheme], tokenizer: str | None) -> dict[str, Any]:
    """The `fp8` part of `config.json`: what the schema cannot say."""
    groups = {
        f"group_{i}": {"activation_scale_rounding": s.scale_rounding, "accumulate": s.accumulate}
        for i, s in enumerate(schemes)
    }
    return {"version": VERSION, "groups": groups, "tokenizer": tokenizer}


@dataclass(frozen=True)
class Groups:
    """The schemes of a checkpoint, which layer has which, and what its scales are called.

    `kv`: what has a scale in the KV cache, "attn_head" or "tensor"; None: nothing. `parts`: an entry of `ignore` may
    name a part of a path (Hugging Face's `fp8`), not only all of it.
    """

    rows: tuple[tuple[Scheme, tuple[str, ...]], ...]
    ignore: tuple[str, ...]
    scale_name: str = "weight_scale"
    input_name: str = "input_scale"
    kv: str | None = None
    parts: bool = False

    def scheme(self, name: str) -> Scheme | None:
        """The scheme of the linear layer called `name`; None: high precision. A name goes before a class."""
        if self.ignores(name):
            return None
        for exact in (True, False):
            for scheme, targets in self.rows:
                if any(matches(t, name) and (t != "Linear") == exact for t in targets):
                    return scheme
        return None

    def ignores(self, name: str) -> bool:
        """Whether a layer stays in high precision by name."""
        hidden = f".{name}."
        return any(matches(entry, name) or (self.parts and f".{entry}." in hidden) for entry in self.ignore)


def matches(entry: str, name: str) -> bool:
    """Whether a target, an exact name, the class `Linear` or `re:` and a regular expression, means this layer."""
    return re.match(entry[3:], name) is not None if entry.startswith("re:") else entry in (name, "Linear")


def read_groups(config: Mapping[str, Any]) -> Groups:
    """The groups of a `config.json`. Raises `CheckpointError`, naming the setting, for what cannot be computed here."""
    plain = config["quantization_config"]
    expect(plain, "quant_method", "compressed-tensors", "quantization_config")
    expect(plain, "format", ("float-quantized", "naive-quantized", "mixed-precision"), "quantization_config")
    own = config.get("fp8", {})
    if own.get("version", VERSION) != VERSION:
        raise CheckpointError(f"the checkpoint is of version {own['version']}; this is version {VERSION}: update fp8.")
    groups = plain.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise CheckpointError("quantization_config lacks 'config_groups': no layer has a scheme.")
    rows = tuple(_read_group(name, group, own.get("groups", {}).get(name, {})) for name, group in groups.items())
    kv = plain.get("kv_cache_scheme")
    if kv:
        _expect_number(kv, "kv_cache_scheme")
        expect(kv, "strategy", ("attn_head", "tensor"), "kv_cache_scheme")
    return Groups(rows, tuple(plain.get("ignore") or ()), kv=kv["strategy"] if kv else None)


def _read_group(name: str, group: Mapping[str, Any], own: Mapping[str, Any]) -> tuple[Scheme, tuple[str, ...]]:
    weights, inputs = group.get("weights"), group.get("input_activations")
    if not weights:
        raise CheckpointError(f"{name} has no scheme for weights: there is nothing to read in FP8.")
    _expect_number(weights, f"{name}.weights")
    expect(weights, "strategy", ("channel", "tensor", "block"), f"{name}.weights")
    block = _read_block(weights, f"{name}.weights")
    how, size = ("none", 0) if not inputs else _read_inputs(inputs, f"{name}.input_activations")
    scheme = Scheme(
        block,
        size,
        own.get("activation_scale_rounding", "none"),
        own.get("accumulate", "promoted" if block else "fast"),
        weights["strategy"] == "tensor",
        how,
    )
    try:
        scheme.recipe(Tile(1, 0) if block is None else Tile(1, block[1]))
    except Fp8Error as error:
        raise CheckpointError(f"{name} cannot be computed: {error}") from None
    return scheme, tuple(group.get("targets") or ())


def _expect_number(part: Mapping[str, Any], where: str) -> None:
    for key, need in NUMBER.items():
        expect(part, key, need, where)


def _read_inputs(inputs: Mapping[str, Any], where: str) -> tuple[str, int]:
    """How activations are quantized, and the size of a group."""
    _expect_number(inputs, where)
    expect(inputs, "strategy", ("token", "group", "tensor"), where)
    if inputs["strategy"] == "tensor":
        expect(inputs, "dynamic", False, where)
        return "static", 0
    expect(inputs, "dynamic", True, where)
    if inputs["strategy"] == "token":
        return "dynamic", 0
    expect(inputs, "group_size", (32, 128), where)
    return "dynamic", inputs["group_size"]


def _read_block(weights: Mapping[str, Any], where: str) -> tuple[int, int] | None:
    if weights["strategy"] != "block":
        return None
    block = weights.get("block_structure")
    if not isinstance(block, Sequence) or len(block) != 2 or block[1] not in (32, 128) or block[0] < 1:
        raise CheckpointError(f"{where}.block_structure={block!r}; blocks [rows, 128] or [rows, 32] can be computed.")
    return int(block[0]), int(block[1])


def expect(plain: Mapping[str, Any], key: str, need: Any, where: str) -> None:
    """Refuse a setting that is missing or not (one of) what is needed."""
    known = need if isinstance(need, tuple) else (need,)
    if key not in plain:
        raise CheckpointError(f"{where} lacks {key!r} ({' or '.join(map(repr, known))} is needed).")
    if plain[key] not in known:
        raise CheckpointError(
            f"{where}.{key}={plain[key]!r} cannot be computed here. {suggest(plain[key], map(str, known))}"
        )
