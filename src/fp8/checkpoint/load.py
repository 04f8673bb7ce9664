"""Reading a checkpoint into a decoder: `load`.

An FP8 checkpoint gives a decoder whose FP8 layers are `FrozenLinear`, holding the file's codes and scales in bytes;
nothing is decoded and quantized again. A plain Hugging Face Llama gives a decoder in high precision, ready for
`fp8.convert`. Every file is checked before the model is built, so that a damaged one never gives a model that runs and
is wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, Fp8Error
from ..models.huggingface import Shard, from_config, from_huggingface, shape_of, shards
from ..models.llama import Decoder, DecoderConfig
from ..nn import Report
from ..nn.frozen_linear import FrozenLinear
from ..quantize import Quantized
from . import huggingface_fp8
from .compressed_tensors import Groups, Scheme, check_shard, joined, read_groups
from .tensorfile import INDEX, read_index, read_json, read_tensors

OTHER_METHODS = {
    "modelopt": "NVIDIA Model Optimizer's format",
    "fbgemm_fp8": "FBGEMM's format",
}


def load(folder: str | Path, device: torch.device | str | None = None) -> Decoder:
    """The decoder in a folder: an FP8 checkpoint (compressed-tensors, `float-quantized`) or a plain Hugging Face Llama.

    Parameters have the types of the file. An FP8 checkpoint's decoder is for inference (nothing requires a gradient);
    both are in evaluation mode. Raises `CheckpointError`, naming the file, tensor or setting, for anything missing or
    unfit.
    """
    folder = Path(folder)
    plain = read_json(folder / "config.json")
    config = from_config(plain)
    tensors = read_folder(folder)
    groups = groups_of(plain)
    model = build(config, tensors, groups)
    if groups is not None:
        model.requires_grad_(False)
        model.fp8_report = report_of(plain)  # type: ignore[assignment]
    return model.eval() if device is None else model.eval().to(device)


def report_of(plain: Mapping[str, Any]) -> Report | None:
    """Which layers were converted, and why, if the checkpoint tells: what was decided once is carried on."""
    decided = plain.get("fp8", {}).get("conversion")
    try:
        return None if decided is None else Report.from_dict(decided)
    except Fp8Error as error:
        raise CheckpointError(f"fp8.conversion in config.json is damaged: {error}") from None


def groups_of(plain: Mapping[str, Any]) -> Groups | None:
    """The schemes of a `config.json`; None where nothing is quantized."""
    quantization = plain.get("quantization_config")
    if not quantization:
        return None
    method = quantization.get("quant_method")
    if method == huggingface_fp8.METHOD:
        return huggingface_fp8.read_groups(plain)
    if method != "compressed-tensors":
        known = f" ({OTHER_METHODS[method]})" if method in OTHER_METHODS else ""
        raise CheckpointError(
            f"config.json says quant_method={method!r}{known}; 'compressed-tensors' and 'fp8' are read: export it in "
            "one of these formats."
        )
    return read_groups(plain)


def read_folder(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, from one file or from those that an index names."""
    files = read_index(folder)
    if not files:
        return read_tensors(folder / "model.safetensors")
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(files.values())):
        tensors |= {name: t for name, t in read_tensors(folder / file).items() if files.get(name, file) == file}
    if missing := [name for name in files if name not in tensors]:
        raise CheckpointError(f"{INDEX} names {missing[0]}, which {files[missing[0]]} does not hold: copy it again.")
    return tensors


def build(config: DecoderConfig, tensors: dict[str, Tensor], groups: Groups | None) -> Decoder:
    """The model with these tensors. What belongs to FP8 layers is taken out of `tensors`."""
    with torch.device("meta"):
        model = Decoder(config)
    frozen = {} if groups is None else take_frozen(config, tensors, groups)
    state = from_huggingface(tensors, config, skip=frozen)
    for name, layer in frozen.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    model.load_state_dict(state, strict=False, assign=True)
    if config.tie_embeddings:
        model.head.weight = model.embedding.weight
    return model


