"""Bytes that a training step moves outside its products, as tables. A wrong figure is one number to correct.

Everything is in bytes an element: `r2` reads a BF16 number, `w1` writes a code. Elements are those of a tensor of the
block, for T tokens:

    x     T * hidden           the residual stream, a normed input, a gradient of either
    qk    T * (H + KV) * D     what RoPE turns
    qkv   T * (H + 2 KV) * D
    ctx   T * H * D            attention's output
    h     T * ffn              what `down` multiplies
    up    T * 2 ffn (gated)    what `up` gives

**Passes** are what BF16 needs too. Compiled figures are what torch.compile makes of the plain modules today, checked
against the times of its kernels in a profile of four Llama-3-8B layers: the gradient of SwiGLU moves 18 bytes and not
12, because the joining of two halves reads its inputs for each. RoPE is counted by its bytes; a compiled RoPE that
computes sine and cosine anew for each element takes many times as long, which is a fault, not a cost. Eager figures
count each operation of the modules by what it reads and writes: RoPE in FP32 is eleven of them.

With FP32 parameters under autocast the embedding, and so the residual stream, is FP32: its reads and writes cost two
bytes more each (`wide`).

**Quantizing** is what FP8 adds, in both orientations, by scheme and by where the tensor comes from. Alone (`plain`):

    current   r2 for the amax; r2 w1 w1      = 6
    delayed   r2 w1 w1                       = 4
    row       r2 w1 and the columns' amax; r2 w1 = 6
    block     r2 w1 w1 and scales            = 4.06 (128 x 1 columns from the same read)

Fused into the producer the BF16 tensor need not be written (- w2) or read (- r2): a delayed or blocked producer writes
two codes in place of one BF16 number, 0 more; a current one finds the amax on its way and the cast reads once: 4.
The gradient of the residual stream is needed in BF16 as well, so its codes cost w1 w1 = 2. Attention is not ours to
fuse: its output is always quantized alone.
"""

from __future__ import annotations

from typing import NamedTuple


class Pass(NamedTuple):
    """A kernel, or several, that run `times` a block: bytes for each of `elements`, by build; `wide` more where the
    residual stream is FP32."""

    kind: str
    name: str
    elements: str
    times: int
    compiled: float
    fused: float
    eager: float
    wide: float = 0.0


PASSES = (
    #    kind          what                                    of    times compiled fused eager wide
    Pass("norm", "residual add and norm (r4 w4)", "x", 2, 8, 8, 12, 4),
    Pass("norm", "backward of both (r6 w2)", "x", 2, 8, 8, 16, 6),
    Pass("rope", "RoPE (r2 w2)", "qk", 1, 4, 4, 48),
    Pass("rope", "backward of RoPE (r2 w2)", "qk", 1, 4, 4, 52),
    Pass("rope", "joining the gradients of q, k, v (r2 w2)", "qkv", 1, 4, 0, 8),
    Pass("copy", "attention's heads into rows, once (r2 w2)", "ctx", 1, 4, 0, 4),
)
ACTIVATION = {
    True: (
        Pass("activation", "SwiGLU (r4 w2)", "h", 1, 6, 6, 10),
        Pass("activation", "backward of SwiGLU (r6 w4, h again w2)", "h", 1, 18, 12, 26),
    ),
    False: (
        Pass("activation", "activation (r2 w2)", "h", 1, 4, 4, 4),
        Pass("activation", "backward of activation (r4 w2, h again w2)", "h", 1, 8, 8, 6),
    ),
}

# Bytes an element that FP8 adds, for both orientations, by the operand's origin.
PLAIN = {"current": 6.0, "delayed": 4.0, "row": 6.0, "block": 4.06}
FUSED = {
    "current": {"norm": 4.0, "activation": 4.0, "attention": 6.0, "rope": 4.0, "residual": 4.0, "loss": 6.0},
    "delayed": {"norm": 0.0, "activation": 0.0, "attention": 4.0, "rope": 0.0, "residual": 2.0, "loss": 4.0},
    "row": {"norm": 3.0, "activation": 4.0, "attention": 6.0, "rope": 4.0, "residual": 4.0, "loss": 6.0},
    "block": {"norm": 0.06, "activation": 0.06, "attention": 4.06, "rope": 0.06, "residual": 2.06, "loss": 4.06},
}
# A weight, both orientations, from BF16; from FP32 each read of it costs two bytes more.
WEIGHT = {"current": 6.0, "delayed": 4.0, "row": 6.0, "block": 4.0}
WEIGHT_READS = {"current": 2, "delayed": 1, "row": 2, "block": 1}

# Which measured cast moves these bytes.
CAST = {"current": "both tensor", "delayed": "both tensor given", "row": "both row", "block": "both 1x128"}
CAST_WEIGHT = {**CAST, "block": "both 128x128"}
CAST_BYTES = {"both tensor": 6.0, "both tensor given": 4.0, "both row": 6.0, "both 1x128": 4.06, "both 128x128": 4.0}

# Head and loss, bytes a logit. Compiled: loss r2 r2, its gradient r2 w2. Eager: FP32 copy (r2 w4), log softmax (r4 r4
# w4), loss, gradient (r4 w4), back to BF16 (r4 w2).
LOSS = {"compiled": 8.0, "eager": 28.0}
# Embedding, bytes an element of T * hidden (r w forward, r w backward), and of the table (its gradient, cleared).
EMBEDDING, EMBEDDING_TABLE = 8.0, 1.0
# AdamW, bytes a parameter for an element of s bytes: p, g, m, v read; p, m, v written.
ADAMW_TOUCHES = 7
CLIP_TOUCHES = 3  # the norm reads g; scaling reads and writes it


def quantizing(scheme: str, origin: str, fused: bool) -> float:
    """Bytes an element that FP8 adds to an operand from `origin`."""
    return FUSED[scheme][origin] if fused else PLAIN[scheme]
