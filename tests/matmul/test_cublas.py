"""cuBLASLt's door: what it refuses and why, the layouts it is given, and, on a Hopper GPU, its bits."""

from __future__ import annotations

import pytest
import torch

from fp8 import Quantized, Tile, explain_matmul, matmul, quantize
from fp8.formats import format_of
from fp8.matmul import Request, cublas, emulate
from fp8.matmul.budget import budget, exact_product
from waiting import never_waits

PAIRS = [("e4m3", "e4m3"), ("e4m3", "e5m2"), ("e5m2", "e4m3")]
CONSTANT = [("tensor", "tensor"), ("row", "row"), ("row", "tensor"), ("tensor", "row")]
BLOCKS = [("1x128", "128x128"), ("128x128", "1x128"), ("1x128", "1x128")]
ODD = [(1, 1, 1), (5, 7, 33), (104, 200, 300), (130, 257, 513)]
ONE = torch.ones(1, 1)
gpu = pytest.mark.gpu


def request(tiles: tuple[str, str], formats=("e4m3", "e4m3"), accumulate: str = "promoted") -> Request:
    tile_a, tile_b = map(Tile.of, tiles)
    device = torch.device("cuda", 0)
    return Request(device, formats[0], formats[1], tile_a, tile_b, (64, 64, 64), torch.bfloat16, accumulate, None)


# ------------------------------------------------------------------------------- what it refuses


@pytest.mark.parametrize("tiles", CONSTANT + BLOCKS, ids="*".join)
def test_takes_what_hopper_takes(tiles):
    assert cublas.why_not(request(tiles)) is None


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (request(("tensor", "tensor"), ("e5m2", "e5m2")), "E5M2"),
        (request(("1x32", "1x32")), "Blackwell"),
        (request(("128x128", "128x128")), "1x128 on at least one side"),
        (request(("row", "1x128")), "does not combine the tiles row and 1x128"),
        (request(("1x128", "128x128"), accumulate="fast"), "accumulate='promoted'"),
    ],
)
def test_refuses_with_a_reason(asked, reason):
    assert reason in (cublas.why_not(asked) or "")


def test_on_a_cpu_the_choice_says_why():
    a = quantize(torch.ones(4, 4))
    reasons = dict(explain_matmul(a, a).refused)
    assert "CUDA" in reasons["cublas"]


# ------------------------------------------------------------------------------- the layouts, on a CPU


def fake_scaled_mm(a, b, scale_a, recipe_a, scale_b, recipe_b, swizzle_a, swizzle_b, output_dtype):
    """Checks what the GPU requires, reads each scale where the layout puts it, and multiplies exactly."""
    assert a.is_contiguous() and b.t().is_contiguous()
    assert a.shape[0] % 8 == 0 and b.shape[1] % 16 == 0 and a.shape[1] % 128 == 0
    left = read(a, scale_a, recipe_a.name)
    right = read(b.t(), scale_b, recipe_b.name)
    return (left @ right.t()).to(output_dtype)


