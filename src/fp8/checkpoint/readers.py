"""Who can load an FP8 checkpoint: vLLM, SGLang, TensorRT-LLM, transformers, and this package; with the reasons.

What is said here was read in their sources, of vLLM 0.33, SGLang 0.5.23, transformers 5.23 and compressed-tensors 0.20,
and in the documentation of TensorRT-LLM; only transformers is run against what we write.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import Fp8Error
from ..models.architecture import Architecture
from .compressed_tensors import Scheme
from .fp8_folder import Fp8Folder
from .layers import fused_group

YES, CARE, NO = "yes", "with care", "no"


@dataclass(frozen=True)
class Reader:
    """A reader, whether it can load the file, and why not, or what to know."""

    name: str
    verdict: str
    reasons: tuple[str, ...]


def readers(folder: Fp8Folder) -> tuple[Reader, ...]:
    """What each reader makes of the file, from its config and headers."""
    rules = {"vLLM": _vllm, "SGLang": _sglang, "TensorRT-LLM": _tensorrt, "transformers": _transformers, "fp8": _ours}
    return tuple(_judge(name, list(rule(folder))) for name, rule in rules.items())


def _judge(name: str, found: list[tuple[str, str]]) -> Reader:
    verdict = next((level for level in (NO, CARE) if any(level == each for each, _ in found)), YES)
    return Reader(name, verdict, tuple(reason for _, reason in sorted(found, key=lambda one: one[0] != verdict)))


Reasons = Iterator[tuple[str, str]]


def _schemes(folder: Fp8Folder) -> set[Scheme]:
    return {s for name in folder.stored if (s := folder.groups.scheme(name)) is not None}


def _shapes(folder: Fp8Folder, of: int) -> list[str]:
    """FP8 layers with a side that is no multiple of `of`."""
    shapes = {name: folder.source.entries[f"{name}.weight"].shape for name in folder.stored}
    return [name for name, shape in shapes.items() if any(side % of for side in shape)]


def _servers(folder: Fp8Folder) -> Reasons:
    """What vLLM and SGLang have in common."""
    for scheme in _schemes(folder):
        if scheme.block and scheme.block != (128, 128):
            yield NO, f"blocks of {scheme.block[0]}x{scheme.block[1]}: its kernels know 128x128"
        if folder.groups.parts and scheme.per_tensor:
            yield (
                NO,
                "per-tensor scales of the fp8 schema go by another name there: fp8 convert --to compressed-tensors",
            )
        if scheme.per_tensor and _unequal(folder):
            yield CARE, "fused per-tensor scales differ: it rounds their codes anew (fp8 convert --for vllm)"
        if scheme.inputs == "none":
            yield CARE, "weight-only: decoded in the kernel (Marlin), no FP8 product"
        if scheme.block == (128, 128) and (odd := _odd_blocks(folder)):
            yield (
                NO,
                f"{odd[0]} has a side that is no multiple of 128, which blocks need there ({len(odd)} such layers)",
            )
    if odd := _shapes(folder, 16):
        yield CARE, f"{odd[0]} has a side that is no multiple of 16: no CUTLASS kernel, a slow path ({len(odd)} layers)"


def _odd_blocks(folder: Fp8Folder) -> list[str]:
    """Every K, and the rows of every layer that is fused with others."""
    shapes = {name: folder.source.entries[f"{name}.weight"].shape for name in folder.stored}
    return [n for n, (rows, cols) in shapes.items() if cols % 128 or (rows % 128 and len(fused_group(n)) > 1)]


def _unequal(folder: Fp8Folder) -> bool:
    names = [n for n in folder.stored if f"{n}.{folder.groups.scale_name}" in folder.source.entries]
    scales = {
        n: folder.scale(n).flatten()[:1].tolist() for n in names if (s := folder.groups.scheme(n)) and s.per_tensor
    }
    return any(scales[n] != scales[other] for n in scales for other in fused_group(n) if other in scales)


def _vllm(folder: Fp8Folder) -> Reasons:
    yield from _servers(folder)
    if folder.groups.kv == "attn_head":
        yield CARE, "KV scales per head: read by its FlashAttention backend only"
    if other := [name for name in folder.kv if ".self_attn." not in name]:
        yield CARE, f"{other[0]}: it looks for KV scales under .self_attn only"


def _sglang(folder: Fp8Folder) -> Reasons:
    yield from _servers(folder)
    if folder.groups.kv == "attn_head":
        yield NO, "KV scales per head: it reads one a tensor (fp8 convert --for sglang)"


def _tensorrt(folder: Fp8Folder) -> Reasons:
    if not folder.groups.parts:
        yield (
            NO,
            "it reads NVIDIA's modelopt format and Hugging Face's fp8 (fp8 convert --to huggingface-fp8, for blocks)",
        )
    elif any(scheme.per_tensor for scheme in _schemes(folder)):
        yield NO, "of the fp8 schema it reads 128x128 blocks"
    elif odd := _odd_blocks(folder):
        yield CARE, f"{odd[0]} has a side that is no multiple of 128 ({len(odd)} such layers): not known to work"


def _transformers(folder: Fp8Folder) -> Reasons:
    schemes = _schemes(folder)
    if folder.groups.parts:
        yield CARE, "needs the package accelerate; without a GPU it decodes to BF16"
        if odd := _shapes(folder, 128):
            yield (
                NO,
                f"{odd[0]} has a side that is no multiple of 128: it cannot be decoded there ({len(odd)} such layers)",
            )
        return
    yield CARE, "needs the package compressed-tensors; it decodes to BF16 unless use_optimized_inference is set"
    for scheme in schemes:
        wide = [n for n in folder.stored if folder.source.entries[f"{n}.weight"].shape[1] % (scheme.group or 1)]
        if scheme.group and wide:
            yield NO, f"{wide[0]} has inputs that are no whole groups of {scheme.group}: it fails when it runs"
        if scheme.inputs == "none" and folder.source.config["quantization_config"].get("format") == "float-quantized":
            yield (
                NO,
                "weight-only must be called naive-quantized: compressed-tensors refuses float-quantized without inputs",
            )


def _ours(folder: Fp8Folder) -> Reasons:
    try:
        Architecture.of(folder.source.config)
    except Fp8Error as error:
        yield NO, f"{error} It verifies and converts it all the same."
