"""Programmatic dependent launch: a kernel is put on the GPU while the one before it still runs.

A decode step is a chain of some hundred kernels of a few microseconds, and between two of them the GPU is half empty:
the first one's last programs end, the next one's first ones begin. Hopper lets a kernel say that its follower may be
started (`griddepcontrol.launch_dependents`); the follower does what needs none of its forerunner's results, such as
asking for its weights, and then waits until that one has ended and all it wrote is visible (`griddepcontrol.wait`).

Each kernel here that is launched so calls `enter` in every program before it reads or writes anything that another
kernel writes or reads. So a kernel that has ended has waited for its forerunner, and the order of a stream holds as if
nothing had changed. Kernels that are launched in the ordinary way, before or after, wait for everything as always.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LAUNCH = False  # whether kernels are launched so


@triton.jit
def enter(AHEAD: tl.constexpr):
    """Let the next kernel come, and wait for the one before."""
    if AHEAD:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def ask_for(ptr, at, AHEAD: tl.constexpr):
    """Ask memory for the lines of 128 bytes at some elements; they come into the L2, nobody waits."""
    if AHEAD:
        place = (ptr + at).to(tl.int64)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [place], dtype=tl.int32, is_pure=False, pack=1
        )
