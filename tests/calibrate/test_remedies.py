"""Remedies against outliers: found on one text, judged on another, told with what was measured, verified in bytes."""

from __future__ import annotations

import json

import pytest
import torch

import tiny_models
from fp8.calibrate import Calibration
from fp8.calibrate.folding import migrated, migrations
from fp8.calibrate.remedies import RECORD, Remedies, as_written, gain, helpful
from fp8.calibrate.smoothing import exponents, searched
from fp8.checkpoint import Options, quantize_folder
from fp8.checkpoint.layers import choose_layers, skeleton
from fp8.checkpoint.quantize import SCHEMES
from fp8.checkpoint.source import Source
from fp8.checkpoint.verify import verify
from fp8.cli import main
from fp8.errors import CheckpointError, ConfigError
from tiny_models import bytes_of, retensor, tensors

FEW = Calibration(samples=9, length=24)
FOLDED = ("rotate", "smooth", "both")


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    pytest.importorskip("transformers")
    return tiny_models.build(tmp_path_factory.mktemp("remedies") / "tied", "tied")


@pytest.fixture(scope="module")
def hiding(tied, tmp_path_factory):
    """One channel of every norm 2^16 times as large, and its columns smaller by as much: the same model to the bit,
    whose other channels sink."""
    worse = tiny_models.copied(tied, tmp_path_factory.mktemp("hiding") / "hiding")
    changed = migrated(Source.open(tied), dict.fromkeys(norms(tied), [-16] + [0] * 127))
    for name in changed.edits:
        retensor(worse, name, changed.read(name))
    return worse


def norms(folder):
    return [m.maker for m in migrations(Source.open(folder)) if m.maker.endswith("layernorm")]


def found_for(folder, method, scheme="dynamic", calibration=FEW):
    source, options = Source.open(folder), Options(scheme)
    return Remedies(method, options, calibration).find(source, choose_layers(source, skeleton(source)))


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("method", FOLDED)
def test_the_written_folder_is_plain_and_verifies_against_the_original(hiding, tmp_path, method):
    out, options = tmp_path / "out", Options("dynamic")
    quantize_folder(hiding, out, options, remedy=Remedies(method, options, FEW))
    config = json.loads((out / "config.json").read_text())
    told = config["fp8"]["quantized"]["outliers"]
    assert told["applied"] == method and {"high precision", "none", method} == told["nats"].keys()
    assert config["tie_word_embeddings"] is (method == "smooth") and config["architectures"] == ["LlamaForCausalLM"]
    assert ("lm_head.weight" in tensors(out)) is (method != "smooth")
    assert all(t.dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.float32) for t in tensors(out).values())
    verdict = verify(out, as_written(Source.open(hiding), out), torch.arange(12).view(2, 6), transformers=False)
    assert {c.name: c.passed for c in verdict.checks if c.passed is not None} == dict.fromkeys(
        ("codes", "rest", "logits"), True
    )
    assert not verify(out, hiding, transformers=False).passed


def test_the_same_call_gives_the_same_bytes_and_a_seed_others(tied, tmp_path):
    def made(name, seed):
        quantize_folder(tied, tmp_path / name, remedy=Remedies("both", Options(), FEW, seed))
        return bytes_of(tmp_path / name)

    one, two, other = made("one", 0), made("two", 0), made("other", 1)
    assert one == two and one["model.safetensors"] != other["model.safetensors"]


def test_what_was_found_survives_a_stop(tied, tmp_path):
    found = []

    class Counted(Remedies):
        def find(self, source, layers):
            found.append(source)
            return super().find(source, layers)

    def stop(done, total):
        raise KeyboardInterrupt

    remedy = Counted("both", Options(), FEW)
    with pytest.raises(KeyboardInterrupt):
        quantize_folder(tied, tmp_path / "out", progress=stop, remedy=remedy)
    assert quantize_folder(tied, tmp_path / "out", remedy=remedy).resumed and len(found) == 1
    quantize_folder(tied, tmp_path / "whole", remedy=remedy)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


