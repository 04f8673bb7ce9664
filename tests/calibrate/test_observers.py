"""Counted magnitudes: the maximum, percentiles and clipped shares are those of the elements, exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fp8
from fp8.calibrate import Magnitudes
from fp8.calibrate.observers import observe, saturated
from fp8.errors import ConfigError, DataError

numbers = st.floats(allow_nan=False, allow_infinity=False, width=32)


@given(st.lists(numbers, min_size=1, max_size=40), st.floats(50, 100))
def test_amax_and_percentile_are_those_of_the_sorted_elements(values, percent):
    x = torch.tensor([values]).bfloat16()
    if not x.isfinite().all():
        return
    seen = Magnitudes(1)
    seen.add(x)
    ordered = x.abs().float().flatten().sort().values
    assert float(seen.amax()) == float(ordered[-1])
    rank = max(int(np.ceil(len(ordered) * (percent / 100))), 1)
    assert float(seen.percentile(percent)) in (float(ordered[rank - 1]), float(ordered[min(rank, len(ordered) - 1)]))
    assert float(seen.percentile(100.0)) == float(ordered[-1])


def test_groups_do_not_mix_and_batches_add_up():
    torch.manual_seed(0)
    x = torch.randn(3, 1000).bfloat16() * torch.tensor([1.0, 10.0, 100.0])[:, None].bfloat16()
    whole, parts = Magnitudes(3), Magnitudes(3)
    whole.add(x)
    for part in x.split(77, 1):
        parts.add(part)
    assert torch.equal(whole.counts, parts.counts) and len(whole) == 3
    assert torch.equal(whole.amax(), x.float().abs().amax(1))


def test_clipped_shares_are_those_that_quantizing_reports():
    torch.manual_seed(0)
    x = torch.randn(1, 4096).bfloat16()
    seen = Magnitudes(1)
    seen.add(x)
    for scale in (2.0**-8, 2.0**-7, 2.0**-6):
        given_scale = torch.full((1, 1), scale)
        told = fp8.quantize(x, scale=given_scale, statistics=True).statistics
        assert float(saturated(seen, given_scale.flatten())) == pytest.approx(float(told.saturated))


def test_one_outlier_moves_max_and_not_a_percentile():
    x = torch.randn(1, 100_000).clamp(-4, 4)
    x[0, 5] = 4000.0
    seen = Magnitudes(1)
    seen.add(x)
    assert float(observe(seen, "max", 0)) == 4000 and float(observe(seen, "percentile", 99.99)) <= 4


def test_what_is_not_finite_or_unknown_is_refused():
    seen = Magnitudes(1)
    for value in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(DataError, match="not finite"):
            seen.add(torch.tensor([[1.0, value]]))
    with pytest.raises(ConfigError, match="Did you mean 'percentile'"):
        observe(seen, "percentle", 99)


def test_nothing_seen_gives_zero():
    assert Magnitudes(2).amax().tolist() == [0.0, 0.0]
