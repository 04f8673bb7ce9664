"""Moments in one and two bytes: what is promised of each number, and of the average."""

from __future__ import annotations

from decimal import Decimal, localcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fp8.formats import FORMATS
from fp8.fused.adamw import moments, reference


def kept(x: Tensor, kind: str, name: str, word: Tensor | None) -> Tensor:
    """x, written and read again."""
    state = moments.fresh(x, kind)
    moments.write(state, name, x, word)
    return moments.read(state, name)


def draw(count: int, step: int = 1) -> tuple[Tensor, Tensor]:
    return moments.words(count, 3, 0, step)


def test_the_table_of_roots_is_correctly_rounded() -> None:
    """Against 40 decimal digits: so any machine whose power is right to a unit of FP64 has the same table."""
    table = moments.roots()
    with localcontext() as context:
        context.prec = 40
        for k in (1, 2, 3, 5, 7, 12, 21, 31, 32):
            for code in range(1, 127):
                exact = (Decimal(FORMATS["e4m3"].decode(code)) / 448) ** (Decimal(4) / k)
                below, above = (float(table[k, code].nextafter(torch.tensor(side))) for side in (-1.0, 2.0))
                error = abs(Decimal(float(table[k, code])) - exact)
                assert all(error <= abs(Decimal(other) - exact) for other in (below, above)), (k, code)


@given(st.lists(st.floats(min_value=2.0**-100, max_value=2.0**100, width=32), min_size=1, max_size=300))
def test_a_second_moment_that_is_not_zero_never_becomes_zero(numbers: list[float]) -> None:
    x = torch.tensor(numbers)
    for word in (None, draw(len(numbers))[1]):
        assert bool((kept(x, "fp8", "exp_avg_sq", word) > 0).all())


@given(st.floats(min_value=0.5, max_value=40), st.booleans())
def test_both_ends_of_a_group_are_kept(binades: float, signed: bool) -> None:
    """The largest is exact; a second moment's smallest is within the codes around 2.3 steps above zero."""
    x = torch.exp2(-torch.linspace(0, binades, 128)) * 3e-5
    x = -x if signed else x
    back = kept(x, "fp8", "exp_avg" if signed else "exp_avg_sq", None)
    assert back[0] == pytest.approx(x[0].item(), rel=1e-6)
    assert signed or 0.5 < back[-1] / x[-1] < 2.0 or binades > 36


def test_a_narrow_group_is_kept_finer_than_plain_e4m3_keeps_it() -> None:
    x = torch.exp2(torch.rand(12800, generator=torch.Generator().manual_seed(0)) * 3 - 20)
    plain = (x / x.amax() * 448).to(torch.float8_e4m3fn).float() * x.amax() / 448
    ours = kept(x, "fp8", "exp_avg_sq", None)
    error = lambda y: ((y - x).abs() / x).mean().item()  # noqa: E731
    assert error(ours) < 0.35 * error(plain)


@pytest.mark.parametrize("kind", ["bf16", "fp8"])
@pytest.mark.parametrize("name", moments.NAMES)
def test_stochastic_rounding_is_right_on_average(kind: str, name: str) -> None:
    """The mean error of 400 draws of 256 numbers is within 5 standard errors of nothing."""
    x = torch.rand(256, generator=torch.Generator().manual_seed(0)) + 0.5
    x = x if name == "exp_avg_sq" else x - 1.0
    which = moments.NAMES.index(name)
    draws = torch.stack([kept(x, kind, name, draw(256, step)[which]) for step in range(400)])
    error = (draws - x).double()
    assert error.std() > 0
    assert abs(error.mean()) < 5 * error.std() / error.numel() ** 0.5


def test_bf16_freezes_when_it_rounds_to_nearest_and_fp8_does_not() -> None:
    """300 steps without a gradient: v should be 0.996^300 = 0.3 of what it was, and at 0.999 BF16 does not move."""
    for kind, word, rate, expected in (
        ("bf16", False, 0.999, 1.0), ("bf16", True, 0.996, 0.3), ("fp8", False, 0.996, 0.3), ("fp8", True, 0.996, 0.3),
    ):  # fmt: skip
        v = torch.linspace(0.5, 1.5, 256)
        state = moments.fresh(v, kind)
        moments.write(state, "exp_avg_sq", v, None)
        for step in range(300):
            v = moments.read(state, "exp_avg_sq") * rate
            moments.write(state, "exp_avg_sq", v, draw(256, step)[1] if word else None)
        assert moments.read(state, "exp_avg_sq").mean().item() == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("kind", ["bf16", "fp8"])
@pytest.mark.parametrize("stochastic", [False, True])
def test_nothing_is_hidden_and_zero_stays_zero(kind: str, stochastic: bool) -> None:
    x = torch.tensor([0.0, -0.0, 1.0, -2.0, torch.nan, torch.inf, 1e-42, *[0.0] * 300])
    word = draw(x.numel())[0] if stochastic else None
    back = kept(x, kind, "exp_avg", word)
    assert back[2:4].tolist() == pytest.approx([1.0, -2.0], rel=0.05)
    assert not back[4:6].isfinite().any()
    assert bool((back[7:] == 0).all())
    assert back[:2].signbit().tolist() == [False, True]


def test_bytes_an_element() -> None:
    p = torch.zeros(4096, 128)
    for kind in moments.KINDS:
        held = sum(t.numel() * t.itemsize for t in moments.fresh(p, kind).values())
        assert held / p.numel() == pytest.approx(moments.bytes_an_element(kind))


def test_tables_and_corrections_lie_on_the_host_whatever_the_default_device_is() -> None:
    moments.roots.cache_clear()
    with torch.device("meta"):
        assert not moments.roots().is_meta
        assert reference.single(0.1) == pytest.approx(0.1)
