"""One tree of errors: catching its root catches all, and each message names the nearest right word."""

from __future__ import annotations

import pytest
import torch

import fp8
from fp8 import errors
from fp8.errors import Fp8Error, suggest

TREE = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]


def test_every_error_is_a_value_error_under_one_root() -> None:
    assert len(TREE) == 12
    assert all(issubclass(kind, Fp8Error) and issubclass(kind, ValueError) for kind in TREE)
    assert issubclass(errors.BackendError, RuntimeError)


def test_the_essay_lists_every_error_and_each_has_its_own_line() -> None:
    assert all(kind.__name__ in (errors.__doc__ or "") and kind.__doc__ for kind in TREE)


@pytest.mark.parametrize(
    ("word", "end"),
    [
        ("e4m4", "Did you mean 'e4m3'? Known: e4m3, e5m2."),
        ("E5M2", "Did you mean 'e5m2'? Known: e4m3, e5m2."),
        ("something else", "Known: e4m3, e5m2."),
        (3, "Known: e4m3, e5m2."),
        (None, "Known: e4m3, e5m2."),
    ],
)
def test_a_suggestion_is_the_nearest_name_or_only_the_list(word: object, end: str) -> None:
    assert suggest(word, ["e4m3", "e5m2"]) == end


def test_whatever_is_wrong_is_caught_by_the_root() -> None:
    x = torch.ones(2, 2)
    mistakes = [
        lambda: fp8.quantize(x, "e4"),
        lambda: fp8.quantize(x, tile="2x2"),
        lambda: fp8.quantize(x.long()),
        lambda: fp8.Recipe.of("tensor_wise"),
        lambda: fp8.Linear(2, 2, recipe="fast"),
        lambda: fp8.convert(torch.nn.Linear(2, 2), skip=["nothing"]),
        lambda: fp8.TransformerLayer(10, 20, 3),
        lambda: fp8.autocast(recipe="tensorwize"),
        lambda: fp8.register(torch.nn.Linear(2, 2), lambda *_: None),
    ]
    for mistake in mistakes:
        with pytest.raises(Fp8Error, match=r"\w"):
            mistake()