@pytest.mark.filterwarnings("default")
def test_from_the_command_line(tied, tmp_path, capfd):
    out, few = tmp_path / "out", ["--samples", "9", "--length", "24", "--no-kv-cache"]
    with pytest.raises(SystemExit) as stopped:
        main(["quantize", str(tied), str(out), "--outliers", "rotate", "--seed", "7", *few])
    assert stopped.value.code == 0
    told = capfd.readouterr().out
    assert "outliers: rotate; the head is untied from the embedding" in told and "too few rows for an interval" in told
    with pytest.raises(SystemExit) as stopped:
        main(["verify", str(out), "--against", str(tied), "--tokens", "0", "--no-transformers"])
    assert stopped.value.code == 0 and json.loads((out / RECORD).read_text())["rotation"] == 7


def test_static_and_block_schemes_take_remedies_too(tied, tmp_path):
    for scheme in ("static", "block", "weight-only"):
        options = Options(scheme)
        inputs = Calibration(samples=9, length=24, kv=False, inputs=True) if scheme == "static" else None
        written = quantize_folder(tied, tmp_path / scheme, options, inputs, remedy=Remedies("smooth", options, FEW))
        assert written.outliers["applied"] == "smooth" and written.layers.fp8


def test_a_model_that_is_not_understood_leaves_nothing(tied, tmp_path):
    bert = tiny_models.build(tmp_path / "bert", "bert")
    with pytest.raises(CheckpointError, match="BertModel"):
        quantize_folder(bert, tmp_path / "out", remedy=Remedies("rotate", Options(), FEW))
    assert [path.name for path in tmp_path.iterdir()] == ["bert"]
    with pytest.raises(ConfigError, match="Did you mean 'rotate'"):
        Remedies("rotat", Options())


# --------------------------------------------------------------------------- choosing


def test_auto_takes_nothing_that_does_not_help_beyond_chance():
    torch.manual_seed(0)
    plain = 3 + torch.rand(16).double()
    better, noise = plain - 0.1, plain + 0.01 * torch.randn(16)
    assert helpful({"none": plain, "rotate": noise, "smooth": better}) == "smooth"
    assert helpful({"none": plain, "rotate": plain + 0.1}) == "none"
    assert helpful({"none": plain, "rotate": plain - 0.001 + 0.1 * torch.randn(16).sub(0).sign()}) == "none"
    assert helpful({"none": plain[:7], "rotate": better[:7]}) == "none" and gain(plain[:7], better[:7])[1] is None


def test_auto_writes_what_it_measured_and_leaves_a_model_without_outliers_alone(tied):
    found = found_for(tied, "auto", calibration=Calibration(samples=64, length=16))
    told = found["told"]
    assert told["nats"].keys() == {"high precision", "none", "rotate", "smooth", "both"}
    assert told["applied"] == "none" and found["rotation"] is found["migration"] is None


@pytest.mark.parametrize("scheme", ["static", "dynamic"])
def test_smoothing_brings_back_what_one_channel_hides(tied, hiding, scheme):
    """Each layer's error, and nothing is moved where no channel hides another."""
    rows, remedies = torch.arange(96).view(4, 24), Remedies("smooth", Options(scheme), FEW)
    before, after = (remedies.one("smooth", Source.open(folder), rows)["groups"] for folder in (tied, hiding))
    assert all(told["alpha"] is None for told in before.values())
    for norm in norms(tied):
        told = after[norm]
        assert told["alpha"] is not None
        assert told["before"] > 2 * before[norm]["before"] and told["after"] < 1.1 * before[norm]["before"]


# --------------------------------------------------------------------------- searching


def test_alpha_is_none_unless_a_migration_errs_less():
    torch.manual_seed(0)
    x, w = torch.randn(64, 128), torch.randn(32, 128)
    assert searched(x, [w], SCHEMES["static"])[1]["alpha"] is None
    x[:, 5] *= 1e5
    w[:, 5] /= 1e5
    move, told = searched(x, [w], SCHEMES["static"])
    assert told["alpha"] is not None and told["after"] < told["before"] / 5 and int(move.argmax()) == 5


def test_dead_channels_stay_where_they_are():
    x, w = torch.tensor([0.0, 1.0, 16.0, 4.0]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    assert exponents(x, w, 1.0).tolist() == [0, 0, 4, 0]
