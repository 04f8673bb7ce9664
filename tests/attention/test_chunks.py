"""Long chunks of prompts: the plan of calls, what they give on a CPU, the kernels around cuDNN, and cuDNN on a GPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fp8.attention.paged import READERS, Chunk, LayerPages, Request, attend, chunks
from fp8.backends import choose
from paged_batches import bits, on
from paged_cases import CACHES, a_batch, chunked, exactly
from triton_interpreter import run_interpreted

kernels = pytest.importorskip("fp8.attention.paged.triton_chunks")
GPU = torch.device("cuda")
SMALL = {"STEP": 16, "BLOCK": 32, "LARGEST": 64, "LEAST_ROWS": 8, "LEAST_PAIRS": 200}
CASES = [  # (stored, new) of each sequence, query heads, key heads, width, page size
    ([(0, 90)], 4, 2, 16, 16),  # a fresh prompt
    ([(70, 1), (9, 1), (0, 5), (3, 4), (200, 50), (33, 21)], 4, 2, 16, 48),  # two decode, two are short, two are long
    ([(64, 32), (0, 40)], 3, 1, 20, 16),
]
LARGE = [
    ([(0, 1700)], 32, 8, 128, 64),
    ([(700, 1), (3000, 1), (4, 60), (2048, 512), (5000, 700)], 32, 8, 128, 64),
    ([(1000, 1500)], 8, 8, 64, 48),
]


@given(st.integers(0, 300_000), st.integers(1, 20_000))
def test_the_calls_of_a_chunk_cover_each_row_and_key_once_and_have_few_shapes(start: int, rows: int) -> None:
    square, *past = chunks.calls_of(Chunk(start, rows))
    assert square.causal and square.first_row == square.first_key <= start < square.first_key + chunks.BLOCK
    assert square.rows == square.keys >= start + rows - square.first_row
    ends = [0, *(call.first_key + call.keys for call in past)]
    assert [call.first_key for call in past] == ends[:-1] and ends[-1] == square.first_key
    assert all(call.first_row == start and rows <= call.rows < rows + chunks.STEP for call in past)
    shapes = {chunks.BLOCK << i for i in range(6)}
    assert {call.keys for call in past} <= shapes and not any(call.causal for call in past)
    assert len(past) <= 6 + square.first_key // chunks.LARGEST


def allowed(kind: str, exact: torch.Tensor, size: torch.Tensor, layer: LayerPages, q: torch.Tensor, scale: float):
    """The bound of `chunks`. Of all keys that are stored, S takes the largest: a row's own are among them."""
    bound = 2.0**-7.95 * exact.abs() + 1.05 * 2.0**-7 * size
    if kind == "static":
        spread, largest = q.shape[1] // layer.num_kv_heads, layer.key_scale.view(1, -1, 1, 1)
        keys = (layer.key_codes.double().abs() * largest).amax((0, 2)).repeat_interleave(spread, 0)
        score = scale * (q.double().abs() * keys).sum(-1, keepdim=True).expand(q.shape).flatten(1)
        bound = bound + 2.0**-8 * size + 2.0**-7 * score * size
    return bound


def within_the_bound(kind: str, case: tuple, device: torch.device) -> None:
    cache, _, q, batch = a_batch(kind, case, device)
    batch, scale = on(chunked(batch, len(case[0])), device), 0.2 if case[3] < 64 else 0.02
    layer, q = cache.layers[0], q[: len(batch.tokens)].to(device)
    exact, size = exactly(layer, q, batch, scale)
    bound = allowed(kind, exact, size, layer, q, scale)
    found = chunks.attend(q, layer, batch, scale).double()
    assert ((found - exact).abs() <= bound).all(), (kind, case)
    assert all(one_key_more_or_less_fails(found, bound, layer, q, batch, scale))


def one_key_more_or_less_fails(found, bound, layer, q, batch, scale):
    """The control: rows that see one key more, or one less, are outside the bound."""
    for shift in (1, -1):
        moved = dataclasses.replace(batch, positions=(batch.positions + shift).clamp(min=0))
        wrong, _ = exactly(layer, q, moved, scale)
        yield not ((found - wrong).abs() <= bound).all()


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("case", CASES)
def test_runs_and_calls_give_what_the_definition_gives(kind: str, case: tuple, monkeypatch) -> None:
    for name, value in SMALL.items():
        monkeypatch.setattr(chunks, name, value)
    within_the_bound(kind, case, torch.device("cpu"))


