"""Rotations: orthogonal, of plus and minus one, the same for a seed, and as fast as they say."""

from __future__ import annotations

import pytest
import torch

from fp8.calibrate.hadamard import Rotation, paley, parts, prime_of
from fp8.errors import ConfigError

SIZES = [2, 12, 20, 28, 36, 64, 96, 576, 768, 1536]


@pytest.mark.parametrize("order", [n for n in range(4, 80) if prime_of(n)])
def test_paley_gives_hadamard_matrices(order):
    h = paley(order)
    assert torch.equal(h.abs(), torch.ones_like(h))
    assert torch.equal(h @ h.T, order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize("size", SIZES)
def test_a_rotation_is_orthogonal_and_mixes_evenly(size):
    q = Rotation(size, seed=3).matrix()
    torch.testing.assert_close(q @ q.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-13)
    torch.testing.assert_close(q.abs(), torch.full_like(q, size**-0.5), rtol=1e-14, atol=0)


def test_turning_is_the_product_in_runs_of_channels():
    x, turn = torch.randn(5, 3 * 24, dtype=torch.float64), Rotation(24, seed=1)
    by_hand = torch.cat([run @ turn.matrix() for run in x.split(24, 1)], 1)
    torch.testing.assert_close(turn.turn(x), by_hand, rtol=0, atol=1e-13)


def test_what_has_no_order_turns_in_blocks():
    turn = Rotation(344, seed=0)  # 8 x 43, as 11008 is 256 x 43
    assert parts(344) is None and turn.block == 8 and Rotation(11008, seed=0).block == 256
    q = turn.matrix()
    torch.testing.assert_close(q @ q.T, torch.eye(344, dtype=torch.float64), rtol=0, atol=1e-13)
    assert int((q != 0).sum()) == 344 * 8
    with pytest.raises(ConfigError, match="15 channels cannot be rotated"):
        Rotation(15, seed=0)


def test_seeds_and_streams_give_signs_of_their_own():
    a, b, c, d = (Rotation(64, *at).signs for at in ((0,), (0,), (1,), (0, 1)))
    assert torch.equal(a, b) and not torch.equal(a, c) and not torch.equal(a, d)
    assert 16 < int((a > 0).sum()) < 48


def test_one_large_channel_no_longer_sticks_out():
    x = torch.randn(64, 576, dtype=torch.float64)
    x[:, 100] *= 100
    y = Rotation(576, seed=0).turn(x)
    torch.testing.assert_close(y.square().sum(1), x.square().sum(1))
    assert float(y.abs().max()) < float(x.abs().max()) / 10
