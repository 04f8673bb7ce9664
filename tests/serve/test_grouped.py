"""Grouped experts: where rows go, that they give the experts' own answers, and on a GPU products and capture."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fp8.serve.models import random_model
from fp8.serve.models.grouped import STEP, laid_out
from paged_batches import Sequence, batch_of, bits, on, step

GPU = torch.device("cuda")
SHAPE = {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "vocab_size": 300, "hidden_size": 64,
    "intermediate_size": 96, "moe_intermediate_size": 48, "num_experts": 6, "num_experts_per_tok": 2,
    "norm_topk_prob": True, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu", "max_position_embeddings": 512,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip
LARGE = SHAPE | {"hidden_size": 512, "moe_intermediate_size": 256, "num_experts": 16, "head_dim": 64}
SCHEMES = ["fp8", None]


def routed(shape: dict, scheme: str | None, device: str = "cpu"):
    return random_model(shape, device=device, quantization=scheme).layers[0].mlp


@given(st.integers(1, 40), st.integers(1, 3), st.integers(3, 9), st.integers(0, 99))
def test_every_choice_has_a_row_among_those_of_its_expert(tokens: int, chosen: int, experts: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    choice = torch.rand(tokens, experts, generator=generator).argsort(-1)[:, :chosen]
    place, ends, rows = laid_out(choice, experts)
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    counts = choice.flatten().bincount(minlength=experts)
    assert ends.dtype == torch.int32 and not (ends % STEP).any() and ends[-1] <= rows
    assert len(place.unique()) == len(place)
    within = place - starts[choice.flatten()]
    assert bool(((within >= 0) & (within < counts[choice.flatten()])).all())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_grouped_answers_are_those_of_the_experts_to_the_bit(scheme: str | None) -> None:
    mlp = routed(SHAPE, scheme)
    assert mlp.grouped is None and mlp.why_not_stacked() is None and "needs a CUDA device" in str(mlp.why_not_grouped)
    torch.manual_seed(0)
    for tokens in (1, 5, 33):
        x = torch.randn(tokens, 64).bfloat16()
        _, chosen = mlp.route(x)
        need = mlp.answers(x, chosen)
        assert torch.equal(bits(mlp.stacked()(x, chosen)), bits(need))
        assert torch.equal(bits(mlp.answers(x, chosen)), bits(need)), "the experts keep their weights"


def test_what_is_not_grouped_says_why() -> None:
    assert "no multiples of 16" in routed(SHAPE | {"moe_intermediate_size": 40}, "fp8").why_not_stacked()
    assert "takes FP8 and BF16" in routed(SHAPE, "int8").why_not_stacked()
    mlp = routed(SHAPE, "fp8")
    mlp.experts[1].down.bias = torch.zeros(64)
    assert "have biases" in mlp.why_not_stacked()


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("tokens", [1, 3, 40, 700])
def test_grouped_answers_on_the_gpu_are_those_of_the_cpu(scheme: str | None, tokens: int) -> None:
    here = routed(LARGE, scheme, "cuda")
    assert here.grouped is not None
    x = torch.randn(tokens, 512, device=GPU).bfloat16()
    _, chosen = here.route(x)
    found = here.grouped(x, chosen).cpu().float()
    there = here.cpu()
    there.grouped = None
    need = there.answers(x.cpu(), chosen.cpu()).float()
    assert (found - need).norm() <= 2.0**-5 * need.norm()
    assert ((found - need).norm(dim=-1) <= 2.0**-4 * need.norm(dim=-1)).all(), "a row of another expert"


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_step_with_experts_is_captured_and_replayed(scheme: str | None) -> None:
    model = random_model(LARGE, device=GPU, quantization=scheme)
    assert model.capturable
    cache, sequences = model.new_cache(8, 16), [Sequence(list(range(40)), [1, 2, 3]), Sequence([7] * 40, [4, 5, 6])]
    step(model, cache, [(s, 30) for s in sequences])
    batch = on(batch_of([(s, 1) for s in sequences]), GPU)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        eager = model(batch, cache)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = model(batch, cache)
    for token in (30, 5):
        batch.tokens.fill_(token)
        graph.replay()
        assert torch.equal(logits, model(batch, cache)) or (logits - model(batch, cache)).norm() < 0.01 * logits.norm()
    assert eager.shape == logits.shape
