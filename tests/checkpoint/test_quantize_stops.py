"""What stops `quantize_folder`: Ctrl-C and full disks lose nothing, wrong sources leave nothing, each says why."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys

import pytest
import torch

import tiny_models
from fp8.checkpoint import Options, Scales, load, partial, quantize_folder
from fp8.checkpoint.source import Source
from fp8.checkpoint.tensorfile import INDEX, read_tensors, write_tensors
from fp8.errors import CheckpointError
from tiny_models import bytes_of, copied, reconfigure, retensor, tensors

UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("models")
    made = {kind: tiny_models.build(folder / kind, kind) for kind in ("llama", "bert")}
    return made | {"sharded": tiny_models.build(folder / "sharded", "llama", shards="150KB")}


def constant(inputs=0.5):
    """A calibration that measures nothing."""

    def calibrate(source, layers):
        return Scales(dict.fromkeys(layers.fp8, inputs))

    return calibrate


def stopped_after(count):
    """A progress callback that is Ctrl-C once so many tensors are written."""
    calls = []

    def progress(done, total):
        calls.append(done)
        if len(calls) > count:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("count", [0, 3, 11])
def test_ctrl_c_loses_nothing_and_shows_nothing(models, tmp_path, count):
    whole = bytes_of(quantize_folder(models["sharded"], tmp_path / "whole").folder)
    with pytest.raises(KeyboardInterrupt):
        quantize_folder(models["sharded"], tmp_path / "out", progress=stopped_after(count))
    assert not (tmp_path / "out").exists()
    made = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out.partial").glob("*.safetensors")}
    written = quantize_folder(models["sharded"], tmp_path / "out")
    assert written.resumed and bytes_of(tmp_path / "out") == whole
    assert all((tmp_path / "out" / name).stat().st_mtime_ns == time for name, time in made.items())
    assert not (tmp_path / "out.partial").exists()


def test_calibrated_scales_survive_a_stop(models, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        quantize_folder(models["llama"], tmp_path / "out", Options("static"), constant(0.25), stopped_after(2))

    def never(source, layers):
        raise AssertionError("calibrated twice")

    quantize_folder(models["llama"], tmp_path / "out", Options("static"), never)
    assert tensors(tmp_path / "out")[f"{UP}.input_scale"].tolist() == [0.25]


def test_other_options_start_over(models, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        quantize_folder(models["sharded"], tmp_path / "out", progress=stopped_after(9))
    assert not quantize_folder(models["sharded"], tmp_path / "out", Options("block")).resumed
    assert bytes_of(tmp_path / "out") == bytes_of(
        quantize_folder(models["sharded"], tmp_path / "b", Options("block")).folder
    )


def test_a_disk_that_fills_up_keeps_the_finished_shards(models, tmp_path, monkeypatch):
    real, count = partial.Place.put, []

    def full(self, name, tensor):
        count.append(name)
        if len(count) > 12:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, name, tensor)

    monkeypatch.setattr(partial.Place, "put", full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*run the same command again"):
        quantize_folder(models["sharded"], tmp_path / "out")
    monkeypatch.undo()
    assert not (tmp_path / "out").exists() and quantize_folder(models["sharded"], tmp_path / "out").resumed


def test_too_little_space_is_seen_before_writing(models, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(CheckpointError, match=r"0\.0 MB free"):
        quantize_folder(models["llama"], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_never_replaced(models, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="already exists"):
        quantize_folder(models["llama"], tmp_path / "out")
    (tmp_path / "new.partial").mkdir()
    (tmp_path / "new.partial" / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="holds other files"):
        quantize_folder(models["llama"], tmp_path / "new")
    assert (tmp_path / "new.partial" / "thesis.txt").exists()


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def nan_weight(name):
    def change(folder):
        weight = tensors(folder)[name].clone()
        weight.view(-1)[3] = float("nan")
        retensor(folder, name, weight)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cut, "damaged or cut off"),
        (lambda f: (f / "model.safetensors").unlink(), "there is no model.safetensors"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "save_pretrained"),
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (nan_weight(f"{UP}.weight"), "has NaN codes"),
        (nan_weight("model.norm.weight"), "model.norm.weight is not finite"),
        (lambda f: retensor(f, f"{UP}.weight", None), f"no tensor '{UP}.weight'"),
        (lambda f: retensor(f, f"{UP}.weight", torch.ones(256, 128, dtype=torch.int32)), "is int32 of shape"),
        (lambda f: retensor(f, "model.norm.weight", torch.ones(128, dtype=torch.float64)), "float64"),
        (lambda f: retensor(f, f"{UP}.weight", torch.ones(256, 100)), r"shape \[256, 100\]; config.json calls for"),
        (lambda f: reconfigure(f, "architectures", value=["WhaleForCausalLM"]), "has no such model"),
        (lambda f: reconfigure(f, "model_type", value="whale"), "whale"),
        (lambda f: reconfigure(f, "quantization_config", value={"quant_method": "awq"}), "quantized already"),
    ],
)  # fmt: skip
def test_a_bad_source_says_what_is_wrong_and_leaves_nothing(models, tmp_path, change, message):
    folder = copied(models["llama"], tmp_path / "model")
    change(folder)
    with pytest.raises(CheckpointError, match=message):
        quantize_folder(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_quantizing_twice_is_refused(models, tmp_path):
    quantize_folder(models["llama"], tmp_path / "out")
    with pytest.raises(CheckpointError, match="quantized already"):
        quantize_folder(tmp_path / "out", tmp_path / "twice")


def test_static_needs_calibration(models, tmp_path):
    with pytest.raises(CheckpointError, match="calibrate"):
        quantize_folder(models["llama"], tmp_path / "out", Options("static"))
    assert list(tmp_path.iterdir()) == []


def test_what_stands_beside_the_weights_goes_along(models, tmp_path):
    folder = copied(models["bert"], tmp_path / "model")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (folder / "vocab.txt").write_text("whale\n")
    (folder / ".secret.json").write_text("{}")
    quantize_folder(folder, tmp_path / "out")
    names = set(bytes_of(tmp_path / "out"))
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt",
                     "1_Pooling/config.json"}  # fmt: skip


def test_too_little_space_keeps_calibrated_scales(models, tmp_path, monkeypatch):
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
        with pytest.raises(CheckpointError, match=r"0\.0 MB free"):
            quantize_folder(models["llama"], tmp_path / "out", Options("static"), constant(0.25))

    def never(source, layers):
        raise AssertionError("calibrated twice")

    assert quantize_folder(models["llama"], tmp_path / "out", Options("static"), never).resumed


def test_a_manifest_of_something_else_protects_its_folder(models, tmp_path):
    mine = tmp_path / "out.partial"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    for manifest in ('{"name": "my app"}', "half a manif"):
        (mine / "manifest.json").write_text(manifest)
        with pytest.raises(CheckpointError, match="holds other files"):
            quantize_folder(models["llama"], tmp_path / "out")
    assert (mine / "thesis.txt").exists()


def test_a_checkpoint_made_inside_its_source_holds_nothing_of_its_making(models, tmp_path):
    model = copied(models["llama"], tmp_path / "model")
    inside = bytes_of(quantize_folder(model, model / "fp8").folder)
    assert inside == bytes_of(quantize_folder(models["llama"], tmp_path / "out").folder)


@pytest.mark.parametrize("file", ["../llama/model.safetensors", "/etc/passwd", "..", "a\\b", 3])
def test_an_index_names_files_beside_it_and_nothing_else(models, tmp_path, file):
    folder = copied(models["sharded"], tmp_path / "model")
    reindexed(folder, UP + ".weight", file)
    for read in (lambda: quantize_folder(folder, tmp_path / "out"), lambda: load(folder)):
        with pytest.raises(CheckpointError, match="is no file beside it"):
            read()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_of_two_tensors_of_one_name_the_index_decides(models, tmp_path):
    folder, name = copied(models["sharded"], tmp_path / "model"), "model.norm.weight"
    right = tensors(folder)[name]
    files = json.loads((folder / INDEX).read_text())["weight_map"]
    stale = folder / max(file for file in files.values() if file != files[name])
    write_tensors(stale, {n: t.clone() for n, t in read_tensors(stale).items()} | {name: torch.zeros_like(right)})
    assert torch.equal(Source.open(folder).read(name), right)
    assert torch.equal(load(folder).state_dict()["norm.weight"], right)


def reindexed(folder, name, file):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][name] = file
    (folder / INDEX).write_text(json.dumps(index))


def test_what_stays_does_not_overflow_its_new_type(models, tmp_path):
    model = copied(models["llama"], tmp_path / "model")
    retensor(model, "model.norm.weight", torch.full((128,), 1e5).bfloat16())
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight holds numbers beyond float16"):
        quantize_folder(model, tmp_path / "out", Options(dtype="float16"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


HOLDING = """
import sys, pathlib
from fp8.checkpoint.partial import alone
with alone(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_processes_do_not_make_one_folder(models, tmp_path):
    out = tmp_path / "out"
    other = subprocess.Popen([sys.executable, "-c", HOLDING, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with other:
        assert other.stdout.readline().strip() == b"held"
        with pytest.raises(CheckpointError, match=r"another process is making .*out"):
            quantize_folder(models["llama"], out)
        other.kill()  # and lets go of it
    assert (tmp_path / "out.partial.lock").exists()
    assert quantize_folder(models["llama"], out).folder.is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
