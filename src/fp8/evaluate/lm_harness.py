"""Tasks of the package lm-eval (EleutherAI's harness), asked of our models, with our intervals and verdict.

`Harness` is a model as lm-eval wants it: likelihoods of continuations, of whole texts, and generation up to a stop
string; its own rules for tokenizing context and continuation are kept. `LmEvalMeasurement` runs one task and keeps what
lm-eval logs of every sample, so that differences are paired like those of the built-in tasks.

Nothing is downloaded: Hugging Face's libraries are told to stay offline before lm-eval is imported, so that a task runs
where its data set is in the local cache or the task's YAML names local files. A task is one batch: an interruption
loses the task that was running, and no other.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ConfigError, DataError
from .answering import Request, last, likelihoods, until
from .measurement import surrounding
from .measures import ACCURACY
from .subject import Causal, ModelSpec
from .windows import cut, score

Record = dict[str, Any]
METRICS = ("exact_match", "acc", "acc_norm")  # 0 or 1 a sample; the first that a task has counts
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")


def lm_eval() -> Any:
    """The package, or how to get it."""
    for name in OFFLINE:
        os.environ.setdefault(name, "1")
    try:
        import lm_eval as package
        import lm_eval.api.model
        import lm_eval.tasks
    except ImportError as error:
        raise ConfigError(f"--lm-eval needs the package lm-eval ({error}): pip install 'fp8[eval]'.") from None
    return package


def harness(model: Causal, batch: int = 1) -> Any:
    """The model, as lm-eval's `simple_evaluate(model=...)` takes it."""

    class Harness(lm_eval().api.model.TemplateLM):
        @property
        def eot_token_id(self) -> int:
            return end_token(model)

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return [int(token) for token in model.words.encode(string)]

        def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
            return scored(model, requests, batch)

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            return [whole_text(model, one.args[0]) for one in requests]

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            return [go_on(model, *one.args) for one in requests]

    return Harness()


def end_token(model: Causal) -> int:
    if not model.ends:
        raise DataError("this model names no end-of-text token, which lm-eval puts before a text without context.")
    return model.ends[0]


def scored(model: Causal, requests: Sequence[Any], batch: int) -> list[tuple[float, bool]]:
    """Likelihoods of tokenized requests: (strings, context, continuation), as lm-eval hands them over."""
    room = model.max_positions + 1
    asked = [Request(last((), tuple(c), room - len(e)), tuple(e)) for _, c, e in requests]
    return [(found.total, found.greedy) for found in likelihoods(model, asked, batch)]


def whole_text(model: Causal, text: str) -> float:
    """The log-likelihood of a text behind an end-of-text token, in windows that do not overlap, as lm-eval has it."""
    tokens = np.array([end_token(model), *map(int, model.words.encode(text))])
    windows = cut(len(tokens), model.max_positions, model.max_positions)
    return 0.0 - sum(record["nll"] for window in windows for record in score(model, tokens, [window]))


def go_on(model: Causal, prompt: str, settings: dict[str, Any]) -> str:
    """Greedy generation with lm-eval's settings. Raises `ConfigError` for a task that samples."""
    if settings.get("do_sample") and settings.get("temperature", 0):
        raise ConfigError("this lm-eval task samples its answers; here generation is greedy: set do_sample to false.")
    stop = settings.get("until") or ()
    most = int(settings.get("max_gen_toks", settings.get("max_tokens", 256)))
    return until(model, prompt, (stop,) if isinstance(stop, str) else tuple(stop), most)


@dataclass(frozen=True)
class LmEvalMeasurement:
    """One task of lm-eval, by name. `manager` is a TaskManager of your own, for tasks outside the package."""

    task: Any
    limit: int | None = None
    shots: int | None = None
    batch_size: int = 1
    manager: Any = None
    encoder: bool = False
    keep: int | None = None

    @property
    def name(self) -> str:
        return f"lm-eval {self.task if isinstance(self.task, str) else self.task['task']}"

    @property
    def measures(self) -> tuple[str, ...]:
        return (ACCURACY,)

    def what(self, spec: ModelSpec) -> dict[str, Any]:
        own = {"task": plain(self.task), "limit": self.limit, "shots": self.shots, "batch": self.batch_size}
        return surrounding(spec) | own | {"lm_eval": getattr(lm_eval(), "__version__", "")}

    def batches(self, spec: ModelSpec) -> list[Sequence[Any]]:
        return [(self.task,)]

    def run(self, model: Causal, batch: Sequence[Any]) -> list[Record]:
        asked = {"num_fewshot": self.shots, "limit": self.limit, "task_manager": self.manager, "bootstrap_iters": 0}
        try:
            told = lm_eval().simple_evaluate(harness(model, self.batch_size), tasks=list(batch), **asked)
        except (OSError, ConnectionError, KeyError) as error:
            raise DataError(f"lm-eval cannot run {self.name}; is its data set on disk? {error}") from None
        return records(told["samples"])


def records(samples: dict[str, list[dict[str, Any]]]) -> list[Record]:
    """One record a sample: right or not by the task's first filter, with lm-eval's own answers, and what guessing among
    them gets. Raises `DataError` for a task without a metric that is 0 or 1 a sample."""
    out = []
    for task, rows in samples.items():
        for row in rows:
            if row.get("filter") != rows[0].get("filter"):
                continue
            metric = next((name for name in METRICS if name in row), None)
            if metric is None:
                raise DataError(f"lm-eval {task} has none of {', '.join(METRICS)}, and cannot be paired by item.")
            answers, asked = plain(row.get("filtered_resps", [])), len(row.get("arguments", ()))
            chance = {"chance": 1 / asked} if asked > 1 else {}
            out.append({"id": f"{task}/{row['doc_id']}", "correct": int(row[metric]), "answers": answers} | chance)
    return out


def plain(value: Any) -> Any:
    """What JSON can hold."""
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
