"""`lint`: a good checkpoint has no error, each fault is found and named, and each reader's limits are said."""

from __future__ import annotations

import json

import pytest
import torch
import typer

import tiny_models
from fp8.checkpoint import Options, Scales, convert_folder, lint, quantize_folder
from fp8.checkpoint.command import lint_command
from tiny_models import copied, reconfigure, retensor, tensors

UP, K = "model.layers.0.mlp.up_proj", "model.layers.0.self_attn.k_proj"
CACHE = "model.layers.1.self_attn.k_scale"
GROUP = ("quantization_config", "config_groups", "group_0")


def scales_for(source, layers):
    keys = {f"model.layers.{i}.self_attn": [0.25, 1.0] for i in range(2)}
    return Scales(dict.fromkeys(layers.fp8, 0.25), keys, keys)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lint")
    model, odd = tiny_models.build(folder / "model", "llama"), tiny_models.build(folder / "odd", "odd")
    bert = tiny_models.build(folder / "bert", "bert")
    made = {
        s: quantize_folder(model, folder / s, Options(s), scales_for).folder for s in ("dynamic", "static", "block")
    }
    made["bert"] = quantize_folder(bert, folder / "bertout").folder
    made["odd"] = quantize_folder(odd, folder / "oddout", Options("block")).folder
    made["nokv"] = quantize_folder(model, folder / "nokv").folder
    made["weight-only"] = quantize_folder(model, folder / "weightonly", Options("weight-only"), scales_for).folder
    return made


def found(report, level):
    return [(finding.kind, finding.where) for finding in report.findings if finding.level == level]


@pytest.mark.parametrize("scheme", ["dynamic", "static", "block", "weight-only", "bert"])
def test_what_we_write_has_no_fault(folders, scheme):
    report = lint(folders[scheme])
    assert report.findings == () and report.errors == report.warnings == 0


def ones(folder):
    for name in [n for n in tensors(folder) if n.endswith(("k_scale", "v_scale"))]:
        retensor(folder, name, torch.ones(2, 1, 1))


def unequal(folder):
    retensor(folder, f"{K}.weight_scale", tensors(folder)[f"{K}.weight_scale"] * 0.9)


def nan_code(folder):
    codes = tensors(folder)[f"{UP}.weight"].clone()
    codes.view(torch.uint8)[3, 4] = 0x7F
    retensor(folder, f"{UP}.weight", codes)


def infinite_norm(folder):
    retensor(folder, "model.norm.weight", torch.full((128,), float("inf"), dtype=torch.bfloat16))


def rescaled(value):
    return lambda f: retensor(f, f"{UP}.weight_scale", torch.full((256, 1), value))


def without(name):
    return lambda f: retensor(f, name, None)


def with_tensor(name, tensor):
    return lambda f: retensor(f, name, tensor)


def configured(*path, value):
    return lambda f: reconfigure(f, *path, value=value)


