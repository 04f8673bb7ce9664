"""Mixtral: Llama whose every layer has experts; the shares of the chosen sum to 1."""

from __future__ import annotations

from torch import nn

from ...models.architecture import Architecture
from .experts import RoutedMLP
from .llama import LlamaBlock
from .weights import Weights


class MixtralBlock(LlamaBlock):
    def read_mlp(self, weights: Weights, i: int, config: Architecture) -> nn.Module:
        return RoutedMLP(weights, f"model.layers.{i}", "block_sparse_moe", ("w1", "w3", "w2"), config)
