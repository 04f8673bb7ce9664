"""The paged cache: the codes that are stored, what is read, and that neither depends on pages, chunks or company."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fp8.attention import LayerCache
from fp8.attention.paged import PagedCache, attend, reference, rope_attend, rope_write
from fp8.errors import ConfigError, ShapeError, TensorError
from fp8.fused.norm.reference import rstd_of, values
from fp8.fused.rope.reference import rotate, tables
from paged_batches import Sequence, batch_of, bits

H, KV, D = 4, 2, 16
HERE = torch.device("cpu")


def product_of(tokens: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(tokens, (H + 2 * KV) * D, generator=generator)).bfloat16()


def written(qkv, sequence, cache, chunks=None, **norms):
    """Write a sequence chunk by chunk; its queries."""
    out = []
    for n in chunks or [len(qkv)]:
        batch = batch_of([(sequence, n)], cache.page_size)
        rows = qkv[sequence.stored : sequence.stored + n]
        rope = tables(1024, D, 10000.0, HERE)
        out.append(rope_write(rows, batch.positions, batch.slots, cache.layers[0], rope, **norms))
        sequence.stored += n
    return torch.cat(out)


def contiguous(qkv, dtype="fp8"):
    """The same in the contiguous cache, and its queries [1, H, T, D]."""
    heads = qkv.view(len(qkv), -1, D).transpose(0, 1)[None]
    q, k, v = heads.split([H, KV, KV], 1)
    cos, sin = (t[: len(qkv)] for t in tables(1024, D, 10000.0, HERE))
    cache = LayerCache(1, KV, D, dtype=dtype)
    cache.append(rotate(k, cos, sin), v)
    return cache, rotate(q, cos, sin)


def laid_out(stored: torch.Tensor, pages: list[int], tokens: int) -> torch.Tensor:
    """Pages [pages, KV, page_size, ...] in the order of positions, [KV, tokens, ...]."""
    raw = stored.view(torch.uint8) if stored.dtype.itemsize == 1 else stored
    return raw[pages].transpose(0, 1).flatten(1, 2)[:, :tokens]


@pytest.mark.parametrize("dtype", ["fp8", "e5m2", "bf16"])
@pytest.mark.parametrize("page_size", [16, 48])
def test_codes_and_scales_are_those_of_the_contiguous_cache(dtype, page_size):
    qkv, pages = product_of(70), [6, 0, 3, 5, 1]
    cache = PagedCache(1, 7, page_size, KV, D, dtype=dtype)
    q = written(qkv, Sequence([0] * 70, pages), cache, [33, 1, 36])
    plain, turned = contiguous(qkv, dtype)
    assert torch.equal(q.transpose(0, 1), turned[0])
    layer = cache.layers[0]
    for codes, scale, store in (
        (layer.key_codes, layer.key_scale, plain.keys),
        (layer.value_codes, layer.value_scale, plain.values),
    ):
        assert torch.equal(bits(laid_out(codes, pages, 70)), bits(store.codes[0, :, :70]))
        if scale is not None:
            assert store.scale is not None
            assert torch.equal(laid_out(scale, pages, 70), store.scale[0, :, :70])


def test_a_static_scale_a_head_clips_and_counts():
    scales = torch.tensor([[[0.25, 0.001], [0.5, 0.002]]])
    cache = PagedCache(1, 2, 16, KV, D, kv_scales=scales)
    qkv = product_of(20)
    written(qkv, Sequence([0] * 20, [1, 0]), cache)
    k, v = (contiguous(qkv, "fp32")[0].__getattribute__(kind).codes[0, :, :20] for kind in ("keys", "values"))
    layer = cache.layers[0]
    lost = 0
    for x, codes, scale in ((k, layer.key_codes, scales[0, 0]), (v, layer.value_codes, scales[0, 1])):
        scaled = x.bfloat16().float() / scale[:, None, None]
        assert torch.equal(bits(laid_out(codes, [1, 0], 20)), bits(scaled.clamp(-448, 448).to(torch.float8_e4m3fn)))
        lost += int((scaled.abs() > 448).sum())
    assert lost > 100
    assert cache.saturated.item() == lost


def test_heads_are_normed_before_they_are_turned():
    qkv, weights = product_of(5), torch.linspace(0.5, 2, D).bfloat16()
    cache, plain = (PagedCache(1, 1, 16, KV, D, dtype="bf16") for _ in range(2))
    q = written(qkv, Sequence([0] * 5, [0]), cache, q_norm=weights, k_norm=weights, eps=1e-6)
    rows = qkv.view(-1, D).clone()
    normed = values(rows, rstd_of(rows, 1e-6), weights, torch.bfloat16).view(5, -1, D)
    heads = torch.cat([normed[:, : H + KV], qkv.view(5, -1, D)[:, H + KV :]], 1)
    assert torch.equal(q, written(heads.reshape(qkv.shape), Sequence([0] * 5, [0]), plain))
    assert torch.equal(cache.layers[0].key_codes, plain.layers[0].key_codes)
    assert torch.equal(cache.layers[0].value_codes, plain.layers[0].value_codes)


def test_slot_minus_one_writes_nothing():
    cache = PagedCache(1, 2, 16, KV, D)
    rope = tables(1024, D, 10000.0, HERE)
    nowhere = torch.full((3,), -1)
    q = rope_write(product_of(3), torch.arange(3).int(), nowhere, cache.layers[0], rope)
    assert q.shape == (3, H, D)
    assert not cache.layers[0].key_codes.float().any()


@pytest.mark.parametrize("dtype", ["fp8", "e5m2", "bf16"])
@pytest.mark.parametrize("tokens", [1, 17, 300, 530])
def test_attention_is_that_of_the_definition(dtype, tokens):
    """FP32 sums in two orders: within a few units of FP32, and so within one of BF16 once rounded."""
    qkv = product_of(tokens)
    pages = torch.randperm(40, generator=torch.Generator().manual_seed(1))[: -(-tokens // 16)].tolist()
    cache = PagedCache(1, 40, 16, KV, D, dtype=dtype)
    q = written(qkv, Sequence([0] * tokens, pages), cache)
    got = attend(q, cache.layers[0], batch_of([(Sequence([0] * tokens, pages), tokens)]), 1 / math.sqrt(D))
    plain, turned = contiguous(qkv, dtype)
    need = plain.attend(turned.float())[0].transpose(0, 1).reshape(tokens, -1)
    assert ((got.float() - need).abs() <= 2**-8 * need.abs() + 1e-5).all()


def test_an_empty_sequence_of_a_padded_batch_reads_nothing():
    cache = PagedCache(1, 2, 16, KV, D)
    qkv = product_of(2)
    batch = batch_of([(Sequence([0], [0]), 1), (Sequence([0], [1]), 1)])
    batch.lengths[1] = 0
    q = rope_write(qkv, batch.positions, batch.slots, cache.layers[0], tables(1024, D, 10000.0, HERE))
    out = attend(q, cache.layers[0], batch, 0.25)
    assert out[0].any()
    assert not out[1].any()


def test_what_lies_in_pages_beyond_a_sequence_does_not_matter():
    cache = PagedCache(1, 3, 16, KV, D)
    qkv = product_of(20)
    written(qkv, Sequence([0] * 20, [2, 0]), cache)
    last = batch_of([(Sequence([0] * 20, [2, 0], stored=19), 1)])
    q = product_of(1, 5).view(1, -1, D)[:, :H]
    before = attend(q, cache.layers[0], last, 0.25)
    for held in (cache.layers[0].key_codes, cache.layers[0].value_codes):
        held.view(torch.uint8)[0, :, 4:] = 0x7F  # NaN
        held.view(torch.uint8)[1] = 0x7F
    assert torch.equal(bits(attend(q, cache.layers[0], last, 0.25)), bits(before))


@st.composite
def companies(draw):
    """Some sequences, how each is cut into chunks, and a shuffle of pages."""
    lengths = draw(st.lists(st.integers(1, 70), min_size=1, max_size=4))
    chunks = [draw(st.lists(st.integers(1, 70), min_size=1, max_size=6)) for _ in lengths]
    return lengths, chunks, draw(st.permutations(range(20)))


@given(companies(), st.sampled_from(["fp8", "bf16"]))
def test_a_row_does_not_depend_on_company_chunks_or_pages(company, dtype):
    lengths, chunks, order = company
    scale, order = 0.3, list(order)
    shared = PagedCache(1, 20, 16, KV, D, dtype=dtype)
    sequences = [Sequence([0] * n, [order.pop() for _ in range(-(-n // 16))]) for n in lengths]
    products = [product_of(n, seed) for seed, n in enumerate(lengths)]
    rope, found = tables(1024, D, 10000.0, HERE), [[] for _ in lengths]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "PARTITION", 32)
        while any(s.stored < len(s.tokens) for s in sequences):
            work = [(i, min(chunks[i].pop(0) if chunks[i] else 99, len(s.tokens) - s.stored))
                    for i, s in enumerate(sequences) if s.stored < len(s.tokens)]  # fmt: skip
            batch = batch_of([(sequences[i], n) for i, n in work])
            qkv = torch.cat([products[i][sequences[i].stored : sequences[i].stored + n] for i, n in work])
            q = rope_write(qkv, batch.positions, batch.slots, shared.layers[0], rope)
            rows = attend(q, shared.layers[0], batch, scale).split([n for _, n in work])
            for (i, n), part in zip(work, rows, strict=True):
                found[i].append(part)
                sequences[i].stored += n
        for n, qkv, parts in zip(lengths, products, found, strict=True):
            own = PagedCache(1, 5, 16, KV, D, dtype=dtype)
            q = written(qkv, Sequence([0] * n, list(range(5))), own)
            whole = attend(q, own.layers[0], batch_of([(Sequence([0] * n, list(range(5))), n)]), scale)
            assert torch.equal(bits(torch.cat(parts)), bits(whole))


def test_bytes_are_counted():
    for dtype, static, one in (("fp8", False, 20), ("e5m2", True, 16), ("bf16", False, 32)):
        scales = torch.ones(3, 2, KV) if static else None
        cache = PagedCache(3, 5, 32, KV, D, dtype=dtype, kv_scales=scales)
        size = PagedCache.bytes_per_page(3, 32, KV, D, dtype, static)
        assert size == 3 * 2 * KV * 32 * one
        assert cache.nbytes == 5 * size + (3 * 2 * KV * 4 if static else 0)


def test_wrong_requests_are_refused():
    cache = PagedCache(1, 2, 16, KV, D)
    qkv, rope = product_of(2), tables(8, D, 10000.0, HERE)
    at, where = torch.arange(2).int(), torch.arange(2)
    batch = batch_of([(Sequence([0, 0], [0]), 2)])
    with pytest.raises(ConfigError, match=r"stored as 'fp4'\. .*Known: fp8, e4m3, e5m2, bf16"):
        PagedCache(1, 2, 16, KV, D, dtype="fp4")
    with pytest.raises(ConfigError, match="page_size=24 must be a multiple of 16"):
        PagedCache(1, 2, 24, KV, D)
    with pytest.raises(ConfigError, match="at least one layer"):
        PagedCache(1, 0, 16, KV, D)
    with pytest.raises(ShapeError, match=r"FP32 \[1, 2, 2\]; got \[2, 2\]"):
        PagedCache(1, 2, 16, KV, D, kv_scales=torch.ones(2, 2))
    with pytest.raises(TensorError, match="bfloat16, not float32"):
        rope_write(qkv.float(), at, where, cache.layers[0], rope)
    with pytest.raises(ShapeError, match=r"takes \[T, \(H \+ 2 \* 2\) \* 16\]"):
        rope_write(qkv[:, :60], at, where, cache.layers[0], rope)
    with pytest.raises(TensorError, match="bfloat16, not float32"):
        rope_attend(qkv.float(), at, where, cache.layers[0], rope, batch, 1.0)
    with pytest.raises(TensorError, match="bfloat16, not float32"):
        attend(torch.zeros(2, H, D), cache.layers[0], batch, 1.0)
    with pytest.raises(ShapeError, match=r"takes \[T, H, 16\]"):
        attend(torch.zeros(2, 3, D, dtype=torch.bfloat16), cache.layers[0], batch, 1.0)
