"""Hugging Face's `fp8` schema (`FineGrainedFP8Config`): the layout of DeepSeek-V3 and of Qwen's FP8 models.

    <m>.weight             F8_E4M3   the codes, [N, K]
    <m>.weight_scale_inv   F32       real = code * scale all the same (the inverse of what quantizing multiplies by);
                                     [ceil(N / 128), ceil(K / 128)]
    <m>.activation_scale   F32       a scalar, where activations have one calibrated scale

It says blocks and nothing else in a way that all readers share: a per-tensor file has one name for its scales in
transformers and another in vLLM. So blocks are written, and both are read. It has no place for scales of the KV cache.

Source: transformers 5.23, `FineGrainedFP8Config` and `integrations/finegrained_fp8.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import CheckpointError
from .compressed_tensors import Groups, Scheme, expect

METHOD = "fp8"
BLOCK = (128, 128)


def quantization_config(scheme: Scheme, ignore: Sequence[str]) -> dict[str, Any]:
    """`quantization_config` for layers in blocks. Raises `CheckpointError` for what the schema cannot say."""
    if scheme.block != BLOCK or scheme.group != BLOCK[1]:
        raise CheckpointError(
            "huggingface-fp8 says 128x128 blocks with dynamic 1x128 activations, and nothing else; other scales would "
            "have to be rounded anew. Quantize the source with --scheme block."
        )
    return {
        "quant_method": METHOD,
        "activation_scheme": "dynamic",
        "weight_block_size": list(BLOCK),
        "modules_to_not_convert": list(ignore),
        "scale_fmt": "float",
        "fmt": "e4m3",
    }


def read_groups(config: Mapping[str, Any]) -> Groups:
    """The groups of a `config.json`."""
    plain = config["quantization_config"]
    expect(plain, "quant_method", METHOD, "quantization_config")
    activations = plain.get("activation_scheme", "dynamic")
    block = plain.get("weight_block_size", list(BLOCK))
    if block is not None and (tuple(block) != BLOCK or activations != "dynamic"):
        raise CheckpointError(
            f"quantization_config has weight_block_size={block} and activation_scheme={activations!r}; blocks of "
            "[128, 128] with 'dynamic', or null, are read."
        )
    if plain.get("scale_fmt", "float") != "float":
        raise CheckpointError(f"quantization_config.scale_fmt={plain['scale_fmt']!r}; float scales are read.")
    own = (config.get("fp8") or {}).get("groups", {}).get("group_0", {})
    scheme = Scheme(
        None if block is None else BLOCK,
        0 if block is None else BLOCK[1],
        own.get("activation_scale_rounding", "none"),
        own.get("accumulate", "fast" if block is None else "promoted"),
        block is None,
        "static" if activations == "static" else "dynamic",
    )
    ignore = plain.get("modules_to_not_convert") or plain.get("ignored_layers") or ()
    return Groups(((scheme, ("Linear",)),), tuple(ignore), "weight_scale_inv", "activation_scale", None, True)
