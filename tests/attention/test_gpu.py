"""On the GPU: the same cache in bytes, attention within rounding of float64, and a loaded model that runs there."""

from __future__ import annotations

import pytest
import torch

import fp8.nn
from fp8 import checkpoint
from fp8.attention import LayerCache, attention
from fp8.models import Decoder, DecoderConfig, generate

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", ["fp8", "e5m2", "bf16"])
@pytest.mark.parametrize("d", [64, 128, 20])
def test_the_cache_holds_the_same_bytes_as_on_the_cpu(dtype, d):
    torch.manual_seed(0)
    k, v = torch.randn(2, 3, 2, 17, d, dtype=torch.bfloat16).unbind(0)
    here, there = LayerCache(3, 2, d, dtype=dtype), LayerCache(3, 2, d, dtype=dtype, device="cuda")
    here.append(k, v)
    there.append(k.cuda(), v.cuda())
    for ours, theirs in ((here.keys, there.keys), (here.values, there.values)):
        assert torch.equal(ours.codes.view(torch.uint8), theirs.codes.cpu().view(torch.uint8))
        assert torch.equal(ours.decode(17), theirs.decode(17).cpu())


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention_and_its_gradients_on_the_gpu(mask, causal, dtype):
    torch.manual_seed(0)
    shapes = (2, 8, 200, 64), (2, 2, 200, 64), (2, 2, 200, 64)
    q, k, v = (torch.randn(shape).to(dtype).cuda().requires_grad_() for shape in shapes)
    exact = [x.detach().double().cpu().requires_grad_() for x in (q, k, v)]
    seen = torch.ones(2, 200, dtype=torch.bool)
    seen[0, 150:] = False
    out = attention(q, k, v, seen.cuda() if mask else None, causal)
    want = attention(exact[0], exact[1], exact[2], seen if mask else None, causal)
    out.square().sum().backward()
    want.square().sum().backward()
    share = 2.0**-7 if dtype == torch.bfloat16 else 1e-4
    for have, need in ((out, want), *((a.grad, b.grad) for a, b in zip((q, k, v), exact, strict=True))):
        assert have is not None and need is not None
        assert (have.cpu().double() - need).norm() <= share * need.norm()


@pytest.mark.parametrize("recipe", ["rowwise", "blockwise"])
def test_a_checkpoint_generates_on_the_gpu(recipe, tmp_path):
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(257, 256, 384, 2, 4, 2, max_positions=64))
    fp8.nn.convert(model, recipe)
    checkpoint.save(model, tmp_path / "out")
    here, there = checkpoint.load(tmp_path / "out"), checkpoint.load(tmp_path / "out", "cuda")
    tokens = torch.randint(0, 257, (2, 9))
    with torch.no_grad():
        a, b = here(tokens).float(), there(tokens.cuda()).float().cpu()
    assert (a - b).norm() <= 2.0**-4 * a.norm(), "more than flipped codes account for"
    cached, plain = (generate(there, [1, 2, 3], 12, kv_cache_dtype=kind) for kind in ("fp8", None))
    assert len(cached.tokens) == len(plain.tokens) == 12
