"""An FP8 checkpoint of anyone's making, read one layer at a time: `Fp8Folder`. Names are those in the files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..quantize import Quantized
from .compressed_tensors import Groups, Scheme, joined
from .load import checked_input, checked_scale, groups_of
from .source import Source

KV_SCALES = (".k_scale", ".v_scale", ".q_scale")
OTHER_PARTS = (".weight_zero_point", ".k_zero_point", ".v_zero_point")


@dataclass(frozen=True)
class Fp8Folder:
    """The files, and the schemes that `config.json` gives their layers."""

    source: Source
    groups: Groups

    @staticmethod
    def open(folder: str | Path) -> Fp8Folder:
        """Read config and headers. Raises `CheckpointError`, also where nothing is quantized."""
        source = Source.open(folder)
        groups = groups_of(source.config)
        if groups is None:
            raise CheckpointError(
                f"{folder} is not quantized: its config.json has no quantization_config. Make an FP8 checkpoint of it "
                "by `fp8 quantize`."
            )
        return Fp8Folder(source, groups)

    @cached_property
    def stored(self) -> tuple[str, ...]:
        """The layers whose weight is stored as codes, whatever the config says."""
        codes = (n for n, e in self.source.entries.items() if e.dtype == torch.float8_e4m3fn and n.endswith(".weight"))
        return tuple(sorted(name.removesuffix(".weight") for name in codes))

    @cached_property
    def layers(self) -> Mapping[str, Scheme]:
        """The scheme of each layer. Raises `CheckpointError` where the config gives none."""
        found = {name: self.groups.scheme(name) for name in self.stored}
        if without := [name for name, scheme in found.items() if scheme is None]:
            raise CheckpointError(f"{without[0]}.weight is stored in FP8, but config.json gives that layer no scheme.")
        return {name: scheme for name, scheme in found.items() if scheme is not None}

    @cached_property
    def kv(self) -> tuple[str, ...]:
        """The names of the scales of the KV cache."""
        return tuple(name for name in self.source.entries if name.endswith(KV_SCALES))

    @cached_property
    def rest(self) -> tuple[str, ...]:
        """The names of all that is neither codes nor scales."""
        scales = (f".{self.groups.scale_name}", f".{self.groups.input_name}", *KV_SCALES, *OTHER_PARTS)
        taken = {f"{name}.weight" for name in self.stored}
        return tuple(n for n in self.source.entries if n not in taken and not n.endswith(scales))

    def scale(self, name: str) -> Tensor:
        """`weight_scale` of a layer as it is stored."""
        return self.source.read(f"{name}.{self.groups.scale_name}")

    def weight(self, name: str) -> Quantized:
        """The codes and scales of a layer, checked."""
        codes, scheme = self.source.read(f"{name}.weight"), self.layers[name]
        return joined([codes], [checked_scale(name, codes, self.scale(name), scheme)], scheme)

    def input_scale(self, name: str) -> Tensor | None:
        """The calibrated scale of a layer's input, `[1, 1]`; None where it is measured when served."""
        if self.layers[name].inputs != "static":
            return None
        return checked_input(name, self.source.read(f"{name}.{self.groups.input_name}"), self.groups)
