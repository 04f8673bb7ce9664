"""Laws of text: what was shown is never taken back, no half character leaks, no stop text is shown."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp8.serve.text import MOST_HELD, Detokenizer, Stops, Writer
from fp8.serve.tokenizer import Bytes

TEXTS = st.text(alphabet="ab\n é€😀\ufffd", max_size=30)


def decode(tokens: list[int]) -> str:
    return bytes(tokens).decode(errors="replace")


@given(text=TEXTS)
def test_pieces_make_up_the_text(text: str) -> None:
    characters = Detokenizer(decode)
    pieces = [characters.push(byte) for byte in text.encode()]
    assert "".join(pieces) + characters.rest() == text.rstrip("\ufffd") or "\ufffd" in text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text
    assert "".join([*pieces, characters.rest()]).rstrip("\ufffd") == text.rstrip("\ufffd")


@given(text=TEXTS, cut=st.integers(1, 3))
def test_half_a_character_never_leaks(text: str, cut: int) -> None:
    characters = Detokenizer(decode)
    shown = "".join(characters.push(byte) for byte in [*text.encode(), *"😀".encode()[:cut]])
    assert (shown + characters.rest()).rstrip("\ufffd") == text.rstrip("\ufffd")


def test_bytes_that_are_no_text_are_shown_in_the_end() -> None:
    characters = Detokenizer(decode)
    pieces = [characters.push(0x80) for _ in range(MOST_HELD)]
    assert pieces[:-1] == [""] * (MOST_HELD - 1) and pieces[-1] == "\ufffd" * MOST_HELD


def test_a_space_that_depends_on_the_word_before_stays() -> None:
    words = ["▁call", "▁me", "▁Ish", "mael"]

    def sentencepiece(tokens: list[int]) -> str:
        return "".join(words[t] for t in tokens).replace("▁", " ").removeprefix(" ")

    characters = Detokenizer(sentencepiece)
    assert [characters.push(t) for t in range(4)] == ["call", " me", " Ish", "mael"]


@given(data=st.data())
def test_a_stop_text_is_found_however_it_is_cut(data: Any) -> None:
    text = data.draw(st.text(alphabet="ab.", max_size=24))
    stops = data.draw(st.lists(st.text(alphabet="ab.", min_size=1, max_size=5), min_size=1, max_size=3))
    places = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]
    looking, shown = Stops(stops), ""
    for piece in pieces:
        shown += looking.push(piece)
        assert not any(stop in shown for stop in stops)
        if looking.found is not None:
            break
    shown += looking.rest()
    found = [text.find(stop) for stop in stops if stop in text]
    if looking.found is None:
        assert not found and shown == text
    else:
        assert shown == text[: len(shown)] and text[len(shown) :].startswith(looking.found)
        assert all(stop not in shown for stop in stops)


def test_a_stop_text_is_kept_if_asked_for() -> None:
    stops = Stops(["END"], keep=True)
    assert [stops.push(piece) for piece in ("one E", "ND two")] == ["one ", "END"]


def test_before_min_tokens_nothing_stops() -> None:
    writer = Writer(decode, ["b"])
    assert writer.push(ord("b"), look=False) == "b" and writer.found is None
    assert writer.push(ord("b")) == "" and writer.found == "b"


def test_what_was_held_back_comes_in_the_end() -> None:
    writer = Writer(decode, ["xyz"])
    assert [writer.push(ord(c)) for c in "axy"] == ["a", "", ""]
    assert writer.end() == "xy"


@pytest.mark.parametrize("skip", [True, False])
def test_the_byte_tokenizer_shows_ends_only_if_asked(skip: bool) -> None:
    assert Bytes().decode([72, 105, 256], skip_special_tokens=skip) == ("Hi" if skip else "Hi<|endoftext|>")
