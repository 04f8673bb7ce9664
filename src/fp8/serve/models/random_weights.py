"""A model of any shape with random weights, made where it runs and read from no file: what a server is timed on, and
what its tests serve.

Matrices are drawn from N(0, 1 / (4 K)), the embedding from N(0, 1), in BF16; norms are 1, biases 0.02 times normal.
They are quantized like those of a file. The same seed, shape and kind of device give the same model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...checkpoint.compressed_tensors import Scheme
from ...checkpoint.quantize import quantize_weight
from ...quantize import Quantized
from .weights import InMemory, Quantization, Weights


class RandomWeights(Weights):
    """Draws what is asked for."""

    def __init__(
        self, config: Mapping[str, Any], scheme: Quantization, device: torch.device | str | None, seed: int
    ) -> None:
        super().__init__(InMemory(config, {}), _nothing, None, scheme, device)
        self.generator = torch.Generator(device or "cpu").manual_seed(seed)

    def high(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        assert shape is not None
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16, device=self.device)
        return self._normal(shape)

    def rows(self, names: Sequence[str], shape: tuple[int, int]) -> Tensor:
        return self._normal(shape) * (0.5 * shape[1] ** -0.5)

    def biases(self, names: Sequence[str], rows: int) -> Tensor:
        return self._normal((rows,)) * 0.02

    def quantized(self, names: Sequence[str], shape: tuple[int, int], scheme: Scheme) -> Quantized:
        return quantize_weight(self.rows(names, shape), scheme)

    def _normal(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, device=self.device, generator=self.generator)


def _nothing(name: str) -> Tensor:
    raise AssertionError(f"random weights read no tensor, and {name} was asked for")
