"""Damaged, foreign and impossible checkpoints: a clear error each, and nothing half-written."""

from __future__ import annotations

import errno
import json

import pytest
import torch

import fp8.nn
from fp8 import checkpoint
from fp8.checkpoint import export, tensorfile
from fp8.errors import CheckpointError, ConvertError
from fp8.models import Decoder, DecoderConfig
from fp8.nn.frozen_linear import FrozenLinear
from fp8.recipe import Operand, Recipe

CONFIG = DecoderConfig(31, 32, 48, 1, 2, 1)


def model(recipe="rowwise", config=CONFIG, **kwargs):
    torch.manual_seed(0)
    decoder = Decoder(config)
    fp8.nn.convert(decoder, recipe, **kwargs)
    return decoder


@pytest.fixture
def folder(tmp_path):
    checkpoint.save(model(), tmp_path / "out")
    return tmp_path / "out"


def change(folder, *path, value=None):
    """Set (or, with None, remove) one setting of config.json."""
    plain = json.loads((folder / "config.json").read_text())
    inner = plain
    for key in path[:-1]:
        inner = inner[key]
    if value is None:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    (folder / "config.json").write_text(json.dumps(plain))


def retensor(folder, name, tensor):
    tensors = {n: t.clone() for n, t in tensorfile.read_tensors(folder / "model.safetensors").items()}
    tensors.pop(name) if tensor is None else tensors.__setitem__(name, tensor)
    tensorfile.write_tensors(folder / "model.safetensors", tensors)


UP = "model.layers.0.mlp.up_proj"
GROUP = ("quantization_config", "config_groups", "group_0")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        checkpoint.load(folder)


@pytest.mark.parametrize("keep", [0, 5, 300, -1])
def test_a_truncated_file_says_so(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="damaged or cut off"):
        checkpoint.load(folder)


def test_a_config_that_is_not_json(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not JSON"):
        checkpoint.load(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="not an object"):
        checkpoint.load(folder)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("quantization_config", "quant_method"), "fp8", "weight_scale_inv"),
        (("quantization_config", "quant_method"), "modelopt", "quant_method='modelopt'"),
        (("quantization_config", "quant_method"), None, "quant_method=None"),
        (("quantization_config", "format"), "int-quantized", "Known: float-quantized"),
        (("quantization_config", "config_groups"), None, "config_groups"),
        ((*GROUP, "weights", "strategy"), "group", "strategy='group'"),
        ((*GROUP, "weights", "strategy"), None, "lacks 'strategy'"),
        ((*GROUP, "weights", "num_bits"), 4, "num_bits=4"),
        ((*GROUP, "weights", "type"), "int", "type='int'"),
        ((*GROUP, "weights"), None, "no scheme for weights"),
        ((*GROUP, "input_activations", "dynamic"), False, "dynamic=False"),
        ((*GROUP, "input_activations", "strategy"), "tensor", "dynamic=True"),
        ((*GROUP, "input_activations", "strategy"), "channel", "strategy='channel'"),
        ((*GROUP, "targets"), [f"re:.*{part}_proj" for part in ("q", "k")], "must have one scheme"),
        (("fp8", "version"), 2, "version 2"),
        (("fp8", "groups", "group_0", "accumulate"), "quickly", "accumulate.forward cannot be 'quickly'"),
        (("fp8", "conversion"), {"decisions": 1}, "fp8.conversion in config.json is damaged"),
        (("hidden_size",), None, "lacks 'hidden_size'"),
        (("hidden_size",), 64, "head_dim=16"),
        (("intermediate_size",), 47, r"gate_proj.weight has shape \(48, 32\); config.json calls for \(47, 32\)"),
        (("num_hidden_layers",), 2, "model.layers.1"),
    ],
)
def test_a_setting_that_is_unknown_or_missing_is_named(folder, path, value, message):
    change(folder, *path, value=value)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(folder)


@pytest.mark.parametrize("block", [None, [128], [128, 64], [0, 128]])
def test_blocks_that_cannot_be_computed(folder, block):
    change(folder, *GROUP, "weights", "strategy", value="block")
    if block is not None:
        change(folder, *GROUP, "weights", "block_structure", value=block)
    with pytest.raises(CheckpointError, match="block_structure"):
        checkpoint.load(folder)