def read(codes: torch.Tensor, scale: torch.Tensor, recipe: str) -> torch.Tensor:
    rows, depth = codes.shape
    blocks = depth // 128
    if recipe == "BlockWise1x128":
        assert scale.shape == (rows, blocks) and scale.stride() == (1, rows)
        wide = scale.repeat_interleave(128, 1)
    else:
        padded = -(-blocks // 4) * 4
        assert rows % 128 == 0 and scale.shape == (padded, rows // 128) and scale.stride() == (1, padded)
        wide = scale[:blocks].t().repeat_interleave(128, 0).repeat_interleave(128, 1)
    return codes.double() * wide.double()


@pytest.mark.parametrize("shape", [*ODD, (8, 128, 1408), (256, 128, 256)], ids=str)
@pytest.mark.parametrize("tiles", BLOCKS, ids="*".join)
def test_block_scales_reach_their_blocks(tiles, shape, monkeypatch):
    """K = 1408 is 11 blocks of 128, not a multiple of 4: the case that `torch._scaled_mm` gets silently wrong."""
    monkeypatch.setattr(torch.nn.functional, "scaled_mm", fake_scaled_mm)
    rows, cols, depth = shape
    torch.manual_seed(0)
    a, b = quantize(torch.randn(rows, depth), "e4m3", tiles[0]), quantize(torch.randn(cols, depth), "e4m3", tiles[1])
    bias = torch.randn(cols)
    found = cublas.matmul(a, b, torch.float32, "promoted", bias)
    expected = exact_product(a, b, bias)
    assert found.shape == (rows, cols)
    assert torch.allclose(found.double(), expected, rtol=1e-6, atol=1e-5)


def fake_v1(a, b, scale_a, scale_b, out_dtype, use_fast_accum):
    rows, cols = a.shape[0], b.shape[1]
    assert a.is_contiguous() and b.t().is_contiguous() and a.shape[1] % 16 == 0 and cols % 16 == 0
    assert (scale_a.numel() == scale_b.numel() == 1) or (scale_a.shape == (rows, 1) and scale_b.shape == (1, cols))
    assert scale_a.is_contiguous() and scale_b.is_contiguous()
    left, right = (Quantized(codes, ONE, Tile.of("tensor"), format_of(codes.dtype)) for codes in (a, b.t()))
    return (matmul(left, right, torch.float32, "exact") * (scale_a * scale_b)).to(out_dtype)


@pytest.mark.parametrize("shape", ODD, ids=str)
@pytest.mark.parametrize("tiles", CONSTANT, ids="*".join)
def test_any_shape_is_padded_inside(tiles, shape, monkeypatch):
    monkeypatch.setattr(torch, "_scaled_mm", fake_v1)
    rows, cols, depth = shape
    torch.manual_seed(0)
    a = quantize(torch.randn(rows, depth), "e4m3", tiles[0], "none")
    b = quantize(torch.randn(cols, depth), "e5m2", tiles[1], "none")
    for bias in (None, torch.randn(cols)):
        found = cublas.matmul(a, b, torch.bfloat16, "fast", bias)
        assert found.is_contiguous() and torch.equal(found, matmul(a, b, torch.bfloat16, "exact", bias))


def test_nothing_is_copied_when_nothing_is_missing():
    q = quantize(torch.randn(128, 512), "e4m3", "1x128")
    stored = q.scale.t().contiguous().t()
    ready = Quantized(q.codes, stored, q.tile, q.format)
    assert cublas._padded(q.codes, 16, 16).data_ptr() == q.codes.data_ptr()
    assert cublas._along_k(ready, 128).data_ptr() == stored.data_ptr()
    square = quantize(torch.randn(256, 512), "e4m3", "128x128")
    assert cublas._along_k(square, 256).data_ptr() == square.scale.data_ptr()


@pytest.mark.parametrize("shape", [(0, 4, 32), (4, 0, 32), (4, 5, 0)])
def test_empty_dimensions(shape):
    rows, cols, depth = shape
    a, b = quantize(torch.zeros(rows, depth)), quantize(torch.zeros(cols, depth))
    found = cublas.matmul(a, b, torch.bfloat16, "fast", torch.ones(cols))
    assert found.shape == (rows, cols) and bool((found == 1).all())


# ------------------------------------------------------------------------------- on a Hopper GPU


def pair(shape, tiles, formats=("e4m3", "e4m3"), rounding="none", positive=False) -> tuple[Quantized, Quantized]:
    torch.manual_seed(0)
    rows, cols, depth = shape
    x, w = torch.randn(rows, depth, device="cuda"), torch.randn(cols, depth, device="cuda")
    x, w = (x.abs(), w.abs()) if positive else (x, w)
    return quantize(x, formats[0], tiles[0], rounding), quantize(w, formats[1], tiles[1], rounding)


@gpu
@pytest.mark.parametrize("accumulate", ["fast", "promoted"])
@pytest.mark.parametrize("tiles", CONSTANT, ids="*".join)
@pytest.mark.parametrize("formats", PAIRS, ids="*".join)
def test_equals_the_emulated_accumulator(formats, tiles, accumulate):
    for positive in (False, True):
        a, b = pair((256, 256, 1024), tiles, formats, positive=positive)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            found = matmul(a, b, dtype, accumulate, backend="cublas")
            model = emulate.matmul(a, b, dtype, f"hopper_{accumulate}", None, splits=1)
            assert torch.equal(found, model)


@gpu
@pytest.mark.parametrize("rounding", ["power_of_two", "none"])
@pytest.mark.parametrize("tiles", BLOCKS, ids="*".join)
def test_equals_the_emulated_blocks(tiles, rounding):
    a, b = pair((256, 256, 1408), tiles, rounding=rounding)
    found = matmul(a, b, torch.float32, "promoted", backend="cublas")
    assert torch.equal(found, emulate.matmul(a, b, torch.float32, "hopper_promoted", None, splits=1))


@gpu
@pytest.mark.parametrize("shape", ODD, ids=str)
@pytest.mark.parametrize("tiles", CONSTANT + BLOCKS, ids="*".join)
def test_any_shape_is_within_its_budget(tiles, shape):
    a, b = pair(shape, tiles)
    bias = torch.randn(shape[1], device="cuda")
    for dtype, given in ((torch.bfloat16, None), (torch.float16, bias), (torch.float32, bias.bfloat16())):
        found = matmul(a, b, dtype, "promoted", given, backend="cublas")
        error = (found.double() - exact_product(a, b, given)).abs()
        assert found.dtype == dtype and found.is_contiguous()
        assert bool((error <= budget(a, b, dtype, "promoted", given, certain=True)).all())


@gpu
def test_a_scale_may_lie_at_any_address():
    a, b = pair((64, 64, 64), ("tensor", "tensor"))
    row = torch.ones(3, device="cuda")
    row[1:2].copy_(a.scale.view(1))
    elsewhere = Quantized(a.codes, row[1:2].view(1, 1), a.tile, a.format)
    assert row[1:2].data_ptr() % 16 != 0
    assert torch.equal(matmul(elsewhere, b, backend="cublas"), matmul(a, b, backend="cublas"))


@gpu
@pytest.mark.parametrize("tiles", CONSTANT + BLOCKS, ids="*".join)
def test_reads_nothing_on_the_host(tiles):
    a, b = pair((130, 257, 513), tiles)
    bias = torch.randn(257, device="cuda")
    matmul(a, b, backend="cublas")
    with never_waits():
        matmul(a, b, bias=bias, backend="cublas")


@gpu
@pytest.mark.parametrize("tiles", [("tensor", "tensor"), ("1x128", "128x128")], ids="*".join)
def test_runs_in_a_captured_graph(tiles):
    a, b = pair((256, 256, 512), tiles)
    expected = matmul(a, b, backend="cublas")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = matmul(a, b, backend="cublas")
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(found, expected)
