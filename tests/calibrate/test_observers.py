"""Counted magnitudes: the maximum, percentiles and clipped shares are those of the elements, exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fp8
from fp8.calibrate import Magnitudes
from fp8.calibrate.grid import candidates, divergence, squared_error
from fp8.calibrate.observers import choose, expected_error, observe, saturated, scales_of
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


# --------------------------------------------------------------------------- what a scale costs


def seen_in(x):
    seen = Magnitudes(len(x))
    seen.add(x)
    return seen


@pytest.fixture(scope="module")
def groups():
    """Normal, with outlier channels, with one massive element, heavy-tailed, and zeros: BF16 [5, 16384]."""
    torch.manual_seed(0)
    x = torch.randn(5, 16384)
    x[1, ::256] *= 100
    x[2, 77] = 30_000
    x[3] *= torch.randn(16384).abs() ** 3
    x[4] = 0
    return x.bfloat16()


@pytest.mark.parametrize("rounding", ["power_of_two", "none"])
def test_the_expected_error_is_the_error_of_the_codes(groups, rounding):
    scales = scales_of(seen_in(groups), "max", 0, rounding)
    back = fp8.quantize(groups, tile="row", scale=scales[:, None]).dequantize(torch.float32)
    errors = (back.double() - groups.double()).square().sum(1)
    torch.testing.assert_close(expected_error(seen_in(groups), scales), errors, rtol=1e-12, atol=0)


@pytest.mark.parametrize("rounding", ["power_of_two", "none"])
def test_no_candidate_errs_less_than_mse(groups, rounding):
    seen = seen_in(groups[:4])
    found = expected_error(seen, scales_of(seen, "mse", 0, rounding))
    for group, scale in enumerate(scales_of(seen, "max", 0, rounding)):
        magnitudes, counts = seen.occurred(group)
        errors = squared_error(magnitudes, counts, candidates(scale, rounding))
        assert float(found[group]) == float(errors.min()) <= float(errors[0])


@pytest.mark.parametrize("rounding", ["power_of_two", "none"])
@pytest.mark.parametrize("observer", ["percentile", "mse", "kl"])
def test_every_observer_beats_or_ties_max_where_it_was_measured(groups, observer, rounding):
    seen = seen_in(groups)
    largest = expected_error(seen, scales_of(seen, "max", 0, rounding))
    assert (expected_error(seen, scales_of(seen, observer, 99.0, rounding)) <= largest).all()


def test_unguarded_a_percentile_and_a_divergence_clip_what_carries_the_error(groups):
    seen = seen_in(groups[1:2])
    largest = float(expected_error(seen, scales_of(seen, "max", 0)))
    for observer in ("percentile", "kl"):
        assert float(expected_error(seen, scales_of(seen, observer, 99.0, guarded=False))) > largest


def decoded(code: int) -> float:
    return float(torch.tensor(code, dtype=torch.uint8).view(torch.float8_e4m3fn))


def test_the_divergence_is_that_of_kullback_and_leibler(groups):
    """Against a plain loop over codes, of a magnitude's own BF16 width: equal up to a constant."""
    magnitudes, counts = seen_in(groups[:1]).occurred(0)
    scales = torch.tensor([2.0**-6, 2.0**-7, 2.0**-9, 2.0**-4])
    p = counts.double() / counts.sum()
    width = 2.0 ** (magnitudes.double().clamp(min=1e-30).log2().floor() - 7)
    by_hand = []
    for scale in scales:
        codes = fp8.quantize(magnitudes[None], tile="row", scale=scale.view(1, 1)).codes.view(torch.uint8)[0]
        kl = 0.0
        for code in codes.unique():
            value = decoded(int(code))
            near = (int(code) + 1, int(code) - 1)
            above, below = (decoded(c) if 0 <= c < 127 else None for c in near)
            low = 0.0 if below is None else (value + below) / 2
            high = max(464.0, float(magnitudes[-1] / scale)) if above is None else (value + above) / 2
            inside = codes == code
            q = p[inside].sum() * width[inside] / ((high - low) * scale.double())
            kl += float((p[inside] * (p[inside] / q).log()).sum())
        by_hand.append(kl)
    found = divergence(magnitudes, counts, scales)
    torch.testing.assert_close(
        found - found[0], torch.tensor(by_hand, dtype=torch.float64) - by_hand[0], rtol=1e-9, atol=1e-9
    )


def test_auto_takes_what_errs_least_on_other_text_and_max_on_what_is_nearly_a_tie(groups):
    """Magnitudes between two codes of the scale of max are a case for a shifted grid."""
    between = torch.full((1, groups.shape[1]), 0.53).bfloat16()
    between[0, :8] = 1.1
    seen, check = seen_in(torch.cat([groups, between])), seen_in(torch.cat([groups.roll(1, 1), between]))
    scales, names, errors = choose(seen, check, 99.9, "none")
    least = torch.stack(list(errors.values())).amin(0)
    won = least < 0.999 * errors["max"]
    assert won.tolist() == [False] * 5 + [True] and names == ["max"] * 5 + ["mse"]
    assert torch.equal(expected_error(check, scales), torch.where(won, least, errors["max"])) and float(scales[4]) == 1
