"""Calibrated scales: of K after the rotary embedding and V as projected, by head; from memory or from disk alike."""

from __future__ import annotations

import json

import pytest
import torch

import fp8
import tiny_models
from fp8.calibrate import Calibration
from fp8.calibrate.calibration import split
from fp8.calibrate.text import read_texts, rows_of, tokenizer_for
from fp8.checkpoint import Options, quantize_folder
from fp8.checkpoint.layers import choose_layers, skeleton
from fp8.checkpoint.source import Source
from fp8.errors import ConfigError, DataError
from tiny_models import bytes_of, tensors

SMALL = {"samples": 9, "length": 24}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("calibrate")
    made = {kind: tiny_models.build(folder / kind, kind) for kind in ("llama", "tied", "qwen2", "bert")}
    return made | {"sharded": tiny_models.build(folder / "sharded", "llama", shards="150KB")}


def scales_of(folder, **changes):
    source = Source.open(folder)
    return Calibration(**SMALL | changes)(source, choose_layers(source, skeleton(source)))


def by_hand(folder, rows):
    """Keys and values of each layer, [KV, all], from a plain forward pass with hooks on the projections."""
    from transformers import AutoModelForCausalLM
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    seen = {}
    for i, layer in enumerate(model.model.layers):
        for kind in "kv":
            projection = getattr(layer.self_attn, f"{kind}_proj")
            projection.register_forward_hook(lambda m, a, out, i=i, kind=kind: seen.__setitem__((kind, i), out))
    with torch.no_grad():
        model(rows)
        places = torch.arange(rows.shape[1])[None]
        cos, sin = model.model.rotary_emb(seen["v", 0], places)
    for (kind, i), x in list(seen.items()):
        heads = x.view(*x.shape[:2], 2, 32).transpose(1, 2)
        heads = apply_rotary_pos_emb(heads, heads, cos, sin)[1] if kind == "k" else heads
        seen[kind, i] = heads.transpose(0, 1).flatten(1)
    return seen


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_scales_are_those_of_the_largest_key_and_value_of_each_head(models, kind):
    scales = scales_of(models[kind])
    rows, _ = split(rows_of(read_texts(["moby-dick"]), tokenizer_for(models[kind], None), 9, 24, 260))
    for (which, i), x in by_hand(models[kind], rows).items():
        found = (scales.keys if which == "k" else scales.values)[f"model.layers.{i}.self_attn"]
        assert found == fp8.quantize(x.bfloat16(), tile="row").scale.flatten().tolist()


@pytest.mark.parametrize("kind", ["llama", "tied", "qwen2", "sharded"])
def test_layer_by_layer_from_disk_gives_the_same_scales(models, kind):
    assert scales_of(models[kind], stream=True, inputs=True) == scales_of(models[kind], stream=False, inputs=True)


def test_static_scales_cover_what_the_layers_saw(models):
    scales = scales_of(models["llama"], inputs=True, kv=False)
    assert len(scales.inputs) == 14 and not scales.keys
    layer = "model.layers.0.self_attn."
    assert scales.inputs[layer + "q_proj"] == scales.inputs[layer + "k_proj"] == scales.inputs[layer + "v_proj"]
    assert all(fp8.quantize(torch.tensor([[448 * s]])).scale.item() == s for s in scales.inputs.values())
    assert set(scales.how["held_out"]) == {"input"}


def test_exact_scales_are_amax_over_448(models):
    two, exact = scales_of(models["llama"]), scales_of(models["llama"], scales="none")
    for name, heads in exact.keys.items():
        assert all(power / 2 < scale <= power for scale, power in zip(heads, two.keys[name], strict=True))


def test_a_percentile_clips_no_more_than_it_says_where_it_was_measured(models):
    given = {"percentile": 90.0, "scales": "none", "guarded": False}
    low, high = (scales_of(models["llama"], observer=o, **given) for o in ("percentile", "max"))
    for name, heads in low.values.items():
        assert all(a < b for a, b in zip(heads, high.values[name], strict=True))
    seen = low.how["held_out"]["value"]
    assert 0.05 < seen["saturated"] < 0.2 and seen["worst"]["module"].endswith("self_attn")
    assert high.how["held_out"]["value"]["saturated"] < 0.01


def test_auto_tells_which_observer_won_where_and_by_how_much(models):
    scales = scales_of(models["llama"], observer="auto", scales="none", inputs=True)
    for kind, groups in (("key", 4), ("value", 4), ("input", 14)):
        told = scales.how["observers"][kind]
        assert sum(told["won"].values()) == groups == sum(map(len, told["where"].values()))
        assert told["error_to_max"]["auto"] <= min(told["error_to_max"].values()) + 1e-12
        assert all(share <= 1 for winners in told["where"].values() for _, share in winners)
    assert "observers" not in scales_of(models["llama"]).how


