"""A transformers model whose FP8 layers are `FrozenLinear`: what a checkpoint computes, on any machine.

transformers itself decodes FP8 weights to BF16 on a CPU, and so shows nothing of quantized activations. Here the
architecture is transformers' and the linear layers are ours: codes times codes, as a server multiplies them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.frozen_linear import FrozenLinear
from ..quantize import Quantized
from ..tile import Tile
from .compressed_tensors import Scheme
from .fp8_folder import Fp8Folder
from .layers import hf_config, linear_layers, model_class, need_transformers
from .source import Source

Layer = tuple[Quantized, Scheme, Tensor | None]  # weight, scheme, calibrated scale of the input


def frozen_model(folder: Fp8Folder, dtype: torch.dtype | None = None) -> nn.Module:
    """The model of an FP8 checkpoint, in evaluation mode, on the CPU. `dtype`: of what is not FP8; else the file's."""
    layers = {name: (folder.weight(name), scheme, folder.input_scale(name)) for name, scheme in folder.layers.items()}
    rest = {name: folder.source.read(name) for name in folder.rest}
    return assembled(folder.source, layers, rest, dtype or folder.source.dtype)


def assembled(source: Source, layers: Mapping[str, Layer], rest: Mapping[str, Tensor], dtype: torch.dtype) -> nn.Module:
    """The model of `source`'s config out of FP8 layers and of all other tensors, by the names of the files."""
    need_transformers().utils.logging.disable_progress_bar()
    kind = model_class(source.config)
    config = hf_config(source.folder, source.config)
    with torch.device("meta"):
        empty = kind(config)
    modules = dict(linear_layers(source, empty))
    linear = {name for name in layers if name in modules and _is_linear(empty, modules[name])}
    state = dict(rest)
    for name, (weight, _, _) in layers.items():
        held = torch.zeros(1, dtype=dtype).expand(weight.shape) if name in linear else weight.dequantize(dtype)
        state[f"{name}.weight"] = held
    model = kind.from_pretrained(None, config=config, state_dict=state, dtype=dtype).eval().requires_grad_(False)
    for name in linear:
        _put(model, modules[name], *layers[name])
    return model


def _is_linear(model: nn.Module, name: str) -> bool:
    return name in dict(model.named_modules()) and isinstance(model.get_submodule(name), nn.Linear)


def _put(model: nn.Module, name: str, weight: Quantized, scheme: Scheme, inputs: Tensor | None) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, frozen(model.get_submodule(name), name, (weight, scheme, inputs)))


def frozen(linear: nn.Module, name: str, layer: Layer) -> FrozenLinear:
    """What stands in place of a linear layer: the codes of `layer`, and the linear layer's bias."""
    weight, scheme, inputs = layer
    bias: Any = linear.bias
    return FrozenLinear(
        weight, scheme.recipe(weight.tile), None if bias is None else bias.detach(), name, input_scale=inputs,
        weight_only=scheme.inputs == "none",
    )  # fmt: skip


def by_rows(weight: Quantized) -> Quantized:
    """The same numbers with the scale of the tensor, where there is one, written once a row: what files are read as."""
    if weight.tile != Tile(0, 0):
        return weight
    return Quantized(weight.codes, weight.scale.expand(weight.shape[0], 1).contiguous(), Tile(1, 0), weight.format)


@torch.no_grad()
def outputs(model: nn.Module, rows: Tensor) -> Tensor:
    """The first output, logits or hidden states, of each row of tokens `[n, T]` on its own: `[n, T, width]`."""
    run: Callable[..., Any] = model
    return torch.cat([run(input_ids=row[None])[0] for row in rows])
