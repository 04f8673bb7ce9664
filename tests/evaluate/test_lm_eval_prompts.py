"""Our prompts and scores are those of lm-eval's own task files, byte for byte. Runs where lm-eval is installed."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from fp8.evaluate import answering, lm_harness
from fp8.evaluate.subject import ModelSpec, open_causal
from fp8.evaluate.tasks import load_task

lm_eval = pytest.importorskip("lm_eval")
yaml = pytest.importorskip("yaml")
pytestmark = pytest.mark.filterwarnings("ignore")

ROWS = [("One plus one?", ["1", "2", "3", "4"], 1), ("A whale?", ["fish", "big, a mammal", "bird", "ship"], 1)]
MMLU = {
    "mmlu": ("mmlu/default/_default_template_yaml", "mmlu/default/mmlu_abstract_algebra.yaml"),
    "mmlu-options": ("mmlu/continuation/_continuation_template_yaml", "mmlu/continuation/mmlu_abstract_algebra.yaml"),
}


def template(*names: str) -> dict[str, Any]:
    folder, plain = Path(lm_eval.__file__).parent / "tasks", {}
    for name in names:
        plain |= yaml.safe_load((folder / name).read_text())
    return plain


def asked(model: Any, task: dict[str, Any], name: str, shots: int, **files: Path) -> list[dict[str, Any]]:
    """What lm-eval asks of a local file, and how it scores the answers."""
    own = {"task": name, "dataset_path": "json", "num_fewshot": shots, "fewshot_config": {"sampler": "first_n"}}
    dropped = ("include", "dataset_name", "tag")
    data = {"dataset_kwargs": {"data_files": {split: str(path) for split, path in files.items()}}}
    local = {key: value for key, value in task.items() if key not in dropped} | own | data
    harness = lm_harness.harness(model, 4)
    told = lm_eval.simple_evaluate(harness, tasks=[local], bootstrap_iters=0)["samples"][name]
    return [row for row in told if row["filter"] in ("none", "flexible-extract")]


def strings(row: dict[str, Any]) -> list[tuple[str, Any]]:
    return [tuple(a.values()) if isinstance(a, dict) else tuple(a) for a in _values(row["arguments"])]


def _values(arguments: Any) -> list[Any]:
    return list(arguments.values()) if isinstance(arguments, dict) else list(arguments)


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", MMLU)
def test_mmlu_is_lm_evals(name: str, llama: Path, tmp_path: Path) -> None:
    model = open_causal(ModelSpec(llama))
    text = "".join(f"{q},{','.join(json.dumps(c) for c in choices)},{a}\n" for q, choices, a in ROWS)
    for kind in ("dev", "test"):
        with zipfile.ZipFile(tmp_path / f"mmlu_{kind}.zip", "w") as files:
            files.writestr(f"abstract_algebra_{kind}.csv", text)
    rows = lines(tmp_path / "rows.jsonl", [{"question": q, "choices": c, "answer": a} for q, c, a in ROWS])
    theirs = asked(model, template(*MMLU[name]), name, 2, test=rows, dev=rows)
    items: Any = load_task(name, tmp_path, shots=2).items
    for row, item, record in zip(theirs, items, answering.choices(model, items, None), strict=True):
        assert strings(row) == [(item.context, choice) for choice in item.choices]
        assert row["acc_norm" if item.by_length else "acc"] == record["correct"]


def test_lambada_is_lm_evals(llama: Path, tmp_path: Path) -> None:
    model = open_causal(ModelSpec(llama))
    path = lines(tmp_path / "lambada_test.jsonl", [{"text": "The sea was calm,\nand so was Ahab"}, {"text": "a b c"}])
    theirs = asked(model, template("lambada/lambada_openai.yaml"), "lambada", 0, test=path)
    items: Any = load_task("lambada", tmp_path).items
    for row, item, record in zip(theirs, items, answering.endings(model, items, None), strict=True):
        assert strings(row) == [(item.context, item.ending)]
        assert row["acc"] == record["correct"]
        assert row["perplexity"] == pytest.approx(-record["nll"], rel=1e-5)


def test_gsm8k_is_lm_evals(llama: Path, tmp_path: Path) -> None:
    model = open_causal(ModelSpec(llama))
    rows = [{"question": f"How many is {i}?", "answer": f"It is {i}.\n#### 1,00{i}"} for i in range(3)]
    path = lines(tmp_path / "gsm8k_test.jsonl", rows)
    lines(tmp_path / "gsm8k_train.jsonl", rows)
    task = template("gsm8k/gsm8k.yaml")
    task["generation_kwargs"]["max_gen_toks"] = 4
    theirs = asked(model, task, "gsm8k", 2, test=path, train=path)
    for row, item in zip(theirs, load_task("gsm8k", tmp_path, shots=2).items, strict=True):
        ((prompt, settings),) = strings(row)
        assert prompt == item.prompt  # type: ignore[union-attr]
        assert settings["until"][0] == "Question:"
