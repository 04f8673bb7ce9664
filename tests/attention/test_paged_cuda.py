"""Decode attention in CUDA: its plan, its resources where NVRTC is, its sums on a GPU and, with g++, here."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import cuda_on_cpu
from fp8 import nvrtc
from fp8.attention.paged import LayerPages, PagedCache, cuda, reference
from fp8.formats import format_of
from fp8.fused.rope.reference import tables
from fp8.fused.rows import Into, row_codes
from fp8.serve.batch import Batch
from fp8.tile import Tile
from sass import resources

CONSTANTS = {
    "GROUP": 4, "E4M3": 1, "DYNAMIC": 1, "PAGE": 64, "PART": 512, "FEW": 128, "SHORT": 2048, "WARPS": 4, "STAGES": 2,
    "TURN": 1,
}  # fmt: skip
gpu = pytest.mark.gpu
KV = 2


@pytest.mark.skipif(nvrtc.why_not() is not None, reason="NVRTC is not installed")
@pytest.mark.parametrize("other", [{}, {"TURN": 0}, {"DYNAMIC": 0}, {"GROUP": 8, "E4M3": 0}])
def test_no_register_is_spilled(other: dict[str, int], tmp_path) -> None:
    used = resources(nvrtc.build(cuda.SOURCE, CONSTANTS | other, "90"), tmp_path)
    assert used["STACK"] == 0 and used["REG"] * 32 <= cuda.REGISTERS


@pytest.mark.parametrize("group", range(1, 9))
def test_at_least_two_blocks_share_a_multiprocessor(group: int) -> None:
    plan = cuda.Plan()
    assert plan.blocks(plan.shared(group, True)) >= 2 and plan.few % (16 * plan.warps) == plan.keys % plan.few == 0


def batch_of(lengths: list[int], page_size: int, shuffled: bool = True) -> Batch:
    need = [-(-n // page_size) for n in lengths]
    numbers = torch.randperm(sum(need)) if shuffled else torch.arange(sum(need))
    pages = torch.zeros(len(lengths), max(need), dtype=torch.int32)
    for s, some in enumerate(numbers.split(need)):
        pages[s, : len(some)] = some
    every = torch.arange(len(lengths) + 1)
    stored = torch.tensor(lengths, dtype=torch.int32)
    return Batch(every[:-1], stored - 1, every[:-1], every.int(), stored, pages, every[:-1], True)


def layer_of(kind: str, pages: int, page_size: int) -> LayerPages:
    scales = 2.0 ** torch.arange(-6, -6 + 2 * KV).view(1, 2, KV) * 1.3 if kind == "static" else None
    dtype = "fp8" if kind == "static" else kind
    layer = PagedCache(1, pages, page_size, KV, 128, dtype=dtype, kv_scales=scales).layers[0]
    for codes in (layer.key_codes, layer.value_codes):
        codes.copy_(torch.randn(codes.shape) * 20)
    if not layer.static:
        for scale in (layer.key_scale, layer.value_scale):
            assert scale is not None
            scale.copy_(torch.randint(-8, -3, scale.shape).float().exp2())
    return layer


def on(record, device: str):
    return type(record)(*(v.to(device) if isinstance(v, torch.Tensor) else v for v in vars(record).values()))


def within_its_bound(
    kind: str, heads: int, page_size: int, lengths: list[int], device: str, use: cuda.Plan | None = None
) -> None:
    torch.manual_seed(0)
    batch, count = batch_of(lengths, page_size), len(lengths)
    layer = layer_of(kind, int(batch.pages.max()) + 1, page_size)
    q = torch.randn(count, heads, 128).bfloat16()
    y = cuda.attend(q.to(device), on(layer, device), on(batch, device), 0.09, use).cpu().double()
    y = y.view(count, heads, 128)
    for s, length in enumerate(lengths):
        if length == 0:
            assert not y[s].any()
            continue
        parts = list(reference.partitions(layer, batch.pages[s], length))
        k, v = (torch.cat(some, 1)[:, :length].double() for some in zip(*parts, strict=True))
        k, v = (t.repeat_interleave(heads // KV, 0) for t in (k, v))
        weights = (torch.einsum("hd,hkd->hk", q[s].double(), k) * 0.09).softmax(-1)
        exact = torch.einsum("hk,hkd->hd", weights, v)
        size = torch.einsum("hk,hkd->hd", weights, v.abs())
        allowed = 2.0**-8 * exact.abs() + 2.0**-11 * size + 2.0**-36 * length * v.abs().amax()
        assert ((y[s] - exact).abs() <= allowed).all(), (kind, s)


def the_same_bits_in_company(lengths: list[int], device: str) -> None:
    """And on other pages."""
    torch.manual_seed(1)
    batch = on(batch_of(lengths, 64, shuffled=False), device)
    layer = on(layer_of("fp8", int(batch.pages.max()) + 1, 64), device)
    q = torch.randn(len(lengths), 8, 128).bfloat16().to(device)
    whole = cuda.attend(q, layer, batch, 0.09)
    order = torch.randperm(layer.key_codes.shape[0]).to(device)
    moved = LayerPages(
        *(t.view(torch.uint8)[order].view(t.dtype) for t in (layer.key_codes, layer.value_codes)),
        *(t[order] for t in (layer.key_scale, layer.value_scale) if t is not None), layer.saturated,
    )  # fmt: skip
    where = order.argsort().int()
    for s, length in enumerate(lengths):
        alone = on(batch_of([length], 64), device)
        pages = batch.pages[s : s + 1]
        for cache, table in ((layer, pages), (moved, where[pages.long()])):
            one = dataclasses.replace(alone, pages=table)
            for early in (True, False) if device == "cuda" else (True,):
                assert torch.equal(cuda.attend(q[s : s + 1], cache, one, 0.09, early=early), whole[s : s + 1])


def turned_and_stored_as_defined(kind: str, heads: int, page_size: int, lengths: list[int], device: str) -> None:
    """`rope_attend` is `attend` after `rope_write`, to the bit, and stores its bytes."""
    torch.manual_seed(2)
    batch, count = batch_of(lengths, page_size), len(lengths)
    last = batch.positions.clamp(min=0).long()
    slots = batch.pages.gather(1, last[:, None] // page_size)[:, 0].long() * page_size + last % page_size
    slots[batch.lengths == 0] = -1
    qkv = (torch.randn(count, (heads + 2 * KV) * 128) * 40).bfloat16()
    rope = tables(max(lengths) + 1, 128, 1e4, torch.device("cpu"))
    found = []
    for fused in (False, True):
        torch.manual_seed(3)
        layer = layer_of(kind, int(batch.pages.max()) + 1, page_size)
        q = qkv if fused else reference.rope_write(qkv, last.int(), slots, layer, rope)
        q, on_it, there = q.to(device), on(layer, device), on(batch, device)
        if fused:
            given = last.int().to(device), slots.to(device), on_it, tuple(t.to(device) for t in rope), there
            y, clipped = cuda.rope_attend(q, *given, 0.02), on_it.saturated.clone()
            if device == "cuda":  # clusters are not emulated
                into = Into(format_of("e4m3"), Tile.of("row"))
                codes, wanted = cuda.rope_attend(q, *given, 0.02, into), row_codes(y, into)
                assert torch.equal(codes.codes.view(torch.uint8), wanted.codes.view(torch.uint8))
                assert torch.equal(codes.scale, wanted.scale)
                on_it.saturated.copy_(clipped)
        else:
            y = cuda.attend(q, on_it, there, 0.02)
        held = [y, on_it.key_codes, on_it.value_codes, on_it.key_scale, on_it.value_scale, on_it.saturated]
        found.append([t.cpu().view(torch.uint8) for t in held if t is not None])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs), kind
    assert kind != "static" or found[0][-1].any()


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    if (reason := cuda_on_cpu.why_not()) is not None:
        pytest.skip(reason)
    cuda_on_cpu.on_cpu(monkeypatch)


@pytest.mark.parametrize(("kind", "heads", "page_size"), [("fp8", 8, 64), ("e5m2", 2, 16), ("static", 6, 48)])
def test_here_attention_is_within_its_bound(here, kind: str, heads: int, page_size: int) -> None:
    within_its_bound(kind, heads, page_size, [1, 0, 17, 140], "cpu")


def test_here_long_sequences_have_larger_partitions(here) -> None:
    within_its_bound("fp8", 4, 48, [60, 129, 200], "cpu", cuda.Plan(64, 32, 128, 2, 3))


def test_here_a_row_has_the_same_bits_alone_in_company_and_on_other_pages(here) -> None:
    the_same_bits_in_company([3, 140], "cpu")


@pytest.mark.parametrize(("kind", "soon"), [("fp8", True), ("e5m2", False), ("static", True)])
def test_here_queries_are_turned_and_keys_and_values_stored_as_defined(here, monkeypatch, kind: str, soon) -> None:
    monkeypatch.setattr(cuda, "soon", lambda device: soon)  # as in a graph
    turned_and_stored_as_defined(kind, 4, 48, [0, 1, 50, 130], "cpu")


@gpu
@pytest.mark.parametrize("kind", ["fp8", "e5m2", "static"])
@pytest.mark.parametrize(("heads", "page_size"), [(8, 64), (2, 16)])
def test_queries_are_turned_and_keys_and_values_stored_as_defined(kind: str, heads: int, page_size: int) -> None:
    turned_and_stored_as_defined(kind, heads, page_size, [0, 1, 50, 130, 1025, 2048, 5000], "cuda")


@gpu
@pytest.mark.parametrize("kind", ["fp8", "e5m2", "static"])
@pytest.mark.parametrize(("heads", "page_size"), [(8, 64), (2, 16), (16, 48)])
def test_attention_is_within_its_bound(kind: str, heads: int, page_size: int) -> None:
    within_its_bound(kind, heads, page_size, [1, 17, 600, 0, 512, 2048, 2049, 5000], "cuda")


@gpu
def test_a_row_has_the_same_bits_alone_in_company_and_on_other_pages() -> None:
    the_same_bits_in_company([700, 3, 2049, 512, 0, 7000], "cuda")
