"""The scale of a channel that errs least: what it wins, that it is the best, and that nobody else need know of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import tiny_models
from fp8.calibrate.sequential import Compensation
from fp8.checkpoint import Options, quantize_folder, verify
from fp8.checkpoint.quantize import SCHEMES, quantize_weight, with_scales
from fp8.errors import ConfigError
from fp8.quantize import quantize
from fp8.quantize.scale_search import FACTORS, searched_scales
from tiny_models import bytes_of, tensors

UP = "model.layers.0.mlp.up_proj"


def weight(rows: int = 64, cols: int = 576, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    sizes = 2.0 ** torch.linspace(-20, 5, rows)[:, None]
    return (sizes * torch.randn(rows, cols, generator=torch.Generator().manual_seed(0))).to(dtype)


def squared(w: Tensor, scale: Tensor) -> Tensor:
    off = quantize(w, "e4m3", "row", scale=scale).dequantize(torch.float32).double() - w.double()
    return off.square().sum(1)


def test_it_is_the_best_of_its_candidates_and_better_than_a_power_of_two() -> None:
    w = weight()
    amax, found = w.float().abs().amax(1, keepdim=True), squared(w, searched_scales(w))
    assert all(bool((found <= squared(w, amax * factor) * (1 + 1e-4)).all()) for factor in FACTORS)
    plain = squared(w, quantize(w, "e4m3", "row", "power_of_two").scale)
    assert float((found / plain).mean()) < 0.9


@pytest.mark.parametrize("columns", [1, 7, 576])
def test_the_order_of_columns_changes_no_scale(columns: int) -> None:
    w = weight(cols=columns)
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(1))
    assert torch.equal(searched_scales(w), searched_scales(w[:, order]))


def test_a_row_times_a_power_of_two_has_that_times_the_scale() -> None:
    w = weight(8, dtype=torch.float32)
    assert torch.equal(searched_scales(w * 4), searched_scales(w) * 4)


def test_zeros_and_what_is_not_finite_leave_finite_scales() -> None:
    w = weight(4)
    w[0], w[1, 3], w[2, 0] = 0, float("nan"), float("inf")
    scales = searched_scales(w)
    assert scales[0] == 1 and bool(scales.isfinite().all()) and bool((scales > 0).all())


@pytest.mark.parametrize("scheme", ["dynamic", "weight-only"])
@pytest.mark.parametrize("compensate", [None, Compensation(samples=9, length=24)])
def test_a_checkpoint_of_them_is_verified_and_written_twice_alike(tmp_path, scheme, compensate) -> None:
    model = tiny_models.build(tmp_path / "model", "llama")
    made = [
        quantize_folder(model, tmp_path / name, Options(scheme, scales="search"), compensate=compensate).folder
        for name in ("one", "two")
    ]
    assert bytes_of(made[0]) == bytes_of(made[1])
    assert torch.equal(tensors(made[0])[f"{UP}.weight_scale"], searched_scales(tensors(model)[f"{UP}.weight"]))
    verdict = verify(made[0], model, torch.arange(40).view(2, 20))
    assert verdict.passed, verdict


def test_slabs_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    w, scheme = weight(300, 40), with_scales(SCHEMES["dynamic"], "search")
    whole = quantize_weight(w, scheme)
    monkeypatch.setattr("fp8.checkpoint.quantize.SLAB", 128 * 40)
    cut = quantize_weight(w, scheme)
    assert torch.equal(whole.scale, cut.scale) and torch.equal(
        whole.codes.view(torch.uint8), cut.codes.view(torch.uint8)
    )


def test_where_a_channel_has_no_scale_there_is_none_to_look_for() -> None:
    for scheme in ("static", "block"):
        with pytest.raises(ConfigError, match="none of its own for a channel"):
            Options(scheme, scales="search")


@pytest.mark.gpu
def test_a_gpu_finds_the_same_scales() -> None:
    w = weight(512, 4096)
    assert torch.equal(searched_scales(w), searched_scales(w.cuda()).cpu())
