"""Writing a large checkpoint so that a stop at any moment loses nothing and shows nothing half-done.

    OUT.partial/manifest.json           what is being made of what, calibrated scales, and the shards that are finished
    OUT.partial/model-0000i-of-n…       finished shards
    OUT.partial/….writing               the shard in hand
    OUT.partial.lock                    held by the one process that makes OUT; a process that dies lets it go
    OUT.partial/compensated/            what choosing the codes has come to, where they are not simply the nearest
    OUT                                 appears by one rename, when all is there

A shard's header is known before its first tensor is (shapes and types follow from the source's headers), so tensors are
written where they belong as they are made, and none is held: the memory needed is that of one tensor, not of one shard.
A shard is renamed when its bytes are on disk, then noted in the manifest. The same command finds the manifest, checks
that source, options and version are the same, and goes on behind the last finished shard; with others it starts over.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from ..errors import CheckpointError, Fp8Error
from .source import INDEX, SINGLE, Source
from .tensorfile import header, read_json, refuse_full_disk, tensor_bytes, write_json

MANIFEST = "manifest.json"
SPARE = 1 << 20  # bytes for configs and tokenizers

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Task:
    """A few tensors that are made together: what they will be (on the meta device), and how to make them."""

    outputs: Mapping[str, Tensor]
    make: Callable[[], Mapping[str, Tensor]]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.outputs.values())


def promised(dtype: torch.dtype, *shape: int) -> Tensor:
    """A tensor that will be there: type and shape without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


