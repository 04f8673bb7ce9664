"""Seconds of one product: what waves, short K and small shapes do to it."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp8.cost import gemm, rates

KINDS = sorted(rates().gemm)
SIZES = st.integers(1, 1 << 15)


@pytest.mark.parametrize("kind", KINDS)
def test_a_large_product_runs_near_its_peak_and_never_above(kind: str) -> None:
    n = 16384
    rate = 2.0 * n**3 / gemm.seconds(n, n, n, kind, rates())
    assert 0.9 < rate / rates().gemm[kind].peak <= 1


def test_one_tile_too_many_is_a_wave_more() -> None:
    """132 tiles of 128 x 256 are one wave. One row more is a 133rd tile, and a larger step than a row is worth."""
    full, over = (gemm.seconds(12 * 128 + row, 11 * 256, 8192, "tensor fast", rates()) for row in (0, 1))
    within = gemm.seconds(12 * 128 - 1, 11 * 256, 8192, "tensor fast", rates())
    assert within == full
    assert over > 1.1 * full


def test_a_short_k_hides_nothing() -> None:
    """The rate falls with K, because filling the pipeline takes the same time."""
    per_k = [gemm.seconds(16384, 4096, k, "bf16", rates()) / k for k in (256, 1024, 4096, 16384)]
    assert per_k == sorted(per_k, reverse=True)


def test_decoding_reads_the_weight_at_the_speed_of_memory() -> None:
    known = rates()
    took = gemm.seconds(16, 28672, 4096, "tensor fast", known)
    assert took == pytest.approx(known.gemm["tensor fast"].start + 28672 * 4096 / known.copy, rel=0.02)


def test_few_outputs_and_a_long_k_are_split() -> None:
    """768 x 768 outputs are too few tiles for 132 multiprocessors: with K = 65536 it is cut, not left to 18 of them."""
    rate = 2.0 * 768 * 768 * 65536 / gemm.seconds(768, 768, 65536, "bf16", rates())
    assert rate > 0.5 * rates().gemm["bf16"].peak


@given(SIZES, SIZES, SIZES)
def test_more_work_is_never_faster(m: int, n: int, k: int) -> None:
    known, kind = rates(), "1x128 128x128"
    less = gemm.seconds(m, n, k, kind, known)
    for larger in ((m + 128, n, k), (m, n + 256, k)):
        assert gemm.seconds(*larger, kind, known) >= less * (1 - 1e-9)


@given(SIZES, SIZES, SIZES)
def test_faster_memory_never_slows_a_product(m: int, n: int, k: int) -> None:
    slow = rates()
    fast = dataclasses.replace(slow, copy=2 * slow.copy)
    assert gemm.seconds(m, n, k, "bf16", fast) <= gemm.seconds(m, n, k, "bf16", slow)
