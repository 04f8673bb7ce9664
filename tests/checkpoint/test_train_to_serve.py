"""Train to serve: the file holds the codes that the last training forward would multiply by, and a server multiplies by
them. Seen where products are made, not asked of the layers, so that nothing here could have quantized a second time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import fp8
from fp8.checkpoint import load, save, verify
from fp8.checkpoint.compressed_tensors import row_scales
from fp8.checkpoint.fp8_folder import Fp8Folder
from fp8.models import Decoder, DecoderConfig
from fp8.models.huggingface import shards
from fp8.nn import frozen_linear, products
from fp8.quantize import Quantized
from fp8.recipe import Operand
from fp8.tile import Tile
from fp8.train import TrainConfig, train
from fp8.train.finished import trained_decoder

ROWS = torch.arange(48).view(2, 24) * 5 % 250
GROUPS = fp8.Recipe.of("blockwise").replace(name="groups", w=Operand("e4m3", Tile(1, 128)))
MIXED = fp8.Recipe.of("rowwise").replace(overrides=(("*.mlp.down", "blockwise"), ("layers.0.attention.out", None)))
RECIPES = ["tensorwise", "delayed", "rowwise", "blockwise", GROUPS, MIXED]


@contextmanager
def multiplied(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Quantized]]:
    """The weights of the forward products that run inside, in order."""
    seen: list[Quantized] = []
    with monkeypatch.context() as patch:
        for room in (products, frozen_linear):
            original = room.run_matmul
            patch.setattr(
                room, "run_matmul", lambda a, b, *rest, to=original: seen.append(copied(b)) or to(a, b, *rest)
            )
        yield seen


def copied(q: Quantized) -> Quantized:
    return Quantized(q.codes.clone(), q.scale.clone(), q.tile, q.format)


def trained(recipe: Any, optimizer: str = "torch", dtype: torch.dtype = torch.float32, hidden: int = 128) -> Decoder:
    """Three steps."""
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(257, hidden, 176, 2, 4, 2)).to(dtype)
    fp8.convert(decoder, recipe)
    steps = fp8.AdamW if optimizer == "fp8" else torch.optim.AdamW
    adam = steps(decoder.parameters(), lr=1e-2)
    fp8.attach(decoder, adam)
    for _ in range(3):
        decoder(ROWS).float().square().mean().backward()
        adam.step()
        adam.zero_grad()
    return decoder.eval()


def numbers(q: Quantized) -> tuple[Tensor, Tensor]:
    """Codes as bytes, and the scale of each row and group of columns."""
    return q.codes.view(torch.uint8), row_scales(q)


def is_the_same(a: Quantized, b: Quantized) -> bool:
    return all(torch.equal(x, y) for x, y in zip(numbers(a), numbers(b), strict=True))


@pytest.mark.parametrize("hidden", [128, 48])
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: getattr(r, "name", r))
def test_the_codes_of_training_are_served(monkeypatch, tmp_path, recipe, hidden):
    """48 channels: blocks that shards cut in two, partial tiles, and K that is no multiple of 16."""
    decoder = trained(recipe, hidden=hidden)
    with torch.no_grad(), multiplied(monkeypatch) as training:
        decoder(ROWS)
    save(decoder, tmp_path / "out")
    server = load(tmp_path / "out")
    with torch.no_grad(), multiplied(monkeypatch) as serving:
        server(ROWS)
    assert len(training) == len(serving) == (7 if recipe is MIXED else 8)
    assert all(is_the_same(a, b) for a, b in zip(training, serving, strict=True))
    assert verify(tmp_path / "out", decoder, ROWS).passed


@pytest.mark.parametrize("recipe", RECIPES[:4])
def test_the_file_holds_them_shard_by_shard(monkeypatch, tmp_path, recipe):
    """Byte by byte, under the names that other servers read: q, k and v are rows of one matrix of ours."""
    decoder = trained(recipe)
    with torch.no_grad(), multiplied(monkeypatch) as training:
        decoder(ROWS)
    save(decoder, tmp_path / "out")
    folder, parts = Fp8Folder.open(tmp_path / "out"), shards(decoder.config)
    names = [
        f"layers.{i}.{part}" for i in range(2) for part in ("attention.qkv", "attention.out", "mlp.up", "mlp.down")
    ]
    assert len(folder.layers) == 14
    for ours, q in zip(names, training, strict=True):
        for part in parts[ours]:
            stored = folder.weight(part.name)
            assert torch.equal(stored.codes.view(torch.uint8), q.codes.view(torch.uint8)[part.start : part.stop])
            assert torch.equal(row_scales(stored), row_scales(q)[part.start : part.stop])


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", "rowwise", "blockwise"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_that_the_optimizer_wrote_are_served(monkeypatch, tmp_path, recipe, dtype):
    """`fp8.AdamW` writes the next step's codes as it updates; BF16 weights have an FP32 master beside them."""
    decoder = trained(recipe, "fp8", dtype)
    with torch.no_grad(), multiplied(monkeypatch) as training:
        decoder(ROWS)
    save(decoder, tmp_path / "out")
    with torch.no_grad(), multiplied(monkeypatch) as serving:
        load(tmp_path / "out")(ROWS)
    assert all(is_the_same(a, b) for a, b in zip(training, serving, strict=True))
    assert verify(tmp_path / "out", decoder, ROWS).passed


@pytest.mark.parametrize(("recipe", "optimizer"), [("delayed", "torch"), ("blockwise", "fp8"), ("tensorwise", "fp8")])
def test_a_run_is_exported_with_the_codes_of_its_last_evaluation(monkeypatch, tmp_path, recipe, optimizer):
    """Through the run's checkpoint on disk, as `fp8 quantize RUN OUT` reads it."""
    text = tmp_path / "text.txt"
    text.write_text("Call me Ishmael. " * 200)
    config = TrainConfig(
        text=str(text), out=str(tmp_path / "run"), steps=3, batch_size=2, sequence_length=32, hidden_size=32,
        ffn_hidden_size=48, num_layers=1, num_attention_heads=2, num_kv_heads=1, tokenizer="bytes",
        recipe=recipe, optimizer=optimizer,
    )  # fmt: skip
    with multiplied(monkeypatch) as training:
        train(config)
    decoder, _ = trained_decoder(tmp_path / "run")
    save(decoder, tmp_path / "out")
    with torch.no_grad(), multiplied(monkeypatch) as serving:
        load(tmp_path / "out")(ROWS)
    assert len(serving) == 4
    assert all(is_the_same(a, b) for a, b in zip(training[-4:], serving, strict=True))


def test_a_weight_that_moved_after_training_is_not_what_was_trained(tmp_path):
    """`verify` notices."""
    decoder = trained("rowwise")
    save(decoder, tmp_path / "out")
    with torch.no_grad():
        decoder.get_submodule("layers.0.mlp.up").weight.mul_(1.01)
    fp8.refresh(decoder)
    assert not verify(tmp_path / "out", decoder, ROWS).passed
