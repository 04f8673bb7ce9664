"""Every error a user can meet, in one tree.

    Fp8Error (ValueError)
    ├── FormatError       a number format that is unknown or does not compute
    ├── TileError         a tile that no scale layout has
    ├── RecipeError       a recipe or preset that is unknown or contradicts itself
    ├── TensorError       a tensor of the wrong type, or holding what cannot be quantized
    ├── ShapeError        operands whose shapes do not fit together
    ├── BackendError      no implementation can run here (also a RuntimeError)
    ├── ConvertError      a module that cannot be converted, or converted twice
    ├── DataError         text, tokens or a tokenizer that cannot be used
    ├── CheckpointError   a file that is missing, truncated, or written by another recipe or version
    ├── ConfigError       a setting that is unknown or out of range
    └── RequestError      a request that the serving engine cannot take

Each message says what was given, what is needed, and how to get there. `ValueError` is for users, `assert` for
ourselves.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class Fp8Error(ValueError):
    """The root of the tree: catch this to catch everything that `fp8` raises on purpose."""


class FormatError(Fp8Error):
    """A number format that is unknown, or that is only a row of the table and does not compute."""


class TileError(Fp8Error):
    """A tile that no scale layout has, or that does not fit the request."""


class RecipeError(Fp8Error):
    """A recipe that is unknown or contradicts itself."""


class TensorError(Fp8Error):
    """A tensor of the wrong type, or one whose values cannot be quantized."""


class ShapeError(Fp8Error):
    """Operands whose shapes do not fit together."""


class BackendError(Fp8Error, RuntimeError):
    """No implementation of an operation can run here; the message lists each one's reason."""


class ConvertError(Fp8Error):
    """A module that cannot be converted."""


class DataError(Fp8Error):
    """Text, tokens or a tokenizer that cannot be used."""


class CheckpointError(Fp8Error):
    """A checkpoint that is missing, damaged, or of another recipe or version."""


class ConfigError(Fp8Error):
    """A setting that is unknown or out of range."""


class RequestError(Fp8Error):
    """A request that the serving engine cannot take: its prompt, its id or its sampling parameters."""


def suggest(word: object, known: Iterable[str]) -> str:
    """The end of an error message: the nearest known name, and all of them.

    >>> suggest("e4m4", ["e4m3", "e5m2"])
    "Did you mean 'e4m3'? Known: e4m3, e5m2."
    """
    names = list(known)
    near = difflib.get_close_matches(str(word), names, n=1, cutoff=0.5)
    return (f"Did you mean {near[0]!r}? " if near else "") + f"Known: {', '.join(names)}."
