"""Who owns which page of the cache: reference counts, and full pages found again by what they hold.

**Names of contents.** A full page of a sequence is named by a hash of its tokens and of the page before it, so that a
name stands for everything from position 0 on: two sequences with the same name have the same keys and values there, to
the bit, because the model's results depend on nothing but a token's past. Names are 128 bits of BLAKE2b: Python's own
`hash` could be made to collide, and would then show one user another's text.

**Life of a page.**

    free, empty ── take ──► held by one ── share ──► held by many ── release ──► … ──► free
                                 └── name, when it is full and its tokens are known

A page that nobody holds is free, but keeps its name until it is taken again: whoever asks for that name meanwhile gets
it back. Free pages are taken in this order: those without a name, then those freed longest ago (LRU); a sequence frees
its pages from the last to the first, so that the end of a common beginning is forgotten before the beginning.

**Who may write.** Only who took a page, and each position once. Others find it by its name, which it has when no
position is left to write.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence


class PagePool:
    """The pages `0 .. count - 1` of a cache. All operations are O(1) a page."""

    def __init__(self, count: int) -> None:
        self.references = [0] * count
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(count))  # the next to be taken stands first
        self._by_name: dict[bytes, int] = {}
        self._names: dict[int, bytes] = {}

    @property
    def total(self) -> int:
        return len(self.references)

    @property
    def free(self) -> int:
        """Pages that nobody holds, whatever they still contain."""
        return len(self._free)

    def take(self) -> int:
        """A page to write to; its old content is forgotten. There must be a free one."""
        page, _ = self._free.popitem(last=False)
        self.forget(page)
        self.references[page] = 1
        return page

    def share(self, page: int) -> None:
        """Hold a page that `find` gave."""
        self._free.pop(page, None)
        self.references[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Hold these pages of a sequence, in the order of positions, no longer."""
        for page in reversed(list(pages)):
            self.references[page] -= 1
            assert self.references[page] >= 0, f"page {page} was released more often than held"
            if self.references[page] == 0:
                self._free[page] = None
                self._free.move_to_end(page, last=page in self._names)

    def name(self, page: int, name: bytes) -> None:
        """Let a full page be found. Where another page has the name, that one stays the one to be found."""
        if name not in self._by_name:
            self._by_name[name] = page
            self._names[page] = name

    def forget(self, page: int) -> None:
        """Let a page not be found any more."""
        if (name := self._names.pop(page, None)) is not None:
            del self._by_name[name]

    def find(self, names: Iterable[bytes]) -> list[int]:
        """The pages of the longest beginning of `names` that is here."""
        pages: list[int] = []
        for name in names:
            if name not in self._by_name:
                break
            pages.append(self._by_name[name])
        return pages


def next_name(before: bytes, tokens: Sequence[int]) -> bytes:
    """The name of a full page of these tokens, behind the page named `before` (b"": it is the first).

    >>> next_name(b"", [1, 2]) == next_name(b"", [1, 2]), next_name(b"x", [1, 2]) == next_name(b"", [1, 2])
    (True, False)
    """
    return hashlib.blake2b(before + array("q", tokens).tobytes(), digest_size=16).digest()
