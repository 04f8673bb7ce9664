"""From records to figures: a model's value, what it loses against its base on the same items, and the verdict.

    kind         value                                     loss, positive where the model is worse
    perplexity   exp of the mean nats a token (or word)    percent of perplexity: 100 (exp(difference in nats) - 1)
    accuracy     percent of items that are right           percentage points
    spearman     100 times the rank correlation            hundredths of the correlation

`intervals.py` has the intervals, `verdict.py` the rule. Chance is a uniform distribution over the vocabulary for a
perplexity (`token_nats` is its loss), what a record says for an accuracy (one over the number of choices, else 0), and
0 for a correlation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .intervals import (
    Estimate,
    bootstrap_spearman,
    discordant,
    exactly_zero,
    mcnemar,
    paired_difference,
    proportion,
    ratio_mean,
)
from .perplexity import perplexity
from .verdict import beats_chance, verdict

Record = dict[str, Any]
PERPLEXITY, ACCURACY, SPEARMAN = "perplexity", "accuracy", "spearman"
UNITS = {PERPLEXITY: "%", ACCURACY: "points", SPEARMAN: "points"}


@dataclass(frozen=True)
class Figure:
    """One measure of one model. `loss` and `verdict` are None for the base itself.

    nats   of a perplexity: the mean in nats a token, and the paired difference to the base's
    p      of an accuracy: McNemar's, exact
    """

    measure: str
    value: Estimate
    loss: Estimate | None = None
    verdict: str | None = None
    nats: tuple[Estimate, Estimate | None] | None = None
    p: float | None = None

    def to_dict(self) -> dict[str, Any]:
        plain: dict[str, Any] = {"measure": self.measure, "value": self.value.to_dict()}
        if self.nats is not None:
            plain["nats"] = self.nats[0].to_dict()
        if self.loss is not None:
            plain |= {"loss": self.loss.to_dict(), "loss_unit": UNITS[self.measure], "verdict": self.verdict}
            plain |= {"mcnemar_p": self.p} if self.p is not None else {}
            if self.nats is not None and self.nats[1] is not None:
                plain["nats_difference"] = self.nats[1].to_dict()
        return plain


def figures(
    measures: Sequence[str], model: Sequence[Record], base: Sequence[Record] | None, token_nats: float, limit: float
) -> list[Figure]:
    """A model's figures, one for each measure, beside those of the base (None: it is the base)."""
    if base is not None:
        by_id = {record["id"]: record for record in base}
        base = [by_id[record["id"]] for record in model]
    return [FIGURES[measure](model, base, token_nats, limit) for measure in measures]


def of_perplexity(model: Sequence[Record], base: Sequence[Record] | None, token_nats: float, limit: float) -> Figure:
    in_order = "correct" not in model[0]  # windows of a text have neighbours, words of passages have none
    weights = [record["tokens"] if in_order else 1 for record in model]
    nats = ratio_mean([record["nll"] for record in model], weights, in_order=in_order)
    value = nats.map(perplexity)
    if base is None:
        return Figure(PERPLEXITY, value, nats=(nats, None))
    off = ratio_mean([m["nll"] - b["nll"] for m, b in zip(model, base, strict=True)], weights, in_order=in_order)
    known = ratio_mean([b["nll"] for b in base], weights, in_order=in_order)
    guessed = token_nats * sum(record["tokens"] for record in model) / sum(weights)
    loss = off.map(lambda d: 100 * (perplexity(d) - 1))
    told = verdict(loss, beats_chance(guessed - known.value, known.standard_error), limit)
    return Figure(PERPLEXITY, value, loss, told, (nats, off))


def of_accuracy(model: Sequence[Record], base: Sequence[Record] | None, token_nats: float, limit: float) -> Figure:
    right = [record["correct"] for record in model]
    value = proportion(right).map(percent)
    if base is None:
        return Figure(ACCURACY, value)
    before = [record["correct"] for record in base]
    loss = (exactly_zero(len(right)) if same(model, base) else paired_difference(before, right)).negated().map(percent)
    known, guessed = proportion(before), sum(record.get("chance", 0.0) for record in base) / len(base)
    told = verdict(loss, beats_chance(known.value - guessed, known.standard_error), limit)
    return Figure(ACCURACY, value, loss, told, p=mcnemar(*discordant(before, right)))


def of_spearman(model: Sequence[Record], base: Sequence[Record] | None, token_nats: float, limit: float) -> Figure:
    scores, cosines = ([record[key] for record in model] for key in ("score", "cosine"))
    value = bootstrap_spearman(scores, cosines).map(percent)
    if base is None:
        return Figure(SPEARMAN, value)
    before = [record["cosine"] for record in base]
    off = exactly_zero(len(scores)) if same(model, base) else bootstrap_spearman(scores, before, cosines)
    loss, known = off.negated().map(percent), bootstrap_spearman(scores, before)
    return Figure(SPEARMAN, value, loss, verdict(loss, beats_chance(known.value, known.standard_error), limit))


def percent(share: float) -> float:
    return 100 * share


def same(model: Sequence[Record], base: Sequence[Record]) -> bool:
    """Whether two models answered alike to the last bit. Records hold log-likelihoods (or the text), so that models
    which merely get the same items right are not taken for one."""
    return all(m == b for m, b in zip(model, base, strict=True))


FIGURES: dict[str, Callable[..., Figure]] = {
    PERPLEXITY: of_perplexity,
    ACCURACY: of_accuracy,
    SPEARMAN: of_spearman,
}
