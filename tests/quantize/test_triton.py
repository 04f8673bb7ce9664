"""The Triton quantizer: byte-equal to the reference, on a GPU, and (its own cast apart) in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fp8.bench.quantize_bytes import Case, cases, differing_bytes
from fp8.formats import FORMATS
from fp8.tile import NAMES, Tile

DOORS = [*itertools.product(NAMES, [False], [False, True]), *itertools.product(NAMES, [True], [False])]
DOORS.append(("tensor", True, True))
FORMS = list(itertools.product(("e4m3", "e5m2"), (True, False), (False, True)))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("tile", NAMES)
def test_the_kernels_equal_the_reference_in_the_interpreter(tile):
    """In a process of its own: whether kernels are interpreted is decided when Triton is imported."""
    tests = Path(__file__).parent.parent
    found = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, tile],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tests.parent / "src"), str(tests)])},
        timeout=550,
        check=False,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert found.stdout.splitlines()[-1] == "0 differing bytes"


@pytest.mark.gpu
@pytest.mark.parametrize("tile", NAMES)
def test_the_kernels_equal_the_reference_on_hard_values(tile):
    """Every ninth of the benchmark's cases: `python -m fp8.bench.quantize` runs them all."""
    for case in [c for c in cases() if c.tile == tile][::9]:
        assert differing_bytes(case) == 0, case


@pytest.mark.gpu
def test_scales_of_1x128_lie_column_by_column():
    from fp8.quantize import triton

    x = torch.randn(256, 512, device="cuda", dtype=torch.bfloat16)
    _, scale, _, scale_t, _ = triton.quantize_both(x, None, FORMATS["e4m3"], Tile.of("1x128"), True, None)
    assert scale.stride() == (1, 256)
    assert scale_t.stride() == (1, 512)


@pytest.mark.gpu
@pytest.mark.parametrize("tile", NAMES)
def test_a_captured_graph_gives_the_same_bytes_at_every_replay(tile):
    from fp8.quantize import triton

    x = torch.randn(384, 512, device="cuda", dtype=torch.bfloat16)
    rest = (None, FORMATS["e4m3"], Tile.of(tile), True, None)
    want = triton.quantize_both(x, *rest)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = triton.quantize_both(x, *rest)
    for _ in range(3):
        graph.replay()
        for a, b in zip(want, got, strict=True):
            assert torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


def interpreted(tile: str) -> int:
    """Differing bytes over small even, uneven and odd shapes; the forms and types take turns."""
    import triton_interpreter

    reason = triton_interpreter.install()
    assert reason is None, reason
    from fp8.quantize import triton

    triton.LONGEST = 256  # so that a row of 300 is read twice
    shapes = [(128, 256), (130, 300), (37, 132), (132, 33), (1, 1)]
    count = 0
    for number, (shape, door) in enumerate(itertools.product(shapes, [d for d in DOORS if d[0] == tile])):
        for turn in range(3):
            form = FORMS[(number * 3 + turn) % len(FORMS)]
            dtype = ("bfloat16", "float32", "float16")[turn]
            case = Case(shape, dtype, tile, *form, both=door[1], given=door[2], calm=number % 2 == 0)
            if wrong := differing_bytes(case, "cpu", 1):
                print(wrong, case)
            count += wrong
    return count


if __name__ == "__main__":
    print(interpreted(sys.argv[1]), "differing bytes")
