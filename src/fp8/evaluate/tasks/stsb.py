"""STS-B (Cer et al., SemEval-2017 task 1): pairs of sentences, a score by people from 0 to 5.

File: `stsb-en-test.csv`, three columns: sentence, sentence, score, no header. A model's answer is the cosine of its two
sentence vectors, each the mean of the last hidden states over the sentence's tokens; the figure is Spearman's rank
correlation of cosines and scores.
"""

from __future__ import annotations

import csv
from pathlib import Path

from ...errors import DataError
from .record import Pair, Task


def load(path: Path) -> Task:
    """The pairs of a file. Raises `DataError` for a row that has no two sentences and a number."""
    if not path.is_file():
        raise DataError(f"there is no file {path}.")
    items = []
    with path.open(encoding="utf-8", newline="") as file:
        for i, row in enumerate(csv.reader(file)):
            try:
                first, second, score = row
                items.append(Pair(str(i), first, second, float(score)))
            except ValueError:
                raise DataError(f"{path}, row {i + 1}: needs two sentences and a score, got {row!r}.") from None
    if len(items) < 3:
        raise DataError(f"{path} has {len(items)} pairs; a rank correlation needs at least 3.")
    return Task("stsb", items)
