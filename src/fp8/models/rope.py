"""Rotary positions as a `config.json` describes them: the frequencies, and the tables made of them.

    default   frequency[i] = theta^(-2i / D)
    llama3    long wavelengths are stretched by `factor`, short ones stay, those between are interpolated:
              with w = 2 pi / frequency and L the context of pre-training,
              w < L / high       the frequency stays
              w > L / low        frequency / factor
              between            (1 - s) * frequency / factor + s * frequency,  s = (L / w - low) / (high - low)

Angles, cosines and sines are FP32, made on the CPU and carried to where they are used, as in `fused/rope`: so they are
the same bits everywhere.

Sources: Su et al., "RoFormer", 2021; Llama 3.1 (transformers' `_compute_llama3_parameters`: the order of operations is
its).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError


@dataclass(frozen=True)
class Llama3Scaling:
    """The frequencies' change for contexts longer than that of pre-training."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int

    def scaled(self, frequency: Tensor) -> Tensor:
        """FP32 [D / 2], to the same."""
        wavelength = 2 * math.pi / frequency
        long, short = (self.original_max_positions / f for f in (self.low_freq_factor, self.high_freq_factor))
        stretched = torch.where(wavelength > long, frequency / self.factor, frequency)
        share = (self.original_max_positions / wavelength - self.low_freq_factor) / (
            self.high_freq_factor - self.low_freq_factor
        )
        between = (1 - share) * stretched / self.factor + share * stretched
        return torch.where((wavelength < short) | (wavelength > long), stretched, between)


@dataclass(frozen=True)
class Rope:
    """Rotary positions: the base, and how frequencies are scaled (None: not at all)."""

    theta: float
    scaling: Llama3Scaling | None = None

    def tables(self, positions: int, head_dim: int, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
        """cos and sin, FP32 [positions, head_dim / 2], on the device."""
        channel = torch.arange(0, head_dim, 2, dtype=torch.int64, device="cpu").float()
        frequency = 1.0 / self.theta ** (channel / head_dim)
        frequency = frequency if self.scaling is None else self.scaling.scaled(frequency)
        angle = torch.outer(torch.arange(positions, dtype=torch.int64, device="cpu").float(), frequency)
        return angle.cos().to(device), angle.sin().to(device)

    @staticmethod
    def of(plain: Mapping[str, Any]) -> Rope:
        """What a `config.json` says, of transformers 4 or 5. Raises `CheckpointError`."""
        said = plain.get("rope_parameters") or plain.get("rope_scaling") or {}
        theta = float(said.get("rope_theta", plain.get("rope_theta", 10000.0)))
        kind = said.get("rope_type", said.get("type", "default"))
        if kind == "default" and said.get("partial_rotary_factor", plain.get("partial_rotary_factor", 1.0)) == 1.0:
            return Rope(theta)
        if kind != "llama3":
            what = "partial_rotary_factor" if kind == "default" else f"rope_type={kind!r}"
            raise CheckpointError(
                f"config.json asks for rotary positions with {what}; 'default' and 'llama3' are computed."
            )
        try:
            scaling = Llama3Scaling(
                float(said["factor"]),
                float(said["low_freq_factor"]),
                float(said["high_freq_factor"]),
                int(said.get("original_max_position_embeddings") or plain["original_max_position_embeddings"]),
            )
        except KeyError as error:
            raise CheckpointError(f"config.json asks for rope_type='llama3' and lacks {error.args[0]!r}.") from None
        return Rope(theta, scaling)
