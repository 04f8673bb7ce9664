"""What a decode step's kernels are on Hopper, seen without one: their instructions, registers and shared memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from sass import compiled, disassemble, resources

skinny = pytest.importorskip("fp8.matmul.skinny.triton")
paged = pytest.importorskip("fp8.attention.paged.triton")

TYPES = {
    "x_ptr": "*fp8e4nv", "w_ptr": "*fp8e4nv", "q_ptr": "*bf16", "out_ptr": "*bf16", "bias_ptr": "*bf16", "keys_ptr":
    "*fp8e4nv", "values_ptr": "*fp8e4nv", "ticket_ptr": "*i32", "pages_ptr": "*i32", "lengths_ptr": "*i32", "scale":
    "fp32", "residual_ptr": "*bf16",
}  # fmt: skip


def built(kernel, constants, **options):
    types = {n: TYPES.get(n, "*fp32") for n in kernel.arg_names if n.endswith("_ptr") or n == "scale"}
    aligned = {n for n in kernel.arg_names if n.endswith("_ptr") or n in ("N", "K", "span")}
    return compiled(kernel, constants, types, aligned, **options)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("tokens", [16, 64])
def test_a_weight_goes_to_the_tensor_core_without_passing_a_register(tokens: int, ahead: bool, tmp_path: Path) -> None:
    use = skinny.plan(6144, 4096, True)
    constants = {
        "FP8": True, "TILE_X": 1, "TILE_W": 1, "ALONG": 0, "BIAS": False, "RESIDUAL": True, "SPLITS": use.splits,
        "WHOLE": True, "ROWS": use.rows, "TOKENS": tokens, "DEPTH": use.depth, "AHEAD": ahead,
    }  # fmt: skip
    kernel = built(skinny.skinny_rows, constants, num_warps=use.warps, num_stages=use.stages, enable_fp_fusion=False)
    sass = disassemble(kernel.asm["cubin"], tmp_path)
    assert "QGMMA" in sass and "F2FP" not in sass.split("QGMMA")[0]
    assert resources(kernel.asm["cubin"], tmp_path)["STACK"] == 0
    assert kernel.metadata.shared * (4 if tokens == 16 else 2) <= 227 << 10, "so many programs fit a multiprocessor"
    assert ("ACQBULK" in sass) == ahead == ("PREEXIT" in sass)
    if ahead:
        assert sass.index("PREEXIT") < sass.index("ACQBULK") < sass.index("LDGSTS"), "x is read after the wait"


def test_decode_attention_spills_nothing(tmp_path: Path) -> None:
    constants = {
        "PAGE": 64, "GROUP": 4, "D": 128, "SCALES": paged.DYNAMIC, "PART": 256, "KEYS": paged.KEYS, "ROWS": 16,
        "BD": 128, "AHEAD": True,
    }  # fmt: skip
    kernel = built(paged.attend_parts, constants, num_warps=paged.WARPS, num_stages=paged.STAGES)
    sass = disassemble(kernel.asm["cubin"], tmp_path)
    assert "HMMA.16816.F32" in sass and "QGMMA" not in sass
    assert resources(kernel.asm["cubin"], tmp_path)["STACK"] == 0
    first = min(sass.index(op) for op in ("LDG.E", "LDGSTS"))
    assert sass.index("ACQBULK") < first
