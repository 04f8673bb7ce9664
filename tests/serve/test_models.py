"""Served models: what they compute is what transformers computes, and what they hold is what the file holds."""

from __future__ import annotations

import json

import pytest
import torch

import fp8
import tiny_models
from fp8.checkpoint import Options, Scales, frozen_model, load, quantize_folder, save
from fp8.checkpoint.convert import convert_folder
from fp8.checkpoint.fp8_folder import Fp8Folder
from fp8.checkpoint.layers import choose_layers, skeleton
from fp8.checkpoint.source import Source
from fp8.errors import CheckpointError, ConfigError, Fp8Error
from fp8.models import Architecture, Decoder, DecoderConfig, Rope
from fp8.nn.frozen_linear import FrozenLinear
from fp8.nn.int8_linear import Int8Linear
from fp8.serve.models import BLOCKS, load_model
from paged_batches import alone, bits
from tiny_models import bytes_of, copied, reconfigure, retensor, tensors

transformers = pytest.importorskip("transformers")

KINDS = (
    "llama", "tied", "odd", "llama3", "biased", "mistral", "qwen2", "qwen3", "mixtral4", "qwen3_moe", "qwen3_moe_mixed"
)  # fmt: skip
TEXT = torch.randint(0, 256, (90,), generator=torch.Generator().manual_seed(7)).tolist()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of each kind, written when it is first asked for."""
    root, made = tmp_path_factory.mktemp("served"), {}

    def of(kind):
        return made.setdefault(kind, None) or made.__setitem__(kind, tiny_models.build(root / kind, kind)) or made[kind]

    return of


def error(logits, exact):
    """The median over tokens of the relative error: a token that a near tie sends to another expert is no measure."""
    return ((logits - exact).norm(dim=1) / exact.norm(dim=1)).median()


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_as_near_to_fp32_as_those_of_transformers_in_bf16(folders, kind):
    """Both round to BF16 at every step, ours at fewer of them: with a BF16 cache ours must not be farther from the same
    model in FP32, but for what chance does to a median of 90 tokens."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folders(kind)).eval()
    with torch.no_grad():
        theirs = model(torch.tensor([TEXT])).logits[0].float()
        exact = model.float()(torch.tensor([TEXT])).logits[0]
    ours = alone(load_model(folders(kind)), TEXT, "bf16")
    assert ours.dtype == torch.float32
    assert error(ours, exact) <= 1.1 * error(theirs, exact)


