"""`fp8 qat`: a short training of a folder, stopped and gone on with, and what it leaves."""

from __future__ import annotations

import json

import pytest
import torch

import tiny_models
from fp8.calibrate import short_qat
from fp8.calibrate.short_qat import ShortQat, order, split, train_folder
from fp8.checkpoint import Options, Scales, quantize_folder, verify
from fp8.checkpoint.fp8_folder import Fp8Folder
from fp8.cli import main
from fp8.errors import CheckpointError, ConfigError, DataError
from tiny_models import bytes_of, tensors

SMALL = ShortQat(steps=6, batch=2, length=24, lr=1e-4, device="cpu", save_every=4)
TWO_STEPS = {"steps": 2, "batch": 2, "length": 24, "device": "cpu"}


def run(*words: object) -> int:
    try:
        main([str(word) for word in words])
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    pytest.importorskip("transformers")
    return tiny_models.build(tmp_path_factory.mktemp("qat") / "model", "tied")


@pytest.mark.filterwarnings("default")
def test_from_the_command_line(model, tmp_path, capfd):
    out = tmp_path / "out"
    few = ("-n", 3, "--batch", 2, "--length", 24, "--device", "cpu", "--skip", "*.down_proj")
    assert run("qat", model, out, *few) == 0
    told = capfd.readouterr().out
    assert "held-out perplexity:" in told and "rounded and trained" in told
    assert sorted(path.name for path in out.iterdir()) == ["fp8", "high", "qat.json"]
    assert len(json.loads((out / "qat.json").read_text())["losses"]) == 3
    assert run("verify", out / "fp8", "--against", out / "high", "--tokens", 48) == 0
    assert run("lint", out / "fp8") == 0
    assert "0 errors" in capfd.readouterr().out
    folder = Fp8Folder.open(out / "fp8")
    assert len(folder.kv) == 4 and len(folder.layers) == 12
    high = tensors(out / "high")
    assert set(high) == set(tensors(model)) and {t.dtype for t in high.values()} == {torch.float32}
    assert run("qat", model, out, *few) == 2
    assert "already exists" in " ".join(capfd.readouterr().err.split())


@pytest.mark.parametrize("scheme", ["static", "block", "weight-only"])
def test_the_checkpoint_is_the_one_that_quantize_makes_of_the_trained_weights(model, tmp_path, scheme):
    train_folder(model, tmp_path / "out", Options(scheme), SMALL)
    stored = Fp8Folder.open(tmp_path / "out" / "fp8")
    kv = {kind: {n.removesuffix(f".{kind}"): stored.source.read(n).flatten().tolist() for n in stored.kv if kind in n}
          for kind in ("k_scale", "v_scale")}  # fmt: skip
    inputs = {n: float(stored.input_scale(n)) for n in stored.layers} if scheme == "static" else {}
    scales = Scales(inputs, kv["k_scale"], kv["v_scale"])
    quantize_folder(tmp_path / "out" / "high", tmp_path / "again", Options(scheme), lambda *_: scales)
    assert bytes_of(tmp_path / "again")["model.safetensors"] == bytes_of(stored.source.folder)["model.safetensors"]
    assert verify(stored.source.folder, tmp_path / "out" / "high", torch.arange(24).view(2, 12)).passed


@pytest.mark.parametrize("distill", [True, False])
def test_stopped_and_gone_on_with_it_gives_the_same_bytes(monkeypatch, model, tmp_path, distill):
    """Killed in its sixth step, it goes on behind the fourth, the last that was saved."""
    how = ShortQat(**{**vars(SMALL), "distill": distill})
    train_folder(model, tmp_path / "whole", Options("static"), how)
    one_step, count = short_qat.Run.one_step, []

    def stopping(self):
        count.append(self.step)
        if len(count) == 6:
            raise KeyboardInterrupt
        return one_step(self)

    monkeypatch.setattr(short_qat.Run, "one_step", stopping)
    with pytest.raises(KeyboardInterrupt):
        train_folder(model, tmp_path / "parts", Options("static"), how)
    assert not (tmp_path / "parts").exists()
    train_folder(model, tmp_path / "parts", Options("static"), how)
    assert count == [0, 1, 2, 3, 4, 5, 4, 5]
    assert bytes_of(tmp_path / "whole") == bytes_of(tmp_path / "parts")


