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

    tokens = config.batch_size * config.sequence_length
    return convert(model, config.fp8_recipe, config.skip, only_if_faster=config.only_if_faster, tokens=tokens)


def as_decided(model: nn.Module, config: TrainConfig, decided: dict[str, Any] | None) -> Any:
    """Convert a model anew where a checkpoint's report (`Report.to_dict`) has other layers in FP8 than it has.

    What `only_if_faster` decides depends on the device, and a run that goes on elsewhere must not change its numbers.
    Returns the report that holds: the checkpoint's, with the reasons it gave.
    """
    from ..nn import Report, convert, revert

    if decided is None or config.fp8_recipe is None:
        return getattr(model, "fp8_report", None)
    report = Report.from_dict(decided)
    if report.converted != model.fp8_report.converted:  # type: ignore[union-attr]
        revert(model)
        convert(model, config.fp8_recipe, [*config.skip, *report.kept])
        model.fp8_report = report  # type: ignore[assignment]
    return report
