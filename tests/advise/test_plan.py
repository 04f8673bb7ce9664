"""`fp8 plan`: whose sizes it reads, what it decides, and what it says to what cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fp8.advise import models, plan
from fp8.advise.plan import check, what_helps
from fp8.cli import main
from fp8.errors import CheckpointError, ConfigError, Fp8Error
from fp8.models.huggingface import to_config
from fp8.models.llama import DecoderConfig

SMALL = DecoderConfig(257, 128, 384, 4, 4, 2)
HF: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(["plan", *argv])
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


# --------------------------------------------------------------------------- models


@pytest.mark.parametrize(
    ("name", "billions"),
    [("llama-3-8b", 8.03), ("llama-3-70b", 70.6), ("llama-3.1-405b", 405.8), ("llama-3.2-1b", 1.24),
     ("llama-3.2-3b", 3.21), ("llama-2-7b", 6.74), ("llama-2-13b", 13.0), ("mistral-7b", 7.24), ("qwen2.5-7b", 7.6),
     ("gpt2-124m", 0.124), ("gpt2-355m", 0.355), ("gpt2-774m", 0.774), ("gpt2-1.5b", 1.557)],
)  # fmt: skip
def test_named_models_have_the_parameters_of_their_makers(name: str, billions: float) -> None:
    assert models.named(name).parameters / 1e9 == pytest.approx(billions, rel=0.005)


def test_a_hugging_face_model_has_its_projections_apart(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(HF))
    theirs, ours = models.architecture(tmp_path), models.named("llama-3-8b")
    assert theirs.parameters == ours.parameters
    assert [p.name for p in theirs.products()] == ["q", "k, v", "out", "gate, up", "down"]
    assert sum(p.parameters for p in theirs.products()) == sum(p.parameters for p in ours.products())


def test_our_own_configuration_is_read_in_every_form(tmp_path: Path) -> None:
    import torch

    (tmp_path / "ours.json").write_text(json.dumps(SMALL.to_dict()))
    (tmp_path / "config.json").write_text(json.dumps(to_config(SMALL, torch.float32)))
    sizes = [models.architecture(m).parameters for m in (SMALL, tmp_path / "ours.json", tmp_path)]
    assert len(set(sizes)) == 1


def test_a_run_of_fp8_train_is_read(tmp_path: Path) -> None:
    from fp8.train import TrainConfig, train

    config = TrainConfig(hidden_size=32, ffn_hidden_size=64, num_layers=1, num_attention_heads=2, num_kv_heads=1,
                         sequence_length=16, batch_size=1, steps=1, eval_batches=1, recipe="none",
                         out=str(tmp_path))  # fmt: skip
    folder = train(config).checkpoint
    assert folder is not None
    for place in (tmp_path, folder):
        found = models.architecture(place)
        assert (found.hidden, found.ffn, found.layers, found.vocab) == (32, 64, 1, 257)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not json", "is not JSON"),
        ("[]", "holds a list"),
        (json.dumps({"model_type": "llama", "hidden_size": 8}), "lacks 'num_attention_heads'"),
        (json.dumps({"model_type": "mixtral"}), "mixture of experts"),
        (json.dumps({"model_type": "mamba"}), "modelled are llama"),
    ],
)
def test_what_is_no_configuration_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        models.architecture(tmp_path)


def test_an_empty_folder_and_an_unknown_name_are_told_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither config"):
        models.architecture(tmp_path)
    with pytest.raises(ConfigError, match="Did you mean 'llama-3-8b'"):
        models.architecture("lama-3-8b")


# --------------------------------------------------------------------------- decisions


def test_a_large_model_gains_and_a_small_one_does_not() -> None:
    large, small = plan("llama-3-8b", 16384, gpus=8), plan("gpt2-124m", 2048)
    assert large.verdict.startswith("Use FP8: ")
    assert {d.name for d in large.decisions if d.fp8} == {"qkv", "out", "up", "down"}
    assert small.verdict.startswith("Do not use FP8: no layer would be faster")
    assert small.fp8.step == small.bf16.step
    assert small.fp8.memory == small.bf16.memory


def test_the_head_stays_unless_asked_for() -> None:
    kept, asked = plan("llama-3.2-1b", 16384), plan("llama-3.2-1b", 16384, head=True)
    head = next(d for d in kept.decisions if d.name == "head")
    assert not head.fp8
    assert "straight into the loss" in head.reason
    assert asked.fp8.step.seconds < kept.fp8.step.seconds


def test_a_graph_takes_the_host_away() -> None:
    eager, graph = plan("gpt2-124m", 2048, eager=True), plan("gpt2-124m", 2048, graph=True)
    assert graph.bf16.step.host == 0
    assert graph.bf16.step.seconds < eager.bf16.step.seconds


@pytest.mark.parametrize("tokens", [1024, 8192, 65536])
@pytest.mark.parametrize("model", ["gpt2-124m", "gpt2-1.5b", "llama-3.2-1b"])
def test_what_is_decided_is_never_slower(model: str, tokens: int) -> None:
    """Whether the GPU or the host is waited for: the promise of `only_if_faster`, for the whole step."""
    for recipe in ("tensorwise", "delayed", "rowwise", "blockwise"):
        assert plan(model, tokens, recipe=recipe).gain >= 1 - 1e-9


def test_fused_producers_are_as_fast_without_a_compiler() -> None:
    """`TransformerLayer` in eager mode against itself compiled: head and loss apart, the GPU does the same."""
    compiled, eager = (plan("llama-3-8b", 16384, gpus=8, fused=True, eager=eager).fp8.step for eager in (False, True))
    apart = {kind for kind in compiled.parts if compiled.parts[kind] != eager.parts[kind]}
    assert apart == {"loss"}
    assert not eager.host_bound


def test_days_and_cost_are_tokens_over_rate() -> None:
    found = plan("llama-3.2-1b", 16384, gpus=8, total_tokens=1e12, price=2.0)
    side = found.fp8
    assert side.days is not None
    assert side.cost is not None
    assert found.bf16.cost is not None
    assert side.days == pytest.approx(1e12 / (8 * side.tokens_per_second) / 86400)
    assert side.cost == pytest.approx(side.days * 24 * 8 * 2.0)
    assert found.bf16.cost / side.cost == pytest.approx(found.gain)


def test_every_recipe_has_its_own_gain() -> None:
    gains = {
        r: plan("llama-3-8b", 16384, recipe=r, gpus=8).gain for r in ("delayed", "tensorwise", "rowwise", "blockwise")
    }
    assert gains["delayed"] > gains["tensorwise"] > gains["rowwise"]
    assert gains["tensorwise"] > gains["blockwise"] > 1


def test_another_gpu_is_said_to_be_scaled() -> None:
    assert "not measured" in plan("llama-3.2-1b", 16384, gpu="h100").known.gpu.note


# --------------------------------------------------------------------------- what cannot be


def test_what_does_not_fit_is_told_by_how_much_and_what_helps() -> None:
    found = plan("llama-3-8b", 16384)
    assert not found.fits
    with pytest.raises(
        ConfigError, match=r"needs [\d.]+ GiB, [\d.]+ more than .* an H200's 139.8\. What helps: .*--gpus 2"
    ):
        check(found)


def test_a_verdict_says_that_it_does_not_fit() -> None:
    assert plan("llama-3-8b", 16384).verdict.endswith("It does not fit into the GPU as it is.")
    assert "not fit" not in plan("llama-3-8b", 16384, gpus=8).verdict


def test_each_way_that_helps_does() -> None:
    large = plan("llama-3.2-3b", 131072)
    ways = {way.split()[0]: way.split()[1] for way in what_helps(large)}
    assert set(ways) == {"--tokens"}
    assert plan("llama-3.2-3b", int(ways["--tokens"])).fits
    assert not plan("llama-3.2-3b", int(ways["--tokens"]) + large.sequence).fits
    shared = plan("llama-3-8b", 16384)
    more = next(way.split()[1] for way in what_helps(shared) if way.startswith("--gpus"))
    assert plan("llama-3-8b", 16384, gpus=int(more)).fits
    assert any(way == "--gpu H200" for way in what_helps(plan("llama-3.2-3b", 16384, gpu="H100")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 0}, "tokens must be above 0, not 0"),
        ({"tokens": -5}, "tokens must be above 0"),
        ({"tokens": 16, "sequence": 32}, "holds no sequence of 32"),
        ({"tokens": 16, "gpus": 0}, "gpus must be above 0"),
        ({"tokens": 16, "price": float("nan")}, "price must be above 0"),
        ({"tokens": 16, "total_tokens": -1}, "total-tokens must be above 0"),
        ({"tokens": 16, "gpu": "H20"}, "Did you mean 'H200'"),
        ({"tokens": 16, "state": "fp8"}, "'fp32' .* or 'bf16'"),
        ({"tokens": 16, "recipe": "rowise"}, "Did you mean 'rowwise'"),
        ({"tokens": 4096, "sequence": 2048}, "1024 learned positions"),
    ],
)
def test_what_cannot_be_planned_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(Fp8Error, match=message):
        plan("gpt2-124m", **options)


# --------------------------------------------------------------------------- the command


def test_the_command_shows_layers_step_and_verdict(capsys) -> None:
    code, out, _ = run(capsys, "llama-3-8b", "--gpus", "8", "--total-tokens", "1e12", "--price", "3.5")
    assert code == 0
    for word in ("28672 x 4096", "tokens/s and GPU", "peak GiB", "saved", "Use FP8: ", "Communication"):
        assert word in out, word


def test_the_command_as_json_is_strict_and_whole(capsys) -> None:
    code, out, _ = run(capsys, "llama-3.2-1b", "--json", "--recipe", "blockwise")
    data = json.loads(out)
    assert code == 0
    assert data["request"]["recipe"] == "blockwise"
    assert data["gain"] == pytest.approx(data["bf16"]["seconds"] / data["fp8"]["seconds"])
    assert sum(data["fp8"]["parts"].values()) == pytest.approx(data["fp8"]["gpu_seconds"])
    assert data["use_fp8"] == data["verdict"].startswith("Use FP8")


def test_the_command_prints_the_plan_and_then_that_it_does_not_fit(capsys) -> None:
    code, out, err = run(capsys, "llama-3-70b")
    assert code == 2
    assert "peak GiB" in out
    assert "What helps" in err
    code, out, err = run(capsys, "llama-3-70b", "--json")
    assert (code, json.loads(out)["fits"]) == (2, False)


def test_the_command_teaches_an_unknown_model(capsys) -> None:
    code, _, err = run(capsys, "lama-3-8b")
    assert code == 2
    assert "Did you mean 'llama-3-8b'" in err
