"""Compensation of whole models: what is written, what a stop loses, and what `verify` can say of it."""

from __future__ import annotations

import json

import pytest
import torch

import tiny_models
from fp8.calibrate.blocks import calls_of, entering
from fp8.calibrate.calibration import split
from fp8.calibrate.compensate import REGRESSION, Moments, factor, regressed, sweep
from fp8.calibrate.running import fill
from fp8.calibrate.sequential import Block, Compensation, Walk
from fp8.calibrate.text import read_texts, rows_of, tokenizer_for
from fp8.checkpoint import Options, Scales, frozen_model, quantize_folder, verify
from fp8.checkpoint.fp8_folder import Fp8Folder
from fp8.checkpoint.frozen import outputs
from fp8.checkpoint.layers import choose_layers, skeleton
from fp8.checkpoint.source import Source
from fp8.cli import main
from fp8.errors import CheckpointError, ConfigError
from fp8.quantize import quantize
from tiny_models import bytes_of, copied, retensor, tensors

UP = "model.layers.0.mlp.up_proj"
ROWS = torch.arange(48).view(2, 24) % 250
SCHEMES = ["dynamic", "static", "block", "weight-only"]
FEW = Compensation(samples=20, length=24)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("models")
    return {kind: tiny_models.build(folder / kind, kind) for kind in ("llama", "odd", "bert", "mixtral")}


def constant(source, layers):
    """Scales of inputs that measure nothing."""
    return Scales(dict.fromkeys(layers.fp8, 2.0**-6))


def made(model, out, scheme="dynamic", what=FEW):
    return quantize_folder(model, out, Options(scheme), constant, compensate=what)


