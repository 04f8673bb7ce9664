"""The variance of a gradient, held against torch's own; and what FP8 adds to it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fp8
from fp8.errors import ConfigError
from fp8.evaluate import gradient_noise


def model_and_batches() -> tuple[nn.Sequential, list[Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 16))
    return model, [torch.randn(20, 32) for _ in range(6)]


def by_hand(model: nn.Module, batches: list[Tensor]) -> float:
    gradients = []
    for x in batches:
        found = torch.autograd.grad(model(x).square().mean(), list(model.parameters()))
        gradients.append(torch.cat([g.flatten() for g in found]).double())
    return float(torch.stack(gradients).var(0).mean())


def test_it_is_the_variance_over_micro_batches() -> None:
    model, batches = model_and_batches()
    exact = by_hand(model, batches)
    fp8.convert(model, "tensorwise")
    noise = gradient_noise(model, lambda x: model(x).square().mean(), batches)
    model.eval()
    assert noise.variance_high == pytest.approx(exact, rel=1e-4)
    assert noise.variance_fp8 == pytest.approx(by_hand(model, batches), rel=1e-4)
    assert 0.01 < noise.error < 0.2
    assert noise.to_dict()["ratio"] == noise.ratio


def test_without_fp8_layers_nothing_is_added() -> None:
    model, batches = model_and_batches()
    noise = gradient_noise(model, lambda x: model(x).square().mean(), batches)
    assert (noise.ratio, noise.error) == (1.0, 0.0)


def test_one_micro_batch_has_no_variance() -> None:
    model, batches = model_and_batches()
    with pytest.raises(ConfigError, match="at least 2"):
        gradient_noise(model, lambda x: model(x).sum(), batches[:1])
