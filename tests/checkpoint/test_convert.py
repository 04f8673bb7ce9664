"""`convert_folder`: from one format to another no code and no scale changes, and what cannot be said is refused."""

from __future__ import annotations

import json

import pytest
import torch

import fp8
import tiny_models
from fp8.checkpoint import Options, Scales, convert_folder, load, quantize_folder
from fp8.checkpoint.fused_shards import changed_by_fusing, requantized
from fp8.errors import CheckpointError, ConfigError
from tiny_models import bytes_of, copied, reconfigure, retensor, tensors

TOKENS = torch.arange(9)[None]
GROUP = ("quantization_config", "config_groups", "group_0")


def scales_for(source, layers):
    """Scales of everything, all different."""
    keys = {f"model.layers.{i}.self_attn": [0.25, 0.5 + i] for i in range(2)}
    return Scales(dict.fromkeys(layers.fp8, 0.25), keys, {name: [2 * s for s in heads] for name, heads in keys.items()})


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A Llama with 128-wide shards in each scheme, with KV scales; `odd`: one whose sides are no multiples of 128."""
    folder = tmp_path_factory.mktemp("convert")
    model = tiny_models.build(folder / "model", "llama", shards="300KB")
    made = {
        s: quantize_folder(model, folder / s, Options(s), scales_for).folder for s in ("dynamic", "static", "block")
    }
    odd = tiny_models.build(folder / "odd", "odd")
    return made | {"model": model, "odd": quantize_folder(odd, folder / "oddblock", Options("block")).folder}


def test_to_huggingface_fp8_and_back_is_the_same_bytes(folders, tmp_path):
    there = convert_folder(folders["block"], tmp_path / "hf", "huggingface-fp8")
    assert there.notes == ("4 scales of the KV cache are left out: the format has no place for them",)
    convert_folder(tmp_path / "hf", tmp_path / "ct", "compressed-tensors")
    out, back = tensors(folders["block"]), tensors(tmp_path / "ct")
    assert {name for name in out if "self_attn.k_scale" not in name and "self_attn.v_scale" not in name} == set(back)
    assert all(torch.equal(back[n].view(torch.uint8), out[n].view(torch.uint8)) for n in back)
    reconfigure(tmp_path / "ct", "quantization_config", "kv_cache_scheme", value=None)
    config, before = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "ct", folders["block"]))
    before["quantization_config"]["kv_cache_scheme"] = None
    assert config == before


@pytest.mark.parametrize("target", ["compressed-tensors", None])
def test_converting_to_its_own_format_changes_nothing(folders, tmp_path, target):
    for scheme in ("dynamic", "static", "block"):
        convert_folder(folders[scheme], tmp_path / scheme, target, "transformers")
        assert bytes_of(tmp_path / scheme) == bytes_of(folders[scheme])


def test_the_huggingface_schema(folders, tmp_path):
    convert_folder(folders["block"], tmp_path / "hf", "huggingface-fp8")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head"], "scale_fmt": "float", "fmt": "e4m3",
    }  # fmt: skip
    out = tensors(tmp_path / "hf")
    name = "model.layers.0.mlp.down_proj"
    assert out[f"{name}.weight_scale_inv"].shape == (1, 2) and out[f"{name}.weight_scale_inv"].dtype == torch.float32
    assert f"{name}.weight_scale" not in out


@pytest.mark.filterwarnings("default")
def test_transformers_reads_the_huggingface_schema(folders, tmp_path):
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    convert_folder(folders["block"], tmp_path / "hf", "huggingface-fp8")
    convert_folder(folders["block"], tmp_path / "bf16", "bf16")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    for name, tensor in tensors(tmp_path / "bf16").items():
        assert torch.equal(theirs.state_dict()[name], tensor.float())


@pytest.mark.parametrize("scheme", ["dynamic", "static", "block", "odd"])
def test_bf16_is_the_decoded_weight_exactly(folders, tmp_path, scheme):
    done = convert_folder(folders[scheme], tmp_path / "bf16", "bf16")
    assert not any("rounded" in note for note in done.notes)
    plain, model = tensors(tmp_path / "bf16"), load(folders[scheme])
    assert "quantization_config" not in json.loads((tmp_path / "bf16" / "config.json").read_text())
    q = model.get_submodule("layers.0.mlp.down").quantized_weight()
    assert torch.equal(plain["model.layers.0.mlp.down_proj.weight"].float(), q.dequantize())
    assert not any("scale" in name for name in plain)
    assert load(tmp_path / "bf16")(TOKENS).isfinite().all()


def test_scales_that_bf16_cannot_hold_are_told(folders, tmp_path):
    quantize_folder(folders["model"], tmp_path / "exact", Options(scales="none"))
    done = convert_folder(tmp_path / "exact", tmp_path / "bf16", "bf16")
    assert len(done.notes) == 14 and "is rounded to fit BF16" in done.notes[0]


def test_sglang_gets_one_kv_scale_a_tensor(folders, tmp_path):
    done = convert_folder(folders["dynamic"], tmp_path / "out", reader="sglang")
    assert "KV scales per head are written as their maximum" in done.notes[0]
    out = tensors(tmp_path / "out")
    assert out["model.layers.1.self_attn.k_scale"].tolist() == [1.5]
    assert out["model.layers.0.self_attn.v_scale"].tolist() == [1.0]
    scheme = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]
    assert scheme["strategy"] == "tensor" and scheme["dynamic"] is False


def unequal(folder, target):
    """A per-tensor checkpoint as others write it: q, k and v with scales of their own, in BF16."""
    out = copied(folder, target)
    for file in out.glob("*.safetensors"):
        held = {name: tensor.clone() for name, tensor in fp8.checkpoint.tensorfile.read_tensors(file).items()}
        for i, name in enumerate(n for n in sorted(held) if n.endswith("weight_scale")):
            held[name] = (held[name] * (1 + i / 8)).to(torch.bfloat16)
        fp8.checkpoint.tensorfile.write_tensors(file, held)
    return out


def test_scales_that_vllm_would_merge_are_written_per_channel(folders, tmp_path):
    bad = unequal(folders["static"], tmp_path / "bad")
    done = convert_folder(bad, tmp_path / "good", reader="vllm")
    assert "10 per-tensor scales are written per channel" in done.notes[0]
    before, after = tensors(bad), tensors(tmp_path / "good")
    name = "model.layers.0.self_attn.k_proj"
    assert torch.equal(after[f"{name}.weight"].view(torch.uint8), before[f"{name}.weight"].view(torch.uint8))
    assert after[f"{name}.weight_scale"].shape == (64, 1) and after[f"{name}.weight_scale"].dtype == torch.float32
    assert after["model.layers.0.mlp.down_proj.weight_scale"].shape == (1,)
    assert torch.equal(load(tmp_path / "good")(TOKENS), load(bad)(TOKENS))


def test_vllms_rule_keeps_every_code_that_we_write(folders):
    out = tensors(folders["static"])
    for stem, parts in (("self_attn", "q_proj k_proj v_proj"), ("mlp", "gate_proj up_proj")):
        names = [f"model.layers.0.{stem}.{part}" for part in parts.split()]
        codes, scales = ([out[f"{n}.{kind}"] for n in names] for kind in ("weight", "weight_scale"))
        changed = changed_by_fusing(codes, scales)
        assert (changed.codes, changed.values) == (0, 0) and changed.count > 10_000


def test_vllms_rule_changes_codes_of_unequal_scales():
    torch.manual_seed(0)
    q, k = (fp8.quantize(torch.randn(64, 64)) for _ in range(2))
    scales = [q.scale, 0.9 * k.scale]
    new, largest = requantized([q.codes, k.codes], scales)
    assert torch.equal(new[0].view(torch.uint8), q.codes.view(torch.uint8)) and largest == q.scale
    changed = changed_by_fusing([q.codes, k.codes], scales)
    assert 0.3 < changed.values / changed.count < 0.5  # nearly all of the second half
    tiny = torch.full((1,), 2.0**-20)
    assert changed_by_fusing([q.codes, k.codes], [tiny, tiny]).codes > 0  # FP16 cannot hold code * scale


def test_what_cannot_be_said_is_refused(folders, tmp_path):
    with pytest.raises(CheckpointError, match="--scheme block"):
        convert_folder(folders["dynamic"], tmp_path / "hf", "huggingface-fp8")
    with pytest.raises(CheckpointError, match="fp8 quantize"):
        convert_folder(folders["model"], tmp_path / "out", "compressed-tensors")
    with pytest.raises(ConfigError, match="Did you mean 'bf16'"):
        convert_folder(folders["block"], tmp_path / "out", "bf61")
    with pytest.raises(ConfigError, match="reader cannot be"):
        convert_folder(folders["block"], tmp_path / "out", reader="llama.cpp")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_checkpoint_leaves_nothing(folders, tmp_path):
    bad = copied(folders["odd"], tmp_path / "bad")
    retensor(bad, "model.layers.1.mlp.up_proj.weight_scale", -torch.ones(1, 1))
    with pytest.raises(CheckpointError, match="finite and positive"):
        convert_folder(bad, tmp_path / "out", "bf16")
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def test_a_per_tensor_huggingface_checkpoint_becomes_compressed_tensors(folders, tmp_path):
    """The file that transformers and vLLM name differently."""
    out = tmp_path / "pertensor"
    convert_folder(folders["static"], out, "compressed-tensors", "transformers")
    names = {".weight_scale": ".weight_scale_inv", ".input_scale": ".activation_scale"}
    for file in out.glob("*.safetensors"):
        held = fp8.checkpoint.tensorfile.read_tensors(file)
        turned = {}
        for name, tensor in held.items():
            old = next((end for end in names if name.endswith(end)), None)
            turned[name.replace(old, names[old]) if old else name] = (tensor.reshape(()) if old else tensor).clone()
        fp8.checkpoint.tensorfile.write_tensors(
            file, {n: t for n, t in turned.items() if not n.endswith("_attn.k_scale")}
        )
    index = out / "model.safetensors.index.json"
    index.unlink()
    plain = {
        name: file.name for file in out.glob("*.safetensors") for name in fp8.checkpoint.tensorfile.read_tensors(file)
    }
    index.write_text(json.dumps({"weight_map": plain}))
    quantization = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
    reconfigure(out, "quantization_config", value=quantization | {"ignored_layers": ["lm_head"]})
    convert_folder(out, tmp_path / "ct", "compressed-tensors")
    assert torch.equal(load(tmp_path / "ct")(TOKENS), load(folders["static"])(TOKENS))
    back = tensors(tmp_path / "ct")
    assert all(torch.equal(back[n].float(), t.float()) for n, t in tensors(folders["static"]).items() if n in back)
