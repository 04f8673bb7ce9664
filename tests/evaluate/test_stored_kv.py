"""A checkpoint is judged over the KV cache that it describes: by the scales in its file, in both engines."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import tiny_models
from fp8.calibrate import Calibration
from fp8.checkpoint import Options, quantize_folder
from fp8.errors import CheckpointError, ConfigError
from fp8.evaluate.subject import ModelSpec, open_causal
from fp8.quantize import quantize
from tiny_models import copied, retensor, tensors

ROWS = torch.arange(60).view(2, 30)
K, V = (f"model.layers.1.self_attn.{kind}_scale" for kind in "kv")
ENGINES = ["fp8", "transformers"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    made = tmp_path_factory.mktemp("kv")
    model = tiny_models.build(made / "model", "llama")
    return quantize_folder(model, made / "fp8", Options(), Calibration(samples=4, length=24)).folder


def logits(folder: Path, kv: str | None, engine: str) -> Tensor:
    return open_causal(ModelSpec(folder, kv_cache=kv, engine=engine, device="cpu")).logits(ROWS)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_file_with_scales_is_judged_by_them_unless_told_otherwise(folder: Path, engine: str) -> None:
    spec = ModelSpec(folder, engine=engine, device="cpu")
    assert spec.resolved().kv_cache == "stored" and "scales of the KV cache are used" in open_causal(spec).about
    by_default, stored, without, ones = (logits(folder, kv, engine) for kv in (None, "stored", "fp32", "scale-1"))
    assert torch.equal(by_default, stored)
    assert not torch.allclose(stored, without, rtol=1e-4) and not torch.allclose(stored, ones, rtol=1e-4)


def test_both_engines_store_the_same(folder: Path) -> None:
    ours, theirs = (logits(folder, "stored", engine) for engine in ENGINES)
    assert float((ours - theirs).norm() / ours.norm()) < 1e-4


@pytest.mark.parametrize("engine", ENGINES)
def test_attention_reads_the_codes_under_the_scales_of_its_heads(
    folder: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen where scores are computed: every key is a code times the scale in the file."""
    scales, seen = tensors(folder)[K].flatten(), []
    model = open_causal(ModelSpec(folder, engine=engine, device="cpu"))
    attend = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda q, k, *a, **n: (seen.append(k), attend(q, k, *a, **n))[1],
    )
    model.logits(ROWS)
    keys = seen[-1].float()
    keys = keys[:, :: keys.shape[1] // len(scales)]
    for head, scale in enumerate(scales):
        rows = keys[:, head].reshape(-1, keys.shape[-1])
        again = quantize(rows, "e4m3", "tensor", scale=scale.view(1, 1)).dequantize(torch.float32)
        assert torch.equal(rows, again) and rows.abs().max() > 0


def test_one_scale_for_a_layer_counts_for_each_head(folder: Path, tmp_path: Path) -> None:
    many, one = copied(folder, tmp_path / "many"), copied(folder, tmp_path / "one")
    largest = tensors(folder)[K].amax()
    retensor(many, K, largest.expand(2, 1, 1).clone())
    retensor(one, K, largest.view(1))
    assert torch.equal(logits(many, None, "fp8"), logits(one, None, "fp8"))


@pytest.mark.parametrize("engine", ENGINES)
def test_generation_goes_on_from_the_same_cache(folder: Path, engine: str) -> None:
    model = open_causal(ModelSpec(folder, engine=engine, device="cpu"))
    prompt = ROWS[0, :10].tolist()
    given = [*prompt, *model.go_on(prompt, 6)]
    likeliest = model.logits(torch.tensor([given]))[0].argmax(-1).tolist()
    assert len(given) > 12 and given[10:] == likeliest[9:-1]


@pytest.mark.parametrize("scale", [torch.tensor([1.0, 0.0]), torch.tensor([1.0, float("nan")]), torch.ones(3), None])
def test_scales_that_do_not_fit_are_named(folder: Path, tmp_path: Path, scale: Tensor | None) -> None:
    other = copied(folder, tmp_path / "other")
    retensor(other, V, scale)
    with pytest.raises(CheckpointError, match=V):
        open_causal(ModelSpec(other, device="cpu"))


def test_a_plain_model_has_none(llama: Path) -> None:
    with pytest.raises(ConfigError, match="holds no scales of a KV cache"):
        open_causal(ModelSpec(llama, kv_cache="stored"))
    plain, ones = (open_causal(ModelSpec(llama, kv_cache=kv)).logits(ROWS) for kv in (None, "scale-1"))
    assert 1e-4 < float((plain - ones).norm() / plain.norm()) < 0.2
