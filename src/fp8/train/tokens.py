"""A text becomes one file of tokens, memory-mapped; a step's batch is a pure function of (seed, step).

Tokens lie in `<out>/tokens/<key>.npy` (uint16, or uint32 for more than 65,536 words), where the key is a hash of the
text and the tokenizer: a text is tokenized once, and another text or tokenizer gets a file of its own. The file is
written aside and renamed, so it is whole or absent.

A row of a batch is `sequence_length + 1` neighbouring tokens; the first of them is drawn with Philox4x64, keyed by
the pair (seed, step). So the sampler has no state to save: a run resumed at step 700 asks for the batch of step 700.
The rows of a step are drawn in one go and then cut into micro-batches: 2 x 4 rows and 1 x 8 rows are the same eight
rows.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..errors import DataError
from .config import TrainConfig
from .text import text_path
from .tokenizer import Tokenizer

VALIDATION_SHARE = 0.05


@dataclass(frozen=True)
class Tokens:
    """Tokens to train on and to validate on, each [N] and memory-mapped, and a fingerprint of text and tokenizer."""

    train: np.ndarray
    validation: np.ndarray
    fingerprint: str


def load_tokens(config: TrainConfig, tokenizer: Tokenizer) -> Tokens:
    """The tokens of the run's text: the last 5 % validate, unless a validation text is given.

    Raises `DataError`: a text that is missing, empty, cut, no UTF-8, or shorter than a row.
    """
    path = text_path(config.text)
    tokens, key = tokens_of(path, tokenizer, Path(config.out) / "tokens")
    if config.validation_text:
        other = text_path(config.validation_text)
        validation, other_key = tokens_of(other, tokenizer, Path(config.out) / "tokens")
        train, key = tokens, f"{key}+{other_key}"
    else:
        other, cut = path, len(tokens) - int(len(tokens) * VALIDATION_SHARE)
        train, validation = tokens[:cut], tokens[cut:]
    need_length(train, config, path, "to train on")
    need_length(validation, config, other, "to validate on")
    return Tokens(train, validation, key)


def need_length(tokens: np.ndarray, config: TrainConfig, path: Path, purpose: str) -> None:
    if len(tokens) <= config.sequence_length:
        raise DataError(
            f"{path} gives {len(tokens)} tokens {purpose}, but sequence_length={config.sequence_length} needs at least "
            f"{config.sequence_length + 1}: give a longer text or a shorter sequence_length."
        )


def tokens_of(path: Path, tokenizer: Tokenizer, folder: Path) -> tuple[np.ndarray, str]:
    """The memory-mapped tokens [N] of a text, and the key of their file; tokenizes where the file is absent."""
    raw = read_text(path)
    key = hashlib.sha256(hashlib.sha256(raw).digest() + tokenizer.fingerprint.encode()).hexdigest()[:24]
    file = folder / f"{key}.npy"
    if not file.exists():
        write_tokens(file, tokenizer.encode(decode(raw, path)), tokenizer.vocab_size)
    return map_tokens(file, tokenizer.vocab_size), key


def read_text(path: Path) -> bytes:
    if path.is_dir():
        raise DataError(f"{path} is a folder; give the path of one UTF-8 text file.")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the text {path}: {error.strerror}. Check the path, or use 'moby-dick'.") from None
    if not raw.strip():
        raise DataError(f"the text {path} is empty ({len(raw)} bytes); give a UTF-8 text.")
    return raw


def decode(raw: bytes, path: Path) -> str:
    """The text, strictly as UTF-8: what is binary, or cut inside a character, is refused."""
    if (place := raw.find(b"\0")) >= 0:
        raise DataError(f"{path} is not a text: it holds a zero byte at {place}. Give a UTF-8 text file.")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.reason == "unexpected end of data":
            message = (
                f"{path} ends inside a character (at byte {error.start} of {len(raw)}): it was cut; copy it again."
            )
        else:
            message = f"{path} is not UTF-8 at byte {error.start} of {len(raw)}; convert it: iconv -f LATIN1 -t UTF-8."
        raise DataError(message) from None


def write_tokens(file: Path, tokens: np.ndarray, vocab_size: int) -> None:
    """Write aside, then rename: a reader finds the whole file or none."""
    tokens = tokens.astype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
    aside = file.with_suffix(f".{os.getpid()}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "wb") as stream:
            np.save(stream, tokens)
        aside.replace(file)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise DataError(
            f"cannot write the tokens to {file}: {error.strerror}. They need {tokens.nbytes / 1e6:.1f} MB: "
            "make room there, or set another folder with out."
        ) from None


def map_tokens(file: Path, vocab_size: int) -> np.ndarray:
    """The tokens of a file, memory-mapped and checked; `DataError` where it was cut or is no file of tokens."""
    try:
        tokens = np.load(file, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"the tokens in {file} are damaged ({error}). Delete that file: it is made again.") from None
    if tokens.ndim != 1 or tokens.dtype not in (np.uint16, np.uint32) or int(tokens.max(initial=0)) >= vocab_size:
        raise DataError(f"{file} does not hold tokens below {vocab_size}. Delete that file: it is made again.")
    return tokens


def offsets(seed: int, step: int, count: int, choices: int) -> np.ndarray:
    """Where the rows of a step begin: `count` numbers below `choices`, a pure function of (seed, step)."""
    key = np.array([seed, step], dtype=np.uint64)
    return np.random.Philox(key=key).random_raw(count) % np.uint64(choices)


def rows(tokens: np.ndarray, starts: np.ndarray, length: int) -> torch.Tensor:
    """Rows [len(starts), length + 1] as int64: inputs are all but the last column, targets all but the first."""
    return torch.from_numpy(np.stack([tokens[int(s) : int(s) + length + 1] for s in starts]).astype(np.int64))


def batches(tokens: np.ndarray, config: TrainConfig, step: int) -> list[torch.Tensor]:
    """The micro-batches of update number `step` (from 0), each [batch_size, sequence_length + 1]."""
    count = config.batch_size * config.gradient_accumulation
    starts = offsets(config.seed, step, count, len(tokens) - config.sequence_length)
    return list(rows(tokens, starts, config.sequence_length).split(config.batch_size))


def validation_batches(tokens: np.ndarray, config: TrainConfig) -> Iterator[torch.Tensor]:
    """The same rows at every evaluation: spread evenly over the tokens, none overlapping another."""
    length, wanted = config.sequence_length, config.eval_batches * config.batch_size
    count = min(wanted, (len(tokens) - 1) // length)
    starts = np.arange(count) * ((len(tokens) - 1) // count)
    for first in range(0, count, config.batch_size):
        yield rows(tokens, starts[first : first + config.batch_size], length)