def take_frozen(config: DecoderConfig, tensors: dict[str, Tensor], groups: Groups) -> dict[str, FrozenLinear]:
    """The FP8 layers, by our names."""
    found = {}
    for ours, parts in shards(config).items():
        if ours.endswith("norm") or ours == "embedding" or (ours == "head" and config.tie_embeddings):
            continue
        if (scheme := common_scheme([part.name for part in parts], groups)) is not None:
            weight = take_weight(tensors, parts, scheme, groups, config)
            inputs = take_input_scale(tensors, parts, groups) if scheme.inputs == "static" else None
            found[ours] = FrozenLinear(
                weight, scheme.recipe(weight.tile), None, ours, input_scale=inputs, weight_only=scheme.inputs == "none"
            )
    return found


def common_scheme(parts: Sequence[str], groups: Groups) -> Scheme | None:
    """The scheme that all the named shards of one matrix have."""
    schemes = {part: groups.scheme(part) for part in parts}
    if len(set(schemes.values())) > 1:
        names = ", ".join(f"{name} ({'high precision' if s is None else 'FP8'})" for name, s in schemes.items())
        raise CheckpointError(f"these are rows of one matrix and must have one scheme: {names}.")
    return next(iter(schemes.values()))


def take_weight(
    tensors: dict[str, Tensor], parts: list[Shard], scheme: Scheme, groups: Groups, config: DecoderConfig
) -> Quantized:
    """The weight that the shards make up, checked, and out of `tensors`."""
    codes, scales = [], []
    for part in parts:
        weight, scale = (_take(tensors, f"{part.name}.{kind}") for kind in ("weight", groups.scale_name))
        if tuple(weight.shape) != (need := shape_of(part, config)):
            raise CheckpointError(f"{part.name}.weight has shape {tuple(weight.shape)}; config.json calls for {need}.")
        codes.append(weight)
        scales.append(checked_scale(part.name, weight, scale, scheme))
    return joined(codes, scales, scheme)


def checked_scale(name: str, codes: Tensor, scale: Tensor, scheme: Scheme) -> Tensor:
    """The scales of a layer as a matrix, after all checks; one scale for all is repeated for every row."""
    if scheme.per_tensor and scale.dim() == 0:
        scale = scale.reshape(1)
    if scheme.block is None and scale.numel() == 1:
        scale = scale.reshape(1) if scheme.per_tensor else scale.reshape(1, 1).expand(codes.shape[0], 1)
    check_shard(name, codes, scale, scheme)
    return scale.reshape(1, 1).expand(codes.shape[0], 1) if scheme.per_tensor else scale


def take_input_scale(tensors: dict[str, Tensor], parts: list[Shard], groups: Groups) -> Tensor:
    """The calibrated scale of a layer's input, `[1, 1]`; where shards have several, the largest, as in vLLM."""
    found = [checked_input(part.name, _take(tensors, f"{part.name}.{groups.input_name}"), groups) for part in parts]
    return torch.stack(found).amax(0)


def checked_input(name: str, scale: Tensor, groups: Groups) -> Tensor:
    """One scale for a layer's input as `[1, 1]`, FP32."""
    good = scale.numel() == 1 and bool(scale.isfinite().all()) and bool((scale > 0).all())
    if not good:
        raise CheckpointError(
            f"{name}.{groups.input_name} is {scale.flatten()[:3].tolist()}; it is one number, finite and positive."
        )
    return scale.float().reshape(1, 1)


def _take(tensors: dict[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise CheckpointError(f"the checkpoint has no tensor {name!r}, which its quantization_config calls for.")
    return tensors.pop(name)


def tokenizer_name(folder: str | Path) -> str | None:
    """The tokenizer of a checkpoint: "bytes", the path of its tokenizer.json, or None where it has none."""
    folder = Path(folder)
    if read_json(folder / "config.json").get("fp8", {}).get("tokenizer") == "bytes":
        return "bytes"
    path = folder / "tokenizer.json"
    return str(path) if path.is_file() else None


def end_of_text(folder: str | Path) -> tuple[int, ...]:
    """The tokens that end a text, as `generation_config.json`, or else `config.json`, says."""
    folder = Path(folder)
    generation = folder / "generation_config.json"
    ends = (read_json(generation) if generation.is_file() else {}).get("eos_token_id")
    if ends is None:
        ends = read_json(folder / "config.json").get("eos_token_id")
    return () if ends is None else (ends,) if isinstance(ends, int) else tuple(ends)
