"""The kernels that write both orientations, compiled for Hopper here, read no register that nothing wrote.

A GPU run showed wrong transposed codes where the PTX was right; `tests/sass.py` tells why. This holds the repair
without a GPU.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from sass import disassemble, never_written

pytest.importorskip("triton")


def compiled(mode: str, e4m3: bool, aligned: bool) -> bytes:
    """`cast_tiles` for sm_90 as `quantize_both` launches it on BF16, for one of its modes."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as build

    from fp8.quantize import triton as ours

    use = ours.plan(mode, True)
    constants = {
        "MODE": mode, "GIVEN": mode == "tensor", "BOTH": True, "GROUP": 128 if mode == "group" else 0, "E4M3": e4m3,
        "POWER": True, "STOCHASTIC": False, "QUAD": True, "EVEN": aligned, "ALIGNED": aligned, "PARTS": ours.PARTS,
        "J": use.pack, "BM": use.rows, "BN": use.cols, "BAND": use.band,
    }  # fmt: skip
    code = "*fp8e4nv" if e4m3 else "*fp8e5"
    types = {"x_ptr": "*bf16", "codes_ptr": code, "codes_t_ptr": code, "keys_ptr": "*i32", "nothing": "fp32"}
    kernel, signature, known = ours.cast_tiles, {}, {}
    for place, name in enumerate(kernel.arg_names):
        pointer = name.endswith("_ptr")
        signature[name] = "constexpr" if name in constants else types.get(name, "*fp32" if pointer else "i32")
        if pointer or (aligned and name in ("rows", "cols")):
            known[(place,)] = [["tt.divisibility", 16]]
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature=signature, constexprs=places, attrs=known)
    options = {"num_warps": use.warps, "maxnreg": 128}
    return build(source, target=GPUTarget("cuda", 90, 32), options=options).asm["cubin"]


@pytest.mark.parametrize("mode", ["tensor", "current", "square", "group", "tensor odd", "current odd"])
def test_no_register_is_read_before_it_is_written(mode: str, tmp_path: Path) -> None:
    name, _, odd = mode.partition(" ")
    assert never_written(disassemble(compiled(name, True, aligned=not odd), tmp_path)) == []


def test_the_check_finds_a_register_that_nothing_wrote() -> None:
    """R2 comes from nowhere; R1 was loaded."""
    sass = """
        /*0000*/   LDG.E R1, [UR4] ;
        /*0010*/   IADD3 R3, R1, R2, RZ ;
        /*0020*/   STG.E [UR4], R3 ;
        /*0030*/   EXIT ;
    """
    assert never_written(sass) == ["IADD3 R3, R1, R2, RZ"]
