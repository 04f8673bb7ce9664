"""Served models on a Hopper GPU: what the CPU says, but for the order of sums."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

import tiny_models
from fp8.attention.paged import Chunk
from fp8.checkpoint import Options, quantize_folder
from fp8.models.architecture import KINDS
from fp8.nn.int8_linear import Int8Linear
from fp8.serve import Engine, EngineOptions, Request, SamplingParams
from fp8.serve.models import load_model, random_model
from fp8.serve.sampler import Row, Sampler
from paged_batches import Sequence, alone, batch_of, bits, on, step

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")
TEXT = torch.randint(0, 256, (70,), generator=torch.Generator().manual_seed(7)).tolist()
FAMILY = {"llama": "llama", "mistral": "mistral", "qwen2": "qwen2", "qwen3": "qwen3", "mixtral": "mixtral4",
          "qwen3_moe": "qwen3_moe"}  # fmt: skip


def error(logits, exact):
    """The median over tokens of the relative error."""
    return float(((logits - exact).norm(dim=1) / exact.norm(dim=1)).median())


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_logits_are_those_of_the_cpu(tmp_path, kind):
    """Sums in another order, rounded to BF16 at every step, move a logit by about as much as BF16 itself does: on the
    CPU, these models are 0.4 to 1.2 % from FP32."""
    folder = tiny_models.build(tmp_path / kind, FAMILY[kind])
    ours = alone(load_model(folder, device=GPU), TEXT, "bf16")
    assert error(ours, alone(load_model(folder), TEXT, "bf16")) < 0.02


@pytest.mark.parametrize("scheme", ["dynamic", "block", "weight-only"])
def test_fp8_logits_are_those_of_the_cpu(tmp_path, scheme):
    """A last bit of BF16 that differs turns single codes over: two BF16 ways of computing one FP8 model are 4 to 5 %
    apart on the CPU too, and each is 7 % from the model that was not quantized."""
    quantize_folder(tiny_models.build(tmp_path / "source", "qwen2"), tmp_path / "out", Options(scheme))
    ours = alone(load_model(tmp_path / "out", device=GPU), TEXT)
    assert error(ours, alone(load_model(tmp_path / "out"), TEXT)) < 0.07


def test_quantizing_while_loading_gives_the_codes_of_the_cpu(tmp_path):
    folder = tiny_models.build(tmp_path / "source", "qwen3")
    ours, theirs = (dict(load_model(folder, device=d, quantization="fp8").named_buffers()) for d in (GPU, "cpu"))
    assert all(torch.equal(bits(x.cpu()), bits(theirs[name])) for name, x in ours.items())


def test_int8_products_are_those_of_the_cpu_to_the_bit():
    torch.manual_seed(0)
    for rows in (1, 16, 17, 100):
        x, linear = torch.randn(rows, 256).bfloat16(), Int8Linear(torch.randn(64, 256).bfloat16())
        assert torch.equal(copy.deepcopy(linear).to(GPU)(x.to(GPU)).cpu(), linear(x))


@pytest.mark.parametrize("dtype", ["fp8", "e5m2", "bf16"])
def test_chunks_and_pages_change_little(tmp_path, dtype):
    model = load_model(tiny_models.build(tmp_path / "source", "llama"), device=GPU)
    sequence, other = Sequence(TEXT, [5, 0, 3, 2, 1]), Sequence(TEXT[:3], [4])
    cache = model.new_cache(6, 16, dtype)
    step(model, cache, [(sequence, 33)])
    step(model, cache, [(sequence, 36), (other, 3)])
    step(model, cache, [(sequence, 1)])
    found = torch.stack([sequence.logits[i] for i in range(len(TEXT))])
    assert error(found, alone(model, TEXT, dtype)) < 0.05


def test_a_decode_step_is_captured_and_replayed():
    """What the engine does at every batch size: inputs are written in place, and unused rows are marked."""
    from fp8.models.huggingface import to_config
    from fp8.models.llama import DecoderConfig

    shape = to_config(DecoderConfig(512, 256, 512, 2, 4, 2, max_positions=256), torch.bfloat16)
    model = random_model(shape, device=GPU, quantization="fp8")
    assert model.capturable
    cache, sequence = model.new_cache(8, 16), Sequence(TEXT, [1, 2, 3, 4, 5])
    step(model, cache, [(sequence, 60)])
    batch = batch_of([(sequence, 1), (Sequence([0], [0] * 5), 1)])
    batch.slots[1], batch.lengths[1] = -1, 0
    batch = on(batch, GPU)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        eager = model(batch, cache)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = model(batch, cache)
    graph.replay()
    assert torch.equal(logits[0], eager[0])


@pytest.mark.parametrize("dtype", ["fp8", "bf16"])
def test_a_long_prompt_by_cudnn_in_chunks_changes_little(dtype):
    """Against the kernel that reads pages, in one piece, with all logits; here the last layer computes one row."""
    from fp8.models.huggingface import to_config
    from fp8.models.llama import DecoderConfig

    shape = to_config(DecoderConfig(512, 512, 1024, 3, 4, 2, max_positions=4096), torch.bfloat16)
    model, tokens = random_model(shape, device=GPU), torch.randint(0, 512, (4000,)).tolist()
    whole = alone(model, tokens, dtype, 64)
    sequence, cache = Sequence(tokens, list(range(63))[::-1]), model.new_cache(63, 64, dtype)
    for count in (1500, 2100, 399, 1):
        batch = on(batch_of([(sequence, count)], 64), GPU)
        chunks = (Chunk(sequence.stored, count),)
        logits = model(dataclasses.replace(batch, wanted=batch.wanted[-1:], chunks=chunks), cache)
        sequence.stored += count
        assert error(logits.cpu(), whole[sequence.stored - 1 : sequence.stored]) < 0.03


def test_greedy_takes_the_first_of_the_largest_and_tells_a_nan():
    sampler, logits = Sampler(3, 128256, GPU), torch.zeros(3, 128256, device=GPU)
    logits[0, [70001, 9, 128255]] = 3.0
    logits[1, 128255] = 1.0
    logits[2, [5, 99]] = torch.tensor([float("nan"), float("inf")], device=GPU)
    rows = [Row(SamplingParams(temperature=0), seat, 0.0) for seat in range(3)]
    assert sampler(logits, rows).tolist() == [9, 128255, -1]


@pytest.mark.parametrize("deterministic", [False, True])
def test_an_engine_takes_its_part_of_the_memory_and_no_more(deterministic):
    from fp8.models.huggingface import to_config
    from fp8.models.llama import DecoderConfig

    shape = to_config(DecoderConfig(4096, 256, 512, 2, 4, 2, max_positions=4096), torch.bfloat16)
    model = random_model(shape, device=GPU, quantization="fp8")
    options = EngineOptions(memory_fraction=0.3, max_running=16, deterministic=deterministic)
    engine = Engine(model, options=options)
    free, total = torch.cuda.mem_get_info()
    assert 0.68 * total < free < 0.75 * total
    for i in range(20):
        engine.add(Request(str(i), TEXT * (1 + i), SamplingParams(temperature=i % 2, seed=i, max_tokens=9)))
    while engine.has_work():
        assert all(output.error is None for output in engine.step())
    assert torch.cuda.mem_get_info()[0] > 0.68 * total
