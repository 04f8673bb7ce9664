"""How AdamW's two moments are kept between steps: in FP32, in BF16, or in FP8 with an expanded range.

**BF16.** The upper half of the FP32 bits. Rounding to nearest would freeze the second moment: it decays by 1 - beta2 a
step, and a change of less than 2^-9 of a number is rounded away, so with beta2 = 0.999 it could grow but never shrink.
Stochastic rounding is right on average: 16 random bits are added below the cut, and the carry decides.

**FP8.** 128 neighbours (of the tensor as a line) share an amax and an exponent k. E4M3 spans 2^17.8 from its smallest
code to its largest, a group of moments usually less; raising |x| / amax to the power k stretches the group over the
format, and each step of a code is then k times finer ("COAT", ICLR 2025, whose name for this is dynamic range
expansion).

    k       = floor(4 * 16.5 / log2(amax / least)) / 4, from 1/4 to 8: the least magnitude lands at 2^-16.5 of the
              largest code, between two and three codes above zero
    code    = sign(x) * E4M3((|x| / amax)^k * 448)
    value   = sign(code) * amax * (|code| / 448)^(1/k)

Where this differs from COAT's code, and why:

- `least` leaves zeros out (they stay zero), and for the first moment it is at least 2^-12 of the amax: a first moment
  so far below its neighbours moves nothing, and must not cost them their precision. k below 1 compresses instead: a
  second moment may span more than E4M3 does.
- A second moment that is not zero is never stored as zero: its first moment would then be divided by epsilon alone.
- Rounding is between the *values* of the two codes around x, not between their images under the power: to the nearer
  one, or, if asked, stochastic, which between the images would draw every number downwards when k > 1.
- k is a multiple of 1/4, so that the power is made of products and IEEE square roots, and the root of the way back is
  read from a table of 32 x 128 numbers: every machine gets the same bits. log2 is read off the FP32 bits, which errs by
  at most 0.09, and only moves where the least magnitude lands.
- NaN and Inf are seen in x: their code is NaN. A group without finite magnitudes has amax 0.

Memory: 1 byte an element, and 5 bytes (amax, 4k) a group: 1.04 bytes an element for each moment.

**Which rounding.** BF16 rounds stochastically, FP8 to nearest, unless told otherwise. In FP8 the largest number of a
group is exact and the others are kept as ratios to it: what decays together decays, however small the step; changes
*within* a group freeze. Stochastic rounding has no such bias and more noise. On small training runs nearest came out
ahead; at beta2 = 0.999 and in groups of many binades it keeps v up to 40 % too large, where stochastic is 20 % noise
(docs/log.md, 2026-11-24).

**Random bits.** One Philox word (`quantize.reference.philox`) an element and step, its low half for the first moment,
its high half for the second; key = the optimizer's seed (low 32 bits) and the number of the parameter (high 32 bits),
stream = the step.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ...formats import FORMATS
from ...quantize.reference import LOW32, philox

ROUNDING = {"fp32": "nearest", "bf16": "stochastic", "fp8": "nearest"}
KINDS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
GROUP = 128
MOST = 32  # the largest 4k
RANGE = 66  # 4 * 16.5
FLOOR = 12  # binades below the amax in which the first moment counts
TINY = 2.0**-126
NAMES = ("exp_avg", "exp_avg_sq")


def fresh(parameter: Tensor, kind: str) -> dict[str, Tensor]:
    """Both moments of a parameter, zero: `exp_avg`, `exp_avg_sq`, and in FP8 for each of them `_amax` and `_k` (4k as
    uint8), one for each 128 elements."""
    like = {"device": parameter.device, "dtype": KINDS[kind]}
    state = {name: torch.zeros(parameter.shape, **like) for name in NAMES}
    if kind == "fp8":
        groups = -(-parameter.numel() // GROUP)
        for name in NAMES:
            state[f"{name}_amax"] = torch.zeros(groups, device=parameter.device)
            state[f"{name}_k"] = torch.ones(groups, device=parameter.device, dtype=torch.uint8)
    return state


@cache
@torch.inference_mode(False)
def roots() -> Tensor:
    """[MOST + 1, 128]: row 4k, column c holds (|code c| / 448)^(1/k), FP32, correctly rounded; row 0 is not used."""
    codes = torch.tensor([FORMATS["e4m3"].decode(c) for c in range(128)], dtype=torch.float64, device="cpu")
    codes /= 448.0
    return torch.stack([codes**0.0, *(codes ** (4.0 / n) for n in range(1, MOST + 1))]).float()


def words(count: int, seed: int, number: int, step: int) -> tuple[Tensor, Tensor]:
    """16 random bits for each element (int64), for the first and for the second moment."""
    drawn = philox(count, (number & LOW32) << 32 | (seed & LOW32), step)
    return drawn & 0xFFFF, drawn >> 16


def read(state: dict[str, Tensor], name: str) -> Tensor:
    """A moment in FP32, in the shape of its parameter."""
    kept = state[name]
    if kept.dtype != torch.float8_e4m3fn:
        return kept.float()
    codes, k = grouped(kept.view(torch.uint8)), state[f"{name}_k"].long()
    magnitude = roots().to(kept.device)[k[:, None], (codes & 0x7F).long()] * state[f"{name}_amax"][:, None]
    value = torch.where(codes >= 0x80, -magnitude, magnitude)
    return value.flatten()[: kept.numel()].view(kept.shape)


def write(state: dict[str, Tensor], name: str, value: Tensor, word: Tensor | None) -> None:
    """Keep a moment (FP32), in place. `word`: 16 random bits an element in int64, or None to round to nearest."""
    kept = state[name]
    if kept.dtype == torch.bfloat16:
        kept.copy_(value if word is None else stochastic_bf16(value, word.view(value.shape)))
    elif kept.dtype == torch.float8_e4m3fn:
        codes, amax, k = encode(value, word, signed=name == "exp_avg")
        kept.view(torch.uint8).copy_(codes)
        state[f"{name}_amax"].copy_(amax)
        state[f"{name}_k"].copy_(k)
    else:
        kept.copy_(value)


def stochastic_bf16(x: Tensor, word: Tensor) -> Tensor:
    """x with the lower half of its bits gone, rounded up with the probability of what was lost."""
    bits = x.contiguous().view(torch.int32)
    rounded = (bits + word.int()) & -0x10000
    return torch.where(x.isfinite(), rounded.view(torch.float32), x).bfloat16()


def grouped(x: Tensor) -> Tensor:
    """A tensor as [groups, 128], filled up with zeros."""
    line = x.flatten()
    return torch.nn.functional.pad(line, (0, -line.numel() % GROUP)).view(-1, GROUP)


def encode(x: Tensor, word: Tensor | None, signed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """`(codes uint8 of the shape of x, amax [groups] FP32, 4k [groups] uint8)` of a moment in FP32."""
    lines = grouped(x)
    finite = lines.isfinite()
    magnitude = torch.where(finite, lines.abs(), 0.0)
    amax = magnitude.amax(1)
    k = exponent_of(magnitude, amax, signed)
    u = magnitude * (1.0 / amax.clamp(min=TINY))[:, None]
    below = code_below(power(u, k[:, None]) * 448.0)
    table = roots().to(x.device)
    low, high = table[k.long()[:, None], below], table[k.long()[:, None], (below + 1).clamp(max=126)]
    if word is None:
        up = u - low > high - u
    else:
        up = grouped(word) * 2.0**-16 * (high - low) < u - low
    code = (below + up).clamp(max=126)
    if signed:
        code |= lines.signbit().long() << 7
    else:
        code = torch.where((code == 0) & (magnitude != 0), 1, code)
    code = torch.where(finite, code, 0x7F).to(torch.uint8)
    return code.flatten()[: x.numel()].view(x.shape), amax, k.to(torch.uint8)


def exponent_of(magnitude: Tensor, amax: Tensor, signed: bool) -> Tensor:
    """4k (int32 [groups]) for finite magnitudes [groups, 128]."""
    top = amax.view(torch.int32)
    bits = torch.where(magnitude > 0, magnitude.view(torch.int32), top[:, None]).amin(1)
    span = top - bits
    if signed:
        span = span.clamp(max=FLOOR << 23)
    return ((RANGE << 23) // span.clamp(min=1).long()).clamp(1, MOST).int()


def power(u: Tensor, k: Tensor) -> Tensor:
    """u^(k/4) by IEEE roots and products, for whole k (int32) from 1 to 32."""
    half = root(u)
    second = u * u
    fourth = second * second
    result = torch.ones_like(u)
    for bit, factor in enumerate((root(half), half, u, second, fourth, fourth * fourth)):
        result = torch.where((k >> bit & 1) == 1, result * factor, result)
    return result


def root(x: Tensor) -> Tensor:
    """The IEEE square root of FP32 numbers. torch's own on a CPU (MKL) is a bit off in one of five; through FP64 it is
    right, for no root of an FP32 number lies as near to the middle of two as FP64 errs."""
    return x.double().sqrt().float()


def code_below(z: Tensor) -> Tensor:
    """The last E4M3 code (int64) that is not above z, for z from 0 to 448: its bits are FP32's upper bits, with another
    bias, once a subnormal z has been lifted by the smallest normal (which may round it up to the next code)."""
    z = z.clamp(max=448.0)
    normal = z.view(torch.int32) - (120 << 23)
    lifted = (z + 2.0**-6).view(torch.int32) - (121 << 23)
    return (torch.where(z >= 2.0**-6, normal, lifted) >> 20).long()


def bytes_an_element(kind: str) -> float:
    """Both moments: 8, 4, or 2 and the groups' share."""
    return 2 * (KINDS[kind].itemsize + (5 / GROUP if kind == "fp8" else 0))
