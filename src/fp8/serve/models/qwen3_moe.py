"""Qwen3-MoE: Qwen3 with experts in all layers but those that its configuration calls dense."""

from __future__ import annotations

from torch import nn

from ...models.architecture import Architecture
from .experts import RoutedMLP
from .qwen3 import Qwen3Block
from .weights import Weights


class Qwen3MoeBlock(Qwen3Block):
    def read_mlp(self, weights: Weights, i: int, config: Architecture) -> nn.Module:
        assert config.experts is not None
        if i in config.experts.dense_layers:
            return super().read_mlp(weights, i, config)
        return RoutedMLP(weights, f"model.layers.{i}", "mlp", ("gate_proj", "up_proj", "down_proj"), config)
