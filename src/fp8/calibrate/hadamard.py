"""Orthogonal matrices of plus and minus one, of nearly any size, and how to multiply by them quickly.

A rotation `Q = diag(signs) H / sqrt(b)` spreads every channel evenly over b channels: one that is large no longer
sticks out, and none is lost, since `Q Q^T = 1`. H is a Hadamard matrix of order b, with random signs before it, so that
no direction that a model prefers (all channels alike, say) ends up in one channel.

    order            made by
    2^k              Sylvester: H_2 x ... x H_2, a butterfly of k stages
    q + 1            Paley's first construction, for a prime q = 3 (mod 4): 4, 8, 12, 20, 24, 32, 44, 48, 60 ...
    2 (q + 1)        Paley's second, for a prime q = 1 (mod 4): 12, 28, 36, 60, 76 ...
    2^k m            H_{2^k} x H_m, the Kronecker product: 576 = 16 x 36, 1536 = 128 x 12, 14336 = 512 x 28

m is 128 at most, since its matrix has no fast way. What has no such order (11008 = 256 x 43; one of order 172 is known,
from a table) is rotated in equal blocks of the largest order that divides it. Prime powers, which give 52 and 100, were
left out.

**Exactly the same everywhere.** Sums are elementwise additions in FP64 in a written order, never a matrix product whose
library may add in another, and 1 / sqrt(b) is multiplied once, at the end. Signs are bits of Philox4x32-10, the
generator of `quantize/reference.py`.

Source: Paley, *On orthogonal matrices*, 1933; the use for quantization: QuaRot (arXiv:2404.00456).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from ..errors import ConfigError
from ..quantize.reference import philox

SLAB = 1 << 16  # elements that are turned at once
MOST = 128  # the largest order of Paley


@dataclass(frozen=True)
class Rotation:
    """The rotation of `size` channels with the signs of a seed. Raises `ConfigError` for a size that none mixes.

    >>> turn = Rotation(576, seed=0)
    >>> turn.block, turn.power, turn.paley
    (576, 16, 36)
    """

    size: int
    seed: int
    stream: int = 0  # signs of their own for several rotations of one seed

    def __post_init__(self) -> None:
        if self.block < 2:
            raise ConfigError(
                f"{self.size} channels cannot be rotated: no Hadamard matrix has an order that divides it."
            )

    @cached_property
    def block(self) -> int:
        """The order b of H."""
        return next(d for d in range(self.size, 0, -1) if self.size % d == 0 and parts(d) is not None)

    @property
    def power(self) -> int:
        found = parts(self.block)
        assert found is not None
        return found[0]

    @property
    def paley(self) -> int:
        return self.block // self.power

    @cached_property
    def signs(self) -> Tensor:
        """FP64 [size]."""
        return 1.0 - 2.0 * (philox(self.size, self.seed, self.stream) & 1).double()

    def turn(self, x: Tensor) -> Tensor:
        """`x Q` of x [..., any multiple of size], in runs of `size` channels; FP64."""
        runs = x.reshape(-1, self.size)
        return torch.cat([self._turned(part) for part in runs.split(max(SLAB // self.size, 1))]).view(x.shape)

    def _turned(self, runs: Tensor) -> Tensor:
        """Channels lie before runs, so that each addition is one of long rows, which stay in a processor's cache."""
        y = (runs.double() * self.signs).t().reshape(-1, self.power, self.paley, len(runs))
        y = butterfly(y) if self.power > 1 else y
        y = by_paley(y) if self.paley > 1 else y
        return y.mul(1 / math.sqrt(self.block)).view(self.size, len(runs)).t()

    def matrix(self) -> Tensor:
        """Q, FP64 [size, size]."""
        return self.turn(torch.eye(self.size, dtype=torch.float64))


@cache
def parts(order: int) -> tuple[int, int] | None:
    """`(2^k, m)` with a Hadamard matrix of order 2^k m, m the smallest; None where this file makes none.

    >>> parts(512), parts(576), parts(14336), parts(11008)
    ((512, 1), (16, 36), (512, 28), None)
    """
    m = order // (order & -order)
    while order % m == 0 and m <= MOST:
        if m == 1 or prime_of(m) is not None:
            return order // m, m
        m *= 2
    return None


def prime_of(order: int) -> tuple[int, int] | None:
    """`(q, construction)` of Paley for an order."""
    if order % 4:
        return None
    if is_prime(order - 1):
        return order - 1, 1
    q = order // 2 - 1
    return (q, 2) if q % 4 == 1 and is_prime(q) else None


def is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


@cache
def paley(order: int) -> Tensor:
    """The Hadamard matrix [order, order] of Paley, of plus and minus one, FP64."""
    found = prime_of(order)
    assert found is not None
    q, construction = found
    squares = {a * a % q for a in range(1, q)}
    residue = [0] + [1 if a in squares else -1 for a in range(1, q)]
    core = torch.tensor([[residue[(a - b) % q] for b in range(q)] for a in range(q)], dtype=torch.float64)
    conference = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    conference[0, 1:], conference[1:, 0], conference[1:, 1:] = 1, 1 if construction == 2 else -1, core
    one = torch.eye(q + 1, dtype=torch.float64)
    if construction == 1:
        return conference + one
    plus, minus = (torch.tensor(m, dtype=torch.float64) for m in ([[1, 1], [1, -1]], [[1, -1], [-1, -1]]))
    return torch.kron(conference, plus) + torch.kron(one, minus)


def butterfly(x: Tensor) -> Tensor:
    """`x` times Sylvester's matrix along its second axis, [B, 2^k, m, R]: sums and differences of halves, k times."""
    half, shape = 1, x.shape
    while half < shape[1]:
        pairs = x.view(shape[0], -1, 2, half * shape[2], shape[3])
        first, second = pairs[:, :, 0], pairs[:, :, 1]
        x = torch.stack([first + second, first - second], 2)
        half *= 2
    return x.view(shape)


def by_paley(x: Tensor) -> Tensor:
    """`x` times Paley's matrix along its third axis, [B, 2^k, m, R], one term after the other."""
    h, y = paley(x.shape[2]), torch.zeros_like(x)
    for i in range(x.shape[2]):
        y.addcmul_(x[:, :, i : i + 1], h[i][:, None])
    return y
