"""The learning rate, the articles' rule, the groups of AdamW, the loss scale."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import fp8
import fp8.train.loss_scale as room
from fp8.errors import ConfigError
from fp8.train import TrainConfig, adjust_hyperparameters, gradient_variance, learning_rate
from fp8.train.optimizer import make_optimizer


def test_warm_up_then_half_a_cosine() -> None:
    config = TrainConfig(lr=1.0, warmup_steps=4, steps=25, min_lr_ratio=0.2)
    rates = [learning_rate(step, config) for step in range(25)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[14] == pytest.approx(0.6)
    assert rates[24] == pytest.approx(0.2)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert learning_rate(1000, config) == rates[24]


@pytest.mark.parametrize(("warmup", "steps"), [(0, 1), (1, 1), (0, 2), (5, 5), (5, 6)])
def test_the_shortest_runs_have_a_rate(warmup: int, steps: int) -> None:
    config = TrainConfig(lr=0.5, warmup_steps=warmup, steps=steps)
    assert all(0 < learning_rate(step, config) <= 0.5 for step in range(steps))


def test_the_articles_rule_exactly() -> None:
    assert adjust_hyperparameters(0.0006, 2000) == (0.00051, 3000)
    assert adjust_hyperparameters(lr=0.001, warmup=5) == (0.00085, 7)


def test_only_matrices_decay() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    optimizer = make_optimizer(model, TrainConfig(weight_decay=0.3))
    assert [(group["weight_decay"], len(group["params"])) for group in optimizer.param_groups] == [(0.3, 1), (0.0, 3)]


def test_the_settings_choose_the_optimizer() -> None:
    model = nn.Linear(4, 4)
    assert isinstance(make_optimizer(model, TrainConfig()), torch.optim.AdamW)
    ours = make_optimizer(model, TrainConfig(optimizer="fp8", moments="bf16", seed=3))
    assert isinstance(ours, fp8.AdamW)
    assert [(g["moments"], g["seed"], g["betas"]) for g in ours.param_groups] == [("bf16", 3, (0.9, 0.95))] * 2
    with pytest.raises(ConfigError, match="add optimizer='fp8'"):
        TrainConfig(moments="fp8")


@pytest.mark.parametrize("kind", [torch.optim.AdamW, fp8.AdamW])
def test_gradient_variance_is_that_of_the_gradients(kind: type) -> None:
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.zeros(50, 50))
    optimizer = kind([parameter], betas=(0.99, 0.99))
    assert gradient_variance(optimizer) == 0.0
    for _ in range(400):
        parameter.grad = 3.0 + 0.5 * torch.randn(50, 50)
        optimizer.step()
    assert math.isclose(gradient_variance(optimizer), 0.25, rel_tol=0.05)


def test_a_static_loss_scale_stays_and_a_dynamic_one_moves() -> None:
    for wanted, expected in ((512.0, [512.0] * 4), ("dynamic", [65536.0, 131072.0, 131072.0, 262144.0])):
        config = TrainConfig(loss_scale=wanted, loss_scale_interval=2)
        model = nn.Linear(2, 2)
        optimizer, scaler = make_optimizer(model, config), room.make_scaler(config, torch.device("cpu"))
        assert scaler is not None
        scales = []
        for _ in range(4):
            scaler.scale(model(torch.ones(1, 2)).sum()).backward()
            scaler.step(optimizer)
            room.update_scaler(scaler, config)
            scales.append(scaler.get_scale())
        assert scales == expected
    assert room.make_scaler(TrainConfig(), torch.device("cpu")) is None
