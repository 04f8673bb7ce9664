"""Rotations and migrations folded into weights: the model stays what it was, to the bit or to the rounding of FP32."""

from __future__ import annotations

import pytest
import torch

import tiny_models
from fp8.calibrate.folding import Anatomy, migrated, migrations, rotated
from fp8.calibrate.running import loaded, run_model
from fp8.checkpoint.source import Source
from fp8.errors import CheckpointError, ConfigError
from tiny_models import reconfigure, retensor, tensors

ROWS = torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("folding")
    made = {
        kind: tiny_models.build(folder / kind, kind) for kind in ("llama", "tied", "qwen2", "odd", "mixtral", "bert")
    }
    retensor(
        made["llama"],
        "model.norm.weight",
        tensors(made["llama"])["model.norm.weight"].index_fill(0, torch.tensor(3), 0),
    )
    return made


@torch.no_grad()
def logits(source, dtype=torch.float64):
    return loaded(source, dtype)(ROWS).logits


@torch.no_grad()
def nudged(source):
    """The logits after every weight moved by half a unit in the last place of FP32, up or down."""
    model, draw = loaded(source, torch.float64), torch.Generator().manual_seed(1)
    for p in model.parameters():
        p *= 1 + 2.0**-24 * (2 * torch.randint(0, 2, p.shape, generator=draw) - 1)
    return model(ROWS).logits


def moves(source):
    draw = torch.Generator().manual_seed(2)
    widths = {one.maker: source.entries[f"{one.maker}.weight"].shape[0] for one in migrations(source)}
    return {maker: torch.randint(-9, 10, (width,), generator=draw).tolist() for maker, width in widths.items()}


@pytest.mark.parametrize("kind", ["llama", "tied", "qwen2", "odd"])
def test_a_rotation_changes_logits_no_more_than_rounding_the_weights_to_fp32_does(models, kind):
    """Of 48 channels (`odd`), of heads of 12, of biases, of a norm with a zero, and of a head that was tied."""
    source = Source.open(models[kind])
    exact = logits(source)
    allowed = 4 * (nudged(source) - exact).norm()
    assert (logits(rotated(source, seed=5)) - exact).norm() < allowed
    turned = rotated(source, seed=5)
    assert torch.equal(logits(migrated(turned, moves(turned))), logits(turned))


def test_rotated_weights_are_q_times_the_old_ones(models):
    source = Source.open(models["llama"])
    turned, read = rotated(source, seed=5), lambda name: source.read(f"{name}.weight").double()
    q = turned.edits["model.embed_tokens.weight"][0].rotation.matrix()
    gamma, layer = read("model.layers.1.input_layernorm"), "model.layers.1.self_attn"
    torch.testing.assert_close(turned.read(f"{layer}.q_proj.weight"), (read(f"{layer}.q_proj") * gamma @ q).float())
    torch.testing.assert_close(
        turned.read("model.layers.1.mlp.down_proj.weight"), (q.T @ read("model.layers.1.mlp.down_proj")).float()
    )
    assert torch.equal(turned.read("model.norm.weight"), torch.ones(128))
    values = turned.edits[f"{layer}.o_proj.weight"][0].rotation
    assert values.size == 32 and not torch.equal(
        values.signs, turned.edits["model.layers.0.self_attn.o_proj.weight"][0].rotation.signs
    )


@pytest.mark.parametrize("kind", ["llama", "tied", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_migration_changes_no_bit_of_the_model(models, kind, dtype):
    source = Source.open(models[kind])
    changed = migrated(source, moves(source))
    assert changed.edits and all(changed.read(name).dtype == source.read(name).dtype for name in changed.edits)
    assert torch.equal(logits(changed, dtype), logits(source, dtype))


@pytest.mark.parametrize("kind", ["llama", "tied"])
def test_a_rotated_model_runs_layer_by_layer_from_disk(models, kind):
    source, seen = rotated(Source.open(models[kind]), seed=0), []
    for stream in (False, True):
        with run_model(source, "cpu", stream, head=True) as runner, torch.no_grad():
            seen.append(runner.inner(input_ids=ROWS).logits)
    assert torch.equal(*seen)


def test_a_tied_head_gets_a_tensor_of_its_own(models):
    source = Source.open(models["tied"])
    turned = rotated(source, seed=0)
    assert "lm_head.weight" not in source.entries and source.config["tie_word_embeddings"] is True
    assert turned.entries["lm_head.weight"].shape == (260, 128) and turned.config["tie_word_embeddings"] is False
    assert not torch.equal(turned.read("lm_head.weight"), turned.read("model.embed_tokens.weight"))
    assert "lm_head.weight" not in migrated(source, moves(source)).entries


def test_query_heads_that_share_values_share_factors(models):
    one = next(m for m in migrations(Source.open(models["llama"])) if m.maker.endswith("v_proj"))
    channels = torch.arange(64)
    assert one.repeats == (2, 2, 32) and torch.equal(one.gather(one.spread(channels)), channels)
    assert torch.equal(one.spread(channels).view(2, 2, 32)[:, 0], one.spread(channels).view(2, 2, 32)[:, 1])


def test_what_is_not_understood_is_refused_with_a_way_out(models, tmp_path):
    for kind, name in (("mixtral", "MixtralForCausalLM"), ("bert", "BertModel")):
        with pytest.raises(CheckpointError, match=rf"is {name}; .*LlamaForCausalLM.*--outliers none"):
            rotated(Source.open(models[kind]), seed=0)
    strange = tiny_models.copied(models["tied"], tmp_path / "strange")
    retensor(strange, "model.layers.0.mlp.post_norm.weight", torch.ones(128))
    with pytest.raises(CheckpointError, match=r"model.layers.0.mlp.post_norm.weight has no known part"):
        migrations(Source.open(strange))
    odd = tiny_models.copied(models["odd"], tmp_path / "wide")
    reconfigure(odd, "hidden_size", value=15)
    with pytest.raises(ConfigError, match="15 channels cannot be rotated"):
        rotated(Source.open(odd), seed=0)
    assert Anatomy.of(Source.open(models["odd"])).head_dim == 12
