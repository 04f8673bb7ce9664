"""The conceptual `fp8_gemm` of the article "FP8 Training and Inference: Next-Generation Numerical Formats".

The three steps are the article's: scale and cast, multiply, descale. Changed, and why:
  - `cast_to_fp8` and `matmul_fp8`, which the article leaves open, are `fp8.quantize` under a scale of 1 and
  `fp8.matmul`. - B is handed over transposed: FP8 tensor cores read both operands with the summed dimension last.

The article's scale multiplies; the one in this library dequantizes (`real = code * scale`), so each is the other's
inverse.

Prints, for data of three magnitudes, the relative error of the article's default (scales of 1), of the article's scales
chosen from the data (448 / amax), and of the library's own way, which measures the data and takes a power of two. With
scales of 1 small data is flushed to zero and large data is clipped at 448.
"""

from __future__ import annotations

import torch
from torch import Tensor

import fp8

E4M3_MAX = 448.0


def cast_to_fp8(x: Tensor, format: str) -> fp8.Quantized:
    """The codes of x itself."""
    return fp8.quantize(x, format, scale=torch.ones(1, 1, device=x.device))


def matmul_fp8(a: fp8.Quantized, b: fp8.Quantized) -> Tensor:
    """a [M, K] times b [N, K] transposed, in FP32."""
    return fp8.matmul(a, b, out_dtype=torch.float32)


def fp8_gemm(A_fp32: Tensor, B_fp32: Tensor, scale_a: float = 1.0, scale_b: float = 1.0) -> Tensor:
    # 1. Scale and cast to FP8
    A_fp8 = cast_to_fp8(A_fp32 * scale_a, format="e4m3")
    B_fp8 = cast_to_fp8(B_fp32.T * scale_b, format="e4m3")

    # 2. Execute the FP8 multiply
    C_fp32_scaled = matmul_fp8(A_fp8, B_fp8)  # Returns FP32

    # 3. Descale output
    return C_fp32_scaled / (scale_a * scale_b)


def our_gemm(A: Tensor, B: Tensor) -> Tensor:
    """The same in this library's words: quantizing finds the scale, multiplying applies it."""
    return fp8.matmul(fp8.quantize(A), fp8.quantize(B.T), out_dtype=torch.float32)


def relative_error(result: Tensor, exact: Tensor) -> float:
    return float((result.double() - exact).norm() / exact.norm())


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    print("relative error of a 128 x 256 x 64 product, A and B normal with this deviation")
    print(f"{'deviation':>10} {'scale 1':>10} {'448 / amax':>12} {'fp8.quantize':>14}")
    for size in (1e-4, 1.0, 1e4):
        A = torch.randn(128, 256, generator=generator) * size
        B = torch.randn(256, 64, generator=generator) * size
        exact = A.double() @ B.double()
        scaled = fp8_gemm(A, B, E4M3_MAX / float(A.abs().max()), E4M3_MAX / float(B.abs().max()))
        errors = [relative_error(y, exact) for y in (fp8_gemm(A, B), scaled, our_gemm(A, B))]
        print(f"{size:>10g} {errors[0]:>10.2%} {errors[1]:>12.2%} {errors[2]:>14.2%}")
    print("multiplied by:", fp8.explain_matmul(fp8.quantize(A), fp8.quantize(B.T)))


if __name__ == "__main__":
    main()