FAULTS = [
    ("dynamic", ones, "warning", "kv scales", "model.layers.0.self_attn.k_scale"),
    ("nokv", lambda f: None, "warning", "kv scales", "kv_cache_scheme"),
    ("dynamic", without(CACHE), "error", "kv scales", CACHE),
    ("dynamic", with_tensor(CACHE, torch.ones(3, 1, 1)), "error", "kv scales", CACHE),
    ("dynamic", with_tensor(CACHE, torch.zeros(2, 1, 1)), "error", "kv scales", CACHE),
    ("dynamic", with_tensor(CACHE, torch.ones(2, 1, 1).bfloat16() / 4), "warning", "half scale", CACHE),
    ("dynamic", configured("quantization_config", "kv_cache_scheme", value=None), "warning", "kv scales", None),
    ("dynamic", with_tensor(f"{UP}.weight_scale", torch.ones(256, 1).bfloat16()), "warning", "half scale", None),
    ("dynamic", rescaled(0.0), "error", "values", UP),
    ("dynamic", rescaled(float("nan")), "error", "values", UP),
    ("dynamic", rescaled(-1.0), "error", "values", UP),
    ("dynamic", with_tensor(f"{UP}.weight_scale", torch.ones(128, 1)), "error", "values", UP),
    ("dynamic", without(f"{UP}.weight_scale"), "error", "scale", UP),
    ("dynamic", nan_code, "error", "values", UP),
    ("dynamic", infinite_norm, "error", "values", "model.norm.weight"),
    ("static", unequal, "warning", "fused scales", "model.layers.0.self_attn.q_proj"),
    ("static", without(f"{UP}.input_scale"), "error", "dynamic flag", f"{UP}.input_scale"),
    ("static", with_tensor(f"{UP}.input_scale", -torch.ones(1)), "error", "input scale", f"{UP}.input_scale"),
    ("dynamic", with_tensor(f"{UP}.input_scale", torch.ones(1)), "warning", "dynamic flag", f"{UP}.input_scale"),
    ("dynamic", configured("quantization_config", "ignore", value=["lm_head", UP]), "error", "ignore", UP),
    ("dynamic", configured("quantization_config", "ignore", value=["lm_head", UP]), "error", "fused", None),
    ("dynamic", configured("quantization_config", "ignore", value=[]), "error", "ignore", "lm_head"),
    ("dynamic", configured("quantization_config", "ignore", value=["lm_head", "hed"]), "warning", "ignore", "hed"),
    ("dynamic", with_tensor(f"{UP}.weight", torch.ones(256, 128)), "error", "ignore", UP),
    ("dynamic", with_tensor(f"{UP}.weight", torch.ones(256, 128)), "error", "scale", f"{UP}.weight_scale"),
    ("dynamic", configured("intermediate_size", value=128), "error", "shape", f"{UP}.weight"),
    ("dynamic", configured(*GROUP, "input_activations", "dynamic", value=False), "error", "unreadable", None),
    ("dynamic", lambda f: (f / "model.safetensors").unlink(), "error", "unreadable", None),
    ("dynamic", lambda f: (f / "model.safetensors").write_bytes(b"half"), "error", "unreadable", None),
    ("dynamic", lambda f: [p.unlink() for p in f.glob("tokenizer*")], "note", "tokenizer", None),
]  # fmt: skip


@pytest.mark.parametrize(("scheme", "change", "level", "kind", "where"), FAULTS)
def test_each_fault_is_found_and_named(folders, tmp_path, scheme, change, level, kind, where):
    folder = copied(folders[scheme], tmp_path / "out")
    change(folder)
    report = lint(folder)
    hits = [w for k, w in found(report, level) if k == kind]
    assert hits and (where is None or where in hits), report.findings
    assert report.errors or level != "error"


def verdicts(folder):
    return {reader.name: reader.verdict for reader in lint(folder).readers}


def test_who_can_load_it(folders, tmp_path):
    assert verdicts(folders["nokv"]) == {"vLLM": "yes", "SGLang": "yes", "TensorRT-LLM": "no",
                                         "transformers": "with care", "fp8": "yes"}  # fmt: skip
    assert verdicts(folders["dynamic"])["SGLang"] == "no" and verdicts(folders["dynamic"])["vLLM"] == "with care"
    convert_folder(folders["dynamic"], tmp_path / "sglang", reader="sglang")
    assert verdicts(tmp_path / "sglang")["SGLang"] == "yes"
    assert verdicts(folders["odd"])["vLLM"] == verdicts(folders["odd"])["transformers"] == "no"
    assert verdicts(folders["bert"])["fp8"] == "no"
    convert_folder(folders["odd"], tmp_path / "hf", "huggingface-fp8")
    assert verdicts(tmp_path / "hf")["transformers"] == "no"  # its blocks would begin elsewhere


def test_weight_only_has_the_name_that_compressed_tensors_wants(folders, tmp_path):
    folder = copied(folders["weight-only"], tmp_path / "out")
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["format"] == "naive-quantized"
    assert verdicts(folder)["transformers"] == "with care"
    reconfigure(folder, "quantization_config", "format", value="float-quantized")
    assert verdicts(folder)["transformers"] == "no"


def test_the_command_prints_and_exits(folders, tmp_path, capsys):
    lint_command(folders["dynamic"])
    assert "0 errors, 0 warnings" in capsys.readouterr().out
    with pytest.raises(typer.Exit) as strict:
        lint_command(folders["nokv"], as_json=True, strict=True)
    data = json.loads(capsys.readouterr().out)
    assert strict.value.exit_code == 1 and data["warnings"] == 1 and len(data["readers"]) == 5
    lint_command(folders["nokv"])
