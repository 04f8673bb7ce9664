"""AdamW's kernels: the bytes of the reference, with all that follows; interpreted, on a GPU, and compiled."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fp8.formats import FORMATS
from fp8.fused.adamw import reference
from fp8.fused.adamw.optimizer import fresh
from fp8.fused.adamw.reference import After, Settings, Slot
from fp8.quantize.many import Cast
from fp8.tile import Tile
from sass import compiled, disassemble, never_written, resources

HERE = Path(__file__).parent.parent
SHAPES = [(128, 128), (64, 256), (5, 3), (300,), (1, 2100), (0,)]
AFTER = {"given": "tensor", "key": "tensor", "square": "128x128"}
FORMS = list(itertools.product(("fp32", "bf16", "fp8"), (torch.float32, torch.bfloat16), (True, False)))
BYTES = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def gradients(shape: tuple[int, ...], draw: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Numbers of many sizes, with zeros, and some that are not finite."""
    g = torch.randn(shape, generator=draw) * torch.exp2(torch.randint(-40, 10, shape, generator=draw).float())
    chance = torch.rand(shape, generator=draw)
    hard = torch.tensor([0.0, -0.0, torch.inf, torch.nan, 3e38, 1e-40])
    return torch.where(chance < 0.02, hard[torch.randint(6, shape, generator=draw)], g).to(dtype)


def parameters(dtype: torch.dtype, device: str, kind: str) -> list[Slot]:
    draw = torch.Generator().manual_seed(0)
    slots = []
    for number, shape in enumerate(SHAPES):
        p = torch.randn(shape, generator=draw).to(dtype).to(device)
        slots.append(Slot(p, torch.empty(0), fresh(p, kind), number, after(p, number) if len(shape) == 2 else None))
    return slots


def after(p: Tensor, number: int) -> After | None:
    """Something else to follow for each matrix; what does not fit gets a key or nothing."""
    rows, cols = p.shape
    form, kind = "e4m3" if number % 2 == 0 else "e5m2", list(AFTER)[number % 3]
    kind = kind if cols % 128 == 0 and rows % (128 if kind == "square" else 64) == 0 else "key"
    tile = Tile.of(AFTER[kind])
    codes = torch.zeros(rows, cols, dtype=FORMATS[form].dtype, device=p.device)
    one = torch.full((1, 1), 0.125, device=p.device)
    cast = Cast(
        p, codes, torch.zeros(cols, rows, dtype=codes.dtype, device=p.device),
        torch.zeros(tile.scale_shape(rows, cols), device=p.device), None, one if kind == "given" else None,
        torch.full((), -1.0, device=p.device),
        torch.zeros(1, dtype=torch.int32, device=p.device) if kind == "key" else None,
    )  # fmt: skip
    return After(cast, FORMATS[form], tile, True)


def square(slots: list[Slot]) -> list[Slot]:
    """The first slot with 128x128 codes following."""
    first = slots[0]
    return [dataclasses.replace(first, after=after(first.parameter, 2)), *slots[1:]]


def differing_bytes(kind: str, dtype: torch.dtype, stochastic: bool, device: str, steps: int = 3) -> int:
    """Between kernels and reference over a few steps, one of them skipped, one with a gradient missing."""
    from fp8.fused.adamw import triton

    want, got = (square(parameters(dtype, d, kind)) for d in ("cpu", device))
    draw, prepared, count = torch.Generator().manual_seed(1), None, 0
    for step in range(steps):
        grads = [gradients(slot.parameter.shape, draw, dtype) for slot in want]
        present = [number for number in range(len(want)) if (number + step) % 4 or step != 1]
        found, scale = torch.tensor(float(step == 2)), torch.tensor(3.0)
        lr = torch.tensor(0.01) if step else 0.01
        same = Settings(lr, (0.9, 0.95), 1e-8, 0.1, kind, stochastic, 7)
        settings = [
            dataclasses.replace(same, found_inf=found.to(d), grad_scale=scale.to(d),
                                lr=lr.to(d) if isinstance(lr, Tensor) else lr) for d in ("cpu", device)
        ]  # fmt: skip
        now = [dataclasses.replace(want[n], grad=grads[n]) for n in present]
        reference.adamw(now, settings[0])
        there = [dataclasses.replace(got[n], grad=grads[n].to(device)) for n in present]
        prepared = triton.adamw(there, settings[1], prepared)
        count += sum(differ(a, b, f"{kind} {dtype} step {step}") for a, b in zip(want, got, strict=True))
    return count


