"""Stochastic rounding: the random words are the published generator's, each element's word depends on its index alone,
and the mean of many draws is the number that was rounded."""

from __future__ import annotations

import math

import pytest
import torch

import fp8
from fp8.formats import format_of
from fp8.quantize.reference import philox, stochastic
from fp8.tile import Tile

MASK = 0xFFFFFFFF
Words = tuple[int, int, int, int]


def philox4x32(counter: Words, key: tuple[int, int]) -> Words:
    """Philox4x32-10 in Python's integers, after the paper."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        low, high = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (high >> 32) ^ c1 ^ k0, high & MASK, (low >> 32) ^ c3 ^ k1, low & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0, c1, c2, c3


def word(i: int, seed: int, stream: int = 0) -> int:
    """The random word of the element with row-major index i."""
    counter = ((i >> 2) & MASK, i >> 34, stream, 0)
    return philox4x32(counter, (seed & MASK, seed >> 32))[i & 3]


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((MASK,) * 4, (MASK,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_the_generator_gives_the_known_answers(counter: Words, key: tuple[int, int], words: Words) -> None:
    """The vectors of Random123's `kat_vectors`."""
    assert philox4x32(counter, key) == words


@pytest.mark.parametrize("seed", [0, 1, 0xA4093822, 0x299F31D0A4093822, (1 << 64) - 1])
@pytest.mark.parametrize("stream", [0, 7])
def test_the_words_of_a_tensor_are_those_of_its_indices(seed: int, stream: int) -> None:
    assert philox(11, seed, stream).tolist() == [word(i, seed, stream) for i in range(11)]


def test_the_first_words_of_seed_zero() -> None:
    assert philox(4, 0, 0).tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
@pytest.mark.parametrize("tile", ["tensor", "row", "1x32", "128x128"])
def test_each_code_is_the_one_that_its_word_draws(name: str, tile: str) -> None:
    """u = min(|v|, max), t = u / step, up if word < floor((t - floor(t)) * 2^32)."""
    row, seed = format_of(name), 0x123456789ABCDEF0
    x = torch.randn(5, 37) * torch.tensor([1.0, 1e-3, 1e-5, 100.0, 0.0]).view(-1, 1)
    x[3, :4] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-30])
    q = fp8.quantize(x, name, tile, rounding="stochastic", seed=seed)
    height, width = Tile.of(tile).shape(*x.shape)
    for i, code in enumerate(q.codes.view(torch.uint8).flatten().tolist()):
        r, c = divmod(i, x.shape[1])
        number, scale = x[r, c].item(), q.scale[r // height, c // width].item()
        if not math.isfinite(number):
            assert code == row.encode(number)
            continue
        u = min(abs(number) / scale, row.max)
        exponent = max(math.frexp(u)[1] - 1 if u else row.exponent_min, row.exponent_min)
        step = 2.0 ** (exponent - row.mantissa_bits)
        t = u / step
        up = word(i, seed) < math.floor((t - math.floor(t)) * 2**32)
        assert code == row.encode(math.copysign((math.floor(t) + up) * step, number))


@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_the_mean_of_many_draws_is_the_number(name: str) -> None:
    """100 000 draws of a number 3/10 of the way between two codes, of one among the subnormals, of a negative one: the
    mean is within 5 standard errors of step * sqrt(p (1 - p) / n); nearest would be 0.3 steps off."""
    row, n = format_of(name), 100_000
    for below, step in (
        (1.0, 2.0**-row.mantissa_bits),
        (row.smallest_subnormal, row.smallest_subnormal),
        (-1.5, -(2.0**-row.mantissa_bits)),
    ):
        value = below + 0.3 * step
        x = torch.full((n // 1000, 1000), value)
        q = fp8.quantize(x, name, scale=torch.ones(1, 1), rounding="stochastic", seed=5)
        drawn = q.dequantize().double()
        assert set(drawn.unique().tolist()) == {below, below + step}
        error = abs(float(drawn.mean()) - float(x[0, 0]))
        assert error < 5 * abs(step) * math.sqrt(0.3 * 0.7 / n)


@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_what_needs_no_rounding_is_never_moved(name: str) -> None:
    """Codes, zeros of both signs, and everything from the largest code upwards."""
    row = format_of(name)
    codes = [c for c in range(256) if math.isfinite(row.decode(c))]
    x = torch.tensor([[row.decode(c) for c in codes]]).repeat(50, 1)
    q = fp8.quantize(x, name, scale=torch.ones(1, 1), rounding="stochastic", seed=1)
    assert bool((q.codes.view(torch.uint8) == torch.tensor(codes, dtype=torch.uint8)).all())
    above = fp8.quantize(torch.full((9, 9), row.max * 1.5), name, scale=torch.ones(1, 1), rounding="stochastic", seed=1)
    assert bool((above.dequantize() == row.max).all())


def test_a_number_goes_up_where_the_word_is_below_its_fraction_and_not_where_it_is_equal() -> None:
    """1.03125 is a quarter of the way from 1 to 1.125: up for the words below 2^30. A code is never moved: 0 < 0 is
    false."""
    words = torch.tensor([2**30 - 1, 2**30, 0, MASK])
    v = torch.tensor([1.03125, 1.03125, 1.0, 1.0])
    assert stochastic(v, words, format_of("e4m3")).float().tolist() == [1.125, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("tile", ["tensor", "row", "1x128", "128x128", "1x32"])
def test_one_draw_serves_both_orientations(tile: str) -> None:
    """The transposed codes use the word of the element's index in x, not of its place in x.T."""
    x = torch.randn(33, 47)
    straight, turned = fp8.quantize_both(x, tile=tile, rounding="stochastic", seed=9)
    alone = fp8.quantize(x, tile=tile, rounding="stochastic", seed=9)
    assert torch.equal(alone.codes.view(torch.uint8), straight.codes.view(torch.uint8))
    if Tile.of(tile).transposes:
        assert torch.equal(turned.codes.view(torch.uint8), straight.codes.view(torch.uint8).t())
        return
    ones = torch.ones(1, 1)
    straight, turned = fp8.quantize_both(x, scale=ones, rounding="stochastic", seed=9)
    assert torch.equal(turned.codes.view(torch.uint8), straight.codes.view(torch.uint8).t())


def test_the_draw_depends_on_the_seed_and_on_nothing_else() -> None:
    x = torch.randn(64, 100)
    first, same, other = (fp8.quantize(x, rounding="stochastic", seed=s).codes.view(torch.uint8) for s in (3, 3, 4))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        again = fp8.quantize(x, rounding="stochastic", seed=3).codes.view(torch.uint8)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(first, again)
