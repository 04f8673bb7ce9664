"""From tokens to text that may be shown: whole characters only, and nothing that belongs to a stop text.

**Characters.** A character may be spread over up to four tokens, and what a token says may depend on the one before it
(the space at the start of a word). So a few tokens are decoded together, those of the last character shown and all
after it, and what is new is the difference. A text that ends in U+FFFD ends, for all one can know, in the middle of a
character: it is held back until it is whole. When the answer ends, half a character is dropped; its bytes never
leak. (A model that writes bytes which are no UTF-8 at all would hold back for ever: after `MOST_HELD` tokens they are
shown as U+FFFD.)

**Stop texts** are looked for in the text, not in the tokens, so it does not matter how they are cut into tokens. Text
whose end could begin a stop text is held back until it turns out not to: what was shown never needs to be taken back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

BROKEN = "\ufffd"
MOST_HELD = 16  # tokens

Decode = Callable[[list[int]], str]


class Detokenizer:
    """Text of a growing list of tokens, in whole characters.

    >>> pieces = Detokenizer(lambda tokens: bytes(tokens).decode(errors="replace"))
    >>> [pieces.push(byte) for byte in "né".encode()]
    ['n', '', 'é']
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._context: list[int] = []  # tokens whose text was given last
        self._held: list[int] = []  # tokens whose text was not

    def push(self, token: int) -> str:
        """The text that one more token makes certain."""
        self._held.append(token)
        before = self._decode(self._context) if self._context else ""
        text = self._decode(self._context + self._held)
        if len(text) <= len(before) or (text.endswith(BROKEN) and len(self._held) < MOST_HELD):
            return ""
        self._context, self._held = self._held, []
        return text[len(before) :]

    def rest(self) -> str:
        """What was held back, without the half character at its end."""
        before = self._decode(self._context) if self._context else ""
        return self._decode(self._context + self._held)[len(before) :].rstrip(BROKEN)


class Stops:
    """Looks for the first of some texts in a text that comes in pieces.

    >>> stops = Stops(["\\n\\n"])
    >>> stops.push("one\\n"), stops.push("two\\n"), stops.push("\\nthree"), stops.found
    ('one', '\\ntwo', '', '\\n\\n')
    """

    def __init__(self, texts: Sequence[str], keep: bool = False) -> None:
        self._texts, self._keep = texts, keep
        self._held = ""
        self.found: str | None = None

    def push(self, piece: str, look: bool = True) -> str:
        """The text that may be shown now; where `found` is set, the last of all. `look=False`: not even look."""
        text = self._held + piece
        places = [(place, stop) for stop in self._texts if look and (place := text.find(stop)) >= 0]
        if places:
            place, self.found = min(places)
            self._held = ""
            return text[: place + len(self.found)] if self._keep else text[:place]
        held = self._may_begin(text) if look else 0
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def rest(self) -> str:
        """What was held back, when no more comes."""
        text, self._held = self._held, ""
        return text

    def _may_begin(self, text: str) -> int:
        """The length of the longest end of the text that begins a stop text."""
        lengths = (n for stop in self._texts for n in range(1, len(stop)) if text.endswith(stop[:n]))
        return max(lengths, default=0)


class Writer:
    """The text of one answer: characters, then stop texts."""

    def __init__(self, decode: Decode, stop: Sequence[str] = (), keep_stop: bool = False) -> None:
        self._characters = Detokenizer(decode)
        self._stops = Stops(stop, keep_stop)

    def push(self, token: int, look: bool = True) -> str:
        """The new text; `look`: whether a stop text ends the answer already."""
        return self._stops.push(self._characters.push(token), look)

    def end(self) -> str:
        """The last text, when the answer ends for another reason than a stop text."""
        return self._stops.push(self._characters.rest(), look=False) + self._stops.rest()

    @property
    def found(self) -> str | None:
        """The stop text that was met."""
        return self._stops.found
