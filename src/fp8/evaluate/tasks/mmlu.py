"""MMLU (Hendrycks et al., "Measuring massive multitask language understanding", 2021): 57 subjects, four choices.

Files: `mmlu_test.zip` and `mmlu_dev.zip`, one CSV a subject, `<subject>_test.csv` and `<subject>_dev.csv`, with columns
question, four choices, answer; a header line may be there or not, the answer a letter or a number from 0.

Two ways to ask, both with the first five rows of the subject's dev file as examples, as lm-eval asks (its tasks
`mmlu_<subject>` and `mmlu_<subject>_continuation`, five-shot). `mmlu` scores the letter:

    The following are multiple choice questions (with answers) about abstract algebra.

    Find all c in Z_3 such that Z_3[x]/(x^2 + c) is a field.
    A. 0
    B. 1
    C. 2
    D. 3
    Answer: B

    ...
    Answer:          and the likeliest of " A", " B", " C", " D" is the answer

`mmlu-options` scores the text of each option: "The following are questions (with answers) about abstract algebra.",
"Question: ...", "Answer:", and the likeliest of " " + option, each log-likelihood divided by the option's length in
characters (lm-eval's `acc_norm`). A small model that has not learned letters tells more there.

Blanks around a question are dropped, the choices are as the file has them. The figure is the share over all questions,
each counting once, as lm-eval weights its subjects by size.

With a limit the questions are taken one from each subject in turn, so that few questions still ask about everything.
"""

from __future__ import annotations

import csv
import io
import zipfile
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path

from ...errors import DataError
from .record import Choice, Task

LETTERS = "ABCD"
Row = tuple[str, tuple[str, ...], int]
Ask = Callable[[Row], str]


def load(test: Path, dev: Path, shots: int = 5, *, options: bool = False) -> Task:
    """The task out of its two archives. Raises `DataError` for a file that is missing or not of this form."""
    asked, examples = subjects(test, "_test.csv"), subjects(dev, "_dev.csv") if shots else {}
    if lacking := sorted(set(asked) - set(examples)) if shots else []:
        raise DataError(f"{dev} has no {lacking[0]}_dev.csv to take examples from; or ask with --shots 0.")
    columns = []
    for name, rows in asked.items():
        before = preamble(name, examples.get(name, ())[:shots], options)
        columns.append([item(f"{name}/{i}", before, row, options) for i, row in enumerate(rows)])
    items = [one for turn in zip_longest(*columns) for one in turn if one is not None]
    return Task("mmlu-options" if options else "mmlu", items)


def preamble(subject: str, examples: list[Row] | tuple[Row, ...], options: bool) -> str:
    """All that stands before a question: what the subject is, and examples with their answers."""
    about = subject.replace("_", " ")
    what = "questions" if options else "multiple choice questions"
    head = f"The following are {what} (with answers) about {about}.\n\n"
    told = [f"{question(row, options)} {row[1][row[2]] if options else LETTERS[row[2]]}\n\n" for row in examples]
    return head + "".join(told)


def question(row: Row, options: bool) -> str:
    """One question, up to its "Answer:"."""
    if options:
        return f"Question: {row[0].strip()}\nAnswer:"
    listed = "".join(f"{letter}. {choice}\n" for letter, choice in zip(LETTERS, row[1], strict=True))
    return f"{row[0].strip()}\n{listed}Answer:"


def item(name: str, before: str, row: Row, options: bool) -> Choice:
    choices = row[1] if options else LETTERS
    return Choice(name, before + question(row, options), tuple(f" {c}" for c in choices), row[2], by_length=options)


def subjects(archive: Path, ending: str) -> dict[str, list[Row]]:
    """The rows of every subject, by its name, in alphabetical order."""
    try:
        with zipfile.ZipFile(archive) as files:
            names = sorted(name for name in files.namelist() if name.endswith(ending))
            found = {Path(n).name.removesuffix(ending): rows(files.read(n).decode(), f"{archive}: {n}") for n in names}
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{archive} cannot be read: {error}") from None
    if not found:
        raise DataError(f"{archive} holds no *{ending}: it should have one CSV a subject.")
    return found


def rows(text: str, where: str) -> list[Row]:
    """The rows of a CSV: question, choices, index of the answer."""
    found = []
    for i, cells in enumerate(csv.reader(io.StringIO(text))):
        if not cells or (i == 0 and [cell.lower() for cell in (cells[0], cells[-1])] == ["question", "answer"]):
            continue
        if len(cells) != 6 or cells[5].strip() not in ("0", "1", "2", "3", *LETTERS):
            raise DataError(f"{where}, row {i + 1}: needs a question, four choices and an answer (A to D, or 0 to 3).")
        answer = cells[5].strip()
        found.append((cells[0], tuple(cells[1:5]), LETTERS.index(answer) if answer in LETTERS else int(answer)))
    return found
