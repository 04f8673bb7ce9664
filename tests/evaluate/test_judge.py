"""Laws of judging: the same bits after an interruption, before and after an export, and what a person sees."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fp8
from fp8.checkpoint import Options, load, quantize_folder, save
from fp8.cli import main
from fp8.errors import CheckpointError, ConfigError
from fp8.evaluate.intervals import paired_difference, ratio_mean
from fp8.evaluate.judge import StoppedError, judge, variants
from fp8.evaluate.measurement import TaskMeasurement, TextMeasurement
from fp8.evaluate.schemes import apply_scheme, recipe_of
from fp8.evaluate.subject import ModelSpec, engine_for, open_causal
from fp8.evaluate.tasks import Answer, Choice, Ending, Task
from fp8.nn.int8_linear import Int8Linear, int8_rows

CHOICES = Task("pick", [Choice(str(i), "Call me" + "!" * i, (" A", " B", " C"), i % 3) for i in range(6)])
ENDINGS = Task("last", [Ending(str(i), "I went to sea" + "." * i, " ago") for i in range(4)])
ANSWERS = Task("said", [Answer(str(i), "How long" + "?" * i, "x", ("\n",), 4) for i in range(2)])


def measurements(text: Path) -> list[Any]:
    return [TextMeasurement(text, 64, 32, batch_size=2), *(TaskMeasurement(t, 2) for t in (CHOICES, ENDINGS, ANSWERS))]


def records(told: Any) -> list[Any]:
    return [outcome.records for outcome in told.outcomes]


def test_a_resumed_evaluation_equals_an_uninterrupted_one(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [ModelSpec(llama), ModelSpec(llama, "dynamic")]
    whole = judge(models, measurements(text), out=tmp_path / "whole")
    left, run = [1], TextMeasurement.run

    def interrupted(self: TextMeasurement, model: Any, batch: Any) -> Any:
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return run(self, model, batch)

    monkeypatch.setattr(TextMeasurement, "run", interrupted)
    for _ in range(3):  # each time one batch more
        with pytest.raises(StoppedError, match="the same command goes on"):
            judge(models, measurements(text), out=tmp_path / "cut")
        left.append(1)
    monkeypatch.setattr(TextMeasurement, "run", run)
    resumed = judge(models, measurements(text), out=tmp_path / "cut")
    assert records(resumed) == records(whole)
    assert [f.name for f in sorted((tmp_path / "cut").iterdir())] == [
        f.name for f in sorted((tmp_path / "whole").iterdir())
    ]


def test_what_is_on_disk_is_not_measured_again_unless_asked(llama: Path, text: Path, tmp_path: Path) -> None:
    one = [TextMeasurement(text, 64, 64)]
    first = judge([ModelSpec(llama)], one, out=tmp_path)
    again = judge([ModelSpec(llama)], one, out=tmp_path)
    assert again.about[ModelSpec(llama).name].startswith("not loaded")
    assert records(again) == records(first)
    assert judge([ModelSpec(llama)], one, out=tmp_path, fresh=True).about[ModelSpec(llama).name] == "as it is"


def test_a_larger_limit_goes_on_from_a_smaller_one(llama: Path, text: Path, tmp_path: Path) -> None:
    def first(limit: int | None, out: str) -> list[Any]:
        one = [TextMeasurement(text, 32, 16, limit, batch_size=3)]
        return records(judge([ModelSpec(llama)], one, out=tmp_path / out))[0]

    whole = first(None, "whole")
    for limit in (2, 6, 5, 9):
        assert first(limit, "grown") == whole[:limit]
    (ledger,) = (tmp_path / "grown").iterdir()
    (entire,) = (tmp_path / "whole").iterdir()
    assert ledger.name == entire.name
    assert entire.read_bytes().startswith(ledger.read_bytes())


def test_another_model_in_the_folder_is_measured_anew(llama: Path, text: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(llama, copy)
    before = ModelSpec(copy).fingerprint()
    assert before == ModelSpec(copy).fingerprint()
    assert before != ModelSpec(copy, "dynamic").fingerprint()
    (copy / "model.safetensors").touch()
    assert before != ModelSpec(copy).fingerprint()


def test_a_model_compared_with_itself_differs_by_exactly_nothing(llama: Path, text: Path, tmp_path: Path) -> None:
    twin = tmp_path / "twin"
    shutil.copytree(llama, twin)
    told = judge([ModelSpec(llama), ModelSpec(twin)], measurements(text), out=tmp_path / "out")
    losses = [figure.loss for outcome in told.outcomes[1::2] for figure in outcome.figures]
    assert len(losses) == 5
    assert {(loss.value, loss.low, loss.high) for loss in losses if loss} == {(0.0, 0.0, 0.0)}


@pytest.mark.parametrize("recipe", ["rowwise", "blockwise", "tensorwise"])
def test_a_scheme_judged_beforehand_equals_the_checkpoint_that_is_exported(
    recipe: str, llama: Path, text: Path, tmp_path: Path
) -> None:
    model = load(llama)
    fp8.convert(model, recipe)
    save(model, tmp_path / "fp8", "bytes")
    told = judge([ModelSpec(llama, recipe), ModelSpec(tmp_path / "fp8")], measurements(text), out=tmp_path / "out")
    for beforehand, exported in zip(told.outcomes[0::2], told.outcomes[1::2], strict=True):
        assert beforehand.records == exported.records


def test_the_json_is_enough_to_compute_every_interval_again(llama: Path, text: Path, tmp_path: Path) -> None:
    base = ModelSpec(llama)
    told = judge([base, *variants(base, ["int8"])], measurements(text), out=tmp_path / "out")
    plain = json.loads(json.dumps(told.to_dict(), allow_nan=False))
    one, other = plain["measurements"]["text.txt"]
    off = ratio_mean([m["nll"] - b["nll"] for m, b in zip(other["records"], one["records"], strict=True)],
                     [b["tokens"] for b in one["records"]])  # fmt: skip
    assert other["figures"][0]["nats_difference"] == off.to_dict()
    assert other["figures"][0]["loss"]["high"] == pytest.approx(100 * math.expm1(off.high))
    one, other = plain["measurements"]["pick"]
    off = paired_difference(*([r["correct"] for r in each["records"]] for each in (one, other)))
    assert other["figures"][0]["loss"]["value"] == pytest.approx(-100 * off.value)
    assert [model["name"] for model in plain["models"]] == ["tiny", "tiny · int8"]


# --------------------------------------------------------------------------- engines, schemes, caches


def test_both_engines_give_the_same_logits(llama: Path) -> None:
    pytest.importorskip("transformers")
    rows = torch.arange(60).view(2, 30)
    for scheme, kv in (("none", None), ("none", "fp8"), ("dynamic", None)):
        specs = [ModelSpec(llama, scheme, kv, engine=engine) for engine in ("fp8", "transformers")]
        ours, theirs = map(open_causal, specs)
        a, b = ours.logits(rows), theirs.logits(rows)
        # Codes may flip where the last bit of an FP32 norm differs; without FP8 nothing can.
        assert float((a - b).norm() / a.norm()) < (1e-5 if (scheme, kv) == ("none", None) else 2e-2)
        assert list(ours.go_on([1, 2, 3], 5))[:1] == list(theirs.go_on([1, 2, 3], 5))[:1]


@pytest.mark.parametrize(("scheme", "most"), [("dynamic", 2e-2), ("block", 2e-2), ("weight-only", 1e-5)])
def test_both_engines_multiply_the_codes_of_a_checkpoint(llama: Path, tmp_path: Path, scheme: str, most: float) -> None:
    pytest.importorskip("transformers")
    folder = quantize_folder(llama, tmp_path / "made", Options(scheme)).folder
    rows = torch.arange(60).view(2, 30)
    ours, theirs = (open_causal(ModelSpec(folder, engine=engine)) for engine in ("fp8", "transformers"))
    assert "layers of codes as stored" in ours.about and theirs.about == "14 layers of codes as stored"
    a, b = ours.logits(rows), theirs.logits(rows)
    assert float((a - b).norm() / a.norm()) < most  # as above
    with pytest.raises(ConfigError, match="quantized already"):
        open_causal(ModelSpec(folder, engine="transformers", scheme="int8"))


@pytest.mark.parametrize("scheme", ["dynamic", "block", "weight-only"])
def test_a_scheme_means_what_the_checkpoint_of_that_name_holds(llama: Path, tmp_path: Path, scheme: str) -> None:
    pytest.importorskip("transformers")
    folder = quantize_folder(llama, tmp_path / "made", Options(scheme)).folder
    rows = torch.arange(60).view(2, 30)
    # Our decoder joins q, k and v, of which 128x128 blocks would be others.
    for engine in ("transformers",) if scheme == "block" else ("transformers", "fp8"):
        specs = ModelSpec(llama, scheme, engine=engine), ModelSpec(folder, engine=engine)
        before, after = (open_causal(spec).logits(rows) for spec in specs)
        assert torch.equal(before, after), engine


def test_a_cache_in_fp8_changes_little_and_something(llama: Path) -> None:
    rows = torch.arange(40)[None]
    plain, cached, wide = (open_causal(ModelSpec(llama, kv_cache=kv)).logits(rows) for kv in (None, "fp8", "fp32"))
    assert torch.allclose(plain, wide, atol=1e-4)
    assert 1e-4 < float((plain - cached).norm() / plain.norm()) < 0.1


@pytest.mark.parametrize("scheme", ["dynamic", "block", "weight-only", "int8", "delayed"])
def test_a_scheme_changes_little_and_something(scheme: str, llama: Path) -> None:
    rows = torch.arange(40)[None]
    plain, changed = (open_causal(ModelSpec(llama, s)) for s in ("none", scheme))
    off = float((plain.logits(rows) - changed.logits(rows)).norm() / plain.logits(rows).norm())
    assert 1e-3 < off < 0.2
    assert "8 layers" in changed.about and "kept: head" in changed.about


def test_a_result_does_not_depend_on_the_batch(llama: Path) -> None:
    """Also for a recipe with one scale a tensor, which is served one scale a token."""
    model = open_causal(ModelSpec(llama, "tensorwise"))
    rows = torch.stack([torch.arange(20), torch.full((20,), 255)])
    assert torch.allclose(model.logits(rows)[:1], model.logits(rows[:1]), atol=1e-3)


def test_int8_rounds_each_row_by_its_own_largest() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 32).requires_grad_(False), torch.randn(5, 64)
    y = Int8Linear(layer.weight, layer.bias)(x)
    (a, s), (w, t) = int8_rows(x), int8_rows(layer.weight)
    exact = (a.long() @ w.long().t()).double() * s * t.t() + layer.bias
    assert torch.allclose(y.double(), exact, rtol=1e-6, atol=1e-6)
    assert float((y - layer(x)).norm() / layer(x).norm()) < 0.02
    assert int(a.abs().amax(1).min()) == 127
    assert int8_rows(torch.zeros(2, 3))[1].tolist() == [[1.0], [1.0]]


def test_a_recipe_of_ones_own_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(fp8.Recipe.of("rowwise").replace(overrides=(("1", None),)).to_json())
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    assert apply_scheme(model, str(path)).startswith("1 layers")


def test_what_cannot_be_judged_is_refused_before_anything_runs(llama: Path, text: Path, tmp_path: Path) -> None:
    base, one = ModelSpec(llama), [TextMeasurement(text)]
    with pytest.raises(ConfigError, match="calibration"):
        recipe_of("static")
    with pytest.raises(ConfigError, match="Did you mean 'dynamic'"):
        ModelSpec(llama, "dynamik")
    with pytest.raises(ConfigError, match="nothing to measure"):
        judge([base], [])
    with pytest.raises(ConfigError, match="two models are called 'tiny'"):
        judge([base, base], one, out=tmp_path)
    with pytest.raises(ConfigError, match="changes nothing"):
        variants(base, ["none"])
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        ModelSpec(tmp_path)
    with pytest.raises(ConfigError, match="exceeds the model's 256"):
        judge([base], [TextMeasurement(text, 257, 257)], out=tmp_path)
    with pytest.raises(ConfigError, match="should be one"):
        judge([base], [TextMeasurement(text, 32, 32, bos="<s>")], out=tmp_path)


def test_without_transformers_the_error_says_how_to_get_it(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads((llama / "config.json").read_text())
    shutil.copytree(llama, tmp_path / "gpt")
    (tmp_path / "gpt" / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    assert engine_for(llama) == "fp8"
    assert engine_for(tmp_path / "gpt") == "transformers"
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"pip install 'fp8\[hf\]'"):
        open_causal(ModelSpec(tmp_path / "gpt"))


# --------------------------------------------------------------------------- the command


def test_the_command_shows_a_table_and_prints_json(
    llama: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine.jsonl"
    mine.write_text('{"prompt": "Call me", "choices": [" A", " B"], "answer": 1}\n')
    argv = ["eval", str(llama), "--text", str(text), "--tasks", str(mine), "--window", "64", "--limit", "3", "--int8"]
    argv += ["--scheme", "dynamic", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as ended:
        main(argv)
    out = capsys.readouterr().out
    assert ended.value.code == 0
    with pytest.raises(SystemExit):
        main([*argv, "--json"])
    printed = capsys.readouterr()
    assert "text.txt, perplexity" in printed.err
    assert "text.txt, perplexity" in out and "tiny · dynamic" in out and "tiny · int8" in out
    assert "mine, accuracy" in out and "uninformative" in out
    told = json.loads(printed.out)
    assert list(told["measurements"]) == ["text.txt", "mine"]
    assert [len(m["records"]) for m in told["measurements"]["text.txt"]] == [3, 3, 3]


def test_json_is_a_flag_here_as_elsewhere(llama: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["eval", str(llama), "--text", str(text), "--json", "out.json"])
    assert ended.value.code == 2 and "--json > out.json" in capsys.readouterr().err


def test_a_cache_alone_is_held_against_the_same_model(
    llama: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [
        "eval",
        str(llama),
        "--text",
        str(text),
        "--window",
        "64",
        "--kv-cache",
        "fp8",
        "--out",
        str(tmp_path / "o"),
    ]
    with pytest.raises(SystemExit):
        main([*argv, "--against", str(llama)])
    assert "tiny · kv fp8" in capsys.readouterr().out


def test_a_mistake_is_one_line(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["eval", str(llama), "--tasks", "lambada"])
    assert ended.value.code == 2
    assert "name the folder that holds it by --data" in capsys.readouterr().err
