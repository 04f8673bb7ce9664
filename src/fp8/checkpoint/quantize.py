"""A Hugging Face checkpoint in, an FP8 checkpoint out, one tensor at a time: `quantize_folder`.

    scheme         weight                 activation when served       for
    dynamic        one scale a channel    one scale a token            everything; the default
    static         one scale a tensor     one calibrated scale         kernels that take nothing else
    block          one scale a 128x128    one scale a 1x128 group      the layout of DeepSeek-V3
    weight-only    one scale a channel    not quantized                small batches; any GPU

The codes are those of `fp8.quantize` of the weight as the file stores it, FP32 masters in FP32. Large weights pass in
slabs of whole tiles, which changes no code. Layers that servers fuse (q, k and v; gate and up) share a per-tensor
scale: a server that makes one scale of three quantizes anew, and with equal power-of-two scales that changes nothing.

What stays is copied; FP32 becomes BF16, which servers compute in. Shards keep their names and their tensors, so a
shard of OUT needs one shard of the source, and `partial.py` can go on behind any of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, ConfigError, suggest
from ..quantize import INPUTS, Quantized
from ..quantize import quantize as quantize_tensor
from ..quantize.scale_search import searched_scales
from ..tile import Tile
from .compressed_tensors import E4M3, Scheme, check_values, own_config, quantization_config
from .decisions import (
    Calibrate,
    Choice,
    Choose,
    Compensate,
    Decisions,
    Remedy,
    Rounded,
    Scales,
    calibrated,
    changed,
    chosen,
    compensated,
)  # fmt: skip
from .layers import Layers, choose_layers, fused_group, refuse_shapes, skeleton
from .partial import Progress, Task, making, promised
from .source import Source

SLAB = 1 << 24  # elements that are quantized at once
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

SCHEMES = {
    "dynamic": Scheme(None, 0, "power_of_two", "fast"),
    "static": Scheme(None, 0, "power_of_two", "fast", per_tensor=True, inputs="static"),
    "block": Scheme((128, 128), 128, "power_of_two", "promoted"),
    "weight-only": Scheme(None, 0, "power_of_two", "fast", inputs="none"),
}


@dataclass(frozen=True)
class Options:
    """What decides the bytes. `dtype` of what stays: "auto" (FP32 becomes BF16, all else is kept) or a type's name.

    `scales`: "power_of_two" (the contract's default) or "none" (amax / 448), for weights and for served activations;
    "search": of weights, whichever errs least (`quantize/scale_search.py`), where each channel has its own.
    """

    scheme: str = "dynamic"
    skip: tuple[str, ...] = ()
    head: bool = False
    scales: str = "power_of_two"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        for value, known, what in (
            (self.scheme, SCHEMES, "scheme"),
            (self.scales, ("power_of_two", "none", "search"), "scales"),
            (self.dtype, ("auto", *DTYPES), "dtype"),
        ):
            if value not in known:
                raise ConfigError(f"{what} cannot be {value!r}. {suggest(value, known)}")
        if self.scales == "search" and SCHEMES[self.scheme].tile != Tile(1, 0):
            raise ConfigError(
                f"scales='search' looks for the best scale of each channel, and scheme {self.scheme!r} has none of its "
                "own for a channel: use dynamic or weight-only."
            )

    @property
    def layout(self) -> Scheme:
        return with_scales(SCHEMES[self.scheme], self.scales)


def with_scales(scheme: Scheme, scales: str) -> Scheme:
    """A scheme with the scales that `Options` name so."""
    return replace(scheme, scale_rounding="none" if scales == "none" else "power_of_two", searched=scales == "search")


@dataclass(frozen=True)
class Written:
    """What was made. Bytes are of tensors."""

    folder: Path
    layers: Layers
    nbytes: int
    source_nbytes: int
    scales: Scales
    resumed: bool
    choice: Choice = field(default_factory=Choice)
    outliers: Mapping[str, Any] = field(default_factory=dict)  # what was measured of remedies
    compensation: Mapping[str, Any] = field(default_factory=dict)  # and of rounding with compensation

    def __str__(self) -> str:
        share = 100 * self.nbytes / self.source_nbytes
        return (
            f"{self.folder}: {len(self.layers.fp8)} layers in FP8, {len(self.layers.kept)} kept; "
            f"{self.nbytes / 1e6:.1f} MB, {share:.0f} % of {self.source_nbytes / 1e6:.1f} MB"
        )


def quantize_folder(
    source: str | Path,
    out: str | Path,
    options: Options | None = None,
    calibrate: Calibrate | None = None,
    progress: Progress | None = None,
    *,
    remedy: Remedy | None = None,
    choose: Choose | None = None,
    compensate: Compensate | None = None,
    device: str = "cpu",
) -> Written:
    """Write the FP8 checkpoint of a Hugging Face folder.

    calibrate, remedy, choose,    what is found out before (`decisions.py`), once: an interruption does not lose it
    compensate
    progress                      is called with the bytes written and those to write
    device                        where weights are rounded; it changes no byte

    OUT appears when it is complete; after an interruption the same call goes on. The same input gives the same bytes.
    Raises `CheckpointError` for a source that is damaged, quantized already, or not finite; for an OUT that exists; for
    too small a disk.
    """
    options = options or Options()
    model = Source.open(source)
    refuse_quantized(model)
    empty = skeleton(model)
    layers = choose_layers(model, empty, options.skip, options.head)
    refuse_shapes(model, empty)
    refuse_types(model, layers)
    original, beside = model, {}
    asked = {"calibration": calibrate, "choice": choose, "remedy": remedy, "compensation": compensate}
    with making(Path(out), facts(model, options, asked)) as partial:
        if remedy is not None:
            model, beside = changed(partial, model, layers, remedy)
            layers = choose_layers(model, skeleton(model), options.skip, options.head)
        scales = calibrated(partial, model, layers, calibrate)
        refuse_uncalibrated(options, layers, scales)
        choice = chosen(partial, lambda made: made(model, layers, options, scales), choose)
        layers = layers.keeping(choice.kept)
        rounded = compensated(
            partial, model.files, lambda made: made(model, layers, options, scales, partial.working), compensate
        )
        found = Decisions(scales, choice, partial.notes.get("remedy", {}).get("told", {}), rounded)
        files = tasks(model, layers, options, scales, rounded, device)
        partial.write(files, progress)
        partial.finish(config(model, layers, options, found), files, model, beside)
    size = sum(task.nbytes for made in files.values() for task in made)
    resumed = partial.resumed
    return Written(Path(out), layers, size, original.nbytes, scales, resumed, choice, found.outliers, rounded.how)


# --------------------------------------------------------------------------- checks


def refuse_quantized(source: Source) -> None:
    quantization = source.config.get("quantization_config")
    codes = next((n for n, e in source.entries.items() if e.dtype in (torch.float8_e4m3fn, torch.float8_e5m2)), None)
    if quantization or codes:
        how = (quantization or {}).get("quant_method", f"{codes} holds FP8 codes")
        raise CheckpointError(
            f"{source.folder} is quantized already ({how}): quantizing twice rounds twice. Give the original model, or "
            "change the format with `fp8 convert`."
        )


def refuse_types(source: Source, layers: Layers) -> None:
    """Weights that `fp8.quantize` does not take, and float64 anywhere."""
    for name, entry in source.entries.items():
        if entry.dtype == torch.float64:
            raise CheckpointError(f"{name} is float64: save the model in float32 first, so that the rounding is yours.")
    for layer in layers.fp8:
        entry = source.entries[f"{layer}.weight"]
        if entry.dtype not in INPUTS or len(entry.shape) != 2:
            kind = f"{str(entry.dtype)[6:]} of shape {list(entry.shape)}"
            raise CheckpointError(f"{layer}.weight is {kind}; a matrix in float32, bfloat16 or float16 is quantized.")


def refuse_uncalibrated(options: Options, layers: Layers, scales: Scales) -> None:
    if options.layout.inputs == "static" and (missing := [n for n in layers.fp8 if n not in scales.inputs]):
        raise CheckpointError(f"scheme 'static' needs a calibrated scale for the input of {missing[0]}: calibrate.")


def facts(source: Source, options: Options, asked: Mapping[str, Any]) -> dict[str, Any]:
    """All that decides the bytes of OUT."""
    from .. import __version__

    how = {what: "none" if step is None else getattr(step, "facts", None) for what, step in asked.items()}
    return {"fp8": __version__, "source": source.fingerprint(), "options": asdict(options)} | how


# --------------------------------------------------------------------------- tensors


def tasks(
    source: Source, layers: Layers, options: Options, scales: Scales, rounded: Rounded, device: str = "cpu"
) -> dict[str, list[Task]]:
    """What every file of OUT holds: that of the source, layer by layer, and the scales beside their layers."""
    files: dict[str, list[Task]] = {file: [] for file in source.files}
    fp8, tensor_scales = set(layers.fp8), TensorScales(source, layers, options)
    for name, entry in sorted(source.entries.items()):
        layer = name.removesuffix(".weight")
        if layer in fp8 and name.endswith(".weight"):
            files[entry.file].append(layer_task(source, layer, options, scales, tensor_scales, rounded, device))
        else:
            dtype = kept_dtype(entry.dtype, options.dtype)
            files[entry.file].append(Task({name: promised(dtype, *entry.shape)}, partial(kept, source, name, dtype)))
    for file, task in kv_tasks(source, scales):
        files[file].append(task)
    return files


def layer_task(
    source: Source, layer: str, options: Options, scales: Scales, tensor_scales: TensorScales, rounded: Rounded,
    device: str,
) -> Task:  # fmt: skip
    scheme, shape = options.layout, source.entries[f"{layer}.weight"].shape
    outputs = {
        f"{layer}.weight": promised(torch.float8_e4m3fn, *shape),
        f"{layer}.weight_scale": promised(torch.float32, *scheme.scale_shape(*shape)),
    }
    if scheme.inputs == "static":
        outputs[f"{layer}.input_scale"] = promised(torch.float32, 1)

    def make() -> dict[str, Tensor]:
        made = quantized_layer(source, layer, options, tensor_scales, rounded.codes(layer), device)
        return (
            made if scheme.inputs != "static" else made | {f"{layer}.input_scale": torch.tensor([scales.inputs[layer]])}
        )

    return Task(outputs, make)


def quantized_layer(
    source: Source, layer: str, options: Options, tensor_scales: TensorScales, codes: Tensor | None = None,
    device: str = "cpu",
) -> dict[str, Tensor]:  # fmt: skip
    """`weight` and `weight_scale` of a layer under their names in the file. `codes`: these, and not the nearest."""
    scheme = options.layout
    scale = tensor_scales.of(layer) if scheme.per_tensor else None
    q = quantize_weight(source.read(f"{layer}.weight").to(device), scheme, scale)
    check_values(layer, q.codes, q.scale)
    return {
        f"{layer}.weight": q.codes.cpu() if codes is None else codes,
        f"{layer}.weight_scale": q.scale.reshape(scheme.scale_shape(*q.codes.shape)).cpu(),
    }


def quantize_weight(weight: Tensor, scheme: Scheme, scale: Tensor | None = None) -> Quantized:
    """`fp8.quantize` of a weight [N, K] as the scheme says, in slabs of whole tiles. `scale`: that of the tensor."""
    tile = scheme.tile
    if scheme.per_tensor and scale is None:
        scale = scale_of(largest(weight), scheme.scale_rounding)
    scale = None if scale is None else scale.to(weight.device)
    rows = max(SLAB // max(weight.shape[1], 1) // 128, 1) * 128
    parts = [
        quantize_tensor(
            slab, "e4m3", tile, scheme.scale_rounding, scale=searched_scales(slab) if scheme.searched else scale
        )
        for slab in weight.split(rows)
    ]
    codes = torch.cat([part.codes.view(torch.uint8) for part in parts]).view(torch.float8_e4m3fn)
    return Quantized(codes, parts[0].scale if scheme.per_tensor else torch.cat([p.scale for p in parts]), tile, E4M3)


class TensorScales:
    """The per-tensor scale of a layer, shared by all that servers fuse with it."""

    def __init__(self, source: Source, layers: Layers, options: Options) -> None:
        self.source, self.fp8, self.rounding = source, set(layers.fp8), options.scales
        self.found: dict[tuple[str, ...], Tensor] = {}

    def of(self, layer: str) -> Tensor:
        """FP32 [1, 1]."""
        group = tuple(name for name in fused_group(layer) if name in self.fp8)
        if group not in self.found:
            amax = max(largest(self.source.read(f"{name}.weight")) for name in group)
            self.found[group] = scale_of(amax, self.rounding)
        return self.found[group]


def largest(weight: Tensor) -> float:
    """The largest finite magnitude."""
    rows = max(SLAB // max(weight.shape[1], 1), 1)
    slabs = (slab.float().abs() for slab in weight.split(rows))
    return max(float(torch.where(slab.isfinite(), slab, 0.0).max()) for slab in slabs)


def scale_of(amax: float, rounding: str) -> Tensor:
    """The scale, FP32 [1, 1], of a tensor with this largest magnitude, as `fp8.quantize` gives it."""
    return quantize_tensor(torch.tensor([[amax]]), "e4m3", "tensor", rounding).scale


def kept_dtype(dtype: torch.dtype, wanted: str) -> torch.dtype:
    if not dtype.is_floating_point:
        return dtype
    return (torch.bfloat16 if dtype == torch.float32 else dtype) if wanted == "auto" else DTYPES[wanted]


def kept(source: Source, name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """A tensor that stays in high precision. Raises `CheckpointError` where it is not finite, or overflows `dtype`."""
    tensor = source.read(name)
    if tensor.is_floating_point() and not all_finite(tensor):
        raise CheckpointError(f"{name} is not finite: the source is damaged, or its training run diverged.")
    stays = tensor.to(dtype)
    if stays.dtype != tensor.dtype and not all_finite(stays):
        raise CheckpointError(
            f"{name} holds numbers beyond {str(dtype)[6:]}: keep it in another type (dtype, --dtype)."
        )
    return {name: stays}


def all_finite(tensor: Tensor) -> bool:
    return all(bool(part.isfinite().all()) for part in tensor.flatten().split(SLAB))


def kv_tasks(source: Source, scales: Scales) -> Iterator[tuple[str, Task]]:
    """The scales of the KV cache, each in the file that holds the first tensor of its attention module."""
    for kind, found in (("k_scale", scales.keys), ("v_scale", scales.values)):
        for module, heads in found.items():
            inside = (e.file for n, e in sorted(source.entries.items()) if n.startswith(module + "."))
            file = next(inside, source.files[0])
            tensor = torch.tensor(list(heads), dtype=torch.float32).view(-1, 1, 1)
            made = {f"{module}.{kind}": tensor}
            yield file, Task({n: promised(t.dtype, *t.shape) for n, t in made.items()}, partial(dict, made))


# --------------------------------------------------------------------------- config.json


def config(source: Source, layers: Layers, options: Options, found: Decisions) -> dict[str, Any]:
    """The `config.json` of OUT."""
    kv = "attn_head" if found.scales.keys else None
    quantization = quantization_config({options.layout: layers.fp8}, layers.ignore, kv)
    tokenizer = (source.config.get("fp8") or {}).get("tokenizer")
    own = own_config([options.layout], tokenizer) | {"quantized": told(options, found)}
    kept_as = str(kept_dtype(source.dtype, options.dtype)).removeprefix("torch.")
    types = {key: kept_as for key in ("dtype", "torch_dtype") if key in source.config} or {"torch_dtype": kept_as}
    return {**source.config, **types, "quantization_config": quantization, "fp8": own}


def told(options: Options, found: Decisions) -> dict[str, Any]:
    """How the file was made: what `fp8 verify` needs to make it again."""
    own = {"scheme": options.scheme, "weight_scale_rounding": options.scales, "kept_dtype": options.dtype}
    return own | found.told
