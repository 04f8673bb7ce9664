"""Text to tokens and back: bytes, built in, or any `tokenizer.json`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..errors import DataError

END_OF_TEXT = "<|endoftext|>"
ENDS = (END_OF_TEXT, "<|im_end|>", "<|end_of_text|>", "</s>", "<eos>")


class Tokenizer(Protocol):
    """What a run needs of a tokenizer. `fingerprint` changes when any token could."""

    vocab_size: int
    end_of_text: int | None
    fingerprint: str

    def encode(self, text: str) -> np.ndarray: ...

    def decode(self, tokens: list[int]) -> str: ...


class ByteTokenizer:
    """257 tokens: token i < 256 is byte i of the UTF-8 text, token 256 is the end of a text (`<|endoftext|>` in it).

    >>> tokenizer = ByteTokenizer()
    >>> tokenizer.encode("Ahab<|endoftext|>").tolist()
    [65, 104, 97, 98, 256]
    >>> tokenizer.decode([65, 104, 97, 98])
    'Ahab'
    """

    vocab_size = 257
    end_of_text: int | None = 256
    fingerprint = "bytes-257"

    def encode(self, text: str) -> np.ndarray:
        """Tokens [N] as uint16."""
        parts = [np.frombuffer(part.encode(), dtype=np.uint8).astype(np.uint16) for part in text.split(END_OF_TEXT)]
        end = np.array([256], dtype=np.uint16)
        return np.concatenate([piece for part in parts for piece in (part, end)][:-1])

    def decode(self, tokens: list[int]) -> str:
        """Bytes that are no UTF-8 (a cut character) become the replacement character."""
        parts: list[bytes] = [bytes([t]) if t < 256 else END_OF_TEXT.encode() for t in tokens]
        return b"".join(parts).decode(errors="replace")


class JsonTokenizer:
    """A `tokenizer.json`, read by the `tokenizers` package. No token is added at the start or end of a text."""

    def __init__(self, path: Path) -> None:
        self._tokenizer = read_tokenizer_json(path)
        vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise DataError(f"{path} has no vocabulary; give a tokenizer.json that was trained.")
        self.vocab_size = max(vocabulary.values()) + 1
        self.end_of_text = next((vocabulary[end] for end in ENDS if end in vocabulary), None)
        self.fingerprint = hashlib.sha256(path.read_bytes()).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """Tokens [N] as uint32. Long texts are cut behind a line, a megabyte at a time."""
        encoded = (self._tokenizer.encode(piece, add_special_tokens=False).ids for piece in pieces(text))
        return np.concatenate([np.array(ids, dtype=np.uint32) for ids in encoded] or [np.array([], dtype=np.uint32)])

    def decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=False)


def pieces(text: str, size: int = 1 << 20) -> Iterator[str]:
    """The text in pieces of at least `size` characters, each cut behind a line; a fixed rule."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + size) + 1 or len(text)
        yield text[start:end]
        start = end


def read_tokenizer_json(path: Path) -> Any:
    try:
        import tokenizers
    except ImportError:
        raise DataError(
            f"reading {path} needs the package 'tokenizers': pip install 'fp8[hf]', or use tokenizer='bytes'."
        ) from None
    if not path.is_file():
        raise DataError(f"there is no tokenizer at {path}; give the path of a tokenizer.json, or 'bytes'.")
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001  the package raises bare Exception
        raise DataError(f"{path} is not a tokenizer.json: {error}") from None


def tokenizer_of(name: str) -> Tokenizer:
    """The tokenizer that a setting names: `bytes`, or the path of a `tokenizer.json` or of its folder."""
    if name == "bytes":
        return ByteTokenizer()
    path = Path(name).expanduser()
    return JsonTokenizer(path / "tokenizer.json" if path.is_dir() else path)