@pytest.mark.parametrize("kind", ["llama", "llama3"])
def test_rotary_frequencies_are_those_of_transformers(folders, kind):
    model = transformers.AutoModelForCausalLM.from_pretrained(folders(kind))
    config = Architecture.of(json.loads((folders(kind) / "config.json").read_text()))
    cos, sin = config.rope.tables(128, config.head_dim)
    need = model.model.rotary_emb(torch.zeros(1), torch.arange(128)[None])
    for table, whole in zip((cos, sin), need, strict=True):
        assert torch.equal(table, whole[0, :, : config.head_dim // 2])


@pytest.mark.parametrize("kind", KINDS)
def test_quantizing_while_loading_gives_the_codes_of_fp8_quantize(folders, tmp_path, kind):
    quantize_folder(folders(kind), tmp_path / "out")
    stored, made = load_model(tmp_path / "out"), load_model(folders(kind), quantization="fp8")
    held = dict(stored.named_buffers())
    assert {name for name, _ in made.named_buffers()} == set(held)
    assert all(torch.equal(bits(tensor), bits(held[name])) for name, tensor in made.named_buffers())
    assert torch.equal(alone(made, TEXT[:20]), alone(stored, TEXT[:20]))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mixtral4", "qwen3_moe_mixed"])
def test_what_is_quantized_while_loading_is_what_fp8_quantize_chooses(folders, kind):
    source = Source.open(folders(kind))
    chosen = choose_layers(source, skeleton(source)).fp8
    model = load_model(folders(kind), quantization="fp8")
    frozen = [m for m in model.modules() if isinstance(m, FrozenLinear)]
    shapes = [source.entries[f"{name}.weight"].shape for name in chosen]
    assert sum(m.codes.numel() for m in frozen) == sum(rows * cols for rows, cols in shapes)


SCHEMES = ["dynamic", "static", "block", "weight-only"]


@pytest.fixture(scope="module")
def quantized(folders, tmp_path_factory):
    """A kind in a scheme, with scales of a KV cache where they are asked for."""
    root, made = tmp_path_factory.mktemp("quantized"), {}

    def of(kind, scheme, kv=False):
        if (key := f"{kind}-{scheme}-{kv}") not in made:
            layers = choose_layers(source := Source.open(folders(kind)), skeleton(source)).fp8
            attention = [f"model.layers.{i}.self_attn" for i in range(2)] if kv else []
            scales = Scales(dict.fromkeys(layers, 0.0625), dict.fromkeys(attention, (0.125, 0.25)),
                            dict.fromkeys(attention, (0.5, 1.0)))  # fmt: skip
            quantize_folder(folders(kind), root / key, Options(scheme), calibrate=lambda *_: scales)
            made[key] = root / key
        return made[key]

    return of


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mixtral4"])
def test_the_codes_of_the_file_are_served_in_bytes(quantized, kind, scheme):
    folder = quantized(kind, scheme)
    model, stored = load_model(folder), tensors(folder)
    frozen = [m for m in model.modules() if isinstance(m, FrozenLinear)]
    held = torch.cat([m.codes.view(torch.uint8).flatten() for m in frozen])
    codes = torch.cat([t.view(torch.uint8).flatten() for t in stored.values() if t.dtype == torch.float8_e4m3fn])
    assert torch.equal(held.bincount(minlength=256), codes.bincount(minlength=256))
    layer = model.layers[1].attention
    rows = [stored[f"model.layers.1.self_attn.{part}_proj.weight"] for part in "qkv"]
    assert torch.equal(bits(layer.qkv.codes), bits(torch.cat(rows)))
    assert torch.equal(bits(layer.out.codes), bits(stored["model.layers.1.self_attn.o_proj.weight"]))
    assert layer.qkv.weight_only == (scheme == "weight-only")
    assert (layer.qkv.input_scale is not None) == (scheme == "static")


@pytest.mark.parametrize("scheme", ["dynamic", "block", "weight-only"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "mixtral4"])
def test_a_quantized_model_loses_what_its_fp8_products_lose(folders, quantized, kind, scheme):
    """`frozen_model` is transformers around the same FP8 products, FP32 outside of them. Rounding to BF16 turns single
    codes over, in both directions: the distance from the model that was not quantized stays what it was."""
    with torch.no_grad():
        exact = transformers.AutoModelForCausalLM.from_pretrained(folders(kind), dtype=torch.float32)
        exact = exact.eval()(torch.tensor([TEXT])).logits[0]
        theirs = frozen_model(Fp8Folder.open(quantized(kind, scheme)), torch.float32)(torch.tensor([TEXT])).logits[0]
    ours = alone(load_model(quantized(kind, scheme)), TEXT, "bf16")
    assert error(ours, exact) <= 1.05 * error(theirs, exact)


def test_a_huggingface_fp8_file_is_served(quantized, tmp_path):
    convert_folder(quantized("llama", "block"), tmp_path / "out", to="huggingface-fp8")
    ours, theirs = load_model(tmp_path / "out"), load_model(quantized("llama", "block"))
    assert torch.equal(alone(ours, TEXT), alone(theirs, TEXT))


def test_the_scales_of_the_cache_are_those_of_the_file(quantized, tmp_path):
    assert load_model(quantized("llama", "dynamic")).kv_scales is None
    model = load_model(quantized("llama", "dynamic", kv=True))
    need = torch.tensor([[[0.125, 0.25], [0.5, 1.0]]] * 2)
    assert torch.equal(model.kv_scales, need)
    cache = model.new_cache(2, 16)
    assert torch.equal(cache.layers[1].value_scale, need[1, 1])
    assert not model.new_cache(2, 16, "e5m2").layers[0].static
    folder = copied(quantized("llama", "dynamic", kv=True), tmp_path / "tensor")
    for i in range(2):
        for kind in ("k_scale", "v_scale"):
            retensor(folder, f"model.layers.{i}.self_attn.{kind}", torch.tensor([0.5]))
    reconfigure(folder, "quantization_config", "kv_cache_scheme", "strategy", value="tensor")
    assert torch.equal(load_model(folder).kv_scales, torch.full((2, 2, 2), 0.5))


def test_a_head_in_fp8_is_served_as_such(folders, tmp_path):
    quantize_folder(folders("llama"), tmp_path / "out", Options(head=True))
    model = load_model(tmp_path / "out")
    assert isinstance(model.head, FrozenLinear)
    assert torch.equal(bits(model.head.codes), bits(tensors(tmp_path / "out")["lm_head.weight"]))
    assert error(alone(model, TEXT), alone(load_model(folders("llama"), quantization="fp8"), TEXT)) < 0.05


@pytest.mark.parametrize("kind", ["qwen2", "mixtral4"])
def test_int8_goes_into_the_layers_that_fp8_goes_into(folders, kind):
    ours, fp8s = (load_model(folders(kind), quantization=q) for q in ("int8", "fp8"))
    kinds = [{name for name, m in model.named_modules() if isinstance(m, kind)}
             for model, kind in ((ours, Int8Linear), (fp8s, FrozenLinear))]  # fmt: skip
    assert kinds[0] == kinds[1] != set()
    exact = alone(load_model(folders(kind)), TEXT, "bf16")
    assert error(alone(ours, TEXT, "bf16"), exact) < error(alone(fp8s, TEXT, "bf16"), exact)  # no outliers here


def test_shards_of_a_model_are_read_alike(folders, tmp_path):
    sharded = tiny_models.build(tmp_path / "sharded", "qwen2", shards="200KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert torch.equal(alone(load_model(sharded), TEXT), alone(load_model(folders("qwen2")), TEXT))


def decoder(recipe=None):
    torch.manual_seed(1)
    model = Decoder(DecoderConfig(260, 64, 96, 2, 4, 2, max_positions=128)).eval()
    if recipe is not None:
        fp8.convert(model, recipe)
    return model


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "blockwise"])
def test_a_decoder_in_memory_is_served_like_its_file(tmp_path, recipe):
    model = decoder(recipe)
    save(model, tmp_path / "out")
    ours = alone(load_model(model), TEXT)
    assert torch.equal(ours, alone(load_model(tmp_path / "out"), TEXT))
    with torch.no_grad():
        theirs = load(tmp_path / "out")(torch.tensor([TEXT]))[0].float()
    assert error(ours, theirs) < 0.05  # two ways of rounding activations to BF16 meet other codes, an E4M3 step apart


def test_a_decoder_in_high_precision_is_served_too():
    model = decoder()
    with torch.no_grad():
        exact = model(torch.tensor([TEXT]))[0]
        rounded = model.bfloat16()(torch.tensor([TEXT]))[0].float()
    assert error(alone(load_model(model), TEXT, "bf16"), exact) <= 1.1 * error(rounded, exact)


def test_bytes_of_weights_are_counted_once(folders, quantized):
    for folder in (folders("tied"), folders("llama"), quantized("qwen2", "block"), quantized("mixtral4", "dynamic")):
        stored = sum(t.nbytes for t in tensors(folder).values())
        assert stored <= load_model(folder).nbytes <= 1.02 * stored


def test_every_architecture_has_its_block():
    from fp8.models.architecture import KINDS

    assert set(KINDS) == set(BLOCKS)


# --------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["model_type"], "gemma3", r"model_type='gemma3', which is not served\. .*llama.*qwen3_moe"),
        (["hidden_act"], "gelu", "hidden_act='gelu'"),
        (["mlp_bias"], True, "mlp_bias=True"),
        (["sliding_window"], 64, "sliding_window=64"),
        (["layer_types"], ["full_attention", "sliding_attention"], "layer_types='sliding_attention'"),
        (["rope_parameters"], {"rope_type": "yarn", "factor": 4.0}, "rope_type='yarn'; 'default' and 'llama3'"),
        (["rope_parameters"], {"rope_type": "llama3", "factor": 4.0}, "lacks 'low_freq_factor'"),
        (["rope_parameters"], {"rope_theta": 1e4, "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (["num_key_value_heads"], 3, "4 heads over 3 key heads"),
        (["intermediate_size"], 128, r"gate_proj \+ model.layers.0.mlp.up_proj has shape \[512, 128\].* \[256, 128\]"),
    ],
)
def test_a_setting_that_is_not_computed_is_named(folders, tmp_path, path, value, message):
    folder = copied(folders("llama"), tmp_path / "bad")
    reconfigure(folder, *path, value=value)
    with pytest.raises(CheckpointError, match=message):
        load_model(folder)


def test_a_missing_or_foreign_tensor_is_named(folders, tmp_path):
    folder = copied(folders("qwen2"), tmp_path / "missing")
    retensor(folder, "model.layers.1.self_attn.k_proj.bias", None)
    with pytest.raises(CheckpointError, match=r"no tensor 'model\.layers\.1\.self_attn\.k_proj\.bias'"):
        load_model(folder)
    folder = copied(folders("qwen2"), tmp_path / "foreign")
    reconfigure(folder, "model_type", value="llama")
    with pytest.raises(CheckpointError, match=r"no part of a llama decoder: model\.layers\.0\.self_attn\.k_proj\.bias"):
        load_model(folder)


@pytest.mark.parametrize("quantization", [None, "fp8", "int8"])
def test_a_matrix_of_another_width_is_named(folders, tmp_path, quantization):
    folder = copied(folders("llama"), tmp_path / "bad")
    retensor(folder, "model.layers.0.self_attn.v_proj.weight", torch.ones(64, 96).bfloat16())
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.v_proj\.weight has shape \[64, 96\].* 128\]"):
        load_model(folder, quantization=quantization)