def with_value(value):
    scale = torch.ones(48, 1)
    scale[3] = value
    return scale


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (f"{UP}.weight", None, "no tensor"),
        (f"{UP}.weight_scale", None, "no tensor"),
        (f"{UP}.weight", torch.zeros(48, 32), "float8_e4m3fn"),
        (f"{UP}.weight", torch.zeros(48, 32).to(torch.float8_e5m2), "float8_e5m2; a float"),
        (f"{UP}.weight", torch.zeros(40, 32).to(torch.float8_e4m3fn), "calls for"),
        (f"{UP}.weight", torch.zeros(48, 31).to(torch.float8_e4m3fn), "calls for"),
        (f"{UP}.weight", torch.full((48, 32), float("nan")).to(torch.float8_e4m3fn), "NaN codes"),
        (f"{UP}.weight_scale", torch.ones(47, 1), r"\(47, 1\)"),
        (f"{UP}.weight_scale", torch.ones(48, 1, dtype=torch.float64), "float64"),
        (f"{UP}.weight_scale", with_value(0.0), "has 0.0 in row 3"),
        (f"{UP}.weight_scale", with_value(-1.0), "has -1.0"),
        (f"{UP}.weight_scale", with_value(float("nan")), "has nan"),
        (f"{UP}.weight_scale", with_value(float("inf")), "has inf"),
        (f"{UP}.weight_scale", with_value(1e-40), "row 3"),
        (f"{UP}.bias", torch.ones(48), "belong to no part"),
        ("model.norm.weight", torch.ones(31), "calls for"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(folder, name, tensor, message):
    retensor(folder, name, tensor)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(folder)


def test_a_checkpoint_in_several_files(folder, tmp_path):
    tensors = tensorfile.read_tensors(folder / "model.safetensors")
    parts = {"a.safetensors": sorted(tensors)[:5], "b.safetensors": sorted(tensors)[5:]}
    for file, names in parts.items():
        tensorfile.write_tensors(folder / file, {name: tensors[name] for name in names})
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {name: file for file, names in parts.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    tokens = torch.zeros(1, 3, dtype=torch.int64)
    checkpoint.save(model(), tmp_path / "whole")
    assert torch.equal(checkpoint.load(folder)(tokens), checkpoint.load(tmp_path / "whole")(tokens))
    (folder / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"b\.safetensors does not exist"):
        checkpoint.load(folder)


# --------------------------------------------------------------------------- saving


def left(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_cannot_be_exported_says_why(tmp_path):
    with pytest.raises(CheckpointError, match=r"fp8\.convert"):
        checkpoint.save(Decoder(CONFIG), tmp_path / "out")
    wide = Recipe("wide", w=Operand("e5m2"))
    with pytest.raises(CheckpointError, match=r"layers\.0\.attention\.qkv has e5m2 weights"):
        checkpoint.save(model(wide), tmp_path / "out")
    broken = model()
    with torch.no_grad():
        broken.layers[0].mlp.down.weight[3, 4] = float("nan")  # type: ignore[union-attr, index]
    with pytest.raises(CheckpointError, match=r"down_proj\.weight has NaN"):
        checkpoint.save(broken, tmp_path / "out")
    broken = model()
    with torch.no_grad():
        broken.embedding.weight[0, 0] = float("inf")
    with pytest.raises(CheckpointError, match="embed_tokens"):
        checkpoint.save(broken, tmp_path / "out")
    assert left(tmp_path) == []


def test_an_existing_folder_is_kept_unless_told(folder):
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="overwrite=True"):
        checkpoint.save(model("blockwise"), folder)
    assert (folder / "model.safetensors").read_bytes() == before
    checkpoint.save(model("blockwise"), folder, overwrite=True)
    assert (folder / "model.safetensors").read_bytes() != before
    assert left(folder.parent) == ["out"]


def test_a_folder_with_other_things_is_never_replaced(folder):
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"thesis\.txt is not part of a checkpoint"):
        checkpoint.save(model(), folder, overwrite=True)
    assert (folder / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_disk_that_fills_up_leaves_what_was_there(folder, monkeypatch, overwrite):
    before = (folder / "model.safetensors").read_bytes()

    def full(path, tensors):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export, "write_tensors", full)
    target = folder if overwrite else folder.with_name("new")
    with pytest.raises(CheckpointError, match="No space left on device"):
        checkpoint.save(model(), target, overwrite=overwrite)
    assert left(folder.parent) == ["out"] and (folder / "model.safetensors").read_bytes() == before


def test_too_little_space_is_seen_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(tensorfile.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(CheckpointError, match=r"0\.0 MB free; the checkpoint needs"):
        checkpoint.save(model(), tmp_path / "out")
    assert left(tmp_path) == []


def test_a_tied_head_in_fp8_is_refused(tmp_path):
    tied = Decoder(DecoderConfig(32, 32, 48, 1, 2, 1, tie_embeddings=True))
    fp8.nn.convert(tied, "rowwise")
    checkpoint.save(tied, tmp_path / "out")
    assert checkpoint.load(tmp_path / "out").head.weight.shape == (32, 32)
    fp8.nn.convert(tied.head, "rowwise")
    tied.head.__class__ = fp8.nn.Linear
    with pytest.raises(CheckpointError, match="shares its weight with the embedding"):
        checkpoint.save(tied, tmp_path / "other")


def test_a_gradient_through_loaded_codes_is_refused_not_dropped() -> None:
    """transformers drops it silently: the layers above train, those below never move."""
    layer = FrozenLinear(fp8.quantize(torch.eye(4), tile="row"), fp8.Recipe.of("rowwise"))
    y = layer(torch.ones(2, 4, requires_grad=True))
    assert torch.equal(y, torch.ones(2, 4))
    with pytest.raises(ConvertError, match="has no gradient"):
        y.sum().backward()
