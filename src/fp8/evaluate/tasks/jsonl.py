"""JSON Lines: reading them, and the tasks that come as them.

**LAMBADA** (Paperno et al., 2016; `lambada_test.jsonl`, OpenAI's version): {"text": a passage}. The context is all but
the last word, cut at blanks, and the ending is " " + that word, as lm-eval's `lambada_openai` has it: right where
greedy decoding gives each of its tokens, and its perplexity is exp of the mean over passages of the nats of the whole
word.

**GSM8K** (Cobbe et al., 2021; `gsm8k_test.jsonl`): {"question", "answer": reasoning, then "#### " and a number}. The
prompt is lm-eval's `gsm8k`: examples, then "Question: ...\\nAnswer:"; the examples (five, or `shots`) are the first of
`gsm8k_train.jsonl` where it lies beside the test file, and else the first of the test file itself, which are then not
asked. Generation ends at "Question:". The answer is the last number in what was generated, without commas, dollar
signs and a full stop at the end (lm-eval's filter `flexible-extract`), and is compared with the number after "####".

**A user's own**, any other file, each line of one of two forms:

    {"prompt": ..., "choices": [...], "answer": index or the choice itself}     by log-likelihood
    {"prompt": ..., "answer": ...}                                              generated, stops at a line's end, exact

A choice goes behind the prompt as it stands, so that the file decides about the blank between them. Generated text is
compared without blanks around it. Optional keys: "id", and "stop" (a list) and "max_tokens" for the second form.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ...errors import DataError
from ...train.tokens import decode
from .record import Answer, Choice, Ending, Task

Line = dict[str, Any]
NUMBER = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")  # lm-eval's
LEAST = {"question", "answer"}


def lines(path: Path, needed: set[str]) -> list[Line]:
    """The objects of a file. Raises `DataError`, naming the line, for one that is no object or lacks a key."""
    if not path.is_file():
        raise DataError(f"there is no file {path}.")
    found: list[Line] = []
    for i, text in enumerate(decode(path.read_bytes(), path).split("\n"), 1):  # no other end: strings may hold U+2028
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {i}: this is not JSON: {error}") from None
        if missing := sorted(needed - set(line if isinstance(line, dict) else ())):
            raise DataError(
                f"{path}, line {i} lacks {missing[0]!r}; each is an object with {' and '.join(sorted(needed))}."
            )
        found.append(line)
    if not found:
        raise DataError(f"{path} holds no items.")
    return found


def lambada(path: Path) -> Task:
    """LAMBADA's last words."""
    items = []
    for i, line in enumerate(lines(path, {"text"})):
        context, blank, word = line["text"].rpartition(" ")
        if not blank:
            raise DataError(f"{path}, item {i}: a passage of one word has no context: {line['text']!r}.")
        items.append(Ending(str(i), context, f" {word}"))
    return Task("lambada", items)


def gsm8k(path: Path, shots: int = 5) -> Task:
    """GSM8K, generated."""
    asked, train = lines(path, LEAST), path.with_name("gsm8k_train.jsonl")
    first = 0 if train.is_file() else shots
    examples = (lines(train, LEAST) if train.is_file() else asked)[:shots]
    before = "".join(f"Question: {line['question']}\nAnswer: {line['answer']}\n\n" for line in examples)
    items = [
        Answer(str(i), f"{before}Question: {line['question']}\nAnswer:", number(line["answer"].split("####")[-1]),
               ("Question:",), 320)
        for i, line in enumerate(asked)
        if i >= first
    ]  # fmt: skip
    if not items:
        raise DataError(f"{path} has {len(asked)} questions, and {shots} of them are the examples: use --shots 0.")
    return Task("gsm8k", items, found=number)


def number(text: str) -> str:
    """The last number in a text, as a plain string; "" where there is none.

    >>> number("so 2 * 9 = $1,018.")
    '1018'
    """
    found = ["".join(groups) for groups in NUMBER.findall(text)]
    return found[-1].replace(",", "").replace("$", "").removesuffix(".") if found else ""


def own(path: Path) -> Task:
    """A user's own task."""
    plain = lines(path, {"prompt", "answer"})
    check(path, plain)
    with_choices = ["choices" in line for line in plain]
    if all(with_choices):
        items = [choice(path, i, line) for i, line in enumerate(plain)]
        return Task(path.stem, items)
    if any(with_choices):
        raise DataError(f"{path}: either every line has 'choices' or none has; line {with_choices.index(False) + 1} "
                        "differs. Make two files of it.")  # fmt: skip
    return Task(path.stem, [answer(i, line) for i, line in enumerate(plain)])


def check(path: Path, plain: list[Line]) -> None:
    """Raise `DataError` for values of another kind, and for an id that two items have: models are paired by it."""
    first: dict[str, int] = {}
    for i, line in enumerate(plain):
        if not isinstance(line["prompt"], str):
            raise DataError(f"{path}, item {i}: 'prompt' is a text, not {line['prompt']!r}.")
        for key in ("choices", "stop"):
            value = line.get(key, [])
            if not isinstance(value, list) or not all(isinstance(one, str) and one for one in value):
                raise DataError(f"{path}, item {i}: {key!r} is a list of texts, not {value!r}.")
        if (taken := first.setdefault(str(line.get("id", i)), i)) != i:
            raise DataError(f"{path}, item {i} has the id of item {taken}: give each its own.")


def choice(path: Path, i: int, line: Line) -> Choice:
    choices, right = tuple(line["choices"]), line["answer"]
    right = choices.index(right) if right in choices else right
    if len(choices) < 2 or isinstance(right, bool) or not isinstance(right, int) or not 0 <= right < len(choices):
        raise DataError(f"{path}, item {i}: 'answer' {line['answer']!r} must be one of at least two choices "
                        f"{list(choices)}, or its index from 0.")  # fmt: skip
    return Choice(str(line.get("id", i)), line["prompt"], choices, right)


def answer(i: int, line: Line) -> Answer:
    stop, most = tuple(line.get("stop", ("\n",))), int(line.get("max_tokens", 64))
    return Answer(str(line.get("id", i)), line["prompt"], str(line["answer"]).strip(), stop, most)
