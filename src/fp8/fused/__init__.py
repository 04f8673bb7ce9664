"""Operations that end in FP8 codes: the number that a norm, an activation or a rotation has just made is quantized
where it was made, and is never stored in BF16.

    norm         residual add and RMS norm; its transposed codes, made again for the backward; its backward
    activation   gated or plain; its backward, which also makes the transposed codes of what the forward gave
    across       the transposed codes of a matrix, later than the others
    adamw        the optimizer, which writes the next step's weight codes (`fp8.AdamW`)
    rope         rotary positions of a joined q, k, v product; their backward
    hadamard     the online rotation, which gives values: what rounds them comes after

Each has a reference, which defines it, and kernels that equal the unfused path in bytes: what is quantized, and what is
measured, is the value rounded to the type that an unfused kernel would store. With no `Target` the same kernels store
that value; this is the unfused path of a Hopper GPU.

These are no autograd functions: `nn/fused.py` composes them, since codes cross no differentiable edge.
"""

from .across import across
from .activation import activation, activation_backward
from .hadamard import hadamard
from .norm import norm, norm_across, norm_backward
from .rope import Heads, rope, rope_backward
from .target import Codes, Target

__all__ = [
    "Codes", "Heads", "Target", "across", "activation", "activation_backward", "hadamard", "norm", "norm_across",
    "norm_backward", "rope", "rope_backward",
]  # fmt: skip
