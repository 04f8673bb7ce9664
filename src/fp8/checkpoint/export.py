"""Writing a trained or loaded decoder as an FP8 checkpoint: `save`.

The codes in the file are those that the layers multiply by (`layer.quantized_weight()`), in bytes; nothing is
quantized anew. `compressed_tensors.py` says how they lie. What is not FP8 (embedding, norms, head, layers that were
skipped) is rounded to `dtype`, BF16 unless told otherwise: it is what servers compute in.

    config.json             the architecture, `quantization_config`, and `fp8` for what that cannot say
    generation_config.json  the end-of-text token
    model.safetensors       the tensors
    tokenizer.json, tokenizer_config.json
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..models.huggingface import Shard, shards, to_config
from ..models.llama import Decoder
from ..quantize import Quantized
from . import byte_tokenizer
from .compressed_tensors import E4M3, Scheme, check_values, own_config, quantization_config, shard_scales
from .load import tokenizer_name
from .tensorfile import write_json, write_tensors, written_aside

ENDS = ("<|endoftext|>", "<|im_end|>", "<|end_of_text|>", "</s>", "<eos>")


@dataclass(frozen=True)
class Saved:
    """What was written. Bytes are of tensors: codes and scales, without the file's header."""

    folder: Path
    fp8_layers: tuple[str, ...]
    high_layers: tuple[str, ...]
    nbytes: int
    bytes_in_bf16: int
    fp8_nbytes: int
    fp8_bytes_in_bf16: int

    def __str__(self) -> str:
        share = 100 * self.nbytes / max(self.bytes_in_bf16, 1)
        return (
            f"{self.folder}: {len(self.fp8_layers)} layers in FP8, {len(self.high_layers)} in high precision; "
            f"{self.nbytes / 1e6:.2f} MB, {share:.0f} % of {self.bytes_in_bf16 / 1e6:.2f} MB in BF16"
        )


def save(
    model: Decoder,
    folder: str | Path,
    tokenizer: Any = None,
    *,
    dtype: torch.dtype | None = torch.bfloat16,
    end_of_text: int | None = None,
    overwrite: bool = False,
) -> Saved:
    """Write `model` as an FP8 checkpoint in the compressed-tensors format.

    model        a `Decoder`: converted (`fp8.convert`) or loaded; high-precision layers go into the `ignore` list
    folder       made by this call; an existing checkpoint there is replaced only with `overwrite`
    tokenizer    None, "bytes" (the built-in one), or the path of a tokenizer.json or of a folder that holds one
    dtype        the type of all that is not FP8; None keeps each parameter's own
    end_of_text  its token, if the tokenizer does not tell

    The same model gives the same bytes. Written aside and renamed: no reader sees half of it, and a failure leaves
    nothing. Raises `CheckpointError`.
    """
    tokenizer = tokenizer_source(tokenizer)
    files = tokenizer_files(tokenizer)
    end = end_of_text if end_of_text is not None else end_token(files)
    tensors, config = encode(
        model, dtype, end, "bytes" if tokenizer == "bytes" else "tokenizer.json" if files else None
    )
    size = sum(tensor.nbytes for tensor in tensors.values())
    with written_aside(Path(folder), overwrite, size + (1 << 20)) as aside:
        write_tensors(aside / "model.safetensors", tensors)
        write_json(aside / "config.json", config)
        write_json(aside / "generation_config.json", {"do_sample": False, "eos_token_id": end})
        for name, content in files.items():
            (aside / name).write_bytes(content)
    return report(model, Path(folder), tensors)


