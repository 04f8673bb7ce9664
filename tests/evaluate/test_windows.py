"""Laws of a text's windows and of what is summed over them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fp8.errors import ConfigError, DataError, TensorError
from fp8.evaluate import validation_loss
from fp8.evaluate.ledger import Ledger
from fp8.evaluate.subject import ModelSpec, open_causal
from fp8.evaluate.windows import batches, cut, score

sizes = st.tuples(st.integers(2, 300), st.integers(1, 40), st.integers(1, 40)).filter(lambda s: s[2] <= s[1])


@given(sizes, st.booleans())
def test_each_token_is_scored_once_whatever_the_stride(size: tuple[int, int, int], bos: bool) -> None:
    tokens, window, stride = size
    found = cut(tokens, window, stride, bos=bos)
    scored = [target for w in found for target in range(w.scored, w.stop + 1)]
    assert scored == list(range(0 if bos else 1, tokens))


@given(sizes)
def test_a_scored_token_has_the_promised_context(size: tuple[int, int, int]) -> None:
    tokens, window, stride = size
    first, *others = cut(tokens, window, stride)
    assert first.start == 0
    for w in others:
        assert w.scored - w.start >= window - stride + 1
        assert w.stop - w.start <= window


@given(sizes, st.integers(1, 5))
def test_batches_are_the_windows_in_order_and_of_one_shape(size: tuple[int, int, int], rows: int) -> None:
    found = cut(*size)
    groups = list(batches(found, rows))
    assert [w for group in groups for w in group] == found
    assert all(len(group) <= rows and len({(w.stop - w.start, w.tokens) for w in group}) == 1 for group in groups)


def test_windows_that_do_not_overlap_give_the_plain_mean(llama: Path) -> None:
    model = open_causal(ModelSpec(llama))
    tokens = np.random.default_rng(0).integers(0, 257, 4 * 16 + 1)
    records = [r for batch in batches(cut(len(tokens), 16, 16), 2) for r in score(model, tokens, batch)]
    rows = torch.from_numpy(np.stack([tokens[i : i + 17] for i in range(0, 64, 16)]))
    plain = validation_loss(model.model, [rows])  # type: ignore[attr-defined]
    assert sum(r["nll"] for r in records) / sum(r["tokens"] for r in records) == pytest.approx(plain, rel=1e-6)


def test_more_context_is_what_a_smaller_stride_gives(llama: Path) -> None:
    """Each token's loss equals that of one pass over the whole text, cut to the same context."""
    model, tokens = open_causal(ModelSpec(llama)), np.arange(40)
    overlapping = [score(model, tokens, [w])[0] for w in cut(40, 16, 8)]
    window = cut(40, 16, 8)[1]
    logits = model.logits(torch.from_numpy(tokens[None, window.start : window.stop]))[0]
    losses = torch.nn.functional.cross_entropy(
        logits, torch.from_numpy(tokens[window.start + 1 : window.stop + 1]), reduction="none"
    )
    assert overlapping[1]["nll"] == pytest.approx(float(losses[-8:].sum()), rel=1e-6)


def test_a_begin_token_stands_before_every_window_and_is_not_scored(llama: Path) -> None:
    model, tokens = open_causal(ModelSpec(llama)), np.arange(20)
    told = [score(model, tokens, [w], bos=256)[0] for w in cut(20, 8, 8, bos=True)]
    assert [r["tokens"] for r in told] == [9, 8, 3]
    logits = model.logits(torch.tensor([[256, *range(8)]]))[0]
    assert told[0]["nll"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, torch.arange(9))) * 9)


def test_a_stride_beyond_the_window_and_a_text_without_tokens_are_refused() -> None:
    with pytest.raises(ConfigError, match="left out"):
        cut(100, 8, 9)
    with pytest.raises(DataError):
        cut(1, 8, 8)


def test_a_ledger_gives_back_whole_batches_and_cuts_what_a_kill_left(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, {"model": "m"})
    assert ledger.done() == []
    ledger.append([{"id": 0, "nll": 0.1}])
    ledger.append([{"id": 1, "nll": math.pi}, {"id": 2, "nll": 2.0}])
    whole = ledger.path.read_bytes()
    ledger.path.write_bytes(whole + b'[{"id": 3, "nl')
    assert Ledger(tmp_path, {"model": "m"}).done() == [
        [{"id": 0, "nll": 0.1}],
        [{"id": 1, "nll": math.pi}, {"id": 2, "nll": 2.0}],
    ]
    assert ledger.path.read_bytes() == whole
    assert Ledger(tmp_path, {"model": "other"}).done() == []
    assert Ledger(tmp_path, {"model": "m"}, fresh=True).done() == []


def test_a_model_that_gives_nan_is_refused_by_name(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, {"model": "broken"})
    with pytest.raises(TensorError, match="broken gave NaN"):
        ledger.append([{"id": 0, "nll": math.nan}])
    assert not ledger.path.exists()
