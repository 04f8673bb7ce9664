"""The great law: what a request gets does not depend on what else is computed, bit for bit.

On a CPU, always: alone, in a batch, in chunks, behind pages that others filled, after having been thrown out and
computed again.
"""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny_models
from fp8.attention.paged import Chunk, reference
from fp8.checkpoint import Options, quantize_folder
from fp8.models import Decoder, DecoderConfig
from fp8.serve.models import layers, load_model
from fp8.serve.models.layers import Linear
from paged_batches import Sequence, alone, batch_of, bits, step

PAGE, LONGEST = 16, 40
MODELS = (
    "decoder",
    "llama-bf16",
    "odd-dynamic",
    "qwen2-block",
    "qwen3-weight-only",
    "qwen3_moe-dynamic",
    "mixtral4-bf16",
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Each architecture once, each way of multiplying at least once."""
    root, made = tmp_path_factory.mktemp("company"), {}

    def of(name):
        if name not in made:
            made[name] = decoder() if name == "decoder" else read(root / name, *name.split("-", 1))
        return made[name]

    return of


def decoder():
    torch.manual_seed(0)
    return load_model(Decoder(DecoderConfig(260, 24, 40, 2, 2, 1)), quantization="fp8")


def read(folder, kind, scheme):
    source = tiny_models.build(folder / "source", kind)
    tiny_models.reconfigure(source, "max_position_embeddings", value=512)
    if scheme in ("bf16", "int8"):
        return load_model(source, quantization=None if scheme == "bf16" else scheme)
    quantize_folder(source, folder / "out", Options(scheme))
    return load_model(folder / "out")


def texts(lengths):
    return [torch.randint(0, 256, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in lengths]


def is_the_same(found: Sequence, whole: torch.Tensor) -> bool:
    return all(torch.equal(bits(row), bits(whole[at])) for at, row in found.logits.items())


@st.composite
def schedules(draw):
    """Lengths of some texts, and steps: for each, which of them advance, in which order, by how many tokens at most."""
    lengths = draw(st.lists(st.integers(1, LONGEST), min_size=1, max_size=4))
    some = st.tuples(st.integers(0, len(lengths) - 1), st.integers(1, LONGEST))
    steps = draw(st.lists(st.lists(some, min_size=1, max_size=4, unique_by=lambda w: w[0]), max_size=6))
    return lengths, [*steps, [(i, LONGEST) for i in range(len(lengths))]], draw(st.permutations(range(16)))


@pytest.mark.parametrize("dtype", ["fp8", "bf16"])
@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=6)
@given(schedule=schedules())
def test_a_text_gets_the_same_logits_in_any_company_and_any_chunks(models, name, dtype, schedule):
    lengths, steps, order = schedule
    model, free = models(name), list(order)
    sequences = [Sequence(tokens, [free.pop() for _ in range(-(-len(tokens) // PAGE))]) for tokens in texts(lengths)]
    cache = model.new_cache(16, PAGE, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "PARTITION", 32)
        for wanted in steps:
            work = [(s, min(n, len(s.tokens) - s.stored)) for s, n in ((sequences[i], n) for i, n in wanted)]
            if work := [(s, n) for s, n in work if n]:
                step(model, cache, work)
        for sequence in sequences:
            assert len(sequence.logits) == len(sequence.tokens)
            assert is_the_same(sequence, alone(model, sequence.tokens, dtype))


@pytest.mark.parametrize("name", ["llama-bf16", "odd-dynamic", "qwen3_moe-dynamic"])
def test_a_long_prompt_in_one_piece_or_token_by_token(models, name):
    """Over more keys than a partition, and with the partitions as they are."""
    model, tokens = models(name), texts([290])[0]
    assert len(tokens) > reference.PARTITION
    sequence = Sequence(tokens, list(range(19))[::-1])
    cache = model.new_cache(19, PAGE)
    step(model, cache, [(sequence, 250)])
    for _ in range(250, 290):
        step(model, cache, [(sequence, 1)])
    assert is_the_same(sequence, alone(model, tokens))


def test_a_shared_beginning_is_as_good_as_an_own_one(models):
    model, (beginning, one, two) = models("odd-dynamic"), texts([32, 9, 11])
    cache = model.new_cache(8, PAGE)
    first = Sequence(beginning + one, [5, 2, 7])
    step(model, cache, [(first, len(first.tokens))])
    second = Sequence(beginning + two, [5, 2, 0], stored=32)
    step(model, cache, [(second, 5)])
    step(model, cache, [(first.__class__([1], [1]), 1), (second, 6)])
    assert min(second.logits) == 32
    assert is_the_same(second, alone(model, second.tokens))


def test_what_was_thrown_out_and_computed_again_is_the_same(models):
    model, (mine, other) = models("qwen2-block"), texts([40, 48])
    cache = model.new_cache(4, PAGE)
    sequence = Sequence(mine, [0, 1, 2])
    step(model, cache, [(sequence, 30)])
    step(model, cache, [(sequence, 1)])
    step(model, cache, [(Sequence(other, [2, 1, 0]), 48)])  # its pages go to another
    again = Sequence(mine, [3, 1, 2])
    step(model, cache, [(again, 17)])
    step(model, cache, [(again, 23)])
    assert is_the_same(again, alone(model, mine))


def test_rows_that_only_fill_up_a_batch_change_nothing(models):
    """As in a batch that a CUDA graph replays: slots of -1 and lengths of 0."""
    model, tokens = models("qwen3-weight-only"), texts([20])[0]
    sequence, cache = Sequence(tokens, [1, 0]), model.new_cache(2, PAGE)
    step(model, cache, [(sequence, 19)])
    full = batch_of([(sequence, 1), *[(Sequence([0], [0]), 1)] * 3])
    full.slots[1:] = -1
    full.lengths[1:] = 0
    before = copy.deepcopy(cache.layers[1].key_codes.view(torch.uint8))
    row = model(full, cache)[0]
    assert torch.equal(bits(row), bits(alone(model, tokens)[-1]))
    changed = (before != cache.layers[1].key_codes.view(torch.uint8)).flatten(1).any(1)
    assert changed.tolist() == [True, False]


@pytest.mark.parametrize("name", ["odd-dynamic", "qwen3_moe-dynamic"])
def test_the_last_layer_goes_on_with_wanted_rows_alone_and_stores_all_keys(models, name):
    model, (one, two, three) = models(name), texts([20, 7, 25])
    cache, whole = model.new_cache(6, PAGE), {len(text): alone(model, text) for text in (one, two, three)}
    sequences = [Sequence(one, [1, 0]), Sequence(two, [2]), Sequence(three, [5, 3])]
    for count, rows in ((5, []), (2, [0, 3, 5]), (13, [25, 3])):
        work = [(s, count) for s in sequences if s.stored + count <= len(s.tokens)]
        batch = batch_of(work)
        chunks = tuple(Chunk(s.stored, n) for s, n in work)  # the host knows them: the engine is not deterministic
        wanted = torch.tensor(rows, dtype=torch.int64)
        given = model(dataclasses.replace(batch, wanted=wanted, chunks=chunks), cache)
        owners = [len(s.tokens) for s, n in work for _ in range(n)]
        need = [whole[owners[row]][batch.positions[row]] for row in rows]
        assert [bits(row).tolist() for row in given] == [bits(row).tolist() for row in need]
        for s, n in work:
            s.stored += n


def test_a_neighbour_that_is_not_finite_changes_nothing(models):
    model = copy.deepcopy(models("odd-dynamic"))
    model.embedding[259] = float("nan")
    cache, (tokens,) = model.new_cache(4, PAGE), texts([20])
    sequence, sick = Sequence(tokens, [2, 0]), Sequence([259, 1, 259], [1])
    step(model, cache, [(sick, 2), (sequence, 11)])
    step(model, cache, [(sequence, 9), (sick, 1)])
    assert sick.logits[1].isnan().any()
    assert is_the_same(sequence, alone(model, tokens))


def test_the_law_holds_with_two_threads(models):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        model, (long, short) = models("llama-bf16"), texts([200, 5])
        sequence, other = Sequence(long, list(range(13))), Sequence(short, [13])
        cache = model.new_cache(14, PAGE)
        step(model, cache, [(other, 5), (sequence, 70)])
        step(model, cache, [(sequence, 129)])
        step(model, cache, [(sequence, 1)])
        assert is_the_same(sequence, alone(model, long))
        assert is_the_same(other, alone(model, short))
    finally:
        torch.set_num_threads(threads)


# --------------------------------------------------------------------------- what the law rests on

SHAPES = [(12, 20), (48, 80), (64, 96), (100, 48), (130, 50), (576, 960), (1536, 577), (2048, 33)]


@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_a_row_of_a_bf16_product_does_not_depend_on_its_place(inputs, outputs):
    """What is left to the library: whether the place in a block of rows matters. torch computes a product of few rows
    by other code than one of many, so that without blocks the law fails at once."""
    torch.manual_seed(0)
    x, weight = torch.randn(37, inputs).bfloat16(), torch.randn(outputs, inputs).bfloat16()
    whole = layers.product(x, Linear(weight), torch.float32)
    for start in range(37):
        part = layers.product(x[start:], Linear(weight), torch.float32)
        assert torch.equal(bits(part), bits(whole[start:]))
    assert torch.equal(bits(layers.product(x[5:6], Linear(weight), torch.float32)), bits(whole[5:6]))


@given(st.integers(1, 40), st.integers(1, 70), st.integers(0, 39))
def test_a_row_of_the_gate_does_not_depend_on_its_place(rows, width, at):
    torch.manual_seed(rows)
    x = (4 * torch.randn(rows, 2 * width)).bfloat16()
    at %= rows
    assert torch.equal(bits(layers.gated(x[at : at + 1])), bits(layers.gated(x)[at : at + 1]))
