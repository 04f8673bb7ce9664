"""Attention for training against its formula in float64."""

from __future__ import annotations

import math

import pytest
import torch

from fp8.attention import attention
from fp8.errors import ShapeError, TensorError


def exact(q, k, v, seen=None, bias=None):
    """The formula, head by head, in float64."""
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if bias is not None:
        scores = scores + bias
    if seen is not None:
        scores = scores.masked_fill(~seen, float("-inf"))
    return torch.nan_to_num(scores.softmax(-1)) @ v


def heads(h=4, kv=2, t=9, s=9, d=8, dtype=torch.float32):
    torch.manual_seed(1)
    shapes = (2, h, t, d), (2, kv, s, d), (2, kv, s, d)
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize(("h", "kv", "d"), [(4, 4, 8), (4, 2, 8), (3, 1, 5), (6, 3, 7)])
def test_grouped_heads_and_odd_sizes(h, kv, d):
    q, k, v = heads(h, kv, d=d)
    torch.testing.assert_close(attention(q, k, v), exact(q, k, v).float())


def test_a_causal_query_sees_no_future():
    q, k, v = heads()
    seen = torch.ones(9, 9, dtype=torch.bool).tril()
    torch.testing.assert_close(attention(q, k, v, causal=True), exact(q, k, v, seen).float())


def test_with_more_keys_than_queries_the_last_query_is_at_the_last_key():
    q, k, v = heads(t=3, s=9)
    seen = torch.ones(3, 9, dtype=torch.bool).tril(6)
    torch.testing.assert_close(attention(q, k, v, causal=True), exact(q, k, v, seen).float())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_a_mask_of_keys(causal, dtype):
    q, k, v = heads()
    mask = torch.ones(2, 9, dtype=dtype)
    mask[0, 6:] = 0
    seen = mask.bool()[:, None, None, :] & (torch.ones(9, 9, dtype=torch.bool).tril() if causal else True)
    torch.testing.assert_close(attention(q, k, v, mask, causal), exact(q, k, v, seen).float())


def test_a_mask_of_pairs_and_an_added_mask():
    q, k, v = heads()
    pairs = torch.rand(2, 9, 9) > 0.4
    torch.testing.assert_close(attention(q, k, v, pairs), exact(q, k, v, pairs[:, None]).float())
    bias = torch.randn(2, 1, 9, 9)
    torch.testing.assert_close(attention(q, k, v, bias), exact(q, k, v, bias=bias).float())
    past = torch.ones(9, 9, dtype=torch.bool).tril()
    torch.testing.assert_close(attention(q, k, v, bias, causal=True), exact(q, k, v, past, bias).float())


def test_a_query_that_may_look_nowhere_gets_zeros():
    q, k, v = heads()
    mask = torch.zeros(2, 9, 9, dtype=torch.bool)
    mask[:, 1:] = True
    out = attention(q, k, v, mask)
    assert (out[:, :, 0] == 0).all() and out.isfinite().all()


def test_gradients():
    q, k, v = heads(dtype=torch.float32)
    twin = [x.detach().double().requires_grad_() for x in (q, k, v)]
    seen = torch.ones(9, 9, dtype=torch.bool).tril()
    attention(q, k, v, causal=True).square().sum().backward()
    exact(twin[0], twin[1], twin[2], seen).square().sum().backward()
    for a, b in zip((q, k, v), twin, strict=True):
        assert a.grad is not None and b.grad is not None
        torch.testing.assert_close(a.grad, b.grad.float(), rtol=1e-4, atol=1e-5)


def test_bf16_stays_bf16():
    q, k, v = heads(dtype=torch.bfloat16)
    out = attention(q, k, v, causal=True)
    assert out.dtype == torch.bfloat16
    seen = torch.ones(9, 9, dtype=torch.bool).tril()
    assert (out.double() - exact(q, k, v, seen)).abs().max() < 2**-7 * v.abs().max()


def test_errors_name_the_shapes():
    q, k, v = heads()
    with pytest.raises(ShapeError, match=r"3 query heads cannot share 2"):
        attention(q[:, :3], k, v)
    with pytest.raises(ShapeError, match=r"q \(2, 4, 9, 8\), k \(2, 2, 9, 5\)"):
        attention(q, k[..., :5], v[..., :5])
    with pytest.raises(TensorError, match="one type"):
        attention(q, k.bfloat16(), v)
    with pytest.raises(ShapeError, match="a mask is"):
        attention(q, k, v, torch.ones(9, dtype=torch.bool))
