"""Rounding that makes up for its own errors: laws on small matrices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8.calibrate.compensate import (
    BLOCK,
    Moments,
    damped,
    exact_product,
    factor,
    output_error,
    regressed,
    sweep,
    unit,
)  # fmt: skip
from fp8.errors import ConfigError, DataError
from fp8.quantize import Quantized, quantize
from fp8.tile import Tile

TILES = ["tensor", "row", (128, 128)]


def bits(codes):
    return codes.view(torch.uint8)


def spread(q: Quantized) -> torch.Tensor:
    """The scale of every element."""
    height, width = q.tile.shape(*q.shape)
    return q.scale.repeat_interleave(height, 0)[: q.shape[0]].repeat_interleave(width, 1)[:, : q.shape[1]]


def case(rows, cols, seed=0, text=4):
    """A weight, and the second moments of inputs that are correlated."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(text * cols, cols, generator=draw) @ torch.randn(cols, cols, generator=draw) / cols**0.5
    return torch.randn(rows, cols, generator=draw) * 0.05, x.double().t() @ x.double()


def total(weight, codes, scale, hessian):
    return float(output_error(weight - codes.float() * scale, hessian).sum())


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("order", ["activation", "index"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (33, 130), (129, 257)])
def test_the_outputs_are_nearer_than_rounding_to_nearest_brings_them(shape, order, tile):
    weight, hessian = case(*shape)
    q = quantize(weight, "e4m3", tile)
    scale = spread(q)
    codes = sweep(weight, scale, factor(hessian, 0.01, order))
    plain, compensated = (total(weight, c, scale, hessian) for c in (q.codes, codes))
    assert compensated <= plain
    assert shape[1] < 100 or compensated < 0.6 * plain


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("rounding", ["power_of_two", "none"])
def test_inputs_that_are_independent_give_plain_codes_to_the_bit(tile, rounding):
    weight, _ = case(40, 300)
    weight[0, :3] = torch.tensor([-0.0, 0.0, -1e-9])
    q = quantize(weight, "e4m3", tile, rounding)
    for hessian in (torch.eye(300), torch.zeros(300, 300), torch.diag(torch.arange(300.0))):
        assert torch.equal(bits(sweep(weight, spread(q), factor(hessian.double()))), bits(q.codes))


def test_a_dead_input_takes_nothing_and_gives_nothing():
    weight, hessian = case(16, 40)
    hessian[7], hessian[:, 7] = 0.0, 0.0
    other = weight.clone()
    other[:, 7] = 0.049
    q = quantize(weight, "e4m3", "row", scale=torch.full((16, 1), 2.0**-10))
    codes, changed = (sweep(w, q.scale, factor(hessian)) for w in (weight, other))
    assert torch.equal(bits(codes)[:, 7], bits(q.codes)[:, 7])
    rest = torch.arange(40) != 7
    assert torch.equal(bits(codes)[:, rest], bits(changed)[:, rest])


def test_rows_do_not_meet():
    """A layer fused of q, k and v, with one scale for all, has the codes of its parts."""
    weight, hessian = case(60, 70)
    scale, carried = quantize(weight).scale, factor(hessian)
    parts = [sweep(part, scale, carried) for part in weight.split([40, 10, 10])]
    assert torch.equal(bits(torch.cat(parts)), bits(sweep(weight, scale, carried)))


def test_a_second_time_gives_the_same_codes():
    weight, hessian = case(20, 140)
    scale = quantize(weight, "e4m3", "row").scale
    again = (sweep(weight, scale, factor(hessian.clone())) for _ in range(2))
    assert torch.equal(*map(bits, again))


def test_what_is_clipped_is_made_up_for_by_others():
    weight, hessian = case(8, 30)
    scale = quantize(weight, "e4m3", "row").scale / 2  # the largest weights are beyond 448
    codes = sweep(weight, scale, factor(hessian))
    nearest = quantize(weight, "e4m3", "row", scale=scale).codes
    assert bool(codes.float().isfinite().all())
    assert total(weight, codes, scale, hessian) < total(weight, nearest, scale, hessian)


