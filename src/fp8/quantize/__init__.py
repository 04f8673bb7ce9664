"""Numbers in, codes and scales out, and back.

`quantize` and `quantize_both` are the doors. Behind them are a reference in plain torch, which is the definition, and
Triton kernels that equal it in bytes. Under `torch.compile` both are one opaque operator with its own fake kernel:
inductor never compiles the reference, whose FP8 casts it would round twice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import Backend, choose, why_not_triton
from ..errors import FormatError, ShapeError, TensorError
from ..formats import COMPUTE, Format, format_of
from ..recipe import SCALE_ROUNDING, one_of
from ..tile import Tile
from .record import Quantized, Statistics, as_matrix, spread

__all__ = ["BACKENDS", "Quantized", "Statistics", "quantize", "quantize_both", "statistics_of"]

BACKENDS = (
    Backend("triton", "a Hopper GPU and Triton", lambda x: why_not_triton(x.device), "fp8.quantize.triton"),
    Backend("reference", "nothing", lambda x: None, "fp8.quantize.reference"),
)
INPUTS = (torch.float32, torch.bfloat16, torch.float16)


def quantize(
    x: Tensor,
    format: str | Format = "e4m3",
    tile: str | tuple[int, int] | Tile = "tensor",
    scale_rounding: str = "power_of_two",
    rounding: str = "nearest",
    *,
    scale: Tensor | None = None,
    seed: int | None = None,
    statistics: bool = False,
    backend: str | None = None,
) -> Quantized:
    """Quantize a tensor to FP8.

    x               FP32, BF16 or FP16, any shape; seen as [product of leading dimensions, last dimension]
    format          "e4m3" (largest 448) or "e5m2" (largest 57344)
    tile            what shares a scale: "tensor", "row", (1, 128), (128, 128) or (1, 32); edge tiles may be partial
    scale_rounding  "power_of_two": the smallest power of two that fits; "none": amax / max by IEEE division
    rounding        "nearest" (ties to even) or "stochastic", which needs a `seed`
    scale           FP32, the tile's scale shape: use this one instead of measuring (values beyond it saturate)
    statistics      also return what was clipped, flushed to zero, or not finite
    backend         "triton" or "reference"; by default the best one that can run

    The gradient does not flow through: codes carry none. Raises `TensorError`, `FormatError`, `TileError`,
    `ShapeError`.

    >>> import torch
    >>> q = quantize(torch.tensor([[1.0, 300.0, -500.0]]))
    >>> q.scale.item(), q.dequantize().tolist()
    (2.0, [[1.0, 288.0, -512.0]])
    """
    row, where = format_of(format), Tile.of(tile)
    matrix = as_input(x, row)
    seed = _seed(rounding, seed)
    one_of(scale_rounding, SCALE_ROUNDING, "scale_rounding")
    power_of_two = scale_rounding == "power_of_two" and scale is None  # a given scale may be any: divide by it
    if scale is not None:
        check_scale(scale, where, matrix)
    codes, used, _ = run_quantize(matrix, scale, row, where, power_of_two, seed, backend=backend)
    q = Quantized(codes.view(x.shape), used, where, row)
    return q if not statistics else Quantized(q.codes, q.scale, where, row, statistics_of(x, q))


def quantize_both(
    x: Tensor,
    format: str | Format = "e4m3",
    tile: str | tuple[int, int] | Tile = "tensor",
    scale_rounding: str = "power_of_two",
    rounding: str = "nearest",
    *,
    scale: Tensor | None = None,
    seed: int | None = None,
    backend: str | None = None,
) -> tuple[Quantized, Quantized]:
    """`quantize(x)` and `quantize(x.T)` of a matrix `[rows, cols]`, from one read. Arguments as for `quantize`.

    The second has codes `[cols, rows]`, row-major. A given `scale` needs the tile "tensor" here.
    """
    row, where = format_of(format), Tile.of(tile)
    matrix = as_input(x, row)
    if x.dim() != 2:
        raise ShapeError(f"quantize_both needs a matrix; x has shape {tuple(x.shape)}. Use x.flatten(0, -2).")
    seed = _seed(rounding, seed)
    one_of(scale_rounding, SCALE_ROUNDING, "scale_rounding")
    if scale is not None:
        if where != Tile(0, 0):
            raise ShapeError(f"a given scale serves both orientations only with tile 'tensor', not {str(where)!r}.")
        check_scale(scale, where, matrix)
    power_of_two = scale_rounding == "power_of_two" and scale is None
    codes, used, codes_t, scale_t, _ = run_quantize_both(matrix, scale, row, where, power_of_two, seed, backend=backend)
    return Quantized(codes, used, where, row), Quantized(codes_t, scale_t, where, row)


def statistics_of(x: Tensor, q: Quantized) -> Statistics:
    """What quantizing x to q did: amax, shares saturated and flushed to zero, count of non-finite elements."""
    matrix = as_matrix(x.detach()).float()
    finite = matrix.isfinite()
    scaled = (matrix / spread(q.scale, q.tile, *matrix.shape)).abs()
    zero = (q.matrix.view(torch.uint8) & 0x7F) == 0
    count = max(matrix.numel(), 1)
    amax = torch.where(finite, matrix.abs(), 0.0)
    return Statistics(
        amax=amax.amax() if amax.numel() else amax.new_zeros(()),
        saturated=(finite & (scaled > q.format.max)).sum() / count,
        flushed=(finite & (matrix != 0) & zero).sum() / count,
        non_finite=(~finite).sum(),
    )


# --------------------------------------------------------------------------- checks


def as_input(x: Tensor, format: Format) -> Tensor:
    """x as a contiguous matrix that an implementation takes; refuses what cannot be quantized."""
    if format.name not in COMPUTE:
        raise FormatError(f"{format.name} is a row of the table only; the formats that compute are e4m3 and e5m2.")
    if not isinstance(x, Tensor):
        raise TensorError(f"quantize needs a torch tensor, not {type(x).__name__}: use torch.as_tensor(x).")
    if x.layout != torch.strided or x.is_nested:
        raise TensorError(f"quantize needs a dense tensor, not one of layout {str(x.layout)[6:]}: use x.to_dense().")
    if x.dtype not in INPUTS:
        way = "cast it to float32 yourself, so that the rounding is yours" if x.dtype == torch.float64 else "convert it"
        raise TensorError(f"quantize needs float32, bfloat16 or float16, not {str(x.dtype)[6:]}: {way}.")
    return as_matrix(x.detach()).contiguous()


def check_scale(scale: Tensor, tile: Tile, matrix: Tensor) -> None:
    """A given scale must be FP32 and fit the tile. Its values are validated where it is stored, not here."""
    need = tile.scale_shape(*matrix.shape)
    if not isinstance(scale, Tensor):
        raise TensorError(
            f"a given scale is a float32 tensor of shape {need}, not {scale!r}: use torch.full({need}, ...)."
        )
    if scale.dtype != torch.float32 or tuple(scale.shape) != need or scale.device != matrix.device:
        raise ShapeError(
            f"tile {str(tile)!r} of a {matrix.shape[0]} x {matrix.shape[1]} matrix needs a float32 scale of shape "
            f"{need} on {matrix.device}; got {str(scale.dtype)[6:]} {tuple(scale.shape)} on {scale.device}."
        )


def _seed(rounding: str, seed: int | None) -> int | None:
    one_of(rounding, ("nearest", "stochastic"), "rounding")
    if rounding == "nearest":
        return None
    if not isinstance(seed, int) or not 0 <= seed < 1 << 64:
        raise TensorError(
            "rounding='stochastic' needs a seed, any whole number from 0 to below 2^64: the same seed, the same codes. "
            f"Got {seed!r}."
        )
    return seed


# --------------------------------------------------------------------------- the two operators


def run_quantize(x, scale, format, tile, power_of_two, seed=None, stream=0, backend=None, amax=None):  # type: ignore[no-untyped-def]
    """`reference.quantize` by the best backend, or as one operator, which returns a new amax, under `torch.compile`. x
    is a checked matrix."""
    if torch.compiler.is_compiling():
        return torch.ops.fp8.quantize(x, scale, format.name, str(tile), power_of_two, _signed(seed), stream)
    return choose("quantize", BACKENDS, x, backend).run(x, scale, format, tile, power_of_two, seed, stream, amax)


def run_quantize_both(x, scale, format, tile, power_of_two, seed=None, stream=0, backend=None, amax=None):  # type: ignore[no-untyped-def]
    """`reference.quantize_both`, likewise."""
    if torch.compiler.is_compiling():
        out = torch.ops.fp8.quantize_both(x, scale, format.name, str(tile), power_of_two, _signed(seed), stream)
        codes, scale, codes_t, scale_t, amax = out
        return codes, scale, codes_t, scale.t() if tile.transposes else scale_t, amax
    return choose("quantize_both", BACKENDS, x, backend).run(x, scale, format, tile, power_of_two, seed, stream, amax)


def _signed(seed: int | None) -> int | None:
    """An unsigned 64-bit seed as the signed integer that an operator takes."""
    return seed if seed is None or seed < 1 << 63 else seed - (1 << 64)


@torch.library.custom_op("fp8::quantize", mutates_args=())
def _quantize_op(
    x: Tensor, scale: Tensor | None, format: str, tile: str, power_of_two: bool, seed: int | None, stream: int
) -> tuple[Tensor, Tensor, Tensor]:
    seed = None if seed is None else seed & 0xFFFFFFFFFFFFFFFF
    codes, out, amax = run_quantize(x, scale, format_of(format), Tile.of(tile), power_of_two, seed, stream)
    return codes, out.clone() if out is scale else out, amax.clone() if amax.data_ptr() == out.data_ptr() else amax


@_quantize_op.register_fake
def _(x, scale, format, tile, power_of_two, seed, stream):  # type: ignore[no-untyped-def]
    shape = Tile.of(tile).scale_shape(*x.shape)
    return x.new_empty(x.shape, dtype=format_of(format).dtype), _fake_scale(x, tile, shape), _fp32(x, ())


@torch.library.custom_op("fp8::quantize_both", mutates_args=())
def _quantize_both_op(
    x: Tensor, scale: Tensor | None, format: str, tile: str, power_of_two: bool, seed: int | None, stream: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    where = Tile.of(tile)
    seed = None if seed is None else seed & 0xFFFFFFFFFFFFFFFF
    codes, out, codes_t, scale_t, amax = run_quantize_both(
        x, scale, format_of(format), where, power_of_two, seed, stream
    )
    scale_t = out.new_empty(0) if where.transposes else scale_t
    return codes, out.clone() if out is scale else out, codes_t, scale_t, amax.clone()


@_quantize_both_op.register_fake
def _(x, scale, format, tile, power_of_two, seed, stream):  # type: ignore[no-untyped-def]
    where, dtype = Tile.of(tile), format_of(format).dtype
    rows, cols = x.shape
    codes, codes_t = x.new_empty(rows, cols, dtype=dtype), x.new_empty(cols, rows, dtype=dtype)
    down = _fake_scale(x, tile, where.scale_shape(rows, cols))
    across = _fp32(x, (0,)) if where.transposes else _fake_scale(x, tile, where.scale_shape(cols, rows))
    return codes, down, codes_t, across, _fp32(x, ())


def _fp32(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    return x.new_empty(shape, dtype=torch.float32)


def _fake_scale(x: Tensor, tile: str, shape: tuple[int, int]) -> Tensor:
    """1x128 scales lie column by column, on the GPU, as cuBLASLt reads them; all others row by row."""
    if tile == "1x128" and x.device.type == "cuda":
        return _fp32(x, shape[::-1]).t()
    return _fp32(x, shape)
