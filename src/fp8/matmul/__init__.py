"""Codes times codes: `y [M, N] = a [M, K] · b [N, K]^T` in FP8, on tensor cores or by a CPU model of them.

Both operands have K last, as `nn.Linear` stores its weight and as Hopper's tensor cores read FP8. Which formats and
tiles go together, and who multiplies them:

    cublas      E4M3 x E4M3, E4M3 x E5M2, E5M2 x E4M3; tensor and row tiles; 1x128 with 128x128 or 1x128
    triton      what cuBLASLt refuses: E5M2 x E5M2, 1x32 scales, other pairs of tiles
    reference   everything, on any device: `exact` and `fp32`
    emulate     `hopper_fast` and `hopper_promoted`: what the GPU would return, bit for bit, computed anywhere

`fast` and `promoted` name what a GPU does; without one the `exact` model stands in for both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends import Backend, Choice, choose, function, why_not_hopper, why_not_triton
from ..errors import FormatError, ShapeError, TensorError
from ..formats import COMPUTE, format_of
from ..quantize.record import Quantized
from ..recipe import ACCUMULATE, CPU_MODELS, one_of
from ..tile import Tile

__all__ = ["BACKENDS", "Request", "explain_matmul", "matmul"]

OUTPUTS = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Request:
    """What a backend is asked: everything but the values."""

    device: torch.device
    format_a: str
    format_b: str
    tile_a: Tile
    tile_b: Tile
    shape: tuple[int, int, int]
    out_dtype: torch.dtype
    accumulate: str
    bias: torch.dtype | None


def _cublas(request: Request) -> str | None:
    return _model(request) or why_not_hopper(request.device) or function("fp8.matmul.cublas", "why_not")(request)


def _triton(request: Request) -> str | None:
    return _model(request) or why_not_triton(request.device) or function("fp8.matmul.triton", "why_not")(request)


def _model(request: Request) -> str | None:
    asked = request.accumulate
    return f"accumulate={asked!r} names a CPU model" if asked in CPU_MODELS else None


def _emulate(request: Request) -> str | None:
    asked = request.accumulate
    return None if asked.startswith("hopper") else f"accumulate={asked!r} asks for no model of the Hopper accumulator"


def _reference(request: Request) -> str | None:
    asked = request.accumulate
    return f"accumulate={asked!r} asks for the Hopper accumulator" if asked.startswith("hopper") else None


BACKENDS = (
    Backend("cublas", "a Hopper GPU", _cublas, "fp8.matmul.cublas"),
    Backend("triton", "a Hopper GPU and Triton", _triton, "fp8.matmul.triton"),
    Backend("emulate", "nothing", _emulate, "fp8.matmul.emulate"),
    Backend("reference", "nothing", _reference, "fp8.matmul.reference"),
)


def matmul(
    a: Quantized,
    b: Quantized,
    out_dtype: torch.dtype = torch.bfloat16,
    accumulate: str = "promoted",
    bias: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """`a [M, K] @ b [N, K].T`, scaled: the layout of `torch.nn.functional.linear`.

    a, b        quantized with K last; leading dimensions of `a` are kept: `[..., K]` gives `[..., N]`
    out_dtype   bfloat16, float16 or float32
    accumulate  "promoted" (FP32 every 128 of K) or "fast" (Hopper's accumulator over all of K); or a CPU model by name:
                "exact", "fp32", "hopper_fast", "hopper_promoted"
    bias        [N], added in FP32 before the one rounding to `out_dtype`
    backend     "cublas", "triton", "reference" or "emulate"; by default the first that can run. `explain_matmul` tells
                which

    Any shape: what must be a multiple of 16 or 128 is padded inside. Raises `ShapeError`, `TensorError`,
    `BackendError`.

    >>> import torch, fp8
    >>> a, b = fp8.quantize(torch.eye(3)), fp8.quantize(torch.tensor([[1.0, 2.0, 3.0]]))
    >>> matmul(a, b, torch.float32).flatten().tolist()
    [1.0, 2.0, 3.0]
    """
    check(a, b, out_dtype, accumulate, bias)
    y = run_matmul(a, b, out_dtype, accumulate, bias, backend)
    return y.view(*a.codes.shape[:-1], y.shape[1]) if a.codes.dim() != 2 else y


def explain_matmul(
    a: Quantized,
    b: Quantized,
    out_dtype: torch.dtype = torch.bfloat16,
    accumulate: str = "promoted",
    bias: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Choice:
    """Which backend would run this product, and why the better ones would not."""
    check(a, b, out_dtype, accumulate, bias)
    return choose("matmul", BACKENDS, request_of(a, b, out_dtype, accumulate, bias), backend)


def request_of(a: Quantized, b: Quantized, out_dtype: torch.dtype, accumulate: str, bias: Tensor | None) -> Request:
    (m, k), n = a.matrix.shape, b.matrix.shape[0]
    return Request(
        a.codes.device,
        a.format.name,
        b.format.name,
        a.tile,
        b.tile,
        (m, n, k),
        out_dtype,
        accumulate,
        None if bias is None else bias.dtype,
    )


def check(a: Quantized, b: Quantized, out_dtype: torch.dtype, accumulate: str, bias: Tensor | None) -> None:
    """Refuse operands that do not fit, naming what was given."""
    for name, q in (("a", a), ("b", b)):
        if not isinstance(q, Quantized):
            raise TensorError(
                f"matmul multiplies quantized operands; {name} is a {type(q).__name__}: fp8.quantize it first."
            )
        check_record(name, q)
    one_of(accumulate, ACCUMULATE + CPU_MODELS, "accumulate")
    if out_dtype not in OUTPUTS:
        raise TensorError(f"matmul returns bfloat16, float16 or float32, not {out_dtype}.")
    if b.codes.dim() != 2 or a.codes.dim() < 1 or a.codes.shape[-1] != b.codes.shape[1]:
        raise ShapeError(
            f"matmul needs a [..., K] and b [N, K], K last in both; got a {tuple(a.shape)} and b {tuple(b.shape)}. "
            "For A @ B, quantize B.T."
        )
    if a.codes.device != b.codes.device:
        raise TensorError(f"a is on {a.codes.device} and b on {b.codes.device}: move one.")
    if bias is not None and not isinstance(bias, Tensor):
        raise TensorError(f"bias must be a tensor, not {type(bias).__name__}: use torch.tensor(bias).")
    if bias is not None and bias.shape != b.codes.shape[:1]:
        raise ShapeError(f"bias must have shape ({b.codes.shape[0]},), one number an output; got {tuple(bias.shape)}.")


def check_record(name: str, q: Quantized) -> None:
    """Refuse a `Quantized` whose parts, put together by hand, do not belong to each other. Only types, shapes and
    devices are looked at: no value is read back from the device."""
    for part, what in ((q.codes, "codes"), (q.scale, "scale")):
        if not isinstance(part, Tensor):
            raise TensorError(f"{name} has the {what} {part!r}, which must be a tensor: fp8.quantize makes both.")
    tile, need = Tile.of(q.tile), format_of(q.format)
    if need.name not in COMPUTE:
        raise FormatError(f"{name} is in {need.name}, a row of the table only; e4m3 and e5m2 multiply.")
    if q.codes.dtype != need.dtype:
        raise TensorError(
            f"{name} says format {need.name}, whose codes are {str(need.dtype)[6:]}, but holds "
            f"{str(q.codes.dtype)[6:]}: fp8.quantize makes them, and codes.view(dtype) names the bytes that you have."
        )
    shape = tile.scale_shape(*q.matrix.shape)
    if q.scale.dtype != torch.float32 or tuple(q.scale.shape) != shape:
        raise ShapeError(
            f"{name} has codes {tuple(q.shape)} in tiles {str(tile)!r}, which take a float32 scale of shape {shape}; "
            f"got {str(q.scale.dtype)[6:]} {tuple(q.scale.shape)}. Scales dequantize: real = code * scale."
        )
    if q.scale.device != q.codes.device:
        raise TensorError(f"{name} has codes on {q.codes.device} and scales on {q.scale.device}: move one.")


def run_matmul(
    a: Quantized,
    b: Quantized,
    out_dtype: torch.dtype,
    accumulate: str,
    bias: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The product of checked matrices by the best backend, or as one operator under `torch.compile`."""
    if torch.compiler.is_compiling():
        return torch.ops.fp8.matmul(
            a.matrix, a.scale, str(a.tile), b.matrix, b.scale, str(b.tile), out_dtype, accumulate, bias
        )
    choice = choose("matmul", BACKENDS, request_of(a, b, out_dtype, accumulate, bias), backend)
    return choice.run(_flat(a), _flat(b), out_dtype, accumulate, bias)


def _flat(q: Quantized) -> Quantized:
    return q if q.codes.dim() == 2 else Quantized(q.matrix, q.scale, q.tile, q.format)


@torch.library.custom_op("fp8::matmul", mutates_args=())
def _matmul_op(
    a: Tensor,
    scale_a: Tensor,
    tile_a: str,
    b: Tensor,
    scale_b: Tensor,
    tile_b: str,
    out_dtype: torch.dtype,
    accumulate: str,
    bias: Tensor | None,
) -> Tensor:
    left = Quantized(a, scale_a, Tile.of(tile_a), format_of(a.dtype))
    right = Quantized(b, scale_b, Tile.of(tile_b), format_of(b.dtype))
    return run_matmul(left, right, out_dtype, accumulate, bias)


@_matmul_op.register_fake
def _(a, scale_a, tile_a, b, scale_b, tile_b, out_dtype, accumulate, bias):  # type: ignore[no-untyped-def]
    return a.new_empty(a.shape[0], b.shape[0], dtype=out_dtype)
