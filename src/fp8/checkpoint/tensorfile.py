"""Reading and writing `safetensors` files: the same tensors always give the same bytes, and no file is ever half there.

    8 bytes     length of the header, little-endian
    header      JSON: name -> type, shape, first and last byte; padded with spaces to a multiple of 8
    the rest    the tensors' bytes, row-major, one after the other, none missing

The order is the format's own, wider types first so that each tensor lies aligned, then by name; the header's JSON has
no freedom left. Hence equal tensors are equal files, which checksums, caches and tests can rely on.

Files are written beside their place and renamed once they are on disk, so that a reader finds the old file or the new
one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError

TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.uint8: "U8", torch.int8: "I8",
    torch.int16: "I16", torch.int32: "I32", torch.int64: "I64", torch.bool: "BOOL",
}  # fmt: skip

INDEX = "model.safetensors.index.json"
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file and wait until it is on disk. Raises `OSError`."""
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    with open(path, "wb") as file:
        file.write(header(tensors, order))
        for name in order:
            file.write(tensor_bytes(tensors[name]))
        file.flush()
        os.fsync(file.fileno())


def header(tensors: Mapping[str, Tensor], order: list[str]) -> bytes:
    """The first bytes of the file: where each tensor lies."""
    rows: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in order:
        stop = start + tensors[name].nbytes
        rows[name] = {
            "dtype": TYPES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(rows, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, row-major."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file. Raises `CheckpointError` where it is missing, truncated, or none."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise CheckpointError(f"{path} does not exist: the checkpoint is incomplete, copy it again.")
    try:
        return load_file(path)
    except (SafetensorError, ValueError, KeyError) as error:
        size = path.stat().st_size
        raise CheckpointError(f"{path} ({size} bytes) is damaged or cut off ({error}): copy it again.") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises `CheckpointError`."""
    if not path.is_file():
        raise CheckpointError(f"there is no {path.name} in {path.parent}: give the folder of a checkpoint.")
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}): copy the checkpoint again.") from None
    if not isinstance(plain, dict):
        raise CheckpointError(f"{path} holds a {type(plain).__name__}, not an object of settings.")
    return plain


def read_index(folder: Path) -> dict[str, str]:
    """Which file holds each tensor, as the index says; empty where there is none.

    Raises `CheckpointError` for an index that names anything but files beside it: a checkpoint from elsewhere reads
    nothing else of this machine.
    """
    if not (folder / INDEX).is_file():
        return {}
    named = read_json(folder / INDEX).get("weight_map")
    if not isinstance(named, dict) or not named:
        raise CheckpointError(f"{folder / INDEX} has no weight_map of tensors and files: copy it again.")
    for name, file in named.items():
        if not isinstance(file, str) or file in ("", ".", "..") or "/" in file or "\\" in file or "\0" in file:
            raise CheckpointError(f"{INDEX} says that {name} is in {file!r}, which is no file beside it.")
    return named


def write_json(path: Path, plain: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(plain, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def written_aside(folder: Path, overwrite: bool, need: int = 0) -> Iterator[Path]:
    """A new folder to write into, which takes the place of `folder` when all went well and is removed when not.

    A folder that is already there is kept until the new one is complete, and replaced only with `overwrite`, and only
    if it holds nothing but a checkpoint's files. `need` is how many bytes will be written: less free space is refused
    at once. Raises `CheckpointError`, also for a full disk.
    """
    folder = Path(folder).absolute()
    refuse_other_files(folder, overwrite)
    aside = folder.with_name(f".{folder.name}.writing-{os.getpid()}")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        refuse_full_disk(aside, need)
        yield aside
        take_place(aside, folder)
    except OSError as error:
        raise CheckpointError(f"{folder} was not written: {error.strerror or error}. Nothing was changed.") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def refuse_other_files(folder: Path, overwrite: bool) -> None:
    """Nothing that is not a checkpoint's is ever replaced."""
    found = sorted(folder.iterdir()) if folder.is_dir() else [folder] if folder.exists() else []
    if found and not overwrite:
        raise CheckpointError(f"{folder} already exists: choose another folder, or pass overwrite=True.")
    if others := [path for path in found if path.is_dir() or path.name not in FILES]:
        raise CheckpointError(
            f"{others[0]} is not part of a checkpoint, so {folder} is not replaced: choose another folder."
        )


def refuse_full_disk(folder: Path, need: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < need:
        raise CheckpointError(
            f"{folder.parent} has {free / 1e6:.1f} MB free; the checkpoint needs {need / 1e6:.1f} MB."
        )


def take_place(aside: Path, folder: Path) -> None:
    """Rename `aside` to `folder`; what was there goes only after the new one is complete."""
    old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
    if folder.exists():
        folder.rename(old)
    try:
        aside.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
