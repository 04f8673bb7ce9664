"""A probe sees the codes that the layers multiply by, and leaves no trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fp8
from fp8.evaluate import Watch, probe, run_arm, settings, shares
from fp8.models import Decoder, DecoderConfig
from fp8.recipe import OPERANDS, PRESETS

TINY: dict[str, Any] = {
    "hidden_size": 16, "ffn_hidden_size": 16, "num_layers": 1, "num_attention_heads": 1, "num_kv_heads": 1,
    "sequence_length": 8, "batch_size": 2, "eval_batches": 1, "device": "cpu", "precision": "fp32",
}  # fmt: skip


def layer(recipe: str) -> tuple[fp8.Linear, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 32))
    fp8.convert(model, recipe)
    one = model[0]
    assert isinstance(one, fp8.Linear)
    return one, torch.randn(5, 7, 48) * 3


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", "rowwise", "blockwise"])
def test_it_sees_the_codes_of_each_operand(recipe: str) -> None:
    one, x = layer(recipe)
    factor = torch.randn(5, 7, 32)
    seen = probe(one, lambda: (one(x) * factor).sum())
    for role, tensor in zip(OPERANDS, (x, one.weight, factor), strict=True):
        operand = getattr(PRESETS[recipe], role)
        q = fp8.quantize(tensor, operand.format, operand.tile, statistics=True)
        counts = torch.bincount(q.codes.view(torch.uint8).flatten().int(), minlength=256)
        assert seen.histogram[role].tolist() == counts.tolist()
        assert seen.layers["0"][role]["scale_max"] == float(q.scale.max())
        assert q.statistics is not None
        assert seen.layers["0"][role]["flushed"] == pytest.approx(float(q.statistics.flushed))
    assert seen.products == {"0": {"forward": 1, "grad_w": 1}}  # x needs no gradient


def test_a_scale_that_is_too_old_shows_as_saturation() -> None:
    one, x = layer("delayed")
    one(x).sum().backward()
    fp8.update_scales(one)
    assert probe(one, lambda: one(x).sum()).layers["0"]["x"]["saturated"] == 0
    assert probe(one, lambda: one(x * 64).sum()).layers["0"]["x"]["saturated"] > 0.5


def test_it_leaves_no_trace() -> None:
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(32, 16, 16, 1, 1, 1))
    fp8.convert(model, "delayed")
    tokens = torch.arange(12).view(2, 6)
    model(tokens).sum().backward()
    fp8.update_scales(model)
    model.zero_grad(set_to_none=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    probe(model, lambda: model(tokens).square().mean())
    assert model.training
    assert torch.equal(random, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_watched_run_is_the_same_run(tmp_path: Path) -> None:
    plain = run_arm(settings("delayed", tmp_path / "plain", steps=6, **TINY))
    with Watch(tmp_path / "probes.jsonl", 2) as watch:
        watched = run_arm(settings("delayed", tmp_path / "watched", steps=6, **TINY), callbacks=[watch])
    assert watched.losses == plain.losses
    assert watched.validation_loss == plain.validation_loss
    assert [record["step"] for record in watch.records()] == [1, 2, 4, 6]


def test_shares_count_each_element_once() -> None:
    few = {role: {"flushed": 1.0, "elements": 10} for role in OPERANDS}
    many = {role: {"flushed": 0.0, "elements": 90} for role in OPERANDS}
    assert shares({"a": few, "b": many}, "flushed") == dict.fromkeys(OPERANDS, pytest.approx(0.1))