def test_the_sweep_is_the_method_of_the_paper():
    """Against the textbook: after each column the inverse of what is left is computed anew, in FP64."""
    weight, hessian = case(6, 20)
    scale = quantize(weight, "e4m3", "row").scale
    left, full = weight.double().clone(), damped(hessian, 0.01)
    codes = torch.empty(weight.shape)
    for j in range(20):
        codes[:, j] = (left[:, j] / scale[:, 0]).to(torch.float8_e4m3fn).float()
        error = left[:, j] - codes[:, j].double() * scale[:, 0]
        inverse = torch.linalg.inv(full[j:, j:])
        left[:, j:] -= error[:, None] * inverse[0] / inverse[0, 0]
    assert torch.equal(sweep(weight, scale, factor(hessian, 0.01, "index")).float(), codes)


def test_a_regressed_weight_gives_the_outputs_that_were_asked_for():
    """Inputs that a layer before has mixed up, but lost nothing of, can be made up for to the last digit."""
    weight, _ = case(9, 12)
    wanted = torch.randn(200, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    served = wanted @ (torch.eye(12) + 0.1 * torch.ones(12, 12)).double()
    moments = Moments(served.t() @ served, (wanted - served).t() @ served)
    made = served @ regressed(weight, moments, 0.0).double().t()
    torch.testing.assert_close(made, wanted @ weight.double().t(), rtol=1e-5, atol=1e-6)
    assert torch.equal(regressed(weight, Moments(moments.hessian), 0.0), weight)


# --------------------------------------------------------------------------- the same bits everywhere


@settings(max_examples=30, deadline=None)
@given(st.integers(1, BLOCK), st.integers(0, 10_000), st.sampled_from([1e-30, 1e-3, 1.0, 1e20]))
def test_a_product_that_is_carried_does_not_depend_on_the_order_of_its_sum(inner, seed, size):
    draw = torch.Generator().manual_seed(seed)
    a = torch.randn(7, inner, generator=draw) * torch.randn(7, 1, generator=draw).exp() * size
    b = torch.randn(inner, 5, generator=draw) * torch.randn(inner, 1, generator=draw).exp()
    shuffled = torch.randperm(inner, generator=draw)
    product = exact_product(a, b)
    assert torch.equal(product, exact_product(a[:, shuffled], b[shuffled]))
    limit = inner * 2.0**-20 * float(a.abs().max()) * float(b.abs().max())
    assert float((product - a.double() @ b.double()).abs().max()) <= limit


def test_units_are_powers_of_two_that_leave_22_bits():
    x = torch.tensor([[1.0, -1.75], [0.0, 0.0], [3e-39, 1e-45], [4.0, 0.5]])
    units = unit(x, 1)
    assert bool((torch.frexp(units).mantissa == 0.5).all())
    assert bool(((x / units).abs() <= 2.0**22).all()) and units[0] == 2.0**-21


@pytest.mark.gpu
@pytest.mark.parametrize("tile", [*TILES, (1, 128)])
@pytest.mark.parametrize("rounding", ["power_of_two", "none"])
@pytest.mark.parametrize("shape", [(3, 5), (130, 257), (576, 1536), (1024, 640)])
def test_no_code_differs_between_cpu_and_gpu(shape, rounding, tile):
    """Given the weight, the scales and the statistics."""
    weight, hessian = case(*shape, text=1)
    scale = spread(quantize(weight, "e4m3", Tile.of(tile), rounding))
    carried = factor(hessian)
    there = sweep(weight.cuda(), scale.cuda(), carried).cpu()
    assert int((bits(there) != bits(sweep(weight, scale, carried))).sum()) == 0


# --------------------------------------------------------------------------- mistakes


def test_mistakes_name_what_was_given():
    _, hessian = case(1, 6)
    with pytest.raises(ConfigError, match="Did you mean 'activation'"):
        factor(hessian, order="activatoin")
    with pytest.raises(DataError, match="not finite"):
        factor(hessian * float("nan"))
    with pytest.raises(DataError, match="raise the damping"):
        factor(torch.ones(6, 6, dtype=torch.float64), 0.0)
