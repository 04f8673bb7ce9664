"""The kernels over many matrices, compiled for Hopper: wide accesses, nothing spilled, no register read unwritten."""

from __future__ import annotations

from pathlib import Path

import pytest

from sass import compiled, disassemble, never_written, resources

pytest.importorskip("triton")


@pytest.mark.parametrize("mode", ["tensor", "current", "square", "row", "tensor odd", "square odd"])
@pytest.mark.parametrize("kind", ["bfloat16", "float32"])
def test_the_cast_is_sound(mode: str, kind: str, tmp_path: Path) -> None:
    from fp8.quantize import triton_many as ours

    name, _, odd = mode.partition(" ")
    use = ours.plan(name, True)
    constants = {
        "MODE": name, "KIND": kind, "E4M3": True, "POWER": True, "EVEN": not odd, "PARTS": ours.PARTS,
        "COLUMNS": ours.COLUMNS, "J": 1 if odd else 4, "BM": use.rows, "BN": use.cols,
    }  # fmt: skip
    types = {"table_ptr": "*i64", "owner_ptr": "*i32", "nothing": "fp32"}
    found = compiled(ours.cast_many, constants, types, set(types) - {"nothing"}, num_warps=ours.WARPS, maxnreg=128)
    sass = disassemble(found.asm["cubin"], tmp_path)
    assert never_written(sass) == []
    used = resources(found.asm["cubin"], tmp_path)
    if not odd:
        assert "LDG.E.128" in sass
        assert "STG.E.128" in sass
        assert used["STACK"] == 0
        assert used["REG"] <= 128