def encode(
    model: Decoder, dtype: torch.dtype | None, end_of_text: int | None = None, tokenizer: str | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the `config.json` of a checkpoint, without writing it."""
    tensors: dict[str, Tensor] = {}
    groups: dict[Scheme, list[str]] = {}
    ignore: list[str] = []
    layout = shards(model.config)
    frozen = dict(fp8_layers(model))
    for ours, parts in layout.items():
        if ours in frozen:
            refuse_tied_head(ours, model)
            scheme = add_codes(tensors, ours, frozen[ours], parts)
            groups.setdefault(scheme, []).extend(part.name for part in parts)
            continue
        module = model.get_submodule(ours)
        if isinstance(module, nn.Linear):
            ignore += [part.name for part in parts]
        if not (ours == "head" and model.config.tie_embeddings):
            add_weight(tensors, module, parts, dtype)
    if not groups:
        raise CheckpointError("no layer of this model is FP8: fp8.convert(model, recipe) first.")
    kept = dtype or model.embedding.weight.dtype
    config = to_config(model.config, kept, end_of_text) | {"quantization_config": quantization_config(groups, ignore)}
    return tensors, config | {"fp8": own_config(groups, tokenizer) | decisions(model)}


def decisions(model: nn.Module) -> dict[str, Any]:
    """What `fp8.convert` decided about each layer, and why, where the model knows it."""
    kept = getattr(model, "fp8_report", None)
    return {} if kept is None else {"conversion": kept.to_dict()}


def refuse_tied_head(ours: str, model: Decoder) -> None:
    if ours == "head" and model.config.tie_embeddings:
        raise CheckpointError(
            "the head is FP8 but shares its weight with the embedding, which is not: skip 'head', or untie it."
        )


def fp8_layers(model: Decoder) -> Iterator[tuple[str, nn.Module]]:
    """The layers that hold or make FP8 weight codes, by name."""
    for name, module in model.named_modules():
        if getattr(module, "recipe", None) is not None and hasattr(module, "quantized_weight"):
            yield name, module


def add_codes(tensors: dict[str, Tensor], ours: str, layer: Any, parts: list[Shard]) -> Scheme:
    """A layer's codes and scales, by shard. Raises `CheckpointError` for what the format cannot say."""
    q: Quantized = layer.quantized_weight()
    if q.format is not E4M3 or layer.recipe.x.format != "e4m3":
        raise CheckpointError(
            f"{ours} has {q.format.name} weights and {layer.recipe.x.format} activations; float-quantized checkpoints "
            "hold e4m3 only: train that layer with another recipe."
        )
    part = getattr(layer, "fp8", layer)  # where a layer that is being trained keeps what a loaded one has itself
    inputs = getattr(part, "input_scale", None)
    kind = "none" if getattr(part, "weight_only", False) else "dynamic" if inputs is None else "static"
    scheme = replace(Scheme.of(layer.recipe, q.tile, parts), inputs=kind)
    for part, scale in zip(parts, shard_scales(q, scheme, parts), strict=True):
        codes = q.codes[part.start : part.stop]
        check_values(part.name, codes, scale)
        tensors[f"{part.name}.weight"], tensors[f"{part.name}.weight_scale"] = codes, scale
        if inputs is not None:
            tensors[f"{part.name}.input_scale"] = inputs.reshape(1)
    return scheme


def add_weight(tensors: dict[str, Tensor], module: nn.Module, parts: list[Shard], dtype: torch.dtype | None) -> None:
    """A weight in high precision, by shard."""
    weight: Tensor = module.weight.detach()  # type: ignore[assignment, operator]
    for part in parts:
        tensor = weight[part.start : part.stop]
        if not tensor.isfinite().all():
            raise CheckpointError(
                f"{part.name}.weight is not finite: the training run diverged; export an earlier step."
            )
        tensors[f"{part.name}.weight"] = tensor.to(dtype or tensor.dtype)


def report(model: Decoder, folder: Path, tensors: dict[str, Tensor]) -> Saved:
    """The bytes of what was written, and of the same weights in BF16."""
    linear = shards(model.config)
    fp8 = tuple(name for name, _ in fp8_layers(model))
    high = tuple(n for n in linear if n not in fp8 and isinstance(model.get_submodule(n), nn.Linear))
    names = {f"{part.name}.{kind}" for n in fp8 for part in linear[n] for kind in ("weight", "weight_scale")}
    scales = {name for name in tensors if name.endswith(".weight_scale")}
    return Saved(
        folder, fp8, high,
        nbytes=sum(t.nbytes for t in tensors.values()),
        bytes_in_bf16=2 * sum(t.numel() for n, t in tensors.items() if n not in scales),
        fp8_nbytes=sum(tensors[n].nbytes for n in names),
        fp8_bytes_in_bf16=2 * sum(tensors[n].numel() for n in names - scales),
    )  # fmt: skip


# --------------------------------------------------------------------------- tokenizer


def tokenizer_source(tokenizer: Any) -> Path | str | None:
    """ "bytes", the path of a tokenizer.json, or None; the folder of a checkpoint stands for the tokenizer in it."""
    if tokenizer is None or tokenizer == "bytes":
        return tokenizer
    if getattr(tokenizer, "fingerprint", None) == "bytes-257":
        return "bytes"
    if not isinstance(tokenizer, (str, Path)):
        raise CheckpointError(
            f"tokenizer is 'bytes' or a path, not a {type(tokenizer).__name__}: give its tokenizer.json."
        )
    path = Path(tokenizer)
    if (path / "config.json").is_file() and tokenizer_name(path) == "bytes":
        return "bytes"
    return path / "tokenizer.json" if path.is_dir() else path


def tokenizer_files(source: Path | str | None) -> dict[str, bytes]:
    """The files of a tokenizer, by name."""
    if source is None:
        return {}
    if source == "bytes":
        plain = {
            "tokenizer.json": byte_tokenizer.tokenizer_json(),
            "tokenizer_config.json": byte_tokenizer.tokenizer_config(),
        }
        return {name: (json.dumps(content, indent=1) + "\n").encode() for name, content in plain.items()}
    path = Path(source)
    if not path.is_file():
        raise CheckpointError(f"there is no tokenizer at {path}: give a tokenizer.json, or 'bytes'.")
    beside = path.with_name("tokenizer_config.json")
    files = {"tokenizer.json": path, "tokenizer_config.json": beside}
    return {name: found.read_bytes() for name, found in files.items() if found.is_file()}


def end_token(files: dict[str, bytes]) -> int | None:
    """The end-of-text token that a tokenizer.json names among its added tokens."""
    if "tokenizer.json" not in files:
        return None
    added = {row["content"]: row["id"] for row in json.loads(files["tokenizer.json"]).get("added_tokens") or ()}
    return next((added[end] for end in ENDS if end in added), None)
