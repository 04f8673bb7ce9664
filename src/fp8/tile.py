"""A tile is the set of elements that share a scale.

A matrix is seen as `[rows, columns]`; a tile of `(r, c)` cuts it into rectangles, the last ones partial, and the scales
of those rectangles form a matrix of `[ceil(rows / r), ceil(columns / c)]`. Zero stands for "the whole dimension":

    name      tile        one scale for               used for
    tensor    (0, 0)      the whole matrix            per-tensor recipes
    row       (1, 0)      a token, or a channel       row-wise recipes, checkpoints
    1x128     (1, 128)    128 neighbours in a row     block-wise activations and gradients
    128x128   (128, 128)  a square                    block-wise weights
    1x32      (1, 32)     32 neighbours in a row      MXFP8 (a Blackwell layout; computed by our own kernel here)

Tiles down a column are the row tiles of the transposed matrix, so they need no name of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

from .errors import TileError, suggest

NAMES = {"tensor": (0, 0), "row": (1, 0), "1x128": (1, 128), "128x128": (128, 128), "1x32": (1, 32)}


@dataclass(frozen=True)
class Tile:
    """Rows and columns that share one scale; 0 means the whole dimension."""

    rows: int
    cols: int

    @staticmethod
    def of(tile: str | tuple[int, int] | list[int] | Tile) -> Tile:
        """The tile that a name or a pair stands for.

        >>> Tile.of((1, 128)) == Tile.of("1x128") == Tile(1, 128)
        True
        """
        pair = (tile.rows, tile.cols) if isinstance(tile, Tile) else tile
        pair = NAMES.get(pair) if isinstance(pair, str) else tuple(pair) if isinstance(pair, (tuple, list)) else None
        if pair is None or pair not in NAMES.values():
            word = "x".join(map(str, pair)) if pair else tile
            raise TileError(f"no scale layout has the tile {tile!r}. {suggest(word, NAMES)}")
        return tile if isinstance(tile, Tile) else Tile(*pair)

    def __str__(self) -> str:
        return next(name for name, pair in NAMES.items() if pair == (self.rows, self.cols))

    def shape(self, rows: int, cols: int) -> tuple[int, int]:
        """The tile's height and width in a matrix of `rows x cols` (at least 1)."""
        return self.rows or max(rows, 1), self.cols or max(cols, 1)

    def scale_shape(self, rows: int, cols: int) -> tuple[int, int]:
        """The shape of the matrix of scales. A dimension that is one whole tile has one, even when it is empty."""
        height, width = self.shape(rows, cols)
        return (1 if self.rows == 0 else -(-rows // height)), (1 if self.cols == 0 else -(-cols // width))

    @property
    def constant_along_k(self) -> bool:
        """Whether one scale covers a whole row, so that it leaves the sum over K."""
        return self.cols == 0

    @property
    def transposes(self) -> bool:
        """Whether quantizing the transposed matrix gives the transposed codes."""
        return self.rows == self.cols