def test_ctrl_c_saves_the_step_and_other_settings_start_anew(monkeypatch, model, tmp_path):
    one_step, steps = short_qat.Run.one_step, []

    def asked(self):
        steps.append(self.step)
        loss = one_step(self)
        if len(steps) == 2:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGINT)
        return loss

    monkeypatch.setattr(short_qat.Run, "one_step", asked)
    done = train_folder(model, tmp_path / "out", Options(), SMALL)
    assert done.interrupted and done.step == 2 and "the same command goes on" in str(done)
    assert train_folder(model, tmp_path / "out", Options(skip=("*.o_proj",)), SMALL).step == 6
    assert steps == [0, 1, 0, 1, 2, 3, 4, 5]


def test_distillation_brings_the_rounded_model_nearer(tmp_path, model):
    """The divergence of a batch falls below that of the model that is only rounded."""
    how = ShortQat(steps=20, batch=8, length=32, lr=1e-5, device="cpu", kv="token")
    train_folder(model, tmp_path / "out", Options(), how)
    losses = json.loads((tmp_path / "out" / "qat.json").read_text())["losses"]
    assert sum(losses[-5:]) / 5 < 0.8 * losses[0]


def test_the_control_trains_the_same_way_and_rounds_nothing(tmp_path, model):
    learned = {"distill": False, "steps": 4, "batch": 2, "length": 24, "lr": 1e-3, "device": "cpu"}
    control = train_folder(model, tmp_path / "control", Options(), ShortQat(rounding=False, **learned))
    rounded = train_folder(model, tmp_path / "rounded", Options(), ShortQat(**learned))
    assert sorted(path.name for path in control.folder.iterdir()) == ["high", "qat.json"]
    assert control.perplexity["rounded"] == control.perplexity["model"] == rounded.perplexity["model"]
    assert control.perplexity["trained"] < control.perplexity["model"]
    before, after = tensors(model), tensors(control.folder / "high")
    assert any(not torch.equal(before[name].float(), after[name]) for name in before)


def test_distilled_from_itself_the_control_stays_what_it_was(tmp_path, model):
    control = train_folder(model, tmp_path / "out", Options(), ShortQat(rounding=False, **TWO_STEPS))
    assert max(json.loads((control.folder / "qat.json").read_text())["losses"]) < 1e-6


def test_rows_are_all_seen_before_one_is_seen_again():
    rows = order(7, 20, seed=3)
    assert [sorted(part.tolist()) for part in rows.split(7)][:2] == [list(range(7))] * 2
    assert torch.equal(rows, order(7, 20, 3)) and not torch.equal(rows, order(7, 20, 4))
    kept, held = split(torch.arange(10)[:, None])
    assert len(kept) == 9 and held.flatten().tolist() == [7]
    assert [len(part) for part in split(torch.arange(1000)[:, None])] == [985, 15]


def test_the_rate_warms_up_and_falls_to_zero():
    rates = [ShortQat(steps=20, lr=0.5, device="cpu").rate(i) for i in range(21)]
    assert rates[0] == 0.25 and max(rates) == 0.5 == rates[1] and rates[20] == 0.0
    assert ShortQat(steps=1, lr=0.5, device="cpu").rate(0) == 0.5


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"lr": 2.0}, "lr must be between"),
        ({"device": "tpu"}, "device cannot"),
        ({"length": 1}, "length must be at least 2"),
    ],
)
def test_settings_out_of_range(given, match):
    with pytest.raises(ConfigError, match=match):
        ShortQat(**given)


def test_what_cannot_be_trained_leaves_nothing(model, tmp_path):
    bert = tiny_models.build(tmp_path / "bert", "bert")
    short = tmp_path / "short.txt"
    short.write_text("Call me.")
    for folder, how, error, match in (
        (bert, SMALL, CheckpointError, "predicts no next token"),
        (model, ShortQat(texts=(str(short),), length=64, device="cpu"), DataError, "too short"),
        (model, ShortQat(length=999, device="cpu"), DataError, "999 is more than the 128 positions"),
        (model, ShortQat(kv="heads", length=64, device="cpu"), ConfigError, "Did you mean 'head'"),
        (tmp_path / "none", SMALL, CheckpointError, "there is no folder"),
    ):
        with pytest.raises(error, match=match):
            train_folder(folder, tmp_path / "out", Options(), how)
        assert not list(tmp_path.glob("out*"))