class Partial:
    """The folder beside OUT in which it comes into being."""

    def __init__(self, out: Path, facts: Mapping[str, Any]) -> None:
        """`facts` are all that decides the bytes; a manifest with others is not continued."""
        self.out = out.absolute()
        self.folder = self.out.with_name(self.out.name + ".partial")
        self.facts = json.loads(json.dumps(facts))
        self.done: dict[str, int] = {}
        self.notes: dict[str, Any] = {}
        self.resumed = False
        if self.out.exists():
            raise CheckpointError(f"{self.out} already exists: choose another folder, or remove it first.")
        self._take_up()

    def _take_up(self) -> None:
        manifest = self.folder / MANIFEST
        old = _manifest(manifest)
        if self.folder.exists() and old is None and any(self.folder.iterdir()):
            raise CheckpointError(f"{self.folder} holds other files: move them away, or choose another folder.")
        if old is not None and old["facts"] == self.facts:
            self.done, self.notes, self.resumed = old["done"], old["notes"], True
        elif old is not None:
            self.discard()

    def begin(self) -> None:
        """Make the folder, with the manifest by which a later start knows it as ours."""
        self._write()

    def note(self, key: str, value: Any) -> None:
        """Keep something that took time to find, such as calibrated scales."""
        self.notes[key] = value
        self._write()

    def _write(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            aside = self.folder / (MANIFEST + ".writing")
            write_json(aside, {"facts": self.facts, "done": self.done, "notes": self.notes})
            aside.replace(self.folder / MANIFEST)
        except OSError as error:
            raise CheckpointError(f"{self.out} cannot be written: {error.strerror or error}.") from None

    @property
    def working(self) -> Path:
        """A folder for what is needed on the way, and not in the end."""
        return self.folder / "compensated"

    def finished(self, file: str) -> bool:
        path = self.folder / file
        return file in self.done and path.is_file() and path.stat().st_size == self.done[file]

    def write(self, files: Mapping[str, Sequence[Task]], progress: Progress | None = None) -> None:
        """Make all files that are not yet there. Raises `CheckpointError`; for a full disk too, which loses nothing."""
        total = sum(task.nbytes for tasks in files.values() for task in tasks)
        left = sum(t.nbytes for file, tasks in files.items() if not self.finished(file) for t in tasks)
        self._write()
        refuse_full_disk(self.folder, left + SPARE)
        passed = 0
        for file, tasks in files.items():
            if self.finished(file):
                passed += sum(task.nbytes for task in tasks)
            else:
                with self._writing(file, tasks) as place:
                    for task in tasks:
                        for name, tensor in self._made(task).items():
                            place.put(name, tensor)
                        passed += task.nbytes
                        if progress:
                            progress(passed, total)
                self.done[file] = (self.folder / file).stat().st_size
                self._write()
            if progress:
                progress(passed, total)

    def _made(self, task: Task) -> Mapping[str, Tensor]:
        try:
            return task.make()
        except Fp8Error:  # the source is at fault: what was begun cannot be finished
            self.discard()
            raise

    @contextmanager
    def _writing(self, file: str, tasks: Sequence[Task]) -> Iterator[Place]:
        aside = self.folder / (file + ".writing")
        specs = {name: tensor for task in tasks for name, tensor in task.outputs.items()}
        with open(aside, "wb") as stream:
            place = Place(stream, specs)
            yield place
            assert not place.missing, f"never written: {place.missing}"
            stream.flush()
            os.fsync(stream.fileno())
        aside.replace(self.folder / file)

    def finish(
        self, config: Mapping[str, Any], files: Mapping[str, Sequence[Task]], source: Source,
        beside: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:  # fmt: skip
        """Write what stands beside the weights, also `beside` (JSON by file name), and give the folder its name."""
        index = {name: file for file, tasks in files.items() for task in tasks for name in task.outputs}
        write_json(self.folder / "config.json", config)
        if set(index.values()) != {SINGLE}:
            total = sum(task.nbytes for tasks in files.values() for task in tasks)
            write_json(
                self.folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
            )
        for relative in source.beside(self.folder):
            target = self.folder / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((source.folder / relative).read_bytes())
        for name, plain in (beside or {}).items():
            write_json(self.folder / name, plain)
        shutil.rmtree(self.working, ignore_errors=True)
        (self.folder / MANIFEST).unlink(missing_ok=True)
        self.folder.rename(self.out)

    def discard(self) -> None:
        """Remove the partial folder: what was begun cannot be finished."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.done, self.notes = {}, {}


class Place:
    """An open file with its header written, and the place of every tensor in it."""

    def __init__(self, stream: BinaryIO, specs: Mapping[str, Tensor]) -> None:
        order = sorted(specs, key=lambda name: (-specs[name].element_size(), name))
        head = header(specs, order)
        self.stream, self.specs = stream, specs
        self.starts, start = {}, len(head)
        for name in order:
            self.starts[name] = start
            start += specs[name].nbytes
        self.missing = set(order)
        stream.write(head)
        stream.truncate(start)

    def put(self, name: str, tensor: Tensor) -> None:
        spec = self.specs[name]
        assert (tensor.dtype, tensor.shape) == (spec.dtype, spec.shape), f"{name}: {tensor.dtype} {tensor.shape}"
        self.stream.seek(self.starts[name])
        self.stream.write(tensor_bytes(tensor))
        self.missing.discard(name)


def _manifest(path: Path) -> dict[str, Any] | None:
    """What a manifest says; None where there is none of ours: what lies beside another's file is not ours to remove."""
    try:
        plain = read_json(path)
    except CheckpointError:
        return None
    return plain if {"facts", "done", "notes"} <= plain.keys() else None


@contextmanager
def making(out: Path, facts: Mapping[str, Any]) -> Iterator[Partial]:
    """A `Partial`. A source that is wrong leaves nothing; a full disk or Ctrl-C leaves scales and finished shards.

    Raises `CheckpointError` where another process is making the same folder.
    """
    with alone(Path(out)):
        yield from _making(Path(out), facts)


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Hold the lock of a folder that is being made, and remove its file in the end."""
    path = out.absolute().with_name(out.name + ".partial.lock")
    lock = FileLock(path, timeout=0)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise CheckpointError(
            f"another process is making {out} (it holds {path}): wait for it, or choose another folder."
        ) from None
    except OSError as error:
        raise CheckpointError(f"{out} cannot be written: {error.strerror or error}.") from None
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: whoever opens it later makes a new one
        lock.release()


def _making(out: Path, facts: Mapping[str, Any]) -> Iterator[Partial]:
    partial = Partial(out, facts)
    try:
        yield partial
    except OSError as error:
        raise CheckpointError(
            f"{partial.out} was not finished: {error.strerror or error}. What was written is kept in {partial.folder}; "
            "make room and run the same command again."
        ) from None
    except Fp8Error:
        if not (partial.resumed or partial.done or partial.notes):
            partial.discard()
        raise
