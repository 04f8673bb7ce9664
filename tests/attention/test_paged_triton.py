"""The paged cache's kernels: in Triton's interpreter on a CPU, and on a Hopper GPU, held against the reference."""

from __future__ import annotations

import pytest
import torch

from fp8.attention.paged import PagedCache, attend, reference, rope_write
from fp8.fused.rope.reference import tables
from paged_batches import Sequence, batch_of, bits, on
from triton_interpreter import run_interpreted

triton = pytest.importorskip("fp8.attention.paged.triton")
GPU = torch.device("cuda")
CACHES = ("fp8", "e5m2", "bf16", "static")
WRITES = [(5, 4, 2, 16, 16), (70, 4, 2, 20, 48)]  # tokens, query heads, key heads, width, page size
READS = [  # (stored, new) of each sequence, query heads, key heads, width, page size
    ([(0, 1), (270, 1), (17, 1)], 4, 2, 16, 16),
    ([(63, 1), (256, 1)], 3, 1, 32, 64),
    ([(0, 1), (5, 20), (270, 3)], 4, 2, 16, 16),
    ([(0, 90)], 6, 2, 20, 64),
]


def made(kind: str, pages: int, page_size: int, kv: int, width: int, device: torch.device) -> PagedCache:
    scales = 2.0 ** torch.arange(-6, -6 + 2 * kv).view(1, 2, kv) * 1.3 if kind == "static" else None
    dtype = "fp8" if kind == "static" else kind
    return PagedCache(1, pages, page_size, kv, width, dtype=dtype, kv_scales=scales, device=device)


def the_same_bytes(kind: str, shape: tuple[int, ...], norms: bool, device: torch.device) -> None:
    tokens, heads, kv, width, page_size = shape
    torch.manual_seed(0)
    qkv = (3 * torch.randn(tokens, (heads + 2 * kv) * width)).bfloat16()
    qkv[0, :7], qkv[1, -3:] = 0, torch.tensor([float("inf"), float("nan"), -0.0])
    slots = torch.randperm(2 * tokens + page_size)[:tokens]
    slots[1::5] = -1
    weights = [torch.rand(width).bfloat16() + 0.5 for _ in range(2)] if norms else [None, None]
    found = []
    for run, where in ((reference.rope_write, torch.device("cpu")), (triton.rope_write, device)):
        cache = made(kind, 2 * tokens // page_size + 2, page_size, kv, width, where)
        rope = tuple(t.to(where) for t in tables(512, width, 1e4, torch.device("cpu")))
        at = (torch.arange(tokens, dtype=torch.int32) * 7 % 300).to(where)
        given = (None if w is None else w.to(where) for w in weights)
        q = run(qkv.to(where), at, slots.to(where), cache.layers[0], rope, *given, eps=1e-5)
        layer = cache.layers[0]
        held = (q, layer.key_codes, layer.value_codes, layer.key_scale, layer.value_scale, layer.saturated)
        found.append([bits(t.cpu()) for t in held if t is not None])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs), (kind, shape, norms)


