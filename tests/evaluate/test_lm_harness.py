"""Laws of the adapter to lm-eval: its own part always, a task of lm-eval's where the package is installed."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from fp8.errors import ConfigError, DataError
from fp8.evaluate import lm_harness
from fp8.evaluate.answering import likelihoods, request
from fp8.evaluate.judge import judge, variants
from fp8.evaluate.subject import ModelSpec, open_causal
from fp8.evaluate.windows import cut, score

installed = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")


def test_likelihoods_are_those_of_the_built_in_tasks(llama: Path) -> None:
    model = open_causal(ModelSpec(llama))
    asked = request(model, "Call me", " Ishmael")
    told = lm_harness.scored(model, [(("Call me", " Ishmael"), list(asked.context), list(asked.continuation))], 1)
    assert told == [tuple(likelihoods(model, [asked])[0])]


def test_a_whole_text_is_scored_behind_an_end_of_text_token(llama: Path) -> None:
    model = open_causal(ModelSpec(llama))
    tokens = np.array([256, *b"Call me Ishmael."])
    (only,) = score(model, tokens, cut(len(tokens), 256, 256))
    assert lm_harness.whole_text(model, "Call me Ishmael.") == -only["nll"]
    assert lm_harness.whole_text(model, "x" * 300) < 0  # longer than the model


def test_generation_is_greedy_and_a_task_that_samples_is_refused(llama: Path) -> None:
    model = open_causal(ModelSpec(llama))
    text = lm_harness.go_on(model, "Call", {"until": ["\n"], "max_gen_toks": 5, "do_sample": False})
    assert model.words.encode(text).size <= 15
    with pytest.raises(ConfigError, match="samples its answers"):
        lm_harness.go_on(model, "Call", {"until": [], "do_sample": True, "temperature": 0.7})


def test_samples_become_records_of_the_first_filter_with_their_chance() -> None:
    row = {"doc_id": 3, "filter": "strict", "exact_match": 1.0, "filtered_resps": ["42"], "arguments": [("p", {})]}
    told = lm_harness.records({"t": [row, row | {"filter": "flexible", "exact_match": 0.0}]})
    assert told == [{"id": "t/3", "correct": 1, "answers": ["42"]}]
    choice = {"doc_id": 0, "filter": "none", "acc": 0.0, "filtered_resps": [(-1.0, False)] * 4, "arguments": [1] * 4}
    assert lm_harness.records({"t": [choice]})[0]["chance"] == 0.25
    with pytest.raises(DataError, match="cannot be paired"):
        lm_harness.records({"t": [{"doc_id": 0, "bleu": 0.3}]})


def test_without_lm_eval_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"pip install 'fp8\[eval\]'"):
        lm_harness.lm_eval()


@installed
@pytest.mark.filterwarnings("ignore")
def test_a_task_of_lm_evals_runs_on_local_files(llama: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"q": f"{i} or", "c": ["a", "b"], "a": i % 2}) + "\n" for i in range(4)))
    task = {
        "task": "letters", "dataset_path": "json", "output_type": "multiple_choice", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(data)}}, "doc_to_text": "{{q}}", "doc_to_choice": "{{c}}",
        "doc_to_target": "a", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    base = ModelSpec(llama)
    told = judge([base, *variants(base, ["dynamic"])], [lm_harness.LmEvalMeasurement(task)], out=tmp_path / "out")
    assert [len(outcome.records) for outcome in told.outcomes] == [4, 4]
    assert told.outcomes[0].records[0]["chance"] == 0.5
    assert told.outcomes[1].figures[0].verdict == "uninformative"


def test_a_continuation_that_fills_the_model_is_refused_and_not_run_too_long(llama: Path) -> None:
    model = open_causal(ModelSpec(llama))
    full = [1] * model.max_positions
    assert len(lm_harness.scored(model, [(None, [1, 2, 3], full)], 1)) == 1
    with pytest.raises(DataError, match="too short"):
        lm_harness.scored(model, [(None, [1, 2, 3], [*full, 1])], 1)
