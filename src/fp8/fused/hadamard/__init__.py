"""The online rotation: a Hadamard transform of activations, for an input whose rotation has no layer to vanish into.

`hadamard(x, block)` is the door; `reference.py` is the definition, `triton.py` equals it in bytes. It is meant for the
input of `down_proj`, which a gate has just made: `down_proj(h) = (W H) (H h)`, with H folded into W beforehand
(`Rotation` of `calibrate/hadamard.py` gives it, signs included, which the rows of `up_proj` take). No published
checkpoint format can ask a server for it, so `fp8 quantize` does not write such models.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends import Backend, choose, why_not_triton
from ...errors import ShapeError, TensorError

__all__ = ["BACKENDS", "hadamard"]

BACKENDS = (
    Backend("triton", "a Hopper GPU and Triton", lambda x: why_not_triton(x.device), "fp8.fused.hadamard.triton"),
    Backend("reference", "nothing", lambda x: None, "fp8.fused.hadamard.reference"),
)
MOST = 4096  # channels that one program holds
TYPES = (torch.float32, torch.bfloat16, torch.float16)


def hadamard(x: Tensor, block: int | None = None, *, backend: str | None = None) -> Tensor:
    """x [..., K] with each run of `block` channels times Sylvester's H / sqrt(block): computed in FP32, rounded once to
    the type of x. The transform is its own inverse.

    block    a power of two up to 4096 that divides K; None: the largest

    Raises `ShapeError`, and `TensorError` for a type that is none of float32, bfloat16 and float16.

    >>> hadamard(torch.tensor([4.0, 0.0, 0.0, 0.0])).tolist()
    [2.0, 2.0, 2.0, 2.0]
    """
    if x.dtype not in TYPES:
        raise TensorError(f"hadamard takes float32, bfloat16 or float16, not {str(x.dtype)[6:]}.")
    width = x.shape[-1] if x.ndim else 0
    block = block or min(width & -width, MOST)
    if width == 0 or block < 1 or block & (block - 1) or block > MOST or width % block:
        raise ShapeError(
            f"a run is a power of two up to {MOST} that divides the last dimension; got {block} of {width}."
        )
    matrix = x.reshape(-1, width)
    if torch.compiler.is_compiling():
        return torch.ops.fp8.hadamard(matrix, block).view(x.shape)
    return choose("hadamard", BACKENDS, matrix, backend).run(matrix, block).view(x.shape)


@torch.library.custom_op("fp8::hadamard", mutates_args=())
def _hadamard(x: Tensor, block: int) -> Tensor:
    return hadamard(x, block)


@_hadamard.register_fake
def _(x, block):  # type: ignore[no-untyped-def]
    return torch.empty_like(x, memory_format=torch.contiguous_format)
