"""Tasks, read from public files that a user has on disk. Nothing is downloaded.

    name           file in the folder of `--data`                      asks for
    lambada        lambada_test.jsonl                                  the last word of a passage
    mmlu           mmlu_test.zip, mmlu_dev.zip                         the letter of an option, after 5 examples
    mmlu-options   the same                                            the text of an option, after 5 examples
    gsm8k          gsm8k_test.jsonl, and gsm8k_train.jsonl if there    a number, reasoned towards
    stsb           stsb-en-test.csv, or stsb/stsb-en-test.csv          how alike two sentences are (encoders)
    FILE.jsonl     the file itself                                     a user's own

Each loader's file says what exactly the model is shown.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ...errors import ConfigError, DataError, suggest
from . import jsonl, mmlu, stsb
from .record import Answer, Choice, Ending, Item, Pair, Task

__all__ = ["TASKS", "Answer", "Choice", "Ending", "Item", "Pair", "Task", "load_task"]

TASKS = ("lambada", "mmlu", "mmlu-options", "gsm8k", "stsb")
SHOTS = 5


def load_task(name: str, data: Path | None = None, *, shots: int | None = None, limit: int | None = None) -> Task:
    """A task by name, from the folder `data`, or a file of the user's own; at most the first `limit` items.

    Raises `ConfigError` for a name that is unknown, `DataError` for a file that is missing or of another form.
    """
    task = load(name, data, SHOTS if shots is None else shots)
    return task if limit is None else replace(task, items=task.items[:limit])


def load(name: str, data: Path | None, shots: int) -> Task:
    if name.endswith(".jsonl"):
        return jsonl.own(Path(name).expanduser())
    if name not in TASKS:
        raise ConfigError(f"there is no task {name!r}. {suggest(name, (*TASKS, 'FILE.jsonl'))}")
    if data is None:
        raise ConfigError(f"task {name} reads {FILES[name][0]}: name the folder that holds it by --data.")
    if name == "lambada":
        return jsonl.lambada(found(data, name, 0))
    if name == "gsm8k":
        return jsonl.gsm8k(found(data, name, 0), shots)
    if name == "stsb":
        return stsb.load(found(data, name, 0))
    dev = found(data, name, 1) if shots else data / FILES[name][1]
    return mmlu.load(found(data, name, 0), dev, shots, options=name == "mmlu-options")


FILES = {
    "lambada": ("lambada_test.jsonl",),
    "mmlu": ("mmlu_test.zip", "mmlu_dev.zip"),
    "mmlu-options": ("mmlu_test.zip", "mmlu_dev.zip"),
    "gsm8k": ("gsm8k_test.jsonl",),
    "stsb": ("stsb-en-test.csv",),
}


def found(data: Path, name: str, which: int) -> Path:
    """A task's file in the folder, or in the folder of the task's name within it."""
    file = FILES[name][which]
    for path in (data / file, data / name / file):
        if path.is_file():
            return path
    raise DataError(f"task {name} reads {file}, which is not in {data}.")