def test_neighbours_of_one_kind_go_together_and_a_long_chunk_alone(monkeypatch) -> None:
    for name, value in SMALL.items():
        monkeypatch.setattr(chunks, name, value)
    cache, _, q, batch = a_batch("fp8", CASES[1], torch.device("cpu"))
    found = list(chunks.runs(chunked(batch, 6).chunks, q, cache.layers[0]))
    assert [(what, len(held)) for what, held in found] == [("single", 2), ("short", 2), ("long", 1), ("long", 1)]


def test_without_a_gpu_the_definition_answers_and_says_why() -> None:
    cache, _, q, batch = a_batch("fp8", CASES[0], torch.device("cpu"))
    chosen = choose("attend", READERS, Request(q, cache.layers[0], batch))
    assert chosen.name == "reference" and "it needs a CUDA device" in dict(chosen.refused)["chunks"]


def test_rows_outside_of_the_queries_may_hold_anything() -> None:
    q = torch.arange(5.0).view(5, 1, 1)
    for start, rows in ((-2, 4), (3, 4), (-1, 9), (1, 3)):
        found = chunks.framed(q, start, rows)
        inside = [i for i in range(rows) if 0 <= start + i < 5]
        assert len(found) == rows and found[inside].flatten().tolist() == [start + i for i in inside]


def the_same_keys(kind: str, device: torch.device) -> None:
    for case, first, count, stop in ((CASES[1], 32, 240, 250), (CASES[2], 0, 64, 40)):
        cache, cpu, _, batch = a_batch(kind, case, device)
        s = int(batch.lengths.argmax())
        pages, stop = batch.pages[s], min(stop, int(batch.lengths[s]))
        ours = kernels.gathered(cache.layers[0], pages.to(device), first, count, stop)
        theirs = chunks.gathered(cpu.layers[0], pages, first, count, stop)
        for mine, need in zip(ours, theirs, strict=True):
            assert torch.equal(bits(mine.cpu()), bits(need)), (kind, case)


def the_same_join(device: torch.device, calls: int = 3) -> None:
    torch.manual_seed(0)
    rows, heads, width = 70, 3, 20
    parts = [(torch.randn(rows, heads, width).bfloat16(), 4 * torch.randn(heads, rows + 9 * i)) for i in range(calls)]
    parts = [(given, lse[:, lse.shape[1] - rows :]) for given, lse in parts]
    need, found = torch.empty(2, rows, heads * width).bfloat16()
    chunks.joined(parts, need)
    found = found.to(device)
    kernels.joined([(given.to(device), lse.to(device)) for given, lse in parts], found)
    size = torch.stack([given.float().abs() for given, _ in parts]).amax(0).flatten(1)
    assert ((found.cpu().float() - need.float()).abs() <= 2.0**-8 * need.float().abs() + 1e-5 * size).all()
    one = torch.empty_like(found)
    kernels.joined([(parts[0][0].to(device), parts[0][1].to(device))], one)
    assert torch.equal(one.cpu(), parts[0][0].flatten(1)), "a part alone is copied"


def around(device: torch.device) -> None:
    for kind in CACHES:
        the_same_keys(kind, device)
    the_same_join(device)


def test_the_kernels_around_in_the_interpreter() -> None:
    run_interpreted(__file__, 'test_chunks.around(torch.device("cpu"))')


@pytest.mark.gpu
def test_the_kernels_around_on_the_gpu() -> None:
    around(GPU)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("case", LARGE)
def test_cudnn_gives_what_the_definition_gives(kind: str, case: tuple) -> None:
    assert chunks.why_not_cudnn(GPU, case[1], case[2], case[3]) is None
    within_the_bound(kind, case, GPU)


@pytest.mark.gpu
def test_the_door_takes_batches_apart_only_where_the_host_knows_them() -> None:
    cache, _, q, batch = a_batch("fp8", LARGE[1], GPU)
    known = on(chunked(batch, 5), GPU)
    q = q[: len(known.tokens)].to(GPU)
    chosen = choose("attend", READERS, Request(q, cache.layers[0], known))
    assert chosen.name == "chunks"
    kinds = [what for what, _ in chunks.runs(known.chunks, q, cache.layers[0])]
    assert kinds == ["single", "short", "long", "long"]
    unknown = dataclasses.replace(known, chunks=None)
    assert choose("attend", READERS, Request(q, cache.layers[0], unknown)).name == "triton"
    found, other = (attend(q, cache.layers[0], some, 0.02).float() for some in (known, unknown))
    assert (found - other).norm() <= 2.0**-7 * other.norm()
