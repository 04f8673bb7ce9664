"""`fp8 quantize`, `convert`, `lint` and `verify` from the command line, as a newcomer uses them."""

from __future__ import annotations

import json

import pytest

import tiny_models
from fp8.cli import main
from tiny_models import bytes_of, retensor, tensors

FEW = ["--samples", "9", "--length", "24"]


def run(*words: object) -> int:
    """The exit code."""
    try:
        main([str(word) for word in words])
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0


@pytest.fixture
def model(tmp_path):
    return tiny_models.build(tmp_path / "model", "llama")


@pytest.mark.filterwarnings("default")
def test_quantize_lint_convert_verify(model, tmp_path, capfd):
    out = tmp_path / "out"
    assert run("quantize", model, out, *FEW) == 0
    told = capfd.readouterr().out
    assert "14 layers in FP8, 1 kept" in told and "kept, a head: lm_head" in told
    assert "key scales from 192 tokens (max); of 24 held-out tokens they clip" in told
    assert "SGLang cannot load it: KV scales per head" in told and "vLLM cannot" not in told
    assert run("lint", out) == 0
    told = capfd.readouterr().out
    assert "0 errors, 0 warnings" in told and "fp8 convert --for sglang" in told
    assert run("convert", out, tmp_path / "sglang", "--for", "sglang") == 0
    assert run("convert", out, tmp_path / "plain", "--to", "bf16") == 0
    capfd.readouterr()
    assert run("verify", tmp_path / "sglang", "--against", model, "--tokens", 48, "--json") == 0
    checks = {check["name"]: check["passed"] for check in json.loads(capfd.readouterr().out)["checks"]}
    assert checks == dict.fromkeys(("codes", "rest", "transformers", "logits", "perplexity"), True)


@pytest.mark.filterwarnings("default")
def test_one_changed_bit_fails_in_ci(model, tmp_path, capfd):
    assert run("quantize", model, tmp_path / "out", "--no-kv-cache", "--skip", "*.down_proj") == 0
    norm = tensors(tmp_path / "out")["model.norm.weight"].clone()
    norm[0] *= 2
    retensor(tmp_path / "out", "model.norm.weight", norm)
    assert run("verify", tmp_path / "out", "--against", model, "--tokens", 0, "--no-transformers") == 1
    assert "NOT EQUAL" in capfd.readouterr().out


def test_each_scheme_from_the_command_line(model, tmp_path):
    for scheme in ("static", "block", "weight-only"):
        assert run("quantize", model, tmp_path / scheme, "-s", scheme, *FEW, "--observer", "percentile") == 0
        assert any(name.endswith("k_scale") for name in tensors(tmp_path / scheme))


def test_an_encoder_has_no_kv_cache(tmp_path, capfd):
    encoder = tiny_models.build(tmp_path / "bert", "bert")
    assert run("quantize", encoder, tmp_path / "out") == 0
    assert "12 layers in FP8, 1 kept" in capfd.readouterr().out
    assert run("lint", tmp_path / "out", "--strict") == 0


def test_ctrl_c_says_how_to_go_on(model, tmp_path, capfd, monkeypatch):
    from fp8.checkpoint import partial

    real = partial.Place.put

    def stop(self, name, tensor):
        if "down_proj" in name:
            raise KeyboardInterrupt
        real(self, name, tensor)

    monkeypatch.setattr(partial.Place, "put", stop)
    assert run("quantize", model, tmp_path / "out", *FEW) == 130
    assert "the same command goes on" in capfd.readouterr().err and not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert run("quantize", model, tmp_path / "out", *FEW) == 0
    assert run("quantize", model, tmp_path / "again", *FEW) == 0
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "again")


def test_mistakes_are_one_line(model, tmp_path, capfd):
    assert run("quantize", model, tmp_path / "out", "--scheme", "dynamc") == 2
    assert "Did you mean 'dynamic'" in capfd.readouterr().err
    assert run("quantize", tmp_path / "nowhere", tmp_path / "out") == 2
    assert "there is no folder" in capfd.readouterr().err
    assert run("lint", model) == 1
    assert run("convert", model, tmp_path / "out") == 2
    assert "say what to write" in capfd.readouterr().err


@pytest.mark.parametrize("precision", ["tensorwise", "fp32"])
def test_a_training_run_is_exported_with_its_own_codes(tmp_path, capfd, precision):
    from fp8.train import TrainConfig, train

    text = tmp_path / "text.txt"
    text.write_text("Call me Ishmael. " * 200)
    recipe = {"precision": "fp32", "recipe": "none"} if precision == "fp32" else {"recipe": precision}
    train(
        TrainConfig(
            text=str(text), out=str(tmp_path / "run"), steps=2, batch_size=2, sequence_length=32, hidden_size=32,
            ffn_hidden_size=48, num_layers=1, num_attention_heads=2, num_kv_heads=1, tokenizer="bytes", **recipe,
        )
    )  # fmt: skip
    assert run("quantize", tmp_path / "run", tmp_path / "out") == 0
    own = "its own codes, not quantized again" if precision != "fp32" else "quantized from its FP32 masters"
    assert own in capfd.readouterr().out
    assert run("verify", tmp_path / "out", "--against", tmp_path / "run") == 0
    assert run("quantize", tmp_path / "run", tmp_path / "static", "--scheme", "static") == 2
    for flag in (("--skip", "*.down_proj"), ("--head",), ("--kv-cache",), ("--dtype", "float32"), ("--scales", "none")):
        assert run("quantize", tmp_path / "run", tmp_path / "other", *flag) == 2
        assert "is written as it was trained" in " ".join(capfd.readouterr().err.split())


def test_a_device_that_is_not_here_is_one_line(model, tmp_path, capfd):
    assert run("quantize", model, tmp_path / "out", "--device", "cuda:99") == 2
    assert "is not here" in capfd.readouterr().err
    assert run("quantize", model, tmp_path / "out", "--device", "tpu") == 2
    assert "it is auto, cpu, cuda or cuda:N" in capfd.readouterr().err
    assert not list(tmp_path.glob("out*"))


def test_ctrl_c_in_convert_says_how_to_go_on(model, tmp_path, capfd, monkeypatch):
    from fp8.checkpoint import convert

    def stop(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "convert_folder", stop)
    assert run("convert", model, tmp_path / "out", "--to", "bf16") == 130
    assert "the same command goes on" in capfd.readouterr().err
