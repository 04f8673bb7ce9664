"""The references of fused operations, against float64 and against autograd; and the doors on a CPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fp8.formats import format_of
from fp8.fused import (
    Codes,
    Heads,
    Target,
    across,
    activation,
    activation_backward,
    norm,
    norm_across,
    norm_backward,
    rope,
    rope_backward,
)
from fp8.fused.both import Room, one_pass
from fp8.fused.rope import reference as ropes
from fp8.quantize import quantize_both
from fp8.tile import Tile
from fused_cases import TARGETS, differing, hard, target

FUNCTIONS = [("silu", True), ("gelu", True), ("relu", False), ("gelu", False)]


def wide(x: torch.Tensor) -> torch.Tensor:
    return x.double().requires_grad_()


def test_a_norm_is_that_of_float64_to_the_last_place_of_its_type() -> None:
    x, weight = torch.randn(64, 96), torch.randn(96)
    h, rstd, y = norm(x, None, weight, 1e-5, torch.float32, None)
    want = F.rms_norm(x.double(), (96,), weight.double(), 1e-5)
    assert h is x
    assert isinstance(y, torch.Tensor)
    exact = (x.double().square().mean(1) + 1e-5).rsqrt()
    assert float((rstd.double() / exact - 1).abs().max()) <= 3.01 * 2.0**-24  # mean and eps (halved), root, division
    assert float(((y.double() - want) / want).abs().max()) <= 5.01 * 2.0**-24  # and two products


def test_the_residual_is_added_and_rounded_before_the_norm() -> None:
    x, branch = torch.randn(8, 32).bfloat16(), torch.randn(8, 32).bfloat16()
    h, _, y = norm(x, branch, torch.ones(32), 1e-5, torch.bfloat16, None)
    assert torch.equal(h, x + branch)
    assert torch.equal(y, norm(h, None, torch.ones(32), 1e-5, torch.bfloat16, None)[2])  # type: ignore[arg-type]


def test_gradients_of_a_norm_are_autograds() -> None:
    x, weight, dy, past = torch.randn(24, 48), torch.randn(48), torch.randn(24, 48), torch.randn(24, 48)
    _, rstd, _ = norm(x, None, weight, 1e-5, torch.float32, None)
    dx, dw = norm_backward(dy, x, rstd, weight, past)
    a, w = wide(x), wide(weight)
    F.rms_norm(a, (48,), w, 1e-5).backward(dy.double())
    assert a.grad is not None
    torch.testing.assert_close(dx.double(), a.grad + past.double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dw.double(), w.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("function", "gated"), FUNCTIONS)
def test_activations_and_their_gradients_are_autograds(function: str, gated: bool) -> None:
    x, dh = torch.randn(20, 64 if gated else 32) * 3, torch.randn(20, 32)
    a = wide(x)
    f = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}[function]
    want = f(a.chunk(2, 1)[0]) * a.chunk(2, 1)[1] if gated else f(a)
    want.backward(dh.double())
    torch.testing.assert_close(activation(x, function, gated, None).double(), want.detach(), rtol=1e-5, atol=1e-5)  # type: ignore[union-attr]
    dx, again = activation_backward(dh, x, function, gated, None)
    assert again is None
    torch.testing.assert_close(dx.double(), a.grad, rtol=1e-5, atol=1e-5)  # type: ignore[union-attr]


@pytest.mark.parametrize("start", [0, 5])
def test_rope_turns_pairs_and_its_backward_turns_them_back(start: int) -> None:
    heads = Heads(4, 2, 8, 1e4, start)
    x = torch.randn(2 * 6, heads.total * 8)
    y = rope(x, 6, heads)
    pairs = lambda t: torch.view_as_complex(t.view(2, 6, 8, 2, 4).transpose(3, 4).contiguous())  # noqa: E731
    position = torch.arange(start, start + 6).double()[:, None, None]
    angle = position * 1e4 ** (-torch.arange(4).double() / 4)
    want = pairs(x).to(torch.complex128) * torch.polar(torch.ones_like(angle), angle)
    torch.testing.assert_close(pairs(y)[:, :, :6].to(torch.complex128), want[:, :, :6], rtol=1e-5, atol=1e-5)
    assert torch.equal(y.view(-1, 8, 8)[:, 6:], x.view(-1, 8, 8)[:, 6:])
    q, k, v = y.view(2, 6, 8, 8).transpose(1, 2).split([4, 2, 2], 1)
    torch.testing.assert_close(rope_backward(q, k, v, heads, None), x, rtol=1e-5, atol=1e-5)  # type: ignore[arg-type]


def test_tables_are_the_same_wherever_a_sequence_starts_and_are_made_once() -> None:
    whole, part = Heads(1, 1, 16, 1e4).tables(32, torch.device("cpu")), Heads(1, 1, 16, 1e4, 8)
    late = part.tables(24, torch.device("cpu"))
    assert torch.equal(whole[0][8:], late[0])
    assert late[0].data_ptr() == part.tables(24, torch.device("cpu"))[0].data_ptr()


def test_tables_are_the_same_whatever_mode_and_default_device_first_asked_for_them() -> None:
    """An evaluation in inference mode may come before training; `torch.set_default_device` is the user's."""
    ropes.tables.cache_clear()
    x, heads = torch.randn(4, 48, requires_grad=True), Heads(1, 1, 16, 1e4)
    with torch.inference_mode(), torch.device("meta"):
        first = heads.tables(4, torch.device("cpu"))
    assert not any(t.is_meta or t.is_inference() for t in first)
    rope(x, 4, heads).sum().backward()
    ropes.tables.cache_clear()
    assert all(map(torch.equal, first, heads.tables(4, torch.device("cpu"))))


