"""The model of a run: the decoder that the settings describe, in FP8 where they say so."""

from __future__ import annotations

from typing import Any

from torch import nn

from .config import TrainConfig

POSITIONS = 2048


def build(config: TrainConfig, vocab_size: int) -> nn.Module:
    """The decoder of the settings, in FP32, drawn from torch's generator (seed it before)."""
    from ..models.llama import Decoder, DecoderConfig

    positions = max(config.sequence_length, POSITIONS)
    sizes: dict[str, Any] = dict(config.sizes)
    return Decoder(DecoderConfig(vocab_size=vocab_size, max_positions=positions, **sizes))


def to_fp8(model: nn.Module, config: TrainConfig) -> Any:
    """Convert the model in place and return the report, or None where the run is in high precision."""
    if config.fp8_recipe is None:
        return None
    from ..nn import convert

    return convert(model, config.fp8_recipe, skip=config.skip)