def a_batch(kind: str, case: tuple, device: torch.device):
    """A full cache, queries, and a batch of sequences whose pages lie in disorder; one more reads nothing."""
    lengths, heads, kv, width, page_size = case
    torch.manual_seed(1)
    needed = [-(-(stored + new) // page_size) for stored, new in lengths]
    numbers = torch.randperm(sum(needed) + 1).tolist()
    work = [(Sequence([0] * (a + b), [numbers.pop() for _ in range(n)], a), b)
            for (a, b), n in zip(lengths, needed, strict=True)]  # fmt: skip
    work.append((Sequence([0], [0]), 1))
    batch = batch_of(work, page_size)
    batch.lengths[-1] = 0
    cache = made(kind, sum(needed) + 1, page_size, kv, width, device)
    rows = cache.pages * page_size
    qkv = torch.randn(rows, 3 * kv * width) * torch.randn(rows, 1).exp2()
    rope = tables(rows, width, 1e4, torch.device("cpu"))
    cpu = made(kind, sum(needed) + 1, page_size, kv, width, torch.device("cpu"))
    at = torch.arange(rows)
    reference.rope_write(qkv.bfloat16(), at.int(), at, cpu.layers[0], rope)
    for ours, theirs in zip(vars(cache.layers[0]).values(), vars(cpu.layers[0]).values(), strict=True):
        if ours is not None:
            bits_of = (t.view(torch.uint8) if t.dtype.itemsize == 1 else t for t in (ours, theirs))
            next(bits_of).copy_(next(bits_of))
    q = (2 * torch.randn(len(batch.tokens), heads, width)).bfloat16()
    return cache, cpu, q, batch


def exactly(layer, q: torch.Tensor, batch, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in FP64, and the same weighted sum of |v|: [T, H * D] each."""
    out, size = [], []
    for s in range(len(batch.lengths)):
        parts = list(reference.partitions(layer, batch.pages[s], int(batch.lengths[s])))
        for row in range(int(batch.starts[s]), int(batch.starts[s + 1])):
            if not parts:
                out.append(torch.zeros(q.shape[1] * q.shape[2]).double())
                size.append(out[-1])
                continue
            keys, values = (torch.cat(t, 1)[:, : int(batch.positions[row]) + 1].double()
                            for t in zip(*parts, strict=True))  # fmt: skip
            heads = q[row].double().view(layer.num_kv_heads, -1, q.shape[2])
            weights = (heads @ keys.mT * scale).softmax(-1)
            out.append((weights @ values).flatten())
            size.append((weights @ values.abs()).flatten())
    return torch.stack(out), torch.stack(size)


def within_the_bound(kind: str, case: tuple, device: torch.device) -> None:
    cache, cpu, q, batch = a_batch(kind, case, device)
    exact, size = exactly(cpu.layers[0], q, batch, 0.2)
    found = triton.attend(q.to(device), cache.layers[0], on(batch, device), 0.2).cpu().double()
    share = 2.0**-8 if kind == "bf16" else 2.0**-11
    allowed = 2.0**-7.95 * exact.abs() + 1.05 * share * size + 2.0**-38 * int(batch.lengths.max()) * size.max()
    assert ((found - exact).abs() <= allowed).all(), (kind, case)
    assert not found[-1].any()


def all_of_it(device: torch.device) -> None:
    for i, kind in enumerate(CACHES):
        the_same_bytes(kind, WRITES[0], i % 2 == 0, device)
        the_same_bytes(kind, WRITES[1], i % 2 == 1, device)
        for case in READS[:: 1 if kind == "fp8" else 2]:
            within_the_bound(kind, case, device)


@pytest.mark.gpu
def test_codes_and_attention_on_the_gpu():
    all_of_it(GPU)
    for kind in CACHES:
        the_same_bytes(kind, (100, 32, 8, 128, 64), True, GPU)
        within_the_bound(kind, ([(1000, 1), (70, 1), (4000, 1)], 32, 8, 128, 64), GPU)
        within_the_bound(kind, ([(1000, 90), (0, 100), (77, 1)], 32, 8, 128, 64), GPU)


@pytest.mark.gpu
@pytest.mark.parametrize("decode", [True, False])
def test_a_row_has_the_same_bits_in_any_company(decode):
    cache, _, q, batch = a_batch("fp8", ([(1000, 1), (70, 1), (4000, 1)], 32, 8, 128, 64), GPU)
    batch, q = on(batch, GPU), q.cuda()
    whole = (
        triton.attend(q, cache.layers[0], batch, 0.1)
        if decode
        else triton.attend_chunks(q, cache.layers[0], batch, 0.1)
    )
    for s in range(3):
        one = on(batch_of([(Sequence([0], [0]), 1)]), GPU)
        one.lengths[:], one.positions[:] = batch.lengths[s], batch.positions[s]
        alone = type(one)(**{**vars(one), "pages": batch.pages[s : s + 1]})
        run = triton.attend_decode if decode else triton.attend_chunks
        assert torch.equal(run(q[s : s + 1], cache.layers[0], alone, 0.1), whole[s : s + 1])


@pytest.mark.gpu
def test_the_gpu_takes_the_kernels():
    cache = made("fp8", 2, 64, 2, 64, GPU)
    qkv = torch.randn(3, 8 * 64, device=GPU).bfloat16()
    batch = on(batch_of([(Sequence([0] * 3, [1]), 3)], 64), GPU)
    q = rope_write(qkv, batch.positions, batch.slots, cache.layers[0], tables(64, 64, 1e4, GPU))
    assert attend(q, cache.layers[0], batch, 0.1).isfinite().all()


def test_codes_and_attention_in_the_interpreter():
    """The kernels' indices, masks, scales and roundings; a tensor core's sums are FP32 sums there."""
    run_interpreted(__file__, 'test_paged_triton.all_of_it(torch.device("cpu"))')
