"""What is wrong with an FP8 checkpoint, and who can load it: `lint`.

Servers load many wrong files without a word: scales of the KV cache that were never measured, codes that are rounded
anew when layers are fused, scales in half precision whose largest element saturates. Here each is a finding:

    error      some reader computes wrong numbers, or none
    warning    it works, and costs accuracy or speed that need not be lost
    note       good to know

All codes and scales are read, one layer at a time. `readers.py` says who can load the file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from .compressed_tensors import Scheme
from .fp8_folder import Fp8Folder
from .fused_shards import changed_by_fusing
from .layers import EXPERT, attention_layers, fused_group, linear_layers, skeleton
from .readers import Reader, readers

LEVELS = ("error", "warning", "note")
HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: how bad, a word for its kind, where, and what to do."""

    level: str
    kind: str
    where: str
    what: str


@dataclass(frozen=True)
class Report:
    """All findings, worst first, and what each reader makes of the file."""

    folder: str
    findings: tuple[Finding, ...]
    readers: tuple[Reader, ...]

    @property
    def errors(self) -> int:
        return sum(finding.level == "error" for finding in self.findings)

    @property
    def warnings(self) -> int:
        return sum(finding.level == "warning" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as JSON holds it."""
        return asdict(self) | {"errors": self.errors, "warnings": self.warnings}


def lint(folder: str | Path) -> Report:
    """Read a checkpoint and say what is wrong with it. Raises nothing for a bad one: that is a finding."""
    try:
        opened = Fp8Folder.open(folder)
    except CheckpointError as error:
        return Report(str(folder), (Finding("error", "unreadable", str(folder), str(error)),), ())
    model = _skeleton(opened)
    found = [f for rule in RULES for f in rule(opened, model if isinstance(model, nn.Module) else None)]
    if not isinstance(model, nn.Module):
        found.append(Finding("note", "model", "config.json", f"not checked against the architecture: {model}"))
    found.sort(key=lambda finding: (LEVELS.index(finding.level), finding.kind, finding.where))
    return Report(str(folder), tuple(found), readers(opened))


def _skeleton(folder: Fp8Folder) -> nn.Module | str:
    try:
        return skeleton(folder.source)
    except CheckpointError as error:
        return str(error)


# --------------------------------------------------------------------------- which layers


def wrong_layers(folder: Fp8Folder, model: nn.Module | None) -> Iterator[Finding]:
    """Codes without a scheme, linear layers that should be codes and are not, entries of `ignore` that mean nothing."""
    groups, entries = folder.groups, folder.source.entries
    for name in folder.stored:
        if groups.scheme(name) is None:
            why = "ignore names it" if groups.ignores(name) else "no target means it"
            yield Finding("error", "ignore", name, f"stored in FP8, but {why}: readers take its codes for numbers")
    if model is None:
        return
    linear = dict(linear_layers(folder.source, model))
    for name, module in linear.items():
        named = {name, module}
        stays = name not in folder.stored and not any(groups.ignores(n) for n in named)
        if stays and groups.scheme(name) is not None and (f"{name}.weight" in entries or name == module):
            yield Finding("error", "ignore", name, "in high precision, but not in ignore: readers look for its scales")
    modules = {*linear, *linear.values(), *(n for n, _ in model.named_modules())}
    for entry in groups.ignore:
        if not entry.startswith("re:") and entry not in modules and not any(f".{entry}." in f".{m}." for m in modules):
            yield Finding("warning", "ignore", entry, "ignore names a layer that the model does not have")


def wrong_shapes(folder: Fp8Folder, model: nn.Module | None) -> Iterator[Finding]:
    """Weights whose shape is not that of the config."""
    if model is None:
        return
    for name, module in linear_layers(folder.source, model):
        entry = folder.source.entries.get(f"{name}.weight")
        if entry is None or EXPERT.search(name):
            continue
        need = tuple(model.get_submodule(module).weight.shape)  # type: ignore[union-attr, arg-type]
        if entry.shape != need:
            what = f"has shape {list(entry.shape)}; config.json calls for {list(need)}"
            yield Finding("error", "shape", f"{name}.weight", what)


def fused_apart(folder: Fp8Folder, model: nn.Module | None) -> Iterator[Finding]:
    """Layers that servers fuse must be of one kind."""
    entries = folder.source.entries
    for group in fused_groups(folder):
        members = [name for name in group if f"{name}.weight" in entries]
        schemes = {name: folder.groups.scheme(name) if name in folder.stored else None for name in members}
        if len(set(schemes.values())) > 1:
            kinds = ", ".join(f"{n.rsplit('.', 1)[-1]} {'FP8' if s else 'high precision'}" for n, s in schemes.items())
            yield Finding("error", "fused", members[0], f"servers make one matrix of these and refuse: {kinds}")


def fused_groups(folder: Fp8Folder) -> list[tuple[str, ...]]:
    return list(dict.fromkeys(group for name in folder.stored if len(group := fused_group(name)) > 1))


# --------------------------------------------------------------------------- numbers


def wrong_numbers(folder: Fp8Folder, model: nn.Module | None) -> Iterator[Finding]:
    """Scales and codes, layer by layer."""
    for name in folder.stored:
        if (scheme := folder.groups.scheme(name)) is not None:
            yield from _layer(folder, name, scheme)


def _layer(folder: Fp8Folder, name: str, scheme: Scheme) -> Iterator[Finding]:
    entries, groups = folder.source.entries, folder.groups
    scale = entries.get(f"{name}.{groups.scale_name}")
    if scale is None:
        yield Finding("error", "scale", name, f"has no {groups.scale_name}")
        return
    if scale.dtype in HALF:
        what = f"is {str(scale.dtype)[6:]}: rounded, so that the largest weights saturate; write float32"
        yield Finding("warning", "half scale", f"{name}.{groups.scale_name}", what)
    try:
        folder.weight(name)
    except CheckpointError as error:
        yield Finding("error", "values", name, str(error))
    yield from _input(folder, name, scheme)


def _input(folder: Fp8Folder, name: str, scheme: Scheme) -> Iterator[Finding]:
    where = f"{name}.{folder.groups.input_name}"
    there = folder.source.entries.get(where)
    if scheme.inputs != "static":
        if there is not None:
            what = "a calibrated scale, but the config says that activations are measured when served: it is ignored"
            yield Finding("warning", "dynamic flag", where, what)
        return
    if there is None:
        yield Finding("error", "dynamic flag", where, "missing: the config says that activations are not dynamic")
        return
    scale = folder.source.read(where)
    yield from _positive("input scale", where, scale, 1)


def _positive(kind: str, where: str, scale: Tensor, count: int) -> Iterator[Finding]:
    if scale.numel() != count:
        yield Finding("error", kind, where, f"has {scale.numel()} numbers where {count} are called for")
    elif not (scale.isfinite() & (scale > 0)).all():
        yield Finding("error", kind, where, f"is {scale.flatten()[:4].tolist()}: scales are finite and positive")
    elif scale.dtype in HALF:
        yield Finding("warning", "half scale", where, f"is {str(scale.dtype)[6:]}; write float32")


def fused_codes(folder: Fp8Folder, model: nn.Module | None) -> Iterator[Finding]:
    """Codes that vLLM's fusing of per-tensor weights rounds anew."""
    for group in fused_groups(folder):
        members = [name for name in group if name in folder.stored]
        schemes = [folder.groups.scheme(name) for name in members]
        if len(members) < 2 or not all(s and s.per_tensor for s in schemes):
            continue
        try:
            scales = [folder.scale(name) for name in members]
        except CheckpointError:
            continue  # told already
        if any(s.numel() != 1 for s in scales):
            continue
        changed = changed_by_fusing([folder.source.read(f"{name}.weight") for name in members], scales)
        if changed.values:
            share = 100 * changed.values / changed.count
            what = (
                f"servers make one scale of {', '.join(f'{float(s):g}' for s in scales)} and round "
                f"{share:.2f} % of these weights anew; give them one scale, or write per channel "
                "(fp8 convert --for vllm)"
            )
            yield Finding("warning", "fused scales", members[0], what)


def not_finite(folder: Fp8Folder, model: nn.Module | None) -> Iterator[Finding]:
    """NaN or infinity in what is not quantized."""
    for name in folder.rest:
        entry = folder.source.entries[name]
        if entry.dtype.is_floating_point and entry.dtype.itemsize > 1 and not folder.source.read(name).isfinite().all():
            yield Finding("error", "values", name, "is not finite")


def orphans(folder: Fp8Folder, model: nn.Module | None) -> Iterator[Finding]:
    """Scales whose weight is not in FP8."""
    for ending in (f".{folder.groups.scale_name}", f".{folder.groups.input_name}"):
        for name in folder.source.entries:
            if name.endswith(ending) and name.removesuffix(ending) not in folder.stored:
                yield Finding("error", "scale", name, "belongs to a weight that is not stored in FP8")


# --------------------------------------------------------------------------- the KV cache


def kv_scales(folder: Fp8Folder, model: nn.Module | None) -> Iterator[Finding]:
    """Scales of the KV cache that are missing, were never measured, or do not fit."""
    modules = list(attention_layers(model).values()) if model is not None and _generates(model) else []
    if not folder.kv and folder.groups.kv is None:
        if modules:
            what = "no scales: a server whose cache is FP8 takes 1.0. Calibrate: fp8 quantize writes them by default"
            yield Finding("warning", "kv scales", "kv_cache_scheme", what)
        return
    if folder.groups.kv is None:
        yield Finding(
            "warning", "kv scales", folder.kv[0], "there, but kv_cache_scheme is null: not every server looks"
        )
    for module in modules:
        for kind in ("k_scale", "v_scale"):
            if f"{module}.{kind}" not in folder.kv and not _elsewhere(folder, module, kind):
                yield Finding("error", "kv scales", f"{module}.{kind}", "missing: servers take 1.0")
    heads, scales = _heads(folder), {name: folder.source.read(name) for name in folder.kv}
    for name, scale in scales.items():
        count = heads if folder.groups.kv == "attn_head" and heads and not name.endswith("q_scale") else scale.numel()
        yield from _positive("kv scales", name, scale, count)
    if scales and all(bool((scale == 1.0).all()) for scale in scales.values()):
        yield Finding(
            "warning", "kv scales", next(iter(scales)), "and all others are 1.0: nothing was measured; calibrate"
        )


def _generates(model: nn.Module) -> bool:
    return bool(getattr(model, "can_generate", lambda: False)())


def _elsewhere(folder: Fp8Folder, module: str, kind: str) -> bool:
    """NVIDIA's name for it."""
    return f"{module}.{kind[0]}_proj.{kind}" in folder.kv


def _heads(folder: Fp8Folder) -> int:
    config = folder.source.config
    return int(config.get("num_key_value_heads") or config.get("num_attention_heads") or 0)


# --------------------------------------------------------------------------- beside


def beside(folder: Fp8Folder, model: nn.Module | None) -> Iterator[Finding]:
    """Files that a server needs as well."""
    if not any(folder.source.folder.glob("tokenizer*")) and not any(folder.source.folder.glob("vocab*")):
        yield Finding("note", "tokenizer", str(folder.source.folder), "has no tokenizer: servers need one")
    size = sum(math.prod(folder.source.entries[f"{name}.weight"].shape) for name in folder.stored)
    if not folder.stored:
        yield Finding("error", "layers", "config.json", "calls for FP8, but no weight is stored in it")
    elif size == 0:
        yield Finding("error", "layers", "config.json", "every FP8 weight is empty")


RULES: tuple[Callable[[Fp8Folder, nn.Module | None], Iterator[Finding]], ...] = (
    wrong_layers, wrong_shapes, fused_apart, wrong_numbers, fused_codes, not_finite, orphans, kv_scales, beside,
)  # fmt: skip
