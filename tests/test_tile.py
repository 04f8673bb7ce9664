"""A tile is read from a name or a pair, and cuts a matrix into the rectangles that share a scale."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp8.errors import TileError
from fp8.tile import NAMES, Tile

tiles = pytest.mark.parametrize("tile", [Tile.of(name) for name in NAMES], ids=str)


@pytest.mark.parametrize(("name", "pair"), NAMES.items())
def test_a_name_a_pair_a_list_and_a_tile_mean_the_same(name: str, pair: tuple[int, int]) -> None:
    tile = Tile(*pair)
    assert Tile.of(name) == Tile.of(pair) == Tile.of(list(pair)) == Tile.of(tile) == tile
    assert str(tile) == name
    assert hash(Tile.of(name)) == hash(tile)


def test_scale_shapes_of_a_300_by_200_matrix() -> None:
    """1x128: 200 / 128 = 1.6, so 2 across. 128x128: 300 / 128 = 2.3, so 3 down. 1x32: 200 / 32 = 6.25, so 7 across."""
    shapes = {name: Tile.of(name).scale_shape(300, 200) for name in NAMES}
    assert shapes == {"tensor": (1, 1), "row": (300, 1), "1x128": (300, 2), "128x128": (3, 2), "1x32": (300, 7)}


@pytest.mark.parametrize(
    ("name", "shape", "scales"),
    [
        ("tensor", (0, 0), (1, 1)),
        ("row", (0, 5), (0, 1)),
        ("row", (5, 0), (5, 1)),
        ("1x128", (5, 0), (5, 0)),
        ("128x128", (0, 5), (0, 1)),
    ],
)
def test_an_empty_dimension_has_one_scale_where_it_is_one_whole_tile(
    name: str, shape: tuple[int, int], scales: tuple[int, int]
) -> None:
    assert Tile.of(name).scale_shape(*shape) == scales


@tiles
@given(rows=st.integers(1, 1000), cols=st.integers(1, 1000))
def test_tiles_cover_the_matrix_and_none_is_empty(tile: Tile, rows: int, cols: int) -> None:
    (height, width), (down, across) = tile.shape(rows, cols), tile.scale_shape(rows, cols)
    assert (down - 1) * height < rows <= down * height
    assert (across - 1) * width < cols <= across * width


def test_which_scales_leave_the_sum_and_which_codes_transpose() -> None:
    assert {name for name in NAMES if Tile.of(name).constant_along_k} == {"tensor", "row"}
    assert {name for name in NAMES if Tile.of(name).transposes} == {"tensor", "128x128"}


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("tensors", "Did you mean 'tensor'"),
        ("1x64", "no scale layout has the tile '1x64'"),
        ((1, 64), r"\(1, 64\).*Known: tensor, row, 1x128, 128x128, 1x32"),
        ((128, 1), "no scale layout"),
        ((1, 2, 3), "no scale layout"),
        (128, "no scale layout has the tile 128"),
        (None, "no scale layout has the tile None"),
        ((1, [2]), "no scale layout"),
    ],
)
def test_another_tile_is_refused_with_the_nearest_name(wrong: object, words: str) -> None:
    with pytest.raises(TileError, match=words):
        Tile.of(wrong)
