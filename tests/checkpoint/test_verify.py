"""`verify`: equal bytes pass, one bit of difference anywhere fails and is named."""

from __future__ import annotations

import pytest
import torch

import fp8.nn
import tiny_models
from fp8 import checkpoint
from fp8.checkpoint import Options, Scales, convert_folder, frozen_model, quantize_folder, verify
from fp8.checkpoint.fp8_folder import Fp8Folder
from fp8.checkpoint.frozen import outputs
from fp8.errors import CheckpointError
from fp8.models import Decoder, DecoderConfig
from fp8.nn.frozen_linear import FrozenLinear
from tiny_models import copied, reconfigure, retensor, tensors

UP = "model.layers.0.mlp.up_proj"
ROWS = torch.arange(24).view(2, 12) % 250


def scales_for(source, layers):
    keys = {f"model.layers.{i}.self_attn": [0.25, 1.0] for i in range(2)} if len(layers.fp8) > 12 else {}
    return Scales(dict.fromkeys(layers.fp8, 0.0625), keys, keys)


SCHEMES = ["dynamic", "static", "block", "weight-only"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify")
    models = {kind: tiny_models.build(folder / kind, kind) for kind in ("qwen2", "mixtral", "bert")}
    made = {s: quantize_folder(models["qwen2"], folder / s, Options(s), scales_for).folder for s in SCHEMES}
    made |= {f"{k}out": quantize_folder(models[k], folder / f"{k}out").folder for k in ("mixtral", "bert")}
    return made | models


def passed(verdict):
    return {check.name: check.passed for check in verdict.checks}


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_was_written_is_what_was_evaluated(folders, scheme):
    verdict = verify(folders[scheme], folders["qwen2"], ROWS, ROWS)
    assert passed(verdict) == dict.fromkeys(("codes", "rest", "transformers", "logits", "perplexity"), True), verdict
    assert verdict.passed and verdict.to_dict()["passed"]


@pytest.mark.filterwarnings("default")
def test_experts_and_encoders_are_verified_too(folders):
    for kind in ("mixtral", "bert"):
        verdict = verify(folders[f"{kind}out"], folders[kind], ROWS, ROWS, transformers=kind == "bert")
        assert verdict.passed and passed(verdict)["logits"], verdict
    assert passed(verdict)["perplexity"] is None  # an encoder predicts no next token


@pytest.mark.parametrize("to", ["huggingface-fp8", "compressed-tensors"])
def test_a_converted_checkpoint_is_still_what_was_evaluated(folders, tmp_path, to):
    convert_folder(folders["block"], tmp_path / "out", to, "sglang")
    assert verify(tmp_path / "out", folders["qwen2"], ROWS, transformers=False).passed


def flipped(folder):
    codes = tensors(folder)[f"{UP}.weight"].clone()
    codes.view(torch.uint8)[3, 4] ^= 1
    retensor(folder, f"{UP}.weight", codes)


def doubled(folder):
    retensor(folder, f"{UP}.weight_scale", tensors(folder)[f"{UP}.weight_scale"] * 2)


def moved_norm(folder):
    norm = tensors(folder)["model.norm.weight"].clone()
    norm[5] += 1
    retensor(folder, "model.norm.weight", norm)


@pytest.mark.parametrize(
    ("change", "check", "detail"),
    [
        (flipped, "codes", f"1 codes and the scales of 0 layers differ; first in {UP}"),
        (doubled, "codes", f"0 codes and the scales of 1 layers differ; first in {UP}"),
        (moved_norm, "rest", "1 differ, 0 are not in the source; first model.norm.weight"),
        (lambda f: retensor(f, "model.norm.weight", None), "rest", "1 differ"),
        (lambda f: retensor(f, f"{UP}.weight_scale", None), "codes", "no tensor"),
    ],
)
def test_one_difference_fails_and_is_named(folders, tmp_path, change, check, detail):
    folder = copied(folders["dynamic"], tmp_path / "out")
    change(folder)
    failed = [c for c in verify(folder, folders["qwen2"], transformers=False).checks if c.passed is False]
    assert failed[0].name == check
    assert detail in failed[0].detail


def test_one_code_shows_in_the_logits(folders, tmp_path):
    folder = copied(folders["dynamic"], tmp_path / "out")
    codes = tensors(folder)["model.layers.1.mlp.down_proj.weight"].clone()
    codes.view(torch.uint8)[:, 4] ^= 0x80
    retensor(folder, "model.layers.1.mlp.down_proj.weight", codes)
    checks = {c.name: c for c in verify(folder, folders["qwen2"], ROWS, transformers=False).checks}
    assert checks["logits"].passed is False and "differ, by up to" in checks["logits"].detail


def test_the_model_of_a_file_multiplies_codes(folders):
    model = frozen_model(Fp8Folder.open(folders["static"]))
    layer = model.get_submodule(UP)
    assert isinstance(layer, FrozenLinear) and layer.input_scale.tolist() == [[0.0625]]
    assert model.get_submodule("model.layers.0.self_attn.q_proj").bias is not None
    with fp8.nn.count_products() as products:
        outputs(model, ROWS)
    assert len(products.layers()) == 14


def test_another_model_is_not_what_was_evaluated(folders, tmp_path):
    assert not verify(folders["dynamic"], folders["bert"], transformers=False).passed
    with pytest.raises(CheckpointError, match="not quantized"):
        verify(folders["qwen2"], folders["qwen2"])
    lied = copied(folders["dynamic"], tmp_path / "out")
    reconfigure(lied, "fp8", "quantized", "weight_scale_rounding", value="none")
    assert not verify(lied, folders["qwen2"], transformers=False).passed


@pytest.mark.parametrize("recipe", ["rowwise", "delayed", "blockwise"])
def test_a_trained_decoder_is_held_against_its_own_codes(tmp_path, recipe):
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(257, 128, 176, 2, 4, 2))
    fp8.nn.convert(decoder, recipe)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-3)
    fp8.nn.attach(decoder, optimizer)
    for _ in range(2):
        decoder(ROWS).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    checkpoint.save(decoder.eval(), tmp_path / "out")
    verdict = verify(tmp_path / "out", decoder, ROWS)
    assert passed(verdict) == {"codes": True, "logits": True}
    with torch.no_grad():
        decoder.get_submodule("layers.0.mlp.up").weight.add_(0.01)
    fp8.nn.refresh(decoder)
    assert passed(verify(tmp_path / "out", decoder, ROWS))["codes"] is False
