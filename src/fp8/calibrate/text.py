"""Text for calibration: files, JSON lines, or the book that ships with the package, as rows of tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError
from ..train.text import text_path
from ..train.tokenizer import ByteTokenizer
from ..train.tokens import decode, read_text


def read_texts(names: Sequence[str]) -> str:
    """All texts in a row. `*.jsonl` gives the field "text" of each line; `moby-dick` is the book of the package."""
    return "\n\n".join(_read(text_path(name)) for name in names)


def _read(path: Path) -> str:
    text = decode(read_text(path), path)
    if path.suffix != ".jsonl":
        return text
    return "\n\n".join(_field(line, path, i) for i, line in enumerate(text.split("\n"), 1) if line.strip())


def _field(line: str, path: Path, number: int) -> str:
    try:
        return str(json.loads(line)["text"])
    except (json.JSONDecodeError, KeyError, TypeError):
        raise DataError(f"line {number} of {path} is no JSON object with a field 'text'.") from None


def digest(names: Iterable[str]) -> dict[str, str]:
    """Each text's SHA-256."""
    return {name: hashlib.sha256(read_text(text_path(name))).hexdigest() for name in names}


def tokenizer_for(folder: Path, name: str | None) -> Any:
    """The tokenizer of a model, or the one that is named: "bytes", or a folder. Raises `DataError`."""
    if name == "bytes":
        return ByteTokenizer()
    where = Path(name) if name else folder
    where = where.parent if where.is_file() else where
    if not any(where.glob("tokenizer*")) and not any(where.glob("vocab*")):
        raise DataError(
            f"{where} has no tokenizer, and text is needed here: copy the model's tokenizer files there, or name a "
            "folder that has them, or 'bytes', by --tokenizer. `fp8 quantize --no-kv-cache` needs no text, unless the "
            "scheme is static or another option reads some."
        )
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(where, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        raise DataError(f"the tokenizer in {where} cannot be read: {str(error).splitlines()[0]}") from None


def rows_of(text: str, tokenizer: Any, samples: int, length: int, vocabulary: int) -> Tensor:
    """Up to `samples` rows `[n, length]` of tokens (int64), begun at even distances in the text, none overlapping.

    Each begins as the tokenizer begins a text: a model's first token often has the largest keys of all. Only what is
    needed is tokenized, so that the text may be long.
    """
    start = [] if isinstance(tokenizer, ByteTokenizer) else tokenizer("")["input_ids"][:1]
    count = samples
    while count >= 2:
        rows = [begun(text[i * len(text) // count : (i + 1) * len(text) // count], tokenizer, length - len(start))
                for i in range(count)]  # fmt: skip
        if all(rows):
            break
        count = count * 3 // 4
    else:
        raise DataError(
            f"the text has {len(text)} characters, which is too short; calibration needs two rows of {length} tokens "
            "at least, one of them held out: give a longer text, or a smaller --length."
        )
    largest = max(max(row) for row in rows)
    if largest >= vocabulary:
        raise DataError(
            f"the tokenizer gives token {largest}, but the model knows {vocabulary}: it is another model's tokenizer."
        )
    return torch.tensor([[*start, *row] for row in rows])


def begun(text: str, tokenizer: Any, length: int) -> list[int]:
    """The first `length` tokens of a text; none where it is shorter."""
    characters = 4 * length
    while True:
        piece = text[:characters]
        if isinstance(tokenizer, ByteTokenizer):
            tokens = tokenizer.encode(piece).tolist()
        else:
            tokens = tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
        if len(tokens) > length or (len(tokens) == length and len(piece) == len(text)):
            return tokens[:length]
        if len(piece) == len(text):
            return []
        characters *= 2
