"""Hugging Face's names and settings, both ways; and, where transformers is installed, its logits."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from fp8 import checkpoint
from fp8.errors import CheckpointError
from fp8.models import Decoder, DecoderConfig
from fp8.models.huggingface import from_config, from_huggingface, shards, to_config, to_huggingface

CONFIG = DecoderConfig(61, 48, 80, 2, 4, 2, rope_theta=5000.0, norm_eps=1e-6)


def data() -> Path:
    """Where test data lies: FP8_TEST_DATA, or a folder `shared/data` beside the repository."""
    given = os.environ.get("FP8_TEST_DATA")
    return Path(given) if given else Path(__file__).resolve().parents[3] / "shared" / "data"


def stories() -> Path:
    folder = data() / "models" / "stories260K" / "hf"
    if not (folder / "model.safetensors").is_file():
        pytest.skip("no stories260K model in FP8_TEST_DATA")
    return folder


@pytest.mark.parametrize("tied", [False, True])
def test_weights_come_back_as_they_went(tied):
    config = DecoderConfig(61, 48, 80, 2, 4, 2, tie_embeddings=tied)
    state = Decoder(config).state_dict()
    theirs = to_huggingface(state, config)
    assert ("lm_head.weight" in theirs) != tied
    back = from_huggingface(theirs, config)
    assert set(back) == set(state) and all(torch.equal(back[name], state[name]) for name in state)


def test_the_rows_of_a_fused_matrix_are_q_then_k_then_v():
    parts = shards(CONFIG)["layers.1.attention.qkv"]
    assert [(p.name.rsplit(".", 1)[1], p.start, p.stop) for p in parts] == [
        ("q_proj", 0, 48), ("k_proj", 48, 72), ("v_proj", 72, 96)
    ]  # fmt: skip


def test_a_config_comes_back_as_it_went():
    assert from_config(to_config(CONFIG, torch.float32)) == CONFIG


def test_settings_of_transformers_4_and_of_5_are_read():
    plain = to_config(CONFIG, torch.float32)
    four = {name: value for name, value in plain.items() if name != "rope_parameters"}
    five = {name: value for name, value in plain.items() if name != "rope_theta"}
    assert from_config(four) == from_config(five) == CONFIG


@pytest.mark.parametrize(
    ("setting", "value"),
    [("model_type", "gpt2"), ("hidden_act", "gelu"), ("attention_bias", True), ("head_dim", 64),
     ("rope_parameters", {"rope_type": "llama3", "rope_theta": 500000.0})],
)  # fmt: skip
def test_what_is_not_computed_is_refused(setting, value):
    with pytest.raises(CheckpointError, match="rope_type='llama3'" if "rope" in setting else f"{setting}={value!r}"):
        from_config(to_config(CONFIG, torch.float32) | {setting: value})


def test_a_missing_a_misshapen_and_a_strange_tensor_are_named():
    theirs = to_huggingface(Decoder(CONFIG).state_dict(), CONFIG)
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(CheckpointError, match=f"no tensor '{name}'"):
        from_huggingface({n: t for n, t in theirs.items() if n != name}, CONFIG)
    with pytest.raises(CheckpointError, match=rf"{name} has shape \(79, 48\)"):
        from_huggingface(theirs | {name: theirs[name][1:]}, CONFIG)
    with pytest.raises(CheckpointError, match="q_norm"):
        from_huggingface(theirs | {"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}, CONFIG)
    with pytest.raises(CheckpointError, match="lacks 'hidden_size'"):
        from_config({name: v for name, v in to_config(CONFIG, torch.float32).items() if name != "hidden_size"})


def logits_of_transformers(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.filterwarnings("default")
def test_logits_equal_those_of_transformers():
    folder = stories()
    tokens = torch.randint(3, 512, (2, 40), generator=torch.Generator().manual_seed(0))
    model = checkpoint.load(folder)
    assert model.head.weight is model.embedding.weight
    with torch.no_grad():
        ours = model(tokens)
    torch.testing.assert_close(ours, logits_of_transformers(folder, tokens), rtol=1e-5, atol=1e-5)


def test_a_story_is_told():
    """Greedy text of the known model is the same from an FP32 and from a BF16 cache, and close to sure under FP8."""
    from fp8.models import generate

    model = checkpoint.load(stories())
    texts = {kind: generate(model, [1], 40, kv_cache_dtype=kind).tokens for kind in (None, "fp32", "bf16", "fp8")}
    assert texts[None] == texts["fp32"] == texts["bf16"]
    assert texts["fp8"][:4] == texts[None][:4]
