"""What can be measured of a model: a text's perplexity, or a task. Both are batches of work that give records.

Everything that a record depends on goes into `what`, which names the file of partial results: the model's fingerprint,
the items or the tokens, the sizes of window and batch (a sum of FP32 products may change in its last bit with the shape
of a batch), and the versions of this package and of torch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from ..errors import ConfigError, DataError
from ..train.tokenizer import Tokenizer, pieces
from . import answering, windows
from .measures import ACCURACY, PERPLEXITY, SPEARMAN
from .subject import Causal, ModelSpec, tokenizer_for
from .tasks import Ending, Pair, Task

Record = dict[str, Any]


class Measurement(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def encoder(self) -> bool:
        """Whether an encoder is asked, not a language model."""
        ...

    @property
    def measures(self) -> tuple[str, ...]: ...

    @property
    def keep(self) -> int | None:
        """How many records count, where the last batch may give more; None: all."""
        ...

    def what(self, spec: ModelSpec) -> dict[str, Any]: ...

    def batches(self, spec: ModelSpec) -> list[Sequence[Any]]: ...

    def run(self, model: Any, batch: Sequence[Any]) -> list[Record]: ...


def surrounding(spec: ModelSpec) -> dict[str, Any]:
    """What every record depends on."""
    from .. import __version__

    return {"model": spec.name, "fingerprint": spec.fingerprint(), "fp8": __version__, "torch": torch.__version__}


def begin(words: Tokenizer, bos: str | None) -> int | None:
    """The token that `--bos TEXT` stands for."""
    if bos is None:
        return None
    found = [int(token) for token in words.encode(bos)]
    if len(found) != 1:
        raise ConfigError(f"bos={bos!r} is {len(found)} tokens of this tokenizer, and should be one, as '<s>' is.")
    return found[0]


@dataclass(frozen=True)
class TextMeasurement:
    """The perplexity of a text (UTF-8), `windows.py` says how. `limit`: only the first windows.

    Where batches begin does not depend on the limit, so that a larger one goes on from what a smaller one left on disk.
    """

    path: Path
    window: int = 1024
    stride: int = 512
    limit: int | None = None
    batch_size: int = 1
    bos: str | None = None
    encoder: bool = False
    _tokens: dict[str, np.ndarray] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not self.path.is_file():
            raise DataError(f"there is no text {self.path}.")
        windows.cut(2, self.window, self.stride)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def measures(self) -> tuple[str, ...]:
        return (PERPLEXITY,)

    @property
    def keep(self) -> int | None:
        return self.limit

    @cached_property
    def text(self) -> str:
        try:
            return self.path.read_bytes().decode()  # line ends stay as they are
        except UnicodeDecodeError as error:
            raise DataError(f"{self.path} is not UTF-8 text: {error}.") from None

    def tokens(self, words: Tokenizer) -> np.ndarray:
        """The tokens that are read: all, or as many as the first windows need."""
        if words.fingerprint not in self._tokens:
            need = math.inf if self.limit is None else (self.limit + self.batch_size) * self.stride + self.window + 1
            found: list[np.ndarray] = []
            for piece in pieces(self.text):
                found.append(words.encode(piece))
                if sum(map(len, found)) >= need:
                    break
            joined = np.concatenate(found or [np.array([], dtype=np.uint32)])
            self._tokens[words.fingerprint] = joined[: len(joined) if need == math.inf else int(need)]
        return self._tokens[words.fingerprint]

    def what(self, spec: ModelSpec) -> dict[str, Any]:
        own = {"window": self.window, "stride": self.stride, "batch": self.batch_size, "bos": self.bos}
        read = {"sha256": hashlib.sha256(self.text.encode()).hexdigest(), "words": tokenizer_for(spec).fingerprint}
        return surrounding(spec) | own | {"text": self.name} | read

    def batches(self, spec: ModelSpec) -> list[Sequence[Any]]:
        tokens = self.tokens(tokenizer_for(spec))
        most = None if self.limit is None else self.limit + self.batch_size
        cut = windows.cut(len(tokens), self.window, self.stride, bos=self.bos is not None, limit=most)
        batches = windows.batches(cut, self.batch_size)
        return [batch for batch in batches if self.limit is None or batch[0].index < self.limit]

    def run(self, model: Causal, batch: Sequence[windows.Window]) -> list[Record]:
        bos = begin(model.words, self.bos)
        if (read := self.window + (bos is not None)) > model.max_positions:
            raise ConfigError(f"a window of {read} tokens exceeds the model's {model.max_positions}: use --window.")
        return windows.score(model, self.tokens(model.words), batch, bos)


@dataclass(frozen=True)
class TaskMeasurement:
    """A task's items."""

    task: Task
    batch_size: int = 8
    bos: str | None = None

    @property
    def name(self) -> str:
        return self.task.name

    @property
    def encoder(self) -> bool:
        return self.task.kind is Pair

    @property
    def keep(self) -> int | None:
        return None

    @property
    def measures(self) -> tuple[str, ...]:
        if self.encoder:
            return (SPEARMAN,)
        return (ACCURACY, PERPLEXITY) if self.task.kind is Ending else (ACCURACY,)

    def what(self, spec: ModelSpec) -> dict[str, Any]:
        own = {"task": self.name, "items": len(self.task.items), "sha256": self.task.fingerprint()}
        return surrounding(spec) | own | {"batch": self.batch_size, "bos": self.bos}

    def batches(self, spec: ModelSpec) -> list[Sequence[Any]]:
        return list(answering.batches(self.task, self.batch_size))

    def run(self, model: Any, batch: Sequence[Any]) -> list[Record]:
        return answering.answer(model, self.task, batch, None if self.encoder else begin(model.words, self.bos))
