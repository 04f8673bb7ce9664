"""The report of a checkpoint: from the file alone, beside its model, with text, with judgements; one file, whole."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch

import tiny_models
from balanced_html import Balanced
from fp8.calibrate.budget import Budget
from fp8.calibrate.survey import Reading, survey
from fp8.checkpoint import load, save
from fp8.checkpoint.convert import convert_folder
from fp8.checkpoint.quantize import Options, Scales, quantize_folder
from fp8.cli import main
from fp8.cost import rates
from fp8.cost.serving import Served, decode_seconds, prompt_seconds
from fp8.errors import CheckpointError, DataError
from fp8.nn import convert
from fp8.report import checkpoint_page
from fp8.report.checkpoint_page import judged, page

NAME = "model.layers.1.mlp.down_proj"
HEADS = Scales(keys={f"model.layers.{i}.self_attn": [2.0**-4, 2.0**-i] for i in range(2)},
               values={f"model.layers.{i}.self_attn": [2.0**-7, 2.0**-7] for i in range(2)})  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    where = tmp_path_factory.mktemp("report")
    model = tiny_models.build(where / "model", "llama")
    quantize_folder(model, where / "out", calibrate=lambda source, layers: HEADS)
    return model, where / "out"


@pytest.fixture(scope="module")
def data(models):
    model, out = models
    return survey(out, model, Reading(samples=2, length=24)) | {"judged": []}


@pytest.fixture(scope="module")
def drawing(data):
    return page(data)


@pytest.fixture
def undrawn(monkeypatch):
    """Pictures take most of the time, and few laws are about them."""
    monkeypatch.setattr(checkpoint_page, "pictures", lambda data: {})


def test_the_page_is_whole_and_fetches_nothing(data, drawing):
    drawn = Balanced()
    drawn.feed(html := drawing)
    assert drawn.open == [] and all(place.startswith(("#", "data:")) for place in drawn.places)
    assert not re.search(r"(src|href)=.http|@import|url\((?!#)", html)
    assert html == page(data)


def test_pictures_take_their_colours_from_the_page_and_have_names(drawing):
    html = drawing
    pictures = re.findall(r'<div role="img" aria-label="[^"]+">(<svg.*?</svg>)\s*</div>', html, re.DOTALL)
    assert len(pictures) == html.count("<svg") >= 12
    assert set(re.findall(r"#[0-9a-f]{6}", "".join(pictures))) <= {"#000000", "#ffffff"}
    names = re.findall(r'\bid="([^"]+)"', html)
    assert len(set(names)) == len(names)


def test_every_number_of_a_picture_is_in_a_table(data, drawing):
    html = drawing
    for row in data["weights"]:
        assert f"<code>{row['name']}</code>" in html and f"<td>{row['sqnr']:.3g}</td>" in html
    assert all(f"{group['kl']:.3g}" in html for group in data["sensitivity"]["groups"])
    assert html.count("<caption>") == html.count("<table>") >= 4


def test_the_file_alone_gives_a_page(models):
    alone = survey(models[1]) | {"judged": []}
    assert alone["sensitivity"] is None and all(w["sqnr"] is None for w in alone["weights"])
    html = page(alone)
    assert "Not measured:" in html and "it needs --against" in html and "Scales of keys" in html


def test_a_survey_counts_what_is_in_the_file(models, data):
    held, source = (tiny_models.tensors(folder) for folder in reversed(models))
    row = next(row for row in data["weights"] if row["name"] == NAME)
    codes, scale = held[f"{NAME}.weight"], held[f"{NAME}.weight_scale"]
    real, weight = codes.float() * scale, source[f"{NAME}.weight"].float()
    assert row["saturated"] == pytest.approx(float((codes.float().abs() == 448).float().mean()))
    assert row["flushed"] == pytest.approx(float(((real == 0) & (weight != 0)).float().mean()))
    noise = (real - weight).square().sum() / weight.square().sum()
    assert row["sqnr"] == pytest.approx(float(-10 * noise.log10()), rel=1e-5)
    assert sum(data["scales"].values()) == sum(t.numel() for n, t in held.items() if n.endswith("weight_scale"))
    assert data["bytes"]["total"] == sum(t.nbytes for t in held.values())
    assert [row["k"] for row in data["kv"]] == [[2.0**-4, 1.0], [2.0**-4, 0.5]]
    assert data["kept"] == ["lm_head"]


def test_layers_stand_in_the_order_of_their_numbers(data):
    depths = [int(row["name"].split(".")[2]) for row in data["weights"]]
    assert depths == sorted(depths)


def test_what_a_budget_measured_need_not_be_measured_again(models, tmp_path, undrawn):
    quantize_folder(models[0], tmp_path / "out", choose=Budget(0.01, samples=2, length=24))
    seen = survey(tmp_path / "out")
    assert seen["sensitivity_from"] == "budget" and len(seen["sensitivity"]["groups"]) == 8
    html = page(seen | {"judged": []})
    assert "when the budget was set" in html and "Groups that stay in BF16" in html
    assert all(f"<code>{group['layers'][0]}" in html for group in seen["budget"]["kept"])


def test_text_is_run_by_the_codes_of_the_file(models, tmp_path, data):
    out = tiny_models.copied(models[1], tmp_path / "out")
    tiny_models.retensor(out, f"{NAME}.weight", torch.zeros(128, 256).to(torch.float8_e4m3fn))
    seen = survey(out, models[0], Reading(samples=2, length=24))
    layer = next(row for row in seen["sensitivity"]["layers"] if row["name"] == NAME)
    assert layer["output_error"] == 1.0
    assert (
        next(g for g in seen["sensitivity"]["groups"] if NAME in g["layers"])["kl"]
        > 10 * next(g for g in data["sensitivity"]["groups"] if NAME in g["layers"])["kl"]
    )


def test_another_model_is_refused_or_told(models, tmp_path, undrawn):
    odd = tiny_models.build(tmp_path / "odd", "odd")
    with pytest.raises(CheckpointError, match="another model"):
        survey(models[1], odd)
    with pytest.raises(CheckpointError, match="--against"):
        survey(models[1], None, Reading())
    other = tiny_models.copied(models[0], tmp_path / "other")
    weight = tiny_models.tensors(other)[f"{NAME}.weight"]
    tiny_models.retensor(other, f"{NAME}.weight", -weight)
    seen = survey(models[1], other) | {"judged": []}
    assert seen["unlike"] == [NAME] and "are not those of other, rounded" in page(seen)


def test_names_are_escaped(data, undrawn):
    assert "<b>x" not in page(data | {"checkpoint": "<b>x"})


def test_without_matplotlib_the_page_says_how_to_get_pictures(data, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    html = page(data)
    assert "<svg" not in html and "pip install &#39;fp8[report]&#39;" in html and "Every layer" in html


def test_other_formats_and_our_own_decoder_have_a_report_too(models, tmp_path, undrawn):
    quantize_folder(models[0], tmp_path / "block", Options("block"))
    convert_folder(tmp_path / "block", tmp_path / "hf", "huggingface-fp8")
    decoder = load(models[0])
    convert(decoder, "rowwise")
    save(decoder, tmp_path / "own", "bytes")
    for folder in ("block", "hf", "own"):
        seen = survey(tmp_path / folder)
        assert seen["bytes"]["total"] == sum(t.nbytes for t in tiny_models.tensors(tmp_path / folder).values())
        assert len(seen["weights"]) == 14 and seen["kept"] == ["lm_head"]
        assert "Every layer" in page(seen | {"judged": []})


# --------------------------------------------------------------------------- judgements


def judgement(path: Path, folder: str) -> Path:
    value = {"value": 20.0, "low": 19.0, "high": 21.0, "units": 10}
    loss = {"measure": "perplexity", "value": value, "loss": value | {"value": 0.4, "low": 0.3, "high": None},
            "loss_unit": "%", "verdict": "inconclusive"}  # fmt: skip
    outcomes = [{"model": "base", "figures": [{"measure": "perplexity", "value": value}]},
                {"model": "ours", "figures": [loss]}]  # fmt: skip
    models = [{"name": "base", "folder": "models/base"}, {"name": "ours", "folder": folder}]
    path.write_text(json.dumps({"models": models, "measurements": {"text.txt": outcomes}}))
    return path


def test_judgements_are_shown_with_their_intervals(data, tmp_path):
    rows = judged([judgement(tmp_path / "e.json", "models/out")], "out")
    html = page(data | {"judged": rows})
    assert "+0.40 %" in html and "inconclusive" in html and "unknown" in html and "Against the base" in html


def test_judgements_of_another_model_are_refused(tmp_path):
    with pytest.raises(DataError, match="no figures of out"):
        judged([judgement(tmp_path / "e.json", "models/other")], "out")
    (tmp_path / "none.json").write_text("[]")
    with pytest.raises(DataError, match="no file of `fp8 eval --json`"):
        judged([tmp_path / "none.json"], "out")


# --------------------------------------------------------------------------- the command, and speed


def test_the_command_writes_a_page_and_its_data(models, tmp_path, capfd):
    main_ = [*map(str, ("report", models[1], "--against", models[0], "-o", tmp_path / "p.html"))]
    with pytest.raises(SystemExit) as stopped:
        main(main_)
    assert stopped.value.code == 0 and "p.json" in capfd.readouterr().out
    written = json.loads((tmp_path / "p.json").read_text())
    with pytest.raises(SystemExit):
        main([*main_, "--json"])
    assert json.loads(capfd.readouterr().out) == written
    with pytest.raises(SystemExit) as stopped:
        main([*map(str, ("report", models[1], "-o", tmp_path / "p.txt"))])
    assert stopped.value.code == 2 and "ends with .html" in capfd.readouterr().err


def test_decoding_is_bytes_and_a_long_prompt_is_products():
    known = rates()
    high, low = Served.high(4096, 4096), Served(4096, 4096, "row fast", 4096 * 4096 + 4 * 4096)
    ratio = decode_seconds([high], 0, 0, known) / decode_seconds([low], 0, 0, known)
    assert ratio == pytest.approx(high.nbytes / low.nbytes)
    assert decode_seconds([low], 1e9, 0, known) == decode_seconds([low], 0, 1e9, known)
    assert prompt_seconds([high], 16384, known) / prompt_seconds([low], 16384, known) > 1.3
    assert prompt_seconds([high], 16, known) / prompt_seconds([low], 16, known) < 1.1


@pytest.mark.parametrize("scheme", ["static", "block", "weight-only"])
def test_each_scheme_has_a_speed(models, tmp_path, scheme):
    def inputs(source, layers):
        return Scales(dict.fromkeys(layers.fp8, 1.0))

    quantize_folder(models[0], tmp_path / "out", Options(scheme), inputs if scheme == "static" else None)
    decode = survey(tmp_path / "out")["speed"]["H200"]["decode"]
    assert decode["fp8"] < decode["bf16"]
