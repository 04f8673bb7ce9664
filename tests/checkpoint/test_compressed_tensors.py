"""FP8 checkpoints: the codes are the training codes, the bytes repeat, and other readers accept them."""

from __future__ import annotations

import functools
import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file

import fp8.nn
from fp8 import checkpoint
from fp8.checkpoint.compressed_tensors import Groups, Scheme, read_groups
from fp8.models import Decoder, DecoderConfig
from fp8.models.huggingface import shards
from fp8.nn.frozen_linear import FrozenLinear
from fp8.recipe import Operand, Recipe
from fp8.tile import Tile

ALIGNED = DecoderConfig(257, 256, 384, 1, 2, 1, max_positions=64)
SMALL = DecoderConfig(257, 128, 176, 2, 4, 2, max_positions=64)
ODD = DecoderConfig(61, 60, 50, 1, 6, 2)  # heads of 10: no boundary is a multiple of 4
RECIPES = ["tensorwise", "rowwise", "delayed", "blockwise"]
ACROSS = Recipe("across", Operand("e4m3", Tile(1, 128)), Operand("e4m3", Tile(1, 128)), Operand("e4m3", Tile(1, 128)),
                accumulate=Recipe.of("blockwise").accumulate)  # fmt: skip


@functools.cache
def trained(recipe, config=SMALL):
    """A converted decoder after two steps, so that delayed scales come from a history. Shared: nobody changes it."""
    torch.manual_seed(0)
    model = Decoder(config)
    fp8.nn.convert(model, recipe)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    fp8.nn.attach(model, optimizer)
    for _ in range(2):
        model(torch.randint(0, config.vocab_size, (1, 8))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def same_bytes(a, b):
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize("config", [SMALL, ALIGNED, ODD])
@pytest.mark.parametrize("recipe", [*RECIPES, ACROSS])
def test_the_codes_in_the_file_are_the_training_codes(recipe, config, tmp_path):
    model = trained(recipe, config)
    saved = checkpoint.save(model, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    loaded = checkpoint.load(tmp_path / "out")
    assert len(saved.fp8_layers) == 4 * config.num_layers
    for name in saved.fp8_layers:
        q = model.get_submodule(name).quantized_weight()
        parts = [tensors[f"{part.name}.weight"] for part in shards(config)[name]]
        assert same_bytes(torch.cat(parts), q.codes)
        layer = loaded.get_submodule(name)
        assert isinstance(layer, FrozenLinear)
        back = layer.quantized_weight()
        assert same_bytes(back.codes, q.codes)
        assert torch.equal(back.dequantize(), q.dequantize())
        assert not back.tile.constant_along_k or torch.equal(back.scale, q.scale.expand(q.shape[0], 1))


@pytest.mark.parametrize("recipe", ["rowwise", "blockwise", ACROSS])
@pytest.mark.parametrize("config", [SMALL, ODD])
def test_logits_of_the_file_are_those_of_the_model(recipe, config, tmp_path):
    """Where activations have one scale a token or a group in training too, nothing changes at all."""
    model = trained(recipe, config)
    checkpoint.save(model, tmp_path / "out", dtype=None)
    tokens = torch.randint(0, 61, (2, 9))
    with torch.no_grad():
        assert torch.equal(checkpoint.load(tmp_path / "out")(tokens), model(tokens))


@pytest.mark.parametrize("config", [SMALL, ODD])
@pytest.mark.parametrize("recipe", [*RECIPES, ACROSS])
def test_written_read_and_written_again_is_the_same_bytes(recipe, config, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    checkpoint.save(trained(recipe, config), first, "bytes")
    checkpoint.save(checkpoint.load(first), second, first)
    names = {path.name for path in first.iterdir()}
    assert names == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


def test_golden_bytes(tmp_path):
    """A checkpoint of fixed numbers has fixed bytes. If this fails on purpose, raise the version in the file, unless
    what was added is something that earlier readers pass over."""
    model = Decoder(DecoderConfig(8, 16, 16, 1, 2, 1))
    with torch.no_grad():
        for i, weight in enumerate(model.parameters()):
            ramp = (torch.arange(weight.numel()) * 7 + i) % 31 - 15
            weight.copy_(ramp.view(weight.shape) / 16)
    fp8.nn.convert(model, "tensorwise")
    checkpoint.save(model, tmp_path / "out", "bytes")
    digests = {p.name: hashlib.sha256(p.read_bytes()).hexdigest()[:16] for p in (tmp_path / "out").iterdir()}
    start = (tmp_path / "out" / "model.safetensors").read_bytes()[8:120]
    assert start.startswith(
        b'{"__metadata__":{"format":"pt"},"model.layers.0.mlp.down_proj.weight_scale":{"dtype":"F32"'
    )
    assert digests == GOLDEN


GOLDEN = {
    "config.json": "9014c63c5f50da4b",
    "generation_config.json": "5983f7e27bd75a39",
    "model.safetensors": "8ec05ac8582b56a6",
    "tokenizer.json": "724a7b628faa49f2",
    "tokenizer_config.json": "38322136c1bfbb42",
}


def test_the_library_reads_what_we_wrote_as_we_do(tmp_path):
    checkpoint.save(trained("tensorwise"), tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    ours, theirs = checkpoint.tensorfile.read_tensors(path), load_file(path)
    assert set(ours) == set(theirs) and all(same_bytes(ours[name], theirs[name]) for name in ours)
    assert len(path.read_bytes()) == 8 + int.from_bytes(path.read_bytes()[:8], "little") + sum(
        t.nbytes for t in ours.values()
    )


def test_the_config_says_what_the_reference_says(tmp_path):
    checkpoint.save(trained("tensorwise"), tmp_path / "out", end_of_text=256)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    number = {"num_bits": 8, "type": "float", "symmetric": True, "group_size": None}
    assert config["quantization_config"] == {
        "quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed",
        "global_compression_ratio": None, "ignore": ["lm_head"], "kv_cache_scheme": None,
        "config_groups": {"group_0": {
            "targets": ["Linear"], "format": "float-quantized", "output_activations": None,
            "weights": number | {"strategy": "channel", "dynamic": False},
            "input_activations": number | {"strategy": "token", "dynamic": True}}},
        "sparsity_config": {}, "transform_config": {}, "version": "0.20.0",
    }  # fmt: skip
    assert config["architectures"] == ["LlamaForCausalLM"] and config["torch_dtype"] == "bfloat16"
    assert config["eos_token_id"] == 256 and checkpoint.end_of_text(tmp_path / "out") == (256,)


def test_blocks_shrink_to_the_boundaries_of_the_shards(tmp_path):
    for config, heights in ((ALIGNED, {128}), (SMALL, {16, 64, 128}), (ODD, {4, 2, 128})):
        folder = tmp_path / str(config.hidden_size)
        checkpoint.save(trained("blockwise", config), folder)
        groups = read_groups(json.loads((folder / "config.json").read_text()))
        assert {scheme.block[0] for scheme, _ in groups.rows if scheme.block} == heights
        assert (groups.rows[0][1] == ("Linear",)) == (len(heights) == 1)


def test_a_mixed_model_keeps_its_high_layers(tmp_path):
    torch.manual_seed(0)
    model = Decoder(SMALL)
    fp8.nn.convert(model, "rowwise", skip=("layers.0.*",))
    checkpoint.save(model, tmp_path / "out", dtype=None)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "model.layers.0.self_attn.q_proj" in config["quantization_config"]["ignore"]
    loaded = checkpoint.load(tmp_path / "out")
    assert torch.equal(loaded.layers[0].attention.qkv.weight, model.layers[0].attention.qkv.weight)  # type: ignore[union-attr]
    tokens = torch.randint(0, 257, (1, 5))
    with torch.no_grad():
        assert torch.equal(loaded(tokens), model.eval()(tokens))


def test_why_a_layer_is_fp8_or_not_stands_in_the_file_and_survives_a_round(tmp_path):
    """As `only_if_faster` decided, say: what the report told is in config.json, is loaded, and is written again."""
    model = Decoder(SMALL)
    report = fp8.convert(model, "rowwise", skip=["layers.0.mlp.down"])
    checkpoint.save(model, tmp_path / "one")
    kept = json.loads((tmp_path / "one" / "config.json").read_text())["fp8"]["conversion"]
    assert kept == json.loads(json.dumps(report.to_dict()))
    read = checkpoint.load(tmp_path / "one")
    assert read.fp8_report == report
    checkpoint.save(read, tmp_path / "two")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_recipes_by_layer_become_groups_by_name(tmp_path):
    torch.manual_seed(0)
    model = Decoder(ALIGNED)
    fp8.nn.convert(model, Recipe.of("rowwise").replace(overrides=(("*.mlp.*", "blockwise"),)))
    checkpoint.save(model, tmp_path / "out", dtype=None)
    loaded = checkpoint.load(tmp_path / "out")
    assert str(loaded.get_submodule("layers.0.mlp.up").tile) == "128x128"
    assert str(loaded.get_submodule("layers.0.attention.qkv").tile) == "row"


def test_the_bytes_are_reported(tmp_path):
    saved = checkpoint.save(trained("rowwise", ALIGNED), tmp_path / "out")
    weights = 4 * 256 * 256 // 2 + 256 * 256 + 3 * 256 * 384
    rows = 512 + 256 + 768 + 256
    assert saved.fp8_bytes_in_bf16 == 2 * weights and saved.fp8_nbytes == weights + 4 * rows
    rest = 2 * 257 * 256 + 3 * 256
    assert saved.bytes_in_bf16 == 2 * (weights + rest) and saved.nbytes == saved.fp8_nbytes + 2 * rest
    assert "4 layers in FP8, 1 in high precision" in str(saved)


def test_a_loaded_model_moves_but_its_codes_are_never_cast(tmp_path):
    checkpoint.save(trained("rowwise"), tmp_path / "out", dtype=None)
    model = checkpoint.load(tmp_path / "out").to(torch.bfloat16)
    layer = model.get_submodule("layers.0.mlp.up")
    assert layer.codes.dtype == torch.float8_e4m3fn and layer.scale.dtype == torch.float32
    assert model(torch.zeros(1, 3, dtype=torch.int64)).dtype == torch.bfloat16
    assert not any(p.requires_grad for p in model.parameters())
    with fp8.nn.count_products() as products:
        model(torch.zeros(1, 3, dtype=torch.int64))
    assert len(products.layers()) == 8


def test_high_precision_is_the_decoded_weight(tmp_path):
    checkpoint.save(trained("rowwise"), tmp_path / "out", dtype=None)
    layer = checkpoint.load(tmp_path / "out").get_submodule("layers.0.mlp.up")
    x = torch.randn(3, 128)
    with fp8.nn.autocast(enabled=False):
        assert torch.equal(layer(x), x @ layer.quantized_weight().dequantize().T)


def test_a_token_does_not_depend_on_its_batch(tmp_path):
    checkpoint.save(trained("tensorwise"), tmp_path / "out", dtype=None)
    layer = checkpoint.load(tmp_path / "out").get_submodule("layers.0.mlp.up")
    x = torch.randn(5, 128) * torch.tensor([1.0, 100.0, 1e-3, 1.0, 7.0])[:, None]
    assert torch.equal(layer(x)[2:3], layer(x[2:3]))


def test_a_per_tensor_checkpoint_of_others_is_read_shard_by_shard(tmp_path):
    """Static weights with one scale a tensor, and no `fp8` part: three scales in one fused matrix, no code changed."""
    model = trained("tensorwise")
    tensors, config = checkpoint.encode(model, None)
    del config["fp8"]
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["strategy"] = "tensor"
    for i, name in enumerate(n for n in sorted(tensors) if n.endswith("weight_scale")):
        tensors[name] = torch.tensor([0.25 * (i + 1)], dtype=torch.bfloat16)
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint.tensorfile.write_tensors(tmp_path / "model.safetensors", tensors)
    loaded = checkpoint.load(tmp_path)
    layer = loaded.get_submodule("layers.0.attention.qkv")
    assert same_bytes(layer.codes, model.get_submodule("layers.0.attention.qkv").quantized_weight().codes)
    scales = [float(tensors[f"model.layers.0.self_attn.{p}_proj.weight_scale"]) for p in "qkv"]
    assert layer.scale[[0, 128, 192], 0].tolist() == scales
    assert layer.recipe.scale_rounding == "none"


def test_names_go_before_classes_and_ignore_before_all():
    channel, block = Scheme(None, 0, "none", "fast"), Scheme((128, 128), 128, "none", "promoted")
    groups = Groups(((channel, ("Linear",)), (block, ("re:.*down_proj",))), ("lm_head", "re:model.layers.0.*"))
    assert groups.scheme("model.layers.1.mlp.down_proj") == block
    assert groups.scheme("model.layers.1.mlp.up_proj") == channel
    assert groups.scheme("lm_head") is groups.scheme("model.layers.0.mlp.up_proj") is None


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("recipe", [*RECIPES, ACROSS])
@pytest.mark.parametrize("config", [SMALL, ALIGNED])
def test_the_compressed_tensors_package_accepts_the_config(recipe, config, tmp_path):
    quantization = pytest.importorskip("compressed_tensors.quantization")
    _, plain = checkpoint.encode(trained(recipe, config), None)
    read = quantization.QuantizationConfig.model_validate(json.loads(json.dumps(plain["quantization_config"])))
    assert read.format == "float-quantized" and len(read.config_groups) == len(plain["fp8"]["groups"])


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
def test_transformers_decodes_the_same_weights(recipe, tmp_path):
    pytest.importorskip("compressed_tensors")
    transformers = pytest.importorskip("transformers")
    config = DecoderConfig(257, 128, 384, 2, 4, 2)  # compressed-tensors wants whole groups of 128 channels
    checkpoint.save(trained(recipe, config), tmp_path / "out", dtype=torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    theirs(torch.zeros(1, 2, dtype=torch.int64))
    ours = checkpoint.load(tmp_path / "out")
    for name in ("layers.0.attention.qkv", "layers.1.mlp.up", "layers.1.mlp.down"):
        parts = [theirs.get_submodule(part.name).weight for part in shards(config)[name]]
        assert torch.equal(torch.cat(parts), ours.get_submodule(name).quantized_weight().dequantize())