@pytest.mark.parametrize("which", TARGETS)
def test_codes_are_those_of_quantizing_the_values(which: tuple) -> None:
    """Law 3 on a CPU: norm, activation and rope against `quantize_both` of what they store."""
    into = target(*which)
    expect = lambda y: quantize_both(  # noqa: E731
        y, into.format, into.tile, "power_of_two" if into.power_of_two else "none",
        **({} if into.scale is None else {"scale": into.scale}),
    )  # fmt: skip
    x, weight = hard((32, 128)), torch.randn(128)
    h, rstd, y = norm(x, None, weight, 1e-5, torch.bfloat16, None)
    _, _, made = norm(x, None, weight, 1e-5, torch.bfloat16, into)
    assert isinstance(made, Codes)
    down, turned = expect(y)
    assert torch.equal(made.codes.view(torch.uint8), down.codes.view(torch.uint8))  # type: ignore[union-attr]
    again = into.with_scale(made.scale if str(into.tile) == "tensor" else None)
    later = norm_across(h, rstd, weight, torch.bfloat16, again, made.keys_t)
    if into.power_of_two or into.scale is not None or str(into.tile) != "tensor":
        assert torch.equal(later.codes_t.view(torch.uint8), turned.codes.view(torch.uint8))  # type: ignore[union-attr]


def test_across_is_the_second_orientation() -> None:
    x = hard((48, 32))
    down, turned = quantize_both(x, "e4m3", "tensor")
    made = across(x, Target(format_of("e4m3"), Tile.of("tensor"), True, down.scale))
    assert differing(Codes(None, down.scale, turned.codes, down.scale, down.scale), made, ("codes_t",)) == {}


def test_without_rotary_positions_a_joined_product_is_copied_as_it_is() -> None:
    heads, qkv = Heads(2, 1, 16, None), torch.randn(8, 64)
    y = rope(qkv, 4, heads)
    assert torch.equal(y, qkv)
    assert y.data_ptr() != qkv.data_ptr()


def test_one_launch_fills_two_rooms_only_where_their_scales_come_from_the_same_place() -> None:
    """A kernel is compiled for one: codes of another tile are made by a second launch."""
    x, scale, keys = torch.empty(128, 128), torch.ones(1, 1), torch.zeros(128, dtype=torch.int32)
    rooms = {name: Room(x, 128, 128, target("e4m3", name, True, None)) for name in ("tensor", "row", "1x128")}
    later = {
        "tensor": Room(x, 128, 128, target("e4m3", "tensor", True, None).with_scale(scale), down=False, known=True),
        "row": Room(x, 128, 128, target("e4m3", "row", True, None), down=False, known=True, keys_t=keys),
        "1x128": Room(x, 128, 128, target("e4m3", "1x128", True, None), down=False, known=True),
    }
    assert {(a, b) for a in rooms for b in later if one_pass(rooms[a], later[b])} == {(name, name) for name in rooms}
    assert not one_pass(rooms["row"], Room(x, 128, 128, target("e4m3", "row", True, None), down=False))
