"""The online rotation: its own inverse, Sylvester's matrix, and the bytes of the reference in the kernel."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fp8.calibrate.hadamard import butterfly
from fp8.errors import ShapeError, TensorError
from fp8.fused import hadamard
from fp8.fused.hadamard import reference
from sass import compiled, disassemble, never_written, resources

HERE = Path(__file__).parent.parent
CASES = [(5, 64, 64), (3, 192, 64), (7, 48, 16), (2, 1024, 1024), (4, 6, 2), (3, 5, 1)]


@pytest.mark.parametrize(("rows", "width", "block"), CASES)
def test_it_is_sylvesters_matrix_in_runs_and_its_own_inverse(rows, width, block):
    x = torch.randn(rows, width)
    h = butterfly(torch.eye(block, dtype=torch.float64).view(block, block, 1, 1)).view(block, block) / block**0.5
    by_hand = torch.cat([run.double() @ h for run in x.split(block, 1)], 1).float()
    torch.testing.assert_close(hadamard(x, block), by_hand, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(hadamard(hadamard(x, block), block), x, rtol=1e-5, atol=1e-6)


def test_a_rotated_product_is_the_product():
    x, w = torch.randn(2, 9, 96), torch.randn(8, 96)
    torch.testing.assert_close(hadamard(x) @ hadamard(w).T, x @ w.T, rtol=1e-4, atol=1e-4)


def test_it_computes_in_fp32_and_rounds_once():
    x = torch.randn(64, 256).bfloat16()
    assert torch.equal(hadamard(x), hadamard(x.float()).bfloat16())


def test_it_compiles_to_one_operator():
    def double(t):
        return hadamard(t, 16) * 2

    x = torch.randn(3, 5, 32)
    assert torch.equal(torch.compile(double, backend="eager", fullgraph=True)(x), double(x))


def test_bad_input_is_refused():
    for block in (3, 64, 0.5):
        with pytest.raises(ShapeError, match="power of two"):
            hadamard(torch.ones(2, 96), int(block) or 8192)
    with pytest.raises(ShapeError, match="got 0 of 0"):
        hadamard(torch.ones(2, 0))
    with pytest.raises(TensorError, match="not int64"):
        hadamard(torch.ones(2, 4, dtype=torch.int64))


# --------------------------------------------------------------------------- the kernel


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_equals_the_reference_in_bytes(dtype):
    for rows, width, block in [*CASES, (1000, 14336, 2048), (33, 4096, 4096)]:
        x = torch.randn(rows, width).to(dtype)
        assert torch.equal(hadamard(x.cuda(), block, backend="triton").cpu(), reference.hadamard(x, block))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_kernel_equals_the_reference_in_the_interpreter():
    """In a process of its own: whether kernels are interpreted is decided when Triton is imported."""
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": path}
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == "0 differing numbers\n"


@pytest.mark.parametrize("block", [64, 512, 4096])
def test_compiled_for_hopper_it_spills_nothing_and_reads_no_register_unwritten(block, tmp_path):
    pytest.importorskip("triton")
    from fp8.fused.hadamard import triton as ours

    constants = {"BM": ours.plan(block), "B": block, "STAGES": block.bit_length() - 1}
    types = {"x_ptr": "*bf16", "y_ptr": "*bf16", "factor": "fp32"}
    built = compiled(ours.butterflies, constants, types, {"x_ptr", "y_ptr", "cols"}, num_warps=4)
    assert resources(built.asm["cubin"], tmp_path)["STACK"] == 0
    assert never_written(disassemble(built.asm["cubin"], tmp_path)) == []


def interpreted() -> int:
    import triton_interpreter

    assert triton_interpreter.install() is None
    from fp8.fused.hadamard import triton as ours

    differing = 0
    for dtype in (torch.float32, torch.bfloat16):
        for rows, width, block in CASES:
            x = torch.randn(rows, width).to(dtype)
            differing += int((ours.hadamard(x, block) != reference.hadamard(x, block)).sum())
    return differing


if __name__ == "__main__":
    print(interpreted(), "differing numbers")
