"""Texts and conversations to tokens and back, as the checkpoint's own files say.

A folder whose tokenizer is our built-in bytes needs no package. Any other is read by transformers, which knows each
model's marks, which of them begin a prompt, and its chat template. What ends an answer is told by
`generation_config.json` (some chat models end with one mark of two), or else by the tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ..checkpoint import end_of_text, tokenizer_name
from ..errors import DataError
from ..train.tokenizer import ByteTokenizer

Message = Mapping[str, Any]  # {"role": "user", "content": "..."}


class Tokenizer(Protocol):
    """What an engine needs: `ends` are the tokens that end an answer."""

    ends: frozenset[int]

    def encode(self, text: str) -> list[int]: ...

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str: ...

    def chat(self, messages: Sequence[Message], **template: Any) -> list[int]: ...


class Bytes:
    """The built-in tokenizer: a token a byte, and one that ends a text. It has no chat template."""

    def __init__(self, ends: Iterable[int] = (256,)) -> None:
        self._words, self.ends = ByteTokenizer(), frozenset(ends)

    def encode(self, text: str) -> list[int]:
        return self._words.encode(text).tolist()

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Tokens that no byte has are shown as nothing, or as the end of a text."""
        return self._words.decode([min(token, 256) for token in tokens if token < 256 or not skip_special_tokens])

    def chat(self, messages: Sequence[Message], **template: Any) -> list[int]:
        raise DataError("the byte tokenizer has no chat template: give a prompt, not messages.")


class HuggingFace:
    """A tokenizer that transformers reads, from a folder or from a tokenizer.json alone."""

    def __init__(self, path: str | Path, ends: Iterable[int] = ()) -> None:
        self._words = read(Path(path))
        end = self._words.eos_token_id
        self.ends = frozenset(ends) or frozenset(() if end is None else (end,))

    def encode(self, text: str) -> list[int]:
        """With the marks that the model's prompts begin with, if it has any."""
        return self._words.encode(text)

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self._words.decode(list(tokens), skip_special_tokens=skip_special_tokens)

    def chat(self, messages: Sequence[Message], **template: Any) -> list[int]:
        """The tokens of a conversation, ready for the assistant's answer. Raises `DataError`."""
        if not self._words.chat_template:
            raise DataError("this tokenizer has no chat template: give a prompt, not messages.")
        options = {"add_generation_prompt": True} | template
        try:
            text = self._words.apply_chat_template(list(messages), tokenize=False, **options)
        except Exception as error:  # noqa: BLE001  a template is a program of the model's author
            raise DataError(f"the chat template does not take these messages: {error}") from None
        return self._words.encode(text, add_special_tokens=False)


def read(path: Path) -> Any:
    """transformers' tokenizer. Raises `DataError`."""
    try:
        from transformers import AutoTokenizer, PreTrainedTokenizerFast
    except ImportError:
        raise DataError("reading this tokenizer needs transformers: pip install 'fp8[hf]'.") from None
    if not path.exists():
        raise DataError(f"there is no tokenizer at {path}: give a tokenizer.json, its folder, or 'bytes'.")
    try:
        alone = path.is_file()
        return PreTrainedTokenizerFast(tokenizer_file=str(path)) if alone else AutoTokenizer.from_pretrained(path)
    except Exception as error:  # noqa: BLE001  transformers raises what it met
        raise DataError(f"{path} has no tokenizer that can be read: {error}") from None


def read_tokenizer(folder: str | Path, name: str | Path | None = None) -> Tokenizer | None:
    """The tokenizer of a checkpoint, or the one named instead: "bytes", a folder, or a tokenizer.json; None where there
    is none."""
    own, ends = tokenizer_name(folder), end_of_text(folder)
    if name is None and own is None:
        return None
    if "bytes" in (name, None if name else own):
        return Bytes(ends or (256,))
    return HuggingFace(Path(folder if name is None else name).expanduser(), ends)