def tensors(slot: Slot) -> dict[str, Tensor]:
    found = {"parameter": slot.parameter, **slot.state}
    if slot.after is not None:
        cast = slot.after.cast
        if cast.key is not None:
            return {**found, "key": cast.key}
        found |= {"codes": cast.codes, "codes_t": cast.codes_t, "scale": cast.scale}
        assert cast.amax is not None
        found["amax"] = cast.amax
    return found


def bits(x: Tensor) -> Tensor:
    """The bits, with one NaN for all: which NaN an operation returns is the machine's affair."""
    raw = x.cpu().contiguous().view(BYTES[x.itemsize]).long()
    return torch.where(x.cpu().float().isnan(), -1, raw) if x.is_floating_point() else raw


def differ(want: Slot, got: Slot, where: str) -> int:
    count = 0
    for name, a in tensors(want).items():
        wrong = int((bits(a) != bits(tensors(got)[name])).sum())
        if wrong:
            print("DIFFERS", where, want.number, tuple(want.parameter.shape), name, wrong)
        count += wrong
    return count


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("kind", ["fp32", "bf16", "fp8"])
def test_the_kernels_equal_the_reference_in_the_interpreter(kind: str) -> None:
    """In a process of its own: whether kernels are interpreted is decided when Triton is imported."""
    found = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, kind],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent / "src"), str(HERE)])},
        timeout=300,
        check=False,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert found.stdout.splitlines()[-1] == "0 differing bytes", found.stdout


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["fp32", "bf16", "fp8"])
def test_the_kernels_equal_the_reference(kind: str) -> None:
    for form in FORMS:
        if form[0] == kind:
            assert differing_bytes(*form, device="cuda", steps=6) == 0, form


KEPT = {"fp32": "float32", "bf16": "bfloat16", "fp8": "uint8"}
TYPES = {"table_ptr": "*i64", "owner_ptr": "*i32", "now_ptr": "*fp32", "roots_ptr": "*fp32", "beta2": "fp32",
         "c1": "fp32", "c2": "fp32", "eps": "fp32", "nothing": "fp32"}  # fmt: skip


@pytest.mark.parametrize("kind", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize("mode", ["key", "tensor", "square"])
def test_the_compiled_kernels_are_sound(mode: str, kind: str, tmp_path: Path) -> None:
    """For sm_90, BF16 parameters with masters: wide accesses, nothing spilled, no register read unwritten; and products
    and sums stay apart, or the bytes would not be the reference's."""
    pytest.importorskip("triton")
    from fp8.fused.adamw import triton as ours

    use = ours.shape(mode, kind)
    same = {"P": "bfloat16", "G": "bfloat16", "MASTER": True, "MOMENTS": KEPT[kind], "STOCHASTIC": kind != "fp32",
            "NOW": ours.NOW, "COLUMNS": ours.COLUMNS, "ROWS": use.rows}  # fmt: skip
    if mode == "key":
        kernel, constants = ours.update_lines, {"KEYS": True, "ALIGNED": True, **same}
    else:
        tile = ours.plan(mode, True)
        kernel = ours.update_tiles
        constants = {"MODE": mode, "E4M3": True, "POWER": True, "PARTS": ours.PARTS, "J": 4, "BM": tile.rows,
                     "BN": tile.cols, **same}  # fmt: skip
    found = compiled(
        kernel, constants, TYPES, {name for name in TYPES if name.endswith("_ptr")}, num_warps=use.warps,
        maxnreg=use.registers, enable_fp_fusion=False,
    )  # fmt: skip
    sass, used = disassemble(found.asm["cubin"], tmp_path), resources(found.asm["cubin"], tmp_path)
    assert never_written(sass) == []
    assert "LDG.E.128" in sass
    assert "STG.E.128" in sass
    assert used["STACK"] == 0
    assert used["REG"] * use.warps * 32 <= 65536
    fused = [line for line in found.asm["ptx"].splitlines() if "fma.rn.f32" in line]
    assert all("0f00000000" in line or mode != "key" for line in fused)


def interpreted(kind: str) -> int:
    import triton_interpreter

    reason = triton_interpreter.install()
    assert reason is None, reason
    forms = [form for form in FORMS if form[0] == kind]
    return sum(differing_bytes(*form, device="cpu") for form in (forms[:1] if kind == "fp32" else forms[:3:2]))


if __name__ == "__main__":
    print(interpreted(sys.argv[1]), "differing bytes")
