"""Many matrices in few launches: the bytes of one after the other, in place, whoever computes them."""

from __future__ import annotations

import importlib.util
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fp8.bench.quantize_bytes import hard_values
from fp8.formats import FORMATS
from fp8.quantize import many, reference
from fp8.quantize.many import Cast, key_of, quantize_many, run_many
from fp8.tile import Tile

WEIGHTS = ("tensor", "row", "128x128")
SHAPES = [(128, 128), (64, 128), (37, 132), (0, 5), (1, 1)]
BYTES = {1: torch.uint8, 4: torch.int32}


def room(x: Tensor, format: str, tile: Tile, given: Tensor | None = None, amax: float | None = None) -> Cast:
    """A cast of x with outputs full of junk."""
    rows, cols = x.shape
    junk = lambda *shape: torch.full(shape, 7.0, device=x.device)  # noqa: E731
    kind = FORMATS[format].dtype
    return Cast(
        x, junk(rows, cols).to(kind), junk(cols, rows).to(kind), junk(*tile.scale_shape(rows, cols)),
        None if tile.transposes else junk(*tile.scale_shape(cols, rows)), given,
        None if amax is None else torch.full((), amax, device=x.device),
    )  # fmt: skip


def casts(tile: str, format: str, given: bool, device: str, power: bool = True) -> list[Cast]:
    """Matrices of every type and hard shape; those with a scale of their own where `given`."""
    dtypes = itertools.cycle([torch.bfloat16, torch.float32, torch.float16])
    made = []
    for number, shape in enumerate(SHAPES):
        x = hard_values(shape, next(dtypes), calm=number % 2 == 0, seed=number).to(device)
        scale = torch.full((), 2.0 ** (number - 3) * (1.0 if power else 1.3), device=device)
        made.append(room(x, format, Tile.of(tile), scale if given else None, (-1.0, 0.5, 1e30, None)[number % 4]))
    return made


def differing_bytes(tile: str, format: str, given: bool, power: bool, device: str) -> int:
    """Between the kernels and the reference, twice with the same addresses and once with others."""
    from fp8.quantize import triton_many

    want, got, prepared, count = (*(casts(tile, format, given, d, power) for d in ("cpu", device)), None, 0)
    rest = (FORMATS[format], Tile.of(tile), power)
    quantize_many(want, *rest)
    for turn in range(3):
        kept = prepared
        prepared = triton_many.quantize_many(got, *rest, prepared)
        assert (prepared is kept) == (turn == 1)
        count += sum(differ(a, b) for a, b in zip(want, got, strict=True))
        if turn == 1:
            got = casts(tile, format, given, device, power)
    return count


def differ(want: Cast, got: Cast) -> int:
    pairs = [(getattr(want, name), getattr(got, name)) for name in ("codes", "codes_t", "scale", "scale_t", "amax")]
    return sum(
        int((a.view(BYTES[a.itemsize]) != b.cpu().view(BYTES[b.itemsize])).sum()) for a, b in pairs if a is not None
    )


@pytest.mark.parametrize("tile", WEIGHTS)
@pytest.mark.parametrize("format", ["e4m3", "e5m2"])
def test_many_are_one_after_the_other(tile: str, format: str) -> None:
    """Codes, scales and raised amaxes, in the tensors that were there."""
    made = casts(tile, format, False, "cpu")
    places = [cast.codes.data_ptr() for cast in made]
    before = [None if cast.amax is None else cast.amax.clone() for cast in made]
    run_many(made, FORMATS[format], Tile.of(tile), True)
    assert places == [cast.codes.data_ptr() for cast in made]
    for cast, old in zip(made, before, strict=True):
        codes, scale, codes_t, scale_t, amax = reference.quantize_both(
            cast.x, None, FORMATS[format], Tile.of(tile), True, None
        )
        assert differ(Cast(cast.x, codes, codes_t, scale, None if cast.scale_t is None else scale_t), cast) == 0
        assert cast.amax is None or cast.amax == torch.maximum(old, amax)


def test_a_scale_that_lies_where_the_scale_is_kept_is_used_and_stays() -> None:
    x = torch.randn(8, 16)
    cast = room(x, "e4m3", Tile(0, 0))
    cast.scale.fill_(0.25)
    cast = Cast(cast.x, cast.codes, cast.codes_t, cast.scale, given=cast.scale)
    run_many([cast], FORMATS["e4m3"], Tile(0, 0), True)
    assert cast.scale.item() == 0.25
    assert torch.equal(cast.codes.float(), (x / 0.25).to(torch.float8_e4m3fn).float())


def test_a_tile_that_no_recipe_gives_to_weights_works_too() -> None:
    x = torch.randn(40, 256)
    cast = room(x, "e4m3", Tile(1, 128))
    run_many([cast], FORMATS["e4m3"], Tile(1, 128), True)
    want = reference.quantize_both(x, None, FORMATS["e4m3"], Tile(1, 128), True, None)
    assert differ(Cast(x, want[0], want[2], want[1], want[3]), cast) == 0


def test_a_key_is_the_amax() -> None:
    x = torch.tensor([[1.0, -3.5, torch.inf, torch.nan]])
    assert (key_of(x) - many.EMPTY).view(torch.float32).item() == 3.5
    assert (key_of(x[:, 2:]) - many.EMPTY).item() == 0


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("tile", WEIGHTS)
def test_the_kernels_equal_the_reference_in_the_interpreter(tile: str) -> None:
    """In a process of its own: whether kernels are interpreted is decided when Triton is imported."""
    tests = Path(__file__).parent.parent
    found = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, tile],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tests.parent / "src"), str(tests)])},
        timeout=300,
        check=False,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert found.stdout.splitlines()[-1] == "0 differing bytes"


FORMS = [(f, g, p) for p in (True, False) for g in (False, True) for f in ("e4m3", "e5m2")]


@pytest.mark.gpu
@pytest.mark.parametrize("tile", WEIGHTS)
def test_the_kernels_equal_the_reference_on_hard_values(tile: str) -> None:
    for form, given, power in FORMS:
        if tile == "tensor" or not given:
            assert differing_bytes(tile, form, given, power, "cuda") == 0, (form, given, power)


@pytest.mark.gpu
def test_a_known_key_saves_the_first_pass_and_no_bit() -> None:
    assert with_keys("cuda") == 0


def with_keys(device: str) -> int:
    from fp8.quantize import triton_many

    made = [c for c in casts("tensor", "e4m3", False, device) if c.x.numel()]
    keyed = [Cast(c.x, c.codes, c.codes_t, c.scale, amax=c.amax, key=key_of(c.x)) for c in made]
    want = casts("tensor", "e4m3", False, "cpu")
    quantize_many(want, FORMATS["e4m3"], Tile(0, 0), True)
    triton_many.quantize_many(keyed, FORMATS["e4m3"], Tile(0, 0), True)
    return sum(differ(a, b) for a, b in zip([c for c in want if c.x.numel()], keyed, strict=True))


def interpreted(tile: str) -> int:
    import triton_interpreter

    reason = triton_interpreter.install()
    assert reason is None, reason
    forms = FORMS[::3] if tile == "tensor" else FORMS[:2]
    count = with_keys("cpu") if tile == "tensor" else 0
    return count + sum(differing_bytes(tile, *form, device="cpu") for form in forms)


if __name__ == "__main__":
    print(interpreted(sys.argv[1]), "differing bytes")
