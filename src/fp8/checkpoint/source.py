"""A checkpoint that is read one tensor at a time: `Source`.

A folder of safetensors, in one file or in those that an index names. Opening reads the headers only, and so checks that
every file is whole: a truncated one is refused before anything is done with it. `read` opens the file, takes one
tensor and closes it again, so that its pages are given back: a model of 16 GB is walked through in the memory of its
largest tensor.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from .tensorfile import INDEX, TYPES, read_index, read_json

SINGLE = "model.safetensors"
DTYPES = {name: dtype for dtype, name in TYPES.items()}
# What is copied beside the weights: tokenizer, generation settings, chat template, pooling, remote code, licence.
BESIDE = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".md", ".py")
OTHER_WEIGHTS = ("pytorch_model*.bin", "*.gguf", "*.pth", "*.pt", "*.h5", "*.msgpack")


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies, and what it is."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Source:
    """The folder, its `config.json`, and its tensors by name."""

    folder: Path
    config: Mapping[str, Any]
    entries: Mapping[str, Entry]

    @staticmethod
    def open(folder: str | Path) -> Source:
        """Read config and headers. Raises `CheckpointError` for what is missing, damaged or of another kind."""
        folder = Path(folder)
        if not folder.is_dir():
            raise CheckpointError(f"there is no folder {folder}: give the folder of a checkpoint.")
        config = read_json(folder / "config.json")
        entries = dict(_entries(folder))
        if not entries:
            raise CheckpointError(f"{folder} holds no tensor.")
        return Source(folder, config, entries)

    @property
    def files(self) -> tuple[str, ...]:
        """The files, in order."""
        return tuple(sorted({entry.file for entry in self.entries.values()}))

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries.values())

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point type that holds most of the model, codes apart."""
        sizes: dict[torch.dtype, int] = {}
        for entry in self.entries.values():
            if entry.dtype.is_floating_point and entry.dtype.itemsize > 1:
                sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.nbytes
        return max(sizes, key=lambda dtype: sizes[dtype]) if sizes else torch.bfloat16

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU."""
        if name not in self.entries:
            raise CheckpointError(f"the checkpoint {self.folder} has no tensor {name!r}.")
        with opened(self.folder / self.entries[name].file) as file:
            return file.get_tensor(name)

    @contextmanager
    def reading(self) -> Iterator[Callable[[str], Tensor]]:
        """`read`, with files that stay open until the end: for who reads all there is. The header of a file with
        thousands of experts takes longer to read than one of them."""
        with ExitStack() as stack:
            files: dict[str, Any] = {}

            def read(name: str) -> Tensor:
                if name not in self.entries:
                    return self.read(name)
                file = self.entries[name].file
                if file not in files:
                    files[file] = stack.enter_context(opened(self.folder / file))
                return files[file].get_tensor(name)

            yield read

    def beside(self, without: Path) -> Iterator[Path]:
        """The files that are not weights and go along, relative to the folder; none of the folder `without`, which may
        lie within."""
        for path in sorted(self.folder.rglob("*")):
            relative = path.relative_to(self.folder)
            hidden = any(part.startswith(".") for part in relative.parts) or path.absolute().is_relative_to(without)
            if path.is_file() and path.suffix in BESIDE and not hidden and str(relative) not in ("config.json", INDEX):
                yield relative

    def fingerprint(self) -> str:
        """Changes when the config or any file of weights does (by size and time of change)."""
        digest = hashlib.sha256((self.folder / "config.json").read_bytes())
        for file in self.files:
            stat = (self.folder / file).stat()
            digest.update(f"{file}:{stat.st_size}:{stat.st_mtime_ns};".encode())
        return digest.hexdigest()[:32]


def _entries(folder: Path) -> Iterator[tuple[str, Entry]]:
    named = read_index(folder)
    files = sorted(set(named.values())) if named else [SINGLE]
    if not named and not (folder / SINGLE).is_file():
        raise CheckpointError(_no_weights(folder))
    pairs = (pair for file in files for pair in headers(folder / file))
    held = {name: entry for name, entry in pairs if named.get(name, entry.file) == entry.file}
    if missing := [name for name in named if name not in held]:
        raise CheckpointError(f"{INDEX} names {missing[0]}, which {named[missing[0]]} does not hold: copy it again.")
    yield from held.items()


def _no_weights(folder: Path) -> str:
    other = next((path.name for pattern in OTHER_WEIGHTS for path in sorted(folder.glob(pattern))), None)
    if other:
        return (
            f"{folder} holds its weights in {other}; safetensors are read. Save them so: "
            f"AutoModelForCausalLM.from_pretrained(...).save_pretrained(OUT)."
        )
    return f"there is no {SINGLE} and no {INDEX} in {folder}: give the folder of a checkpoint."


def headers(path: Path) -> Iterator[tuple[str, Entry]]:
    """The tensors of one file, from its header."""
    with opened(path) as file:
        for name in file.keys():  # noqa: SIM118  it is no mapping
            part = file.get_slice(name)
            kind = part.get_dtype()
            if kind not in DTYPES:
                raise CheckpointError(f"{name} in {path.name} is of type {kind}, which is not read here.")
            yield name, Entry(path.name, DTYPES[kind], tuple(part.get_shape()))


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file. Raises `CheckpointError` where it is missing, truncated, or none."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise CheckpointError(f"{path} does not exist: the checkpoint is incomplete, copy it again.")
    try:
        file = safe_open(path, "pt")
    except (SafetensorError, OSError, ValueError) as error:
        size = path.stat().st_size
        raise CheckpointError(f"{path} ({size} bytes) is damaged or cut off ({error}): copy it again.") from None
    with file as reader:
        yield reader
