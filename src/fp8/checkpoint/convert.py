"""From one FP8 format to another, or back to BF16, without rounding a code: `convert_folder`.

    from, to               weights and scales                                KV cache
    compressed-tensors     all schemes; scales become FP32                   kept; for SGLang one scale a tensor
    huggingface-fp8        128x128 blocks only: `weight_scale_inv`           has no place for it: dropped, and told
    bf16                   code * scale, exact for power-of-two scales       dropped

A file for a certain reader (`reader`) differs in what that reader does:

    vllm           per-tensor scales of fused layers that differ become per-channel, which vLLM does not requantize
    sglang         the same, and KV scales per head become their maximum: SGLang reads one a tensor
    transformers   nothing: it reads all of this

What cannot be said in the target without rounding anew is refused: that is what `fp8 quantize` of the source is for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, ConfigError, suggest
from . import compressed_tensors, huggingface_fp8
from .compressed_tensors import Scheme
from .fp8_folder import Fp8Folder
from .layers import fused_group
from .partial import Progress, Task, making, promised

TARGETS = ("compressed-tensors", "huggingface-fp8", "bf16")
READERS = ("vllm", "sglang", "transformers")


@dataclass(frozen=True)
class Converted:
    """What was made, and what was changed or left out on the way."""

    folder: Path
    layers: int
    nbytes: int
    notes: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join([f"{self.folder}: {self.layers} layers, {self.nbytes / 1e6:.1f} MB", *self.notes])


def convert_folder(
    source: str | Path,
    out: str | Path,
    to: str | None = None,
    reader: str | None = None,
    progress: Progress | None = None,
) -> Converted:
    """Write the FP8 checkpoint `source` in another format (`TARGETS`; None: its own) or for a reader (`READERS`).

    Raises `CheckpointError` for what the target cannot say, and as `quantize_folder` does.
    """
    from .. import __version__

    folder = Fp8Folder.open(source)
    to = to or ("huggingface-fp8" if folder.groups.parts else "compressed-tensors")
    for value, known, what in ((to, TARGETS, "to"), (reader, (None, *READERS), "reader")):
        if value not in known:
            raise ConfigError(f"{what} cannot be {value!r}. {suggest(value, [k for k in known if k])}")
    job = {"bf16": Decode, "compressed-tensors": ToCompressedTensors, "huggingface-fp8": ToHuggingFace}[to](
        folder, reader
    )
    files, facts = job.tasks(), {"fp8": __version__, "source": folder.source.fingerprint(), "to": to, "for": reader}
    with making(Path(out), facts) as made:
        made.write(files, progress)
        made.finish(job.config(), files, folder.source)
    size = sum(task.nbytes for tasks in files.values() for task in tasks)
    return Converted(Path(out), len(folder.layers), size, tuple(job.notes))


class Job:
    """One conversion: what becomes of a layer, of the KV scales, and of the config."""

    def __init__(self, folder: Fp8Folder, reader: str | None) -> None:
        self.folder, self.reader, self.source = folder, reader, folder.source
        self.notes: list[str] = []

    def tasks(self) -> dict[str, list[Task]]:
        files: dict[str, list[Task]] = {file: [] for file in self.source.files}
        for name in self.folder.layers:
            files[self.source.entries[f"{name}.weight"].file].append(self.layer(name))
        for name in self.folder.rest:
            entry = self.source.entries[name]
            files[entry.file].append(Task({name: promised(entry.dtype, *entry.shape)}, partial(self.copy, name)))
        for name, tensor in self.kv().items():
            task = Task({name: promised(tensor.dtype, *tensor.shape)}, partial(dict, {name: tensor}))
            files[self.source.entries[name].file].append(task)
        return {file: tasks for file, tasks in files.items() if tasks}

    def copy(self, name: str) -> dict[str, Tensor]:
        return {name: self.source.read(name)}

    def layer(self, name: str) -> Task:
        """What one FP8 layer becomes: each target format has its own."""
        raise NotImplementedError

    def kv(self) -> Mapping[str, Tensor]:
        """The scales of the KV cache; here: none."""
        if self.folder.kv:
            self.notes.append(
                f"{len(self.folder.kv)} scales of the KV cache are left out: the format has no place for them"
            )
        return {}

    def config(self) -> dict[str, Any]:
        return {k: v for k, v in self.source.config.items() if k not in ("quantization_config", "fp8")}

    def own(self) -> dict[str, Any]:
        return {"fp8": self.source.config["fp8"]} if "fp8" in self.source.config else {}


class Decode(Job):
    """To BF16. Where a scale is no power of two, BF16 cannot hold every product: that is told."""

    def layer(self, name: str) -> Task:
        shape = self.source.entries[f"{name}.weight"].shape
        return Task({f"{name}.weight": promised(torch.bfloat16, *shape)}, partial(self.decoded, name))

    def decoded(self, name: str) -> dict[str, Tensor]:
        real = self.folder.weight(name).dequantize()
        rounded = real.to(torch.bfloat16)
        if not torch.equal(rounded.float(), real):
            share = float((rounded.float() != real).float().mean())
            self.notes.append(f"{name}.weight: {100 * share:.2f} % of code * scale is rounded to fit BF16")
        return {f"{name}.weight": rounded}

    def config(self) -> dict[str, Any]:
        plain = super().config()
        return plain | {key: "bfloat16" for key in ("dtype", "torch_dtype") if key in plain}


class ToCompressedTensors(Job):
    """To compressed-tensors."""

    def __init__(self, folder: Fp8Folder, reader: str | None) -> None:
        super().__init__(folder, reader)
        self.schemes = {name: self.scheme(name, scheme) for name, scheme in folder.layers.items()}
        widened = sum(s != folder.layers[name] for name, s in self.schemes.items())
        if widened:
            self.notes.append(
                f"{widened} per-tensor scales are written per channel: {reader} would round their codes anew"
            )

    def scheme(self, name: str, scheme: Scheme) -> Scheme:
        """Its own scheme; per channel where a reader would requantize what it fuses."""
        if not scheme.per_tensor or self.reader not in ("vllm", "sglang"):
            return scheme
        group = [other for other in fused_group(name) if other in self.folder.layers]
        scales = {float(self.folder.scale(other).reshape(())) for other in group}
        return scheme if len(scales) == 1 else replace(scheme, per_tensor=False)

    def layer(self, name: str) -> Task:
        scheme, shape = self.schemes[name], self.source.entries[f"{name}.weight"].shape
        outputs = {
            f"{name}.weight": promised(torch.float8_e4m3fn, *shape),
            f"{name}.weight_scale": promised(torch.float32, *scheme.scale_shape(*shape)),
        }
        if scheme.inputs == "static":
            outputs[f"{name}.input_scale"] = promised(torch.float32, 1)
        return Task(outputs, partial(self.rescaled, name))

    def rescaled(self, name: str) -> dict[str, Tensor]:
        scheme, codes = self.schemes[name], self.source.read(f"{name}.weight")
        self.folder.weight(name)  # every check
        scale, shape = self.folder.scale(name).float(), scheme.scale_shape(*codes.shape)
        scale = scale.reshape(1, 1).expand(shape) if scale.numel() == 1 and len(shape) > 1 else scale.reshape(shape)
        made = {f"{name}.weight": codes, f"{name}.weight_scale": scale}
        given = self.folder.input_scale(name)
        return made if given is None else made | {f"{name}.input_scale": given.reshape(1)}

    def kv(self) -> Mapping[str, Tensor]:
        found = {name: self.source.read(name).float() for name in self.folder.kv}
        if self.reader == "sglang" and any(t.numel() > 1 for t in found.values()):
            self.notes.append("KV scales per head are written as their maximum, one a tensor")
            return {name: tensor.max().reshape(1) for name, tensor in found.items()}
        return found

    def config(self) -> dict[str, Any]:
        groups: dict[Scheme, list[str]] = {}
        for name, scheme in self.schemes.items():
            groups.setdefault(scheme, []).append(name)
        kv = self.folder.groups.kv
        kv = "tensor" if kv and self.reader == "sglang" else kv
        ignore = plain_names(self.folder.groups.ignore, self.folder)
        quantization = compressed_tensors.quantization_config(groups, ignore, kv)
        return super().config() | {"quantization_config": quantization} | self.own()


class ToHuggingFace(Job):
    """To Hugging Face's `fp8`."""

    def layer(self, name: str) -> Task:
        huggingface_fp8.quantization_config(self.folder.layers[name], ())  # refuses what cannot be said
        shape = self.source.entries[f"{name}.weight"].shape
        outputs = {
            f"{name}.weight": promised(torch.float8_e4m3fn, *shape),
            f"{name}.weight_scale_inv": promised(torch.float32, *self.folder.layers[name].scale_shape(*shape)),
        }
        return Task(outputs, partial(self.renamed, name))

    def renamed(self, name: str) -> dict[str, Tensor]:
        self.folder.weight(name)  # every check
        codes, scale = self.source.read(f"{name}.weight"), self.folder.scale(name).float()
        return {f"{name}.weight": codes, f"{name}.weight_scale_inv": scale}

    def config(self) -> dict[str, Any]:
        scheme = next(iter(self.folder.layers.values()))
        if patterns := [entry for entry in self.folder.groups.ignore if entry.startswith("re:")]:
            raise CheckpointError(f"huggingface-fp8 has no patterns: {patterns[0]!r} in ignore cannot be said.")
        quantization = huggingface_fp8.quantization_config(scheme, self.folder.groups.ignore)
        return super().config() | {"quantization_config": quantization} | self.own()


def plain_names(ignore: Iterable[str], folder: Fp8Folder) -> list[str]:
    """Entries that name a part of a path (Hugging Face's `fp8`) as whole names."""
    if not folder.groups.parts:
        return list(ignore)
    weights = [name.removesuffix(".weight") for name in folder.rest if name.endswith(".weight")]
    linear = [name for name in weights if len(folder.source.entries[f"{name}.weight"].shape) == 2]
    return sorted({*(name for name in linear if folder.groups.ignores(name)), *ignore})
