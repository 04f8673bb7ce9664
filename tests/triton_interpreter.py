"""Triton's interpreter, with its casts between float types replaced by right ones.

The interpreter of Triton 3.6 casts FP32 to FP8 wrongly: it drops the carry out of the mantissa, rounds ties away from
even, truncates subnormals, and turns overflow into unrelated codes (triton#8322). Casts are done here by torch
instead, with the clipping of the hardware's `cvt.rn.satfinite`. So a test through the interpreter proves a kernel's
indices, masks, scales and integer arithmetic, while its FP8 cast is this patch's: the bytes themselves are proven on
the GPU.

`install` must run before anything imports triton: which of the two, interpreter or compiler, is decided at each
decorator.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch


def install() -> str | None:
    """Makes Triton interpret kernels in this process. Returns the reason why it cannot, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_convert_float"):
        return "this Triton's interpreter casts in another place: look at tests/triton_interpreter.py"
    interpreter._convert_float = _convert
    interpreter.InterpreterBuilder.create_fma = _fma
    interpreter.InterpreterBuilder.create_dot = _dot
    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):  # type: ignore[no-untyped-def]
        patch(tensor, scope)  # numpy 2.4 no longer makes an integer of an array of one element
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched
    return None


SCRIPT = """
import sys
sys.path[:0] = [{tests!r}, {folder!r}]
import triton_interpreter
if reason := triton_interpreter.install():
    print("skip:", reason)
    sys.exit()
import torch
import {module}
{statements}
print("done")
"""


def run_interpreted(test_file: str, statements: str) -> None:
    """Run statements with the interpreter, in a process of their own, where the test file is imported under its name;
    skips where it cannot be installed."""
    file = Path(test_file)
    script = SCRIPT.format(
        tests=str(Path(__file__).parent), folder=str(file.parent), module=file.stem, statements=statements
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=300)
    if done.stdout.startswith("skip"):
        pytest.skip(done.stdout)
    assert done.stdout.strip() == "done", done.stderr[-3000:]


def _fma(self, x, y, z):  # type: ignore[no-untyped-def]
    """x * y + z without numpy's warning about 0 * Inf."""
    from triton.runtime.interpreter import TensorHandle

    with np.errstate(invalid="ignore"):
        return TensorHandle(x.data * y.data + z.data, z.dtype.scalar)


def _dot(self, a, b, c, input_precision, max_num_imprecise_acc):  # type: ignore[no-untyped-def]
    """a @ b + c in FP32; the interpreter would multiply the bits of BF16 as integers."""
    from triton.runtime.interpreter import TensorHandle

    wide = [_numbers(x.data, x.dtype.scalar).float() for x in (a, b)]
    return TensorHandle((wide[0] @ wide[1]).numpy().astype(c.data.dtype) + c.data, c.dtype.scalar)


def _numbers(data, kind):  # type: ignore[no-untyped-def]
    return torch.from_numpy(np.ascontiguousarray(data).view(_signed(kind))).view(_torch(kind))


def _convert(data, source, target, rounding):  # type: ignore[no-untyped-def]
    """The bits of `data`, of Triton type `source`, as bits of the Triton type `target`."""
    numbers = _numbers(data, source).float()
    if target.is_fp8():
        finite = torch.finfo(_torch(target))
        numbers = torch.where(numbers.isnan(), numbers, numbers.clamp(finite.min, finite.max))
    result = numbers.to(_torch(target))
    if target.is_fp8():
        bits = torch.where(numbers.isnan(), 0x7F, result.view(torch.uint8))
        return bits.numpy().reshape(data.shape)
    width = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[result.itemsize]
    signed = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[result.itemsize]
    return result.view(signed).numpy().view(width).reshape(data.shape)


def _signed(kind):  # type: ignore[no-untyped-def]
    return {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}[kind.primitive_bitwidth]


def _torch(kind):  # type: ignore[no-untyped-def]
    names = {"fp8e4nv": "float8_e4m3fn", "fp8e5": "float8_e5m2", "bf16": "bfloat16", "fp16": "float16"}
    return getattr(torch, names.get(kind.name) or {"fp32": "float32", "fp64": "float64"}[kind.name])
