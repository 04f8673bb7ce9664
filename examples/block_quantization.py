"""The block-quantization and matmul sketches of the article "FP8 Inference", first as printed, then mended.

As printed:
  - A block of zeros has the scale 0, and 0 / 0 gives NaN weights.
  - A width that is no multiple of the block size cannot be viewed as blocks.
  - The result keeps the blocks' shape [out, blocks, block_size], which no product takes.
  - `x_fp8 * x_scales` is not defined for float8 in torch, and the second operand is not transposed.

Mended, below, with as little changed as that allows: a block of zeros gets the scale 1, the last block may be short,
the codes come back in the shape of w with scales [out, blocks], scales are FP32, and the product dequantizes,
transposes and multiplies. This library's `fp8.quantize(w, tile=(1, 128), scale_rounding="none")` gives the same codes
and scales to the byte, and `fp8.matmul` the same product to FP32's rounding; by default it takes powers of two as
scales.

Prints what the sketches do as printed, the comparison, and the mean relative error of normal data per tensor and per
block, of which the article expects 3 to 5 % and 1 to 2 %: a float format's error does not shrink with the block, until
outliers push the rest of their tensor towards zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

import fp8


# Sketch of FP8 quantization
def quantize_fp8_e4m3_as_printed(w_bf16, block_size=128):
    # w_bf16 shape: (out, in)
    out, inn = w_bf16.shape
    n_blocks = inn // block_size
    w_blocks = w_bf16.view(out, n_blocks, block_size)
    abs_max = w_blocks.abs().amax(dim=-1, keepdim=True)
    scales = abs_max / 448.0  # shape: (out, n_blocks, 1) in BF16
    w_fp8 = (w_blocks / scales).to(torch.float8_e4m3fn)  # cast to FP8
    return w_fp8, scales


# At inference: dequantize via scales, then multiply.
def matmul_fp8_as_printed(x_fp8, x_scales, w_fp8, w_scales):
    # On Hopper this is one fused mma.sync; we sketch the math:
    return (x_fp8 * x_scales) @ (w_fp8 * w_scales)


def quantize_fp8_e4m3(w_bf16: Tensor, block_size: int = 128) -> tuple[Tensor, Tensor]:
    """w (out, in) to codes (out, in) and FP32 scales (out, blocks)."""
    out, inn = w_bf16.shape
    n_blocks = -(-inn // block_size)
    w = torch.nn.functional.pad(w_bf16.float(), (0, n_blocks * block_size - inn))
    w_blocks = w.view(out, n_blocks, block_size)
    abs_max = w_blocks.abs().amax(dim=-1, keepdim=True)
    scales = torch.where(abs_max == 0, 1.0, abs_max / 448.0)
    w_fp8 = (w_blocks / scales).clamp(-448, 448).to(torch.float8_e4m3fn)
    return w_fp8.view(out, -1)[:, :inn], scales.squeeze(-1)


def matmul_fp8(x_fp8: Tensor, x_scales: Tensor, w_fp8: Tensor, w_scales: Tensor, block_size: int = 128) -> Tensor:
    """(tokens, in) times the transpose of (out, in)."""

    def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
        return codes.float() * scales.repeat_interleave(block_size, dim=1)[:, : codes.shape[1]]

    return dequantize(x_fp8, x_scales) @ dequantize(w_fp8, w_scales).T


def what_happens(name: str, call) -> None:  # type: ignore[no-untyped-def]
    """Run a sketch as printed and tell its fate."""
    try:
        print(f"  {name}: {call()}")
    except (RuntimeError, NotImplementedError) as error:
        print(f"  {name}: {type(error).__name__}: {str(error).splitlines()[0][:90]}")


def relative_error(x: Tensor, q: fp8.Quantized) -> float:
    """The mean of |dequantized - x| / |x|."""
    return float(((q.dequantize() - x).abs() / x.abs()).mean())


def main() -> None:
    torch.manual_seed(0)
    w, x = torch.randn(64, 384), torch.randn(16, 384)
    w[3, :128] = 0.0

    print("as printed")
    codes, scales = quantize_fp8_e4m3_as_printed(w)
    what_happens("a block of zeros", lambda: f"{int(codes.float().isnan().sum())} NaN weights")
    what_happens("a width of 300", lambda: quantize_fp8_e4m3_as_printed(w[:, :300]))
    what_happens("the product", lambda: matmul_fp8_as_printed(codes, scales, codes, scales))

    print("mended, beside this library")
    ours_w, ours_x = (fp8.quantize(t, tile=(1, 128), scale_rounding="none") for t in (w, x))
    codes, scales = quantize_fp8_e4m3(w)
    same = torch.equal(codes.view(torch.uint8), ours_w.codes.view(torch.uint8)) and torch.equal(scales, ours_w.scale)
    print(f"  codes and scales equal to the byte: {same}")
    y = matmul_fp8(*quantize_fp8_e4m3(x), codes, scales)
    ours = fp8.matmul(ours_x, ours_w, out_dtype=torch.float32)
    print(f"  product, largest difference: {float((y - ours).abs().max() / y.abs().max()):.1e} of the largest output")
    exact = x.double() @ w.double().T
    print(f"  product, error against float64: {float((ours - exact).norm() / exact.norm()):.2%}")

    print("mean relative error of a million numbers")
    normal = torch.randn(1000, 1024)
    spiked = normal.clone()
    spiked[:, :8] *= 1e5
    for name, data in (("normal", normal), ("with 8 of 1024 channels 1e5 times larger", spiked)):
        tiles: list[str | tuple[int, int]] = ["tensor", (1, 128), (1, 32)]
        errors = [relative_error(data, fp8.quantize(data, tile=t, scale_rounding="none")) for t in tiles]
        print(f"  {name}: per tensor {errors[0]:.2%}, per 128 {errors[1]:.2%}, per 32 {errors[2]:.2%}")


if __name__ == "__main__":
    main()