def test_text_unlike_the_calibration_text_shows(models, tmp_path):
    """Every eighth row is held out; made of other bytes than the rest, it exceeds what was seen."""
    rows = [("a" * 24) if i != 7 else "~Q^" * 8 for i in range(8)]
    (tmp_path / "text.txt").write_text("".join(rows))
    scales = scales_of(models["llama"], texts=(str(tmp_path / "text.txt"),), samples=8, inputs=True)
    assert scales.how["held_out"]["value"]["amax_ratio"] > 1.2


def test_the_file_has_the_names_that_vllm_reads(models, tmp_path):
    quantize_folder(models["sharded"], tmp_path / "out", calibrate=Calibration(**SMALL))
    out = tensors(tmp_path / "out")
    names = {f"model.layers.{i}.self_attn.{kind}_scale" for i in range(2) for kind in "kv"}
    assert {name for name in out if "self_attn.k_scale" in name or "self_attn.v_scale" in name} == names
    assert all(out[name].shape == (2, 1, 1) and out[name].dtype == torch.float32 for name in names)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    number = {"num_bits": 8, "type": "float", "symmetric": True, "group_size": None}
    assert config["quantization_config"]["kv_cache_scheme"] == number | {"strategy": "attn_head", "dynamic": False}
    assert config["fp8"]["quantized"]["calibration"]["held_out_tokens"] == 24


def test_two_runs_give_equal_bytes(models, tmp_path):
    a, b = (
        quantize_folder(models["llama"], tmp_path / n, Options("static"), Calibration(**SMALL, inputs=True))
        for n in "ab"
    )
    assert bytes_of(a.folder) == bytes_of(b.folder)


@pytest.mark.filterwarnings("default")
def test_transformers_runs_with_the_kv_scales(models, tmp_path):
    pytest.importorskip("compressed_tensors")
    transformers = pytest.importorskip("transformers")
    quantize_folder(models["llama"], tmp_path / "out", calibrate=Calibration(**SMALL))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model(torch.arange(5)[None]).logits.isfinite().all()
    scale = tensors(tmp_path / "out")["model.layers.1.self_attn.k_scale"]
    assert torch.equal(model.model.layers[1].self_attn.k_scale.float(), scale)


# --------------------------------------------------------------------------- text


def test_rows_are_spread_over_the_text_and_one_in_eight_is_held_out():
    rows = rows_of("".join(chr(97 + i % 26) for i in range(1000)), tokenizer_for(None, "bytes"), 10, 20, 257)  # type: ignore[arg-type]
    assert rows.shape == (10, 20) and rows[3, 0] == 97 + 300 % 26
    assert len(rows_of("abc" * 10, tokenizer_for(None, "bytes"), 64, 10, 257)) == 3
    chosen, held = split(rows)
    assert len(chosen) == 9 and torch.equal(held[0], rows[7])
    assert len(split(rows[:2])[1]) == 1


def test_rows_begin_as_the_tokenizer_begins_a_text():
    class Tokenizer:
        def __call__(self, text, **options):
            ids = [ord(c) for c in text]
            return {"input_ids": ids if options else [1, *ids]}

    rows = rows_of("abc" * 100, Tokenizer(), 4, 10, 300)
    assert rows[:, 0].tolist() == [1, 1, 1, 1] and rows[0, 1] == ord("a")


def test_json_lines_are_texts(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": "two"}\n')
    assert read_texts([str(path)]) == "one\n\ntwo"
    path.write_text('{"text": "one"}\n{"txt": "two"}\n')
    with pytest.raises(DataError, match=r"line 2 of .*chats.jsonl"):
        read_texts([str(path)])


def test_bad_input_is_named(models, tmp_path):
    bare = tiny_models.copied(models["llama"], tmp_path / "bare")
    for path in bare.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(DataError, match=r"has no tokenizer.*--no-kv-cache"):
        quantize_folder(bare, tmp_path / "out", calibrate=Calibration(**SMALL))
    assert [path.name for path in tmp_path.iterdir()] == ["bare"]
    (tmp_path / "short.txt").write_text("call me")
    with pytest.raises(DataError, match="has 7 characters"):
        scales_of(models["llama"], texts=(str(tmp_path / "short.txt"),))
    with pytest.raises(DataError, match="has no KV cache"):
        scales_of(models["bert"])
    with pytest.raises(DataError, match="another model's tokenizer"):
        rows_of("zz" * 99, tokenizer_for(bare, "bytes"), 3, 10, 100)
    for wrong in ({"observer": "mse2"}, {"samples": 1}, {"percentile": 10.0}):
        with pytest.raises(ConfigError):
            Calibration(**wrong)


def test_a_model_that_overflows_is_refused(models, tmp_path):
    broken = tiny_models.copied(models["llama"], tmp_path / "broken")
    tiny_models.retensor(
        broken, "model.embed_tokens.weight", torch.full((260, 128), float("nan"), dtype=torch.bfloat16)
    )
    with pytest.raises(DataError, match="not finite"):
        quantize_folder(broken, tmp_path / "out", calibrate=Calibration(**SMALL))
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]
