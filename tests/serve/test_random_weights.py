"""Models out of nothing but a shape: the same for the same seed, and like loaded ones in all but their numbers."""

from __future__ import annotations

import json

import pytest
import torch

import tiny_models
from fp8.models.huggingface import to_config
from fp8.models.llama import DecoderConfig
from fp8.serve.models import load_model, random_model
from paged_batches import alone

SHAPE = to_config(DecoderConfig(260, 64, 96, 2, 4, 2, max_positions=64), torch.bfloat16)
TEXT = list(range(30))


@pytest.mark.parametrize("quantization", [None, "fp8"])
def test_a_seed_is_a_model(quantization):
    one, same = (alone(random_model(SHAPE, quantization=quantization, seed=3), TEXT) for _ in range(2))
    assert torch.equal(one, same)
    assert not torch.equal(one, alone(random_model(SHAPE, quantization=quantization), TEXT))
    assert 0.1 < one.std() < 10


@pytest.mark.parametrize("kind", ["tied", "llama3", "biased", "qwen2", "qwen3", "mixtral4", "qwen3_moe_mixed"])
@pytest.mark.parametrize("quantization", [None, "fp8"])
def test_it_has_the_parts_of_a_loaded_one(tmp_path, kind, quantization):
    pytest.importorskip("transformers")
    folder = tiny_models.build(tmp_path / kind, kind)
    loaded = load_model(folder, quantization=quantization)
    made = random_model(json.loads((folder / "config.json").read_text()), quantization=quantization)
    parts = [{name: (t.shape, t.dtype) for name, t in model.named_buffers()} for model in (loaded, made)]
    assert parts[0] == parts[1]
    assert made.nbytes == loaded.nbytes
