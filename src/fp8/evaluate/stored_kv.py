"""The KV cache as an FP8 checkpoint says it: one fixed scale a head, or one a layer, calibrated before.

    stored     the file's `k_scale` and `v_scale`; a checkpoint that has them is judged so unless it is told otherwise
    scale-1    every scale 1.0: what a server does with a file that has none

Servers store `K / k_scale` and `V / v_scale` in E4M3, saturating, where `fp8` (a scale a token and head, measured when
it is stored) saturates nothing. Both are rounded in the attention module, before anything is stored or multiplied
(`nn/kv_rounding.py`), so every cache and every attention kernel behind that reads what the codes stand for.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..calibrate.qat import attention_modules, kv_heads
from ..checkpoint.fp8_folder import Fp8Folder
from ..checkpoint.tensorfile import read_json
from ..errors import CheckpointError, ConfigError
from ..models import Decoder
from ..nn.fake_quantize import MeasuredScale
from ..nn.kv_rounding import KVRounding, round_kv

STORED, ONES = "stored", "scale-1"
FIXED = (STORED, ONES)
KINDS = ("k_scale", "v_scale")


def has_scales(folder: Path) -> bool:
    """Whether a folder is an FP8 checkpoint with scales for its KV cache."""
    quantized = bool(read_json(folder / "config.json").get("quantization_config"))
    return quantized and any(name.endswith(KINDS) for name in Fp8Folder.open(folder).kv)


def round_fixed(model: nn.Module, folder: Path, which: str) -> None:
    """Make a model round its keys and values by the scales of its folder, or by 1.0.

    Raises `ConfigError` for a folder without scales, `CheckpointError` for scales that do not fit the model.
    """
    found = scales_of(folder) if which == STORED else {}
    for name, module in attention_modules(model).items():
        heads = kv_heads(model, module)
        both = [torch.ones(heads)] * 2 if which == ONES else fitting(found, name_in_file(model, name), heads)
        device = next(model.parameters()).device
        round_kv(module, KVRounding(*(MeasuredScale(heads, True, scales) for scales in both)).eval().to(device))


def scales_of(folder: Path) -> Mapping[str, Tensor]:
    """The scales by their names in the file, FP32 [heads] or [1]."""
    if not has_scales(folder):
        raise ConfigError(
            f"{folder} holds no scales of a KV cache: --kv-cache fp8 measures one a token and head, scale-1 is what "
            "servers do without."
        )
    checkpoint = Fp8Folder.open(folder)
    read = {name: checkpoint.source.read(name).float().flatten() for name in checkpoint.kv if name.endswith(KINDS)}
    for name, scale in read.items():
        if not (bool(scale.isfinite().all()) and bool((scale > 0).all())):
            raise CheckpointError(f"{name} of {folder} is {scale.tolist()[:3]}; a scale is finite and positive.")
    return read


def fitting(found: Mapping[str, Tensor], module: str, heads: int) -> list[Tensor]:
    """The scales of one attention module's keys and values, [heads] each; one for all is repeated."""
    both = []
    for name in (f"{module}.{kind}" for kind in KINDS):
        if name not in found or len(found[name]) not in (1, heads):
            has = "is missing" if name not in found else f"has {len(found[name])} scales for {heads} heads"
            raise CheckpointError(f"{name} {has}: calibrate anew, or leave the cache alone by --kv-cache bf16.")
        both.append(found[name].expand(heads).contiguous())
    return both


def name_in_file(model: Any, name: str) -> str:
    """What files call an attention module of our decoder; in any other model it has the file's name.

    >>> from fp8.models import DecoderConfig
    >>> name_in_file(Decoder(DecoderConfig(8, 8, 8, 1, 1, 1)), "layers.0.attention")
    'model.layers.0.self_attn'
    """
    return f"model.{name.removesuffix('attention')}self_attn" if isinstance(model, Decoder) else name
