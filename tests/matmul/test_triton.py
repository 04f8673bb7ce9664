"""Our own product: its bits on a Hopper GPU, and its arithmetic in Triton's interpreter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fp8 import explain_matmul, matmul, quantize
from fp8.matmul import emulate

TILES = [("128x128", "128x128"), ("1x32", "1x32"), ("1x128", "row"), ("1x128", "128x128"), ("1x32", "1x128")]
SHAPES = [(256, 256, 1024), (100, 200, 300), (5, 7, 33), (16, 128, 512)]


def pair(shape, tiles, formats):
    torch.manual_seed(0)
    rows, cols, depth = shape
    x, w = torch.randn(rows, depth, device="cuda"), torch.randn(cols, depth, device="cuda")
    return quantize(x, formats[0], tiles[0], "none"), quantize(w, formats[1], tiles[1], "none")


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("accumulate", ["fast", "promoted"])
def test_two_e5m2_operands_equal_the_emulated_accumulator(accumulate, shape):
    for tiles in (("tensor", "tensor"), ("row", "tensor"), ("row", "row")):
        a, b = pair(shape, tiles, ("e5m2", "e5m2"))
        bias = torch.randn(shape[1], device="cuda")
        assert explain_matmul(a, b, accumulate=accumulate).name == "triton"
        for given, dtype in ((None, torch.float32), (bias, torch.bfloat16)):
            model = emulate.matmul(a, b, dtype, f"hopper_{accumulate}", given, splits=1)
            assert torch.equal(matmul(a, b, dtype, accumulate, given), model)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tiles", TILES, ids="*".join)
def test_scales_along_k_equal_the_emulated_blocks(tiles, shape):
    a, b = pair(shape, tiles, ("e4m3", "e5m2"))
    found = matmul(a, b, torch.float32, "promoted", backend="triton")
    fold = emulate.Fold(fused=True, order="pair")
    assert torch.equal(found, emulate.matmul(a, b, torch.float32, "hopper_promoted", None, splits=1, fold=fold))


@pytest.mark.gpu
def test_a_row_has_the_same_bits_in_any_batch():
    a, b = pair((200, 256, 512), ("row", "tensor"), ("e5m2", "e5m2"))
    whole = matmul(a, b)
    alone = type(a)(a.codes[7:8], a.scale[7:8], a.tile, a.format)
    assert torch.equal(matmul(alone, b), whole[7:8])


# ------------------------------------------------------------------------------- the kernel's arithmetic, on a CPU

INTERPRETED = """
import sys
sys.path.insert(0, {tests!r})
import triton_interpreter
reason = triton_interpreter.install()
if reason:
    print("skip:", reason)
    sys.exit()
import torch
from fp8 import quantize
from fp8.matmul import reference, triton
from fp8.matmul.budget import budget, exact_product

torch.manual_seed(0)
for rows, cols, depth in ((5, 7, 64), (130, 140, 300), (70, 17, 33)):
    x, w, bias = torch.randn(rows, depth), torch.randn(cols, depth), torch.randn(cols)
    for tiles in (("tensor", "row"), ("1x32", "1x32"), ("128x128", "128x128"), ("1x128", "row"), ("1x32", "1x128")):
        for kind in ("e4m3", "e5m2"):
            a, b = (quantize(v, kind, t, "none", backend="reference") for v, t in zip((x, w), tiles))
            found = triton.matmul(a, b, torch.float32, "promoted", bias)
            error = (found.double() - exact_product(a, b, bias)).abs()
            allowed = budget(a, b, torch.float32, "fp32", bias)
            assert bool((error <= allowed).all()), (rows, cols, depth, tiles, kind)
print("done")
"""


def test_indices_masks_and_scales_in_the_interpreter():
    """Sums of K = 300 in the interpreter are FP32 sums: inside that model's budget for every pair of tiles."""
    pytest.importorskip("triton")
    script = INTERPRETED.format(tests=str(Path(__file__).parent.parent))
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=300)
    if done.stdout.startswith("skip"):
        pytest.skip(done.stdout)
    assert done.stdout.strip() == "done", done.stderr[-2000:]