@pytest.fixture(scope="module")
def folders(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    return {scheme: made(models["llama"], folder / scheme, scheme).folder for scheme in SCHEMES}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_outputs_on_the_text_are_nearer_and_scales_are_those_of_the_scheme(models, folders, tmp_path, scheme):
    plain = quantize_folder(models["llama"], tmp_path / "plain", Options(scheme), constant).folder
    before, after = tensors(plain), tensors(folders[scheme])
    assert all(torch.equal(before[n], after[n]) for n in before if not n.endswith("_proj.weight"))
    assert not torch.equal(before[f"{UP}.weight"].view(torch.uint8), after[f"{UP}.weight"].view(torch.uint8))
    how = json.loads((folders[scheme] / "config.json").read_text())["fp8"]["quantized"]["compensation"]
    assert how["layers"] == len(how["codes"]) == 14 and how["held_out"]["worst"]["share"] < 0.9


@pytest.mark.parametrize("scheme", ["dynamic", "static"])
def test_the_model_as_served_loses_less(models, folders, tmp_path, scheme):
    """On the text itself, whole models against each other, codes times codes."""
    plain = quantize_folder(models["llama"], tmp_path / "plain", Options(scheme), constant).folder
    rows = text_of(models["llama"])
    wanted = outputs(loaded_plain(models["llama"]), rows)
    lost = [
        float((outputs(frozen_model(Fp8Folder.open(f), torch.float32), rows) - wanted).square().mean())
        for f in (plain, folders[scheme])
    ]
    assert lost[1] < lost[0]


def text_of(folder):
    return rows_of(read_texts(FEW.texts), tokenizer_for(folder, None), FEW.samples, FEW.length, 260)


def loaded_plain(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("target", ["weight", "output", "stream"])
def test_the_last_layer_is_the_method_applied_to_what_it_sees(models, tmp_path, target):
    """By hand, from the inputs that it has in the finished model and in the one in high precision."""
    name = "model.layers.1.mlp.down_proj"
    what = Compensation(samples=FEW.samples, length=FEW.length, target=target)
    folder = Fp8Folder.open(made(models["llama"], tmp_path / "out", what=what).folder)
    rows = split(text_of(models["llama"]))[0]
    high, served = (
        inputs_of(model, name, rows) for model in (loaded_plain(models["llama"]), frozen_model(folder, torch.float32))
    )
    x = quantize(served, "e4m3", "row").dequantize(torch.float32).double()
    weight = tensors(models["llama"])[f"{name}.weight"].float()
    lost = {"weight": None, "output": (high.double() - x).t() @ x}
    if target == "stream":
        behind = hidden_behind(loaded_plain(models["llama"]), None, rows)
        lacks = behind - hidden_behind(frozen_model(folder, torch.float32), (name, weight), rows)
        moments = Moments(x.t() @ x, lack=lacks.double().t() @ x)
    else:
        moments = Moments(x.t() @ x, lost[target])
    codes = sweep(regressed(weight, moments, REGRESSION), folder.weight(name).scale, factor(moments.hessian))
    stored, nearest = folder.weight(name).codes, quantize(weight, "e4m3", "row").codes
    differ = [float((codes.view(torch.uint8) != c.view(torch.uint8)).float().mean()) for c in (stored, nearest)]
    assert differ[0] < 0.01 < 0.1 < differ[1]  # sums of FP32 products end otherwise here and there


def inputs_of(model, name, rows):
    seen = []
    model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    outputs(model, rows)
    return torch.cat(seen)


def hidden_behind(model, unrounded, rows):
    """The hidden states behind the last block, one layer of which has this weight and codes for inputs."""
    if unrounded is not None:
        name, weight = unrounded
        plain = torch.nn.Linear(*weight.t().shape, bias=False)
        plain.weight.data = weight
        plain.register_forward_pre_hook(
            lambda _, args: quantize(args[0].flatten(0, -2), "e4m3", "row").dequantize(torch.float32).view_as(args[0])
        )
        model.set_submodule(name, plain)
    return inputs_of(model, "model.norm", rows)


@torch.no_grad()
def test_stream_is_about_layers_whose_outputs_are_added_to_the_hidden_states(models):
    """Not so behind the norm in which a block of BERT ends."""
    for kind, last in (("llama", "mlp.down_proj"), ("bert", None)):
        source = Source.open(models[kind])
        layers = choose_layers(source, skeleton(source))
        rows = text_of(models["llama"])[:2]
        walk = Walk(source, layers, Options(), Scales(), FEW, [rows, rows])
        prefix, module, names = walk.blocks[0]
        call = calls_of(walk.model, walk.blocks, source, walk.rows, "cpu")[0]
        hidden = entering(walk.model, module, rows)
        fill(walk.model, source, names, "cpu")
        block = Block(walk, prefix, module, call)
        found = block.last_layer(block.stages(hidden)[-1], hidden)
        assert found == (last and f"model.layers.0.{last}")


@pytest.mark.parametrize("kind", ["odd", "bert"])
def test_odd_shapes_and_encoders(models, tmp_path, kind):
    written = made(models[kind], tmp_path / "out")
    assert written.compensation is not None and written.compensation["layers"] == len(written.layers.fp8)
    verdict = verify(written.folder, models[kind], ROWS, transformers=False)
    assert verdict.passed, verdict


def test_a_layer_that_the_text_does_not_reach_is_rounded_to_nearest(models, tmp_path):
    written = quantize_folder(models["llama"], tmp_path / "out", Options(head=True), compensate=FEW)
    plain = quantize_folder(models["llama"], tmp_path / "plain", Options(head=True))
    assert written.compensation is not None and "lm_head" not in written.compensation["codes"]
    heads = (tensors(w.folder)["lm_head.weight"].view(torch.uint8) for w in (written, plain))
    assert torch.equal(*heads)


def test_experts_are_refused(models, tmp_path):
    with pytest.raises(CheckpointError, match="Quantize it without compensation"):
        quantize_folder(models["mixtral"], tmp_path / "out", compensate=FEW)
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------- stops


def stopped_at(block, **more):
    def progress(done, total):
        if done == block:
            raise KeyboardInterrupt

    return Compensation(samples=FEW.samples, length=FEW.length, progress=progress, **more)


@pytest.mark.parametrize("block", [0, 1, 2])
def test_a_stop_loses_one_layer_at_most_and_changes_no_byte(models, folders, tmp_path, block, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        made(models["llama"], tmp_path / "out", what=stopped_at(block))
    assert not (tmp_path / "out").exists()
    rounded = []
    real = Block.round
    monkeypatch.setattr(Block, "round", lambda self, *given: (rounded.append(self), real(self, *given))[1])
    assert made(models["llama"], tmp_path / "out").resumed
    assert len(rounded) == 2 - block
    assert bytes_of(tmp_path / "out") == bytes_of(folders["dynamic"])


def test_a_stop_between_two_streams_changes_no_byte(models, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        made(models["llama"], tmp_path / "out", what=stopped_at(1, target="output"))
    output = Compensation(samples=FEW.samples, length=FEW.length, target="output")
    assert made(models["llama"], tmp_path / "out", what=output).resumed
    assert bytes_of(tmp_path / "out") == bytes_of(made(models["llama"], tmp_path / "whole", what=output).folder)


def test_finished_shards_need_no_compensation_again(models, folders, tmp_path, monkeypatch):
    from fp8.checkpoint.partial import Partial

    def stop(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(Partial, "finish", stop)
    with pytest.raises(KeyboardInterrupt):
        made(models["llama"], tmp_path / "out")
    monkeypatch.undo()
    monkeypatch.setattr(Walk, "through", stop)
    made(models["llama"], tmp_path / "out")
    assert bytes_of(tmp_path / "out") == bytes_of(folders["dynamic"])


def test_other_settings_start_over(models, folders, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        made(models["llama"], tmp_path / "out", what=stopped_at(1))
    other = Compensation(samples=20, length=24, damping=0.5)
    assert not made(models["llama"], tmp_path / "out", what=other).resumed
    assert bytes_of(tmp_path / "out") != bytes_of(folders["dynamic"])


# --------------------------------------------------------------------------- verify


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_verify_holds_the_codes_to_their_digests(models, folders, scheme):
    verdict = verify(folders[scheme], models["llama"], ROWS, ROWS)
    assert {c.name: c.passed for c in verdict.checks} == dict.fromkeys(
        ("codes", "rest", "transformers", "logits", "perplexity"), True
    ), verdict
    assert "14 layers were rounded with compensation" in verdict.checks[0].detail


def test_one_code_or_scale_that_is_another_fails(models, folders, tmp_path):
    folder = copied(folders["dynamic"], tmp_path / "codes")
    codes = tensors(folder)[f"{UP}.weight"].clone()
    codes.view(torch.uint8)[3, 4] ^= 1
    retensor(folder, f"{UP}.weight", codes)
    check = verify(folder, models["llama"], transformers=False).checks[0]
    assert check.passed is False and f"first in {UP}" in check.detail
    folder = copied(folders["dynamic"], tmp_path / "scale")
    retensor(folder, f"{UP}.weight_scale", tensors(folder)[f"{UP}.weight_scale"] * 2)
    check = verify(folder, models["llama"], transformers=False).checks[0]
    assert check.passed is False and "the scales of 1 layers differ" in check.detail


# --------------------------------------------------------------------------- the command


def run(*words):
    """The exit code."""
    try:
        main([str(word) for word in words])
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0


@pytest.mark.filterwarnings("default")
def test_the_command_says_what_it_did(models, tmp_path, capfd):
    few = ["--samples", "9", "--length", "24", "--no-kv-cache"]
    assert run("quantize", models["llama"], tmp_path / "out", "--compensate", *few) == 0
    told = capfd.readouterr()
    assert "14 layers compensated on 192 tokens; of 24 held-out tokens the outputs' squared error is" in told.out
    assert "Give text like yours by --calibrate FILE" in told.err
    assert run("verify", tmp_path / "out", "--against", models["llama"], "--tokens", "0") == 0
    assert "rounded with compensation" in " ".join(capfd.readouterr().out.split())


def test_mistakes_are_named():
    for wrong in ({"damping": -1.0}, {"target": "outputs"}, {"order": "up"}, {"samples": 1}):
        with pytest.raises(ConfigError, match=str(next(iter(wrong.values())))):
            Compensation(**wrong)
