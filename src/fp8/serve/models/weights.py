"""The tensors of a checkpoint, as the layers of a served model ask for them: `Weights`.

A model names the parts of a matrix (q, k and v; gate and up), and gets them as one: `FrozenLinear` where the file holds
FP8 codes (the codes and scales of the file, in bytes), `Linear` in BF16 elsewhere. With `scheme`, matrices in high
precision are quantized as they are read, to the codes that `fp8 quantize` writes; head and routers stay, as there.

Tensors are read one at a time and moved at once, so that loading takes the memory of the model and of one matrix. Every
tensor is counted: one that no part of the model asked for means that the model computes something else than the file
was made for, and is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from ...checkpoint.compressed_tensors import Groups, Scheme, check_values, joined
from ...checkpoint.fp8_folder import OTHER_PARTS
from ...checkpoint.load import checked_input, checked_scale, common_scheme
from ...checkpoint.quantize import quantize_weight
from ...errors import CheckpointError
from ...models.huggingface import IGNORED
from ...nn.frozen_linear import FrozenLinear
from ...nn.int8_linear import Int8Linear
from ...quantize import INPUTS, Quantized
from .layers import Linear, Matrix, Norm

Held = TypeVar("Held", Tensor, Quantized)
Quantization = Scheme | Literal["int8"] | None  # of what a file holds in high precision


class Tensors(Protocol):
    """Tensors by their Hugging Face names: a `checkpoint.Source`, or `InMemory`."""

    @property
    def config(self) -> Mapping[str, Any]: ...

    @property
    def entries(self) -> Mapping[str, Any]: ...

    def reading(self) -> AbstractContextManager[Callable[[str], Tensor]]: ...


@dataclass(frozen=True)
class InMemory:
    """A checkpoint that was never a file. Who reads it gets copies: what is served stays, whatever becomes of these."""

    config: Mapping[str, Any]
    entries: Mapping[str, Tensor]

    @contextmanager
    def reading(self) -> Iterator[Callable[[str], Tensor]]:
        yield lambda name: self.entries[name].clone()


class Weights:
    """Reads a checkpoint part by part."""

    def __init__(
        self,
        tensors: Tensors,
        read: Callable[[str], Tensor],
        groups: Groups | None,
        scheme: Quantization = None,
        device: torch.device | str | None = None,
    ) -> None:
        """read     gives a tensor of `tensors` (their `reading`)
        groups   the schemes that the file has
        scheme   how to quantize what it holds in high precision, in FP8 or as "int8"; None: not
        """
        self.tensors, self.read, self.groups, self.scheme, self.device = tensors, read, groups, scheme, device
        self.used: set[str] = set()

    # ----------------------------------------------------------------------- parts of a model

    def norm(self, name: str, width: int, eps: float) -> Norm:
        """An RMS norm over `width` channels."""
        return Norm(self.high(f"{name}.weight", (width,)), eps)

    def linear(self, names: Sequence[str], shape: tuple[int, int], *, bias: bool = False, keep: bool = False) -> Matrix:
        """The matrix `[N, K]` whose rows the named layers hold, in order; `keep`: it is never quantized here."""
        added = self.biases(names, shape[0]) if bias else None
        own = None if self.groups is None else common_scheme(names, self.groups)
        if own is not None:
            inputs = self._input_scale(names) if own.inputs == "static" else None
            return _frozen(self.stored(names, shape, own), own, added, names[0], inputs)
        if keep or self.scheme is None:
            return Linear(self.rows(names, shape), added)
        if isinstance(self.scheme, str):
            return Int8Linear(self.rows(names, shape), added)
        return _frozen(self.quantized(names, shape, self.scheme), self.scheme, added, names[0])

    def high(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """A tensor that is not FP8, in BF16."""
        tensor = self._plain(name)
        if shape is not None:
            self._checked([name.removesuffix(".weight")], tensor, shape)
        return tensor.to(device=self.device, dtype=torch.bfloat16)

    def has(self, name: str) -> bool:
        """Whether the file holds a tensor."""
        return name in self.tensors.entries

    # ----------------------------------------------------------------------- tensors

    def take(self, name: str) -> Tensor:
        """One tensor as it is stored. Raises `CheckpointError` where it is missing."""
        if not self.has(name):
            raise CheckpointError(f"the checkpoint has no tensor {name!r}, which its config.json calls for.")
        self.used.add(name)
        return self.read(name)

    def _plain(self, name: str) -> Tensor:
        """A tensor that holds numbers, not codes."""
        tensor = self.take(name)
        if tensor.dtype not in INPUTS:
            raise CheckpointError(
                f"{name} is {str(tensor.dtype)[6:]}, and config.json gives that layer no scheme: it was quantized by "
                "other means, or its quantization_config is not its own."
            )
        return tensor

    def rows(self, names: Sequence[str], shape: tuple[int, int]) -> Tensor:
        """A matrix in BF16."""
        parts = [self._of_width(name, self.high(f"{name}.weight"), shape[1]) for name in names]
        return self._checked(names, torch.cat(parts), shape)

    def biases(self, names: Sequence[str], rows: int) -> Tensor:
        """The biases of a matrix's rows, BF16 [N]."""
        return self._checked(names, torch.cat([self.high(f"{name}.bias") for name in names]), (rows,))

    def stored(self, names: Sequence[str], shape: tuple[int, int], scheme: Scheme) -> Quantized:
        """The codes and scales of the file."""
        assert self.groups is not None
        codes, scales = [], []
        for name in names:
            kinds = ("weight", self.groups.scale_name)
            weight, scale = (self.take(f"{name}.{kind}").to(self.device) for kind in kinds)
            codes.append(self._of_width(name, weight, shape[1]))
            scales.append(checked_scale(name, weight, scale, scheme))
        return self._checked(names, joined(codes, scales, scheme), shape)

    def quantized(self, names: Sequence[str], shape: tuple[int, int], scheme: Scheme) -> Quantized:
        """Codes made here, of the weights as the file stores them."""
        codes, scales = [], []
        for name in names:
            weight = self._of_width(name, self._plain(f"{name}.weight"), shape[1])
            made = quantize_weight(weight.to(self.device), scheme)
            check_values(name, made.codes, made.scale)
            codes.append(made.codes)
            scales.append(made.scale)
        return self._checked(names, joined(codes, scales, scheme), shape)

    def _input_scale(self, names: Sequence[str]) -> Tensor:
        """The calibrated scale of the input, [1, 1]; where parts have several, the largest, as in vLLM."""
        assert self.groups is not None
        kind = self.groups.input_name
        found = [checked_input(name, self.take(f"{name}.{kind}"), self.groups) for name in names]
        return torch.stack(found).amax(0).to(self.device)

    def _of_width(self, name: str, weight: Tensor, width: int) -> Tensor:
        if weight.dim() != 2 or weight.shape[1] != width:
            have = list(weight.shape)
            raise CheckpointError(f"{name}.weight has shape {have}; config.json calls for [..., {width}].")
        return weight

    def _checked(self, names: Sequence[str], held: Held, need: tuple[int, ...]) -> Held:
        if tuple(held.shape) != need:
            have = list(held.shape)
            raise CheckpointError(f"{' + '.join(names)} has shape {have}; config.json calls for {list(need)}.")
        return held

    # ----------------------------------------------------------------------- the cache's scales

    def kv_scales(self, attention: Sequence[str], heads: int) -> Tensor | None:
        """The static scales of keys and values, FP32 [layers, 2, KV], of the named attention modules; None where the
        file has none."""
        if self.groups is None or self.groups.kv is None:
            return None
        kinds = ("k_scale", "v_scale")
        rows = [self._kv_scale(f"{name}.{kind}", heads) for name in attention for kind in kinds]
        return torch.stack(rows).view(len(attention), 2, heads)

    def _kv_scale(self, name: str, heads: int) -> Tensor:
        scale = self.take(name).float().flatten()
        if scale.numel() not in (1, heads) or not bool((scale.isfinite() & (scale > 0)).all()):
            raise CheckpointError(
                f"{name} is {scale[:3].tolist()} ({scale.numel()} numbers); it is one, or one each of {heads} heads, "
                "finite and positive."
            )
        return scale.expand(heads)

    def refuse_leftovers(self) -> None:
        """Refuse a file with tensors that no part of the model asked for."""
        passed = (*IGNORED, *OTHER_PARTS)
        left = sorted(n for n in self.tensors.entries if n not in self.used and not n.endswith(passed))
        if left:
            more = f" and {len(left) - 3} more" if len(left) > 3 else ""
            kind = self.tensors.config.get("model_type")
            raise CheckpointError(f"tensors that belong to no part of a {kind} decoder: {', '.join(left[:3])}{more}.")


def _frozen(
    weight: Quantized, scheme: Scheme, bias: Tensor | None, name: str, inputs: Tensor | None = None
) -> FrozenLinear:
    recipe, only = scheme.recipe(weight.tile), scheme.inputs == "none"
    return FrozenLinear(weight, recipe, bias, name, input_scale=inputs, weight_only=only)
