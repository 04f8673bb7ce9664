"""Rows to codes in one launch: in Triton's interpreter, with g++ and on a Hopper GPU, as the definition has them."""

from __future__ import annotations

import pytest
import torch

import cuda_on_cpu
from fp8 import nvrtc
from fp8.formats import format_of
from fp8.fused.rows import Into, cuda, reference
from fp8.tile import Tile
from sass import compiled, disassemble, resources
from triton_interpreter import run_interpreted

triton = pytest.importorskip("fp8.fused.rows.triton")
GPU = torch.device("cuda")


def intos(device):
    e4m3 = format_of("e4m3")
    yield Into(e4m3, Tile.of("row"))
    yield Into(e4m3, Tile.of("row"), power_of_two=False)
    yield Into(e4m3, Tile.of("1x128"))
    yield Into(e4m3, Tile.of("tensor"), scale=torch.tensor([[0.037]], device=device))
    yield Into(format_of("e5m2"), Tile.of("row"))


def equal(a, b) -> bool:
    return torch.equal(a.codes.cpu().view(torch.uint8), b.codes.cpu().view(torch.uint8)) and torch.equal(
        a.scale.cpu(), b.scale.cpu()
    )


def codes_are_those_of_the_definition(rows: int, cols: int, device: torch.device, kernel=triton) -> None:
    torch.manual_seed(0)
    x = (torch.randn(rows, 2 * cols) * torch.randn(rows, 1).exp2()).bfloat16().to(device)
    half, weight = x[:, :cols].contiguous(), (torch.rand(cols) + 0.5).bfloat16().to(device)
    half[0, :2], half[-1, 3] = torch.tensor([float("nan"), float("inf")]), -0.0
    need = reference.gated_values(x).float()
    assert ((kernel.gated_values(x).float() - need).abs() <= 2.0**-7 * need.abs() + 1e-30).all()
    normed = kernel.norm_values(half[1:], weight, 1e-5)
    assert torch.equal(normed.view(torch.int16), reference.norm_values(half[1:], weight, 1e-5).view(torch.int16))
    for into in intos(device):
        if kernel is cuda and into.format.name != "e4m3":
            continue
        assert equal(kernel.row_codes(half, into), reference.row_codes(half, into)), into
        given = weight.float() if kernel is cuda and into.tile.cols else weight
        assert equal(kernel.norm_codes(half[1:], given, 1e-5, into), reference.norm_codes(half[1:], given, 1e-5, into))
        if kernel is triton:
            sums, need = (run.add_norm_codes(half, x[:, cols:], weight, 1e-5, into) for run in (triton, reference))
            assert torch.equal(sums[0].isnan(), need[0].isnan()) and equal(sums[1], need[1]), into
            assert torch.equal(sums[0].nan_to_num(), need[0].nan_to_num())
        found, need = kernel.gated_codes(x, into), reference.gated_codes(x, into)
        assert found.tile == need.tile
        near = (found.dequantize() - need.dequantize()).abs()  # one BF16 unit, and then one step of a code
        step = 2.0 ** -(2 if into.format.name == "e4m3" else 1) * need.dequantize().abs() + 2.0**-6 * need.scale.max()
        assert (near <= step).all()
        same = (found.codes.view(torch.uint8) == need.codes.view(torch.uint8)).float().mean()
        assert same > 0.98, (into, same)


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "cols"), [(2, 336), (1 + 16, 4096), (3, 14336), (3001, 4096), (1501, 14336)])
@pytest.mark.parametrize("kernel", [triton, cuda], ids=["triton", "cuda"])
def test_codes_on_the_gpu(rows, cols, kernel):
    codes_are_those_of_the_definition(rows, cols, GPU, kernel)


def test_codes_in_the_interpreter():
    run_interpreted(
        __file__,
        """for rows, cols in ((2, 336), (5, 128)):
    test_rows.codes_are_those_of_the_definition(rows, cols, torch.device("cpu"))
test_rows.triton.FEW, test_rows.triton.MULTIPROCESSORS = 0, 1
test_rows.codes_are_those_of_the_definition(11, 200, torch.device("cpu"))  # two or three rows a program""",
    )


@pytest.mark.parametrize(
    ("cols", "producer", "add"), [(4096, "norm", True), (8192, "plain", False), (14336, "gated", False)]
)
def test_a_chunk_has_its_next_rows_under_way_and_spills_nothing(cols, producer, add, tmp_path):
    use = triton.plan(8192, cols)
    kernel = triton.rows_to_codes
    types = dict.fromkeys(("x_ptr", "more_ptr", "sum_ptr", "weight_ptr"), "*bf16") | {
        "codes_ptr": "*u8", "scale_ptr": "*fp32", "given_ptr": "*fp32", "eps": "fp32"}  # fmt: skip
    constants = {"PRODUCER": producer, "MODE": "row", "E4M3": True, "POWER": True, "BN": use.wide, "ADD": add,
                 "STAGES": use.stages, "AHEAD": False}  # fmt: skip
    built = compiled(kernel, constants, types, {n for n in types if n != "eps"} | {"rows", "cols"},
                     num_warps=use.warps, maxnreg=use.registers, enable_fp_fusion=False)  # fmt: skip
    used = resources(built.asm["cubin"], tmp_path)
    assert used["STACK"] == 0 and used["REG"] * use.warps * 32 * use.programs <= 65536 * triton.MULTIPROCESSORS
    assert built.metadata.shared * use.programs <= 227 * 1024 * triton.MULTIPROCESSORS
    assert "LDGSTS" in disassemble(built.asm["cubin"], tmp_path)


def test_codes_with_gpp(monkeypatch):
    if (reason := cuda_on_cpu.why_not()) is not None:
        pytest.skip(reason)
    cuda_on_cpu.on_cpu(monkeypatch)
    codes_are_those_of_the_definition(3, 1160, torch.device("cpu"), cuda)


@pytest.mark.skipif(nvrtc.why_not() is not None, reason="NVRTC is not installed")
@pytest.mark.parametrize("other", [{}, {"COLS": 16384, "WARPS": 16}, {"PRODUCER": 2, "COLS": 14336, "CLUSTER": 8}])
def test_no_register_is_spilled(other, tmp_path):
    constants = {"PRODUCER": 1, "MODE": 1, "POWER": 1, "W32": 0, "COLS": 4096, "WARPS": 8, "CLUSTER": 1}
    assert resources(nvrtc.build(cuda.SOURCE, constants | other, "90"), tmp_path)["STACK"] == 0