def test_a_weight_that_is_not_finite_is_not_quantized(folders, tmp_path):
    folder = copied(folders("llama"), tmp_path / "bad")
    weight = tensors(folder)["model.layers.0.self_attn.v_proj.weight"].clone()
    weight[3, 5] = float("nan")
    retensor(folder, "model.layers.0.self_attn.v_proj.weight", weight)
    with pytest.raises(CheckpointError, match=r"v_proj\.weight has NaN codes"):
        load_model(folder, quantization="fp8")


def test_training_on_changes_nothing_that_is_served():
    model = decoder().bfloat16()
    served = load_model(model)
    before = alone(served, TEXT[:5])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert torch.equal(alone(served, TEXT[:5]), before)


@pytest.mark.parametrize("quantization", [None, "fp8", "int8"])
def test_codes_without_a_scheme_are_not_read_as_numbers(quantized, tmp_path, quantization):
    folder = copied(quantized("llama", "dynamic"), tmp_path / "unnamed")
    reconfigure(folder, "quantization_config", value=None)
    with pytest.raises(CheckpointError, match=r"is float8_e4m3fn, and config.json gives that layer no scheme"):
        load_model(folder, quantization=quantization)


def test_a_cache_scale_that_is_none_is_refused(quantized, tmp_path):
    folder = copied(quantized("llama", "dynamic", kv=True), tmp_path / "bad")
    retensor(folder, "model.layers.0.self_attn.v_scale", torch.tensor([[[0.0]], [[1.0]]]))
    with pytest.raises(CheckpointError, match=r"v_scale is .* one each of 2 heads, finite and positive"):
        load_model(folder)


def test_wrong_words_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"quantization cannot be 'int4'\. .*Known: None, fp8, int8"):
        load_model(tmp_path, quantization="int4")
    with pytest.raises(Fp8Error, match="there is no folder"):
        load_model(tmp_path / "nowhere")


def test_loading_changes_no_byte_of_the_folder(quantized):
    folder = quantized("qwen2", "dynamic")
    before = bytes_of(folder)
    load_model(folder)
    assert bytes_of(folder) == before


def test_rope_of_transformers_4_is_read():
    scaling = {"factor": 8, "low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 64}
    old = {"rope_theta": 5e5, "rope_scaling": scaling | {"type": "llama3"}}
    new = {"rope_parameters": scaling | {"rope_theta": 5e5, "rope_type": "llama3"}}
    assert Rope.of(old) == Rope.of(new)
    assert Rope.of({"rope_theta": 5e5}) == Rope(5e5)
