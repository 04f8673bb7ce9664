"""The FP8 cache: what is stored, what is read, and how far attention over it is from exact attention over BF16."""

from __future__ import annotations

import math

import pytest
import torch

import fp8
from fp8.attention import KVCache, LayerCache, attend
from fp8.errors import ConfigError, ShapeError, TensorError


def filled(dtype="fp8", b=2, h=4, kv=2, t=13, d=16, capacity=4, seed=3):
    """A cache that was filled in three pieces, with the queries, keys and values it was given."""
    torch.manual_seed(seed)
    q, k, v = torch.randn(b, h, t, d), torch.randn(b, kv, t, d) * 3, torch.randn(b, kv, t, d)
    cache = LayerCache(b, kv, d, dtype=dtype, capacity=capacity)
    for start, stop in ((0, 5), (5, 6), (6, t)):
        cache.append(k[:, :, start:stop], v[:, :, start:stop])
    return cache, q, k, v


@pytest.mark.parametrize(("dtype", "name"), [("fp8", "e4m3"), ("e4m3", "e4m3"), ("e5m2", "e5m2")])
@pytest.mark.parametrize("d", [16, 5, 1])
def test_the_codes_are_those_of_quantize_in_bytes(dtype, name, d):
    cache, _, k, v = filled(dtype, d=d)
    for store, x in ((cache.keys, k), (cache.values, v)):
        q = fp8.quantize(x.bfloat16(), name, "row")
        assert torch.equal(store.codes[:, :, :13].view(torch.uint8), q.codes.view(torch.uint8))
        assert store.scale is not None
        assert torch.equal(store.scale[:, :, :13].flatten(), q.scale.flatten())
        assert torch.equal(store.decode(13), q.dequantize())


def test_a_token_does_not_depend_on_its_neighbours_or_its_batch():
    cache, _, k, v = filled()
    alone = LayerCache(1, 2, 16)
    alone.append(k[1:, :, 7:8], v[1:, :, 7:8])
    assert torch.equal(alone.keys.decode(1), cache.keys.decode(13)[1:, :, 7:8])


def exact(q, k, v, causal):
    """Attention in float64, and its softmax weights."""
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if causal:
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
        scores = scores.masked_fill(~seen, float("-inf"))
    return scores.softmax(-1) @ v, scores.softmax(-1), v


def rounding(x, name):
    """The most that storing x can change each element: half a step of its code, and BF16's half step before."""
    row = fp8.FORMATS[name]
    scale = fp8.quantize(x.bfloat16(), name, "row").scale.view(*x.shape[:-1], 1).double()
    stored = x.bfloat16().double().abs()
    return torch.maximum(stored * 2.0 ** -(row.mantissa_bits + 1), scale * row.smallest_subnormal / 2)


@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("t", [13, 4, 1])
def test_the_error_is_within_what_the_data_allows(name, causal, t):
    """Scores moved by at most e change each weight by a factor within exp(+-2e); the values add their own error."""
    cache, q, k, v = filled(name)
    q, k, v = q[:, :, -t:], k.bfloat16(), v.bfloat16()
    want, weights, values = exact(q, k, v, causal)
    repeat = q.shape[1] // k.shape[1]
    e_k, e_v = (rounding(x, name).repeat_interleave(repeat, 1) for x in (k, v))
    e = (q.double().abs() @ e_k.mT / math.sqrt(q.shape[-1])).amax(-1, keepdim=True)
    budget = (torch.expm1(2 * e) * weights) @ (values.abs() + e_v) + weights @ e_v + 1e-5
    error = (cache.attend(q, causal).double() - want).abs()
    assert (error <= budget).all()
    assert error.max() > 1e-4, "an FP8 cache that made no error did not store FP8"


def test_a_bf16_cache_is_exact_but_for_fp32():
    cache, q, k, v = filled("bf16")
    want, _, _ = exact(q, k.bfloat16(), v.bfloat16(), True)
    torch.testing.assert_close(cache.attend(q).double(), want, rtol=1e-5, atol=1e-5)


def test_attending_piece_by_piece_equals_attending_at_once():
    _, q, k, v = filled()
    cache = LayerCache(2, 2, 16, capacity=1)
    pieces = []
    for t in range(13):
        cache.append(k[:, :, t : t + 1], v[:, :, t : t + 1])
        pieces.append(cache.attend(q[:, :, t : t + 1]))
    torch.testing.assert_close(torch.cat(pieces, 2), cache.attend(q), rtol=1e-5, atol=1e-6)


def test_growing_keeps_what_was_stored():
    small, q, _, _ = filled(capacity=1)
    large, _, _, _ = filled(capacity=64)
    assert small.capacity == 16 and large.capacity == 64
    assert torch.equal(small.attend(q), large.attend(q))


def test_autocast_does_not_reach_the_sums():
    cache, q, _, _ = filled()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(cache.attend(q), cache.attend(q).float())
        inside = cache.attend(q)
    assert torch.equal(inside, cache.attend(q))


def test_the_bytes_are_counted():
    cache = KVCache(3, 2, num_kv_heads=4, head_dim=32, capacity=8)
    for layer in cache.layers:
        layer.append(torch.zeros(2, 4, 5, 32), torch.zeros(2, 4, 5, 32))
    assert cache.length == 5
    assert cache.bytes_in_bf16 == 3 * 2 * (2 * 4 * 5 * 32) * 2
    assert cache.nbytes == 3 * 2 * (2 * 4 * 5) * (32 + 4)
    plain = KVCache(1, 2, 4, 32, dtype="bf16")
    plain.layers[0].append(torch.zeros(2, 4, 5, 32), torch.zeros(2, 4, 5, 32))
    assert plain.nbytes == plain.bytes_in_bf16


def test_a_nan_stays_visible():
    cache = LayerCache(1, 1, 4)
    k = torch.ones(1, 1, 2, 4)
    k[0, 0, 1, 2] = float("nan")
    cache.append(k, torch.ones_like(k))
    out = cache.attend(torch.ones(1, 1, 2, 4))
    assert out[0, 0, 0].isfinite().all() and out[0, 0, 1].isnan().all()


def test_errors_say_what_fits():
    cache, q, k, v = filled()
    with pytest.raises(ConfigError, match="Did you mean 'e4m3'"):
        LayerCache(1, 1, 4, dtype="e4m4")
    with pytest.raises(ShapeError, match=r"\[2, 2, T, 16\]"):
        cache.append(k[:1], v[:1])
    with pytest.raises(TensorError, match="floating-point"):
        cache.append(k.long(), v.long())
    with pytest.raises(ShapeError, match="empty"):
        LayerCache(1, 1, 4).attend(q)
    with pytest.raises(ShapeError, match="query heads"):
        attend(q[:, :3], k, v)
