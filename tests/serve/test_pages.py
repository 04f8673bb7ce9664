"""Laws of the pool of pages: what is forgotten first, and who finds what."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fp8.serve.pages import PagePool, next_name


def filled(pool: PagePool, *names: bytes) -> list[int]:
    """Pages of a sequence, one a name; b"": it has none."""
    pages = [pool.take() for _ in names]
    for page, name in zip(pages, names, strict=True):
        if name:
            pool.name(page, name)
    return pages


def test_pages_without_a_name_are_taken_first() -> None:
    pool = PagePool(3)
    named, plain = filled(pool, b"a"), filled(pool, b"")
    pool.release(named)
    pool.release(plain)
    assert {pool.take() for _ in range(2)} == {2, plain[0]}
    assert pool.find([b"a"]) == named, "what can be found is kept as long as there is anything else"


def test_of_named_pages_those_freed_longest_ago_are_taken_first() -> None:
    pool = PagePool(2)
    old, new = filled(pool, b"old"), filled(pool, b"new")
    pool.release(old)
    pool.release(new)
    assert pool.take() == old[0] and pool.find([b"old"]) == [] and pool.find([b"new"]) == new


def test_the_end_of_a_beginning_is_forgotten_before_it() -> None:
    pool = PagePool(3)
    pages = filled(pool, b"1", b"12", b"123")
    pool.release(pages)
    pool.take()
    assert pool.find([b"1", b"12", b"123"]) == pages[:2]


def test_a_page_that_is_asked_for_again_is_no_longer_free() -> None:
    pool = PagePool(2)
    (page,) = filled(pool, b"a")
    pool.release([page])
    pool.share(page)
    assert pool.free == 1 and pool.take() != page and pool.references[page] == 1
    pool.share(page)
    pool.release([page])
    assert pool.free == 0, "somebody still holds it"


def test_a_name_stands_for_one_page_and_a_forgotten_one_for_none() -> None:
    pool = PagePool(2)
    first, second = filled(pool, b"a", b"a")
    assert pool.find([b"a"]) == [first]
    pool.forget(second)
    assert pool.find([b"a"]) == [first], "it never had the name"
    pool.forget(first)
    assert pool.find([b"a"]) == []


def test_only_an_unbroken_beginning_is_found() -> None:
    pool = PagePool(3)
    first, _, third = filled(pool, b"1", b"", b"123")
    assert pool.find([b"1", b"12", b"123"]) == [first] and pool.find([b"123"]) == [third]


@given(st.lists(st.integers(0, 2**62), min_size=1, max_size=5), st.lists(st.integers(0, 2**62), min_size=1, max_size=5))
def test_names_differ_where_tokens_or_what_is_before_them_differ(one: list[int], other: list[int]) -> None:
    assert (next_name(b"", one) == next_name(b"", other)) == (one == other)
    assert next_name(b"x", one) != next_name(b"", one)
