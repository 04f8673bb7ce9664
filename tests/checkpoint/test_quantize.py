"""`quantize_folder`: the codes are those of `fp8.quantize`, the bytes repeat, a stop loses nothing, others read it."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch

import fp8
import tiny_models
from fp8.checkpoint import Options, Scales, load, quantize, quantize_folder, tensorfile
from fp8.checkpoint.quantize import SCHEMES
from fp8.errors import CheckpointError, ConfigError
from tiny_models import bytes_of, copied, reconfigure, tensors

UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Each model once: in one file and, of the first, in several."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("models")
    made = {kind: tiny_models.build(folder / kind, kind) for kind in ("llama", "tied", "odd", "qwen2", "mixtral")}
    made |= {kind: tiny_models.build(folder / kind, kind, torch.float32) for kind in ("bert", "gpt2")}
    return made | {"sharded": tiny_models.build(folder / "sharded", "llama", shards="150KB")}


def constant(inputs=0.5):
    """A calibration that measures nothing."""

    def calibrate(source, layers):
        return Scales(dict.fromkeys(layers.fp8, inputs))

    return calibrate


def same(a, b):
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


TILES = {"dynamic": "row", "block": "128x128", "weight-only": "row"}


@pytest.mark.parametrize("kind", ["llama", "odd", "qwen2", "mixtral", "bert"])
@pytest.mark.parametrize("scheme", list(TILES))
def test_the_codes_are_those_of_fp8_quantize(models, tmp_path, kind, scheme):
    written = quantize_folder(models[kind], tmp_path / "out", Options(scheme))
    source, out = tensors(models[kind]), tensors(tmp_path / "out")
    assert len(written.layers.fp8) == {"mixtral": 20, "bert": 12}.get(kind, 14)
    for name in written.layers.fp8:
        q = fp8.quantize(source[f"{name}.weight"], tile=TILES[scheme])
        assert same(out[f"{name}.weight"], q.codes)
        assert torch.equal(out[f"{name}.weight_scale"], q.scale)
    for name in set(source) - {f"{layer}.weight" for layer in written.layers.fp8}:
        assert torch.equal(out[name], source[name].to(torch.bfloat16))
    assert len(out) == len(source) + len(written.layers.fp8)


def test_large_weights_in_slabs_are_the_same_codes(models, tmp_path, monkeypatch):
    whole = {s: quantize_folder(models["odd"], tmp_path / s, Options(s)).folder for s in TILES}
    monkeypatch.setattr(quantize, "SLAB", 1)
    for scheme, folder in whole.items():
        assert bytes_of(quantize_folder(models["odd"], tmp_path / f"{scheme}2", Options(scheme)).folder) == bytes_of(
            folder
        )


def test_an_fp32_master_is_quantized_from_fp32(tmp_path):
    folder = tiny_models.build(tmp_path / "model", "llama", torch.float32)
    quantize_folder(folder, tmp_path / "out")
    weight, out = tensors(folder)[f"{UP}.weight"], tensors(tmp_path / "out")
    assert same(out[f"{UP}.weight"], fp8.quantize(weight, tile="row").codes)
    assert not same(out[f"{UP}.weight"], fp8.quantize(weight.bfloat16(), tile="row").codes)
    assert out["model.norm.weight"].dtype == torch.bfloat16
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    quantize_folder(folder, tmp_path / "kept", Options(dtype="float32"))
    assert tensors(tmp_path / "kept")["model.norm.weight"].dtype == torch.float32


def test_fused_layers_share_their_per_tensor_scale(models, tmp_path):
    quantize_folder(models["llama"], tmp_path / "out", Options("static"), constant())
    source, out = tensors(models["llama"]), tensors(tmp_path / "out")
    for parts in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        stem = "model.layers.1." + ("self_attn" if len(parts) == 3 else "mlp")
        amax = torch.stack([source[f"{stem}.{part}.weight"].float().abs().max() for part in parts]).max()
        scale = fp8.quantize(amax.reshape(1, 1)).scale
        for part in parts:
            assert torch.equal(out[f"{stem}.{part}.weight_scale"], scale.reshape(1))
            assert same(out[f"{stem}.{part}.weight"], fp8.quantize(source[f"{stem}.{part}.weight"], scale=scale).codes)
            assert out[f"{stem}.{part}.input_scale"].tolist() == [0.5]


def test_exact_scales_on_request(models, tmp_path):
    quantize_folder(models["llama"], tmp_path / "out", Options(scales="none"))
    q = fp8.quantize(tensors(models["llama"])[f"{UP}.weight"], tile="row", scale_rounding="none")
    out = tensors(tmp_path / "out")
    assert same(out[f"{UP}.weight"], q.codes) and torch.equal(out[f"{UP}.weight_scale"], q.scale)


@pytest.mark.parametrize("scheme", ["dynamic", "static", "block", "weight-only"])
def test_two_writes_give_equal_bytes(models, tmp_path, scheme):
    calibrate = constant() if scheme == "static" else None
    first, second = (quantize_folder(models["sharded"], tmp_path / n, Options(scheme), calibrate).folder for n in "ab")
    assert bytes_of(first) == bytes_of(second)
    assert len(list(first.glob("*.safetensors"))) == len(list(models["sharded"].glob("*.safetensors"))) > 3


def test_shards_change_no_tensor(models, tmp_path):
    one, many = (quantize_folder(models[kind], tmp_path / kind).folder for kind in ("llama", "sharded"))
    a, b = tensors(one), tensors(many)
    assert a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    index = json.loads((many / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == b.keys() and index["metadata"]["total_size"] == sum(
        t.nbytes for t in b.values()
    )


def ramps(folder):
    """A Llama of fixed numbers."""
    folder.mkdir()
    width, ffn, layer = 16, 32, "model.layers.0."
    shapes = {"model.embed_tokens.weight": (8, width), "model.norm.weight": (width,), "lm_head.weight": (8, width)}
    shapes |= {f"{layer}{n}_layernorm.weight": (width,) for n in ("input", "post_attention")}
    shapes |= {f"{layer}self_attn.{n}_proj.weight": (width, width) for n in "qkvo"}
    shapes |= {f"{layer}mlp.{n}_proj.weight": (ffn, width) for n in ("gate", "up")}
    shapes |= {f"{layer}mlp.down_proj.weight": (width, ffn)}
    held = {}
    for i, (name, shape) in enumerate(shapes.items()):
        count = torch.Size(shape).numel()
        held[name] = (((torch.arange(count) * 7 + i) % 31 - 15).view(shape) / 16).bfloat16()
    tensorfile.write_tensors(folder / "model.safetensors", held)
    plain = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 8, "hidden_size": width,
             "intermediate_size": ffn, "num_hidden_layers": 1, "num_attention_heads": 2}  # fmt: skip
    tensorfile.write_json(folder / "config.json", plain)
    return folder


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_golden_bytes(tmp_path, scheme):
    """A checkpoint of fixed numbers has fixed bytes."""
    pytest.importorskip("transformers")
    kv = {"model.layers.0.self_attn": [0.25, 0.5]}

    def calibrate(source, layers):
        return Scales(dict.fromkeys(layers.fp8, 0.5), kv, kv, {"observer": "max"})

    out = quantize_folder(ramps(tmp_path / "model"), tmp_path / "out", Options(scheme), calibrate).folder
    assert {n: hashlib.sha256(b).hexdigest()[:16] for n, b in bytes_of(out).items()} == GOLDEN[scheme]


GOLDEN = {
    "dynamic": {"config.json": "c8dd78ca9a2dc434", "model.safetensors": "7d13421021f2d216"},
    "static": {"config.json": "4346e373cc1a5f57", "model.safetensors": "75799a214ef5ded6"},
    "block": {"config.json": "94eac7c1ffe58e37", "model.safetensors": "c5104f3ae9e66731"},
    "weight-only": {"config.json": "9de6870029cfd077", "model.safetensors": "7d13421021f2d216"},
}


# --------------------------------------------------------------------------- which layers


def test_what_stays_and_why(models, tmp_path):
    kept = {
        kind: quantize_folder(models[kind], tmp_path / kind).layers.kept
        for kind in ("llama", "tied", "mixtral", "bert")
    }
    assert kept["llama"] == {"lm_head": "a head"}
    assert kept["tied"] == {"lm_head": "has no weight of its own"}
    assert kept["bert"] == {"pooler.dense": "a head"}
    assert set(kept["mixtral"]) == {"lm_head"}  # its router is no nn.Linear
    config = json.loads((tmp_path / "bert" / "config.json").read_text())
    assert config["quantization_config"]["ignore"] == ["pooler.dense"]


def test_what_stays_is_ignored_under_the_names_of_file_and_model(models, tmp_path):
    folder = copied(models["bert"], tmp_path / "model")
    reconfigure(folder, "architectures", value=["BertForSequenceClassification"])
    quantize_folder(folder, tmp_path / "out")
    ignore = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert set(ignore) == {"pooler.dense", "bert.pooler.dense", "classifier"}


def test_the_head_on_request(models, tmp_path):
    assert "lm_head" in quantize_folder(models["llama"], tmp_path / "out", Options(head=True)).layers.fp8
    assert "lm_head" in quantize_folder(models["tied"], tmp_path / "tied", Options(head=True)).layers.kept


def test_what_is_skipped_takes_its_fused_partners_along(models, tmp_path):
    skip = ("*.layers.0.*.k_proj", r"re:.*layers\.1\.mlp\.down_proj$")
    written = quantize_folder(models["llama"], tmp_path / "out", Options(skip=skip))
    assert written.layers.kept == {
        "model.layers.0.self_attn.q_proj": "fused with model.layers.0.self_attn.k_proj, which stays",
        "model.layers.0.self_attn.k_proj": "skipped",
        "model.layers.0.self_attn.v_proj": "fused with model.layers.0.self_attn.k_proj, which stays",
        "model.layers.1.mlp.down_proj": "skipped",
        "lm_head": "a head",
    }
    assert load(tmp_path / "out")(torch.arange(5)[None]).isfinite().all()


def test_a_pattern_that_means_nothing_is_refused(models, tmp_path):
    with pytest.raises(CheckpointError, match=r"'\*\.down_prj' names no linear layer"):
        quantize_folder(models["llama"], tmp_path / "out", Options(skip=("*.down_prj",)))
    with pytest.raises(CheckpointError, match="no regular expression"):
        quantize_folder(models["llama"], tmp_path / "out", Options(skip=("re:(",)))
    with pytest.raises(CheckpointError, match="would become FP8"):
        quantize_folder(models["llama"], tmp_path / "out", Options(skip=("*",)))
    with pytest.raises(CheckpointError, match="Conv1D"):
        quantize_folder(models["gpt2"], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_unknown_options_are_named():
    with pytest.raises(ConfigError, match="Did you mean 'dynamic'"):
        Options("dynamc")
    with pytest.raises(ConfigError, match="scales cannot be"):
        Options(scales="up")


# --------------------------------------------------------------------------- others read it


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("kind", ["llama", "qwen2", "bert"])
@pytest.mark.parametrize("scheme", ["dynamic", "static", "block", "weight-only"])
def test_transformers_decodes_the_same_weights_and_runs(models, tmp_path, kind, scheme):
    quantization = pytest.importorskip("compressed_tensors.quantization")
    transformers = pytest.importorskip("transformers")
    written = quantize_folder(
        models[kind], tmp_path / "out", Options(scheme), constant() if scheme == "static" else None
    )
    plain = json.loads((tmp_path / "out" / "config.json").read_text())
    assert quantization.QuantizationConfig.model_validate(plain["quantization_config"])
    theirs = getattr(transformers, plain["architectures"][0]).from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert theirs(torch.zeros(1, 2, dtype=torch.int64))[0].isfinite().all()
    out = tensors(tmp_path / "out")
    for name in written.layers.fp8:
        scale = out[f"{name}.weight_scale"]
        codes = out[f"{name}.weight"].float()
        if scheme == "block":
            scale = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[: codes.shape[0], : codes.shape[1]]
        assert torch.equal(theirs.get_submodule(name).weight, codes * scale)


@pytest.mark.parametrize("scheme", ["dynamic", "static", "block", "weight-only"])
def test_our_decoder_holds_the_codes_of_the_file(models, tmp_path, scheme):
    quantize_folder(models["odd"], tmp_path / "out", Options(scheme), constant() if scheme == "static" else None)
    out, model = tensors(tmp_path / "out"), load(tmp_path / "out")
    layer = model.get_submodule("layers.1.mlp.down")
    assert same(layer.codes, out["model.layers.1.mlp.down_proj.weight"])
    assert layer.weight_only == (scheme == "weight-only")
    assert (layer.input_scale is not None) == (scheme == "static")
    x = torch.randn(3, 100)
    if scheme == "weight-only":
        assert torch.equal(layer(x), x @ layer.quantized_weight().dequantize().T)
    if scheme == "static":
        assert torch.equal(layer(x)[1:2], layer(x[1:2]))
        assert torch.equal(layer(x * 1e6), layer(x.sign() * 1e6))  # beyond 448 * 0.5 all is one code


def test_a_static_model_saved_again_keeps_its_input_scales(models, tmp_path):
    quantize_folder(models["llama"], tmp_path / "out", Options("static"), constant(0.25))
    fp8.checkpoint.save(load(tmp_path / "out"), tmp_path / "again")
    tokens = torch.arange(7)[None]
    assert torch.equal(load(tmp_path / "again")(tokens), load(tmp_path / "out")(tokens))


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", ["dynamic", "static", "block", "weight-only"])
def test_weights_rounded_on_a_gpu_give_the_same_bytes(scheme, models, tmp_path):
    folders = [
        quantize_folder(models["llama"], tmp_path / device, Options(scheme), constant(), device=device).folder
        for device in ("cpu", "cuda")
    ]
    assert bytes_of(folders[0]) == bytes_of(folders[1])
