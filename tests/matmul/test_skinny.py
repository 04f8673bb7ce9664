"""Products of few rows: in Triton's interpreter and on a Hopper GPU, within the budget of their sum."""

from __future__ import annotations

import pytest
import torch

from fp8 import quantize
from fp8.matmul.budget import budget, exact_product
from fp8.matmul.skinny import reference, skinny
from triton_interpreter import run_interpreted

triton = pytest.importorskip("fp8.matmul.skinny.triton")
GPU = torch.device("cuda")
TILES = [("row", "row"), ("tensor", "tensor"), ("row", "tensor"), ("tensor", "row"), ("1x128", "128x128")]
SHAPES = [(1, 100, 1024), (5, 64, 336), (20, 130, 512)]


def within_its_budget(shape, tiles, device, accumulate):
    rows, cols, depth = shape
    torch.manual_seed(0)
    x, w = torch.randn(rows, depth), torch.randn(cols, depth) * torch.randn(cols, 1).exp2()
    bias = torch.randn(cols).bfloat16()
    a, b = (quantize(t.to(device), "e4m3", tile) for t, tile in zip((x, w), tiles, strict=True))
    for given, dtype in ((None, torch.float32), (bias.to(device), torch.bfloat16)):
        found = triton.skinny(a, b, dtype, given, None)
        allowed = budget(a, b, dtype, accumulate, given, splits=triton.plan(cols, depth, True).splits)
        assert ((found.double() - exact_product(a, b, given)).abs() <= allowed).all(), (shape, tiles, dtype)
        residual = torch.randn(rows, cols).to(device, dtype)
        assert torch.equal(triton.skinny(a, b, dtype, given, residual), residual + found)


def bf16_products(shape, device):
    rows, cols, depth = shape
    torch.manual_seed(0)
    x, w = (torch.randn(n, depth).bfloat16().to(device) for n in (rows, cols))
    residual = torch.randn(rows, cols).bfloat16().to(device)
    exact, size = x.double() @ w.double().t(), x.double().abs() @ w.double().abs().t()
    wide = triton.skinny(x, w, torch.float32, None, None)
    assert ((wide.double() - exact).abs() <= 2.0**-20 * size).all()
    assert torch.equal(triton.skinny(x, w, torch.bfloat16, None, residual), residual + wide.bfloat16())
    close = reference.skinny(x, w, torch.float32, None, None)
    assert ((wide - close).abs() <= 2.0**-20 * size).all()


def all_of_it(device: torch.device, accumulate: str) -> None:
    for tiles in TILES:
        for shape in SHAPES:
            within_its_budget(shape, tiles, device, accumulate)
    for shape in SHAPES:
        bf16_products(shape, device)
    assert device.type != "cpu" or not triton.tickets_of(device).any()


@pytest.mark.gpu
def test_products_on_the_gpu():
    all_of_it(GPU, "promoted")
    for rows in (1, 16, 33, 64):
        for cols, depth in ((6144, 4096), (4096, 14336)):
            within_its_budget((rows, cols, depth), ("row", "row"), GPU, "promoted")
            within_its_budget((rows, cols, depth), ("1x128", "128x128"), GPU, "promoted")
    assert not triton.tickets_of(GPU).any()


@pytest.mark.gpu
def test_a_row_has_the_same_bits_in_any_batch_up_to_16_and_from_17_to_64():
    torch.manual_seed(0)
    a, b = (
        quantize(torch.randn(64, 4096, device=GPU), tile="row"),
        quantize(torch.randn(512, 4096, device=GPU), tile="row"),
    )

    def product(rows):
        return skinny(type(a)(a.codes[:rows].contiguous(), a.scale[:rows].contiguous(), a.tile, a.format), b)

    for most, fewer in ((16, (1, 3, 8, 9)), (64, (17, 32, 33, 40))):
        whole = product(most)
        for rows in fewer:
            assert torch.equal(product(rows), whole[:rows])


def test_products_in_the_interpreter():
    """Pieces, splits, tickets, scales, bias and residual; a tensor core's sums are FP32 sums there."""
    run_interpreted(__file__, 'test_skinny.all_of_it(torch.device("cpu"), "fp32")')
