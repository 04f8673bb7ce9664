"""Laws of the tasks: what exactly a model is shown, what counts as right, and which files are refused."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fp8.errors import ConfigError, DataError
from fp8.evaluate import answering
from fp8.evaluate.tasks import Answer, Choice, Ending, Task, load_task
from fp8.evaluate.tasks.jsonl import number
from fp8.train import ByteTokenizer

DEV = (
    "question,choice0,choice1,choice2,choice3,answer\n"
    "One plus one?,1,2,3,4,1\n"
    '" Is ""x"" odd?",no,"yes, always",perhaps,never,3\n'
)
TEST = "question,choice0,choice1,choice2,choice3,answer\nTwo times two?,1,2,3,4,3\nThree minus one?,1,2,3,4,B\n"
OTHER = "What is a whale?,a fish,a mammal,a bird,a ship,B\n"  # no header, a letter: the files of hendrycks/test


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for kind, arithmetic in (("dev", DEV), ("test", TEST)):
        with zipfile.ZipFile(tmp_path / f"mmlu_{kind}.zip", "w") as files:
            files.writestr(f"mmlu/{kind}/elementary_arithmetic_{kind}.csv", arithmetic)
            files.writestr(f"mmlu/{kind}/whales_{kind}.csv", OTHER)
    lines(tmp_path / "lambada_test.jsonl", {"text": "The sea was calm,\nand so was Ahab"}, {"text": "a b"})
    reasoning = [{"question": f"How many is {i}?", "answer": f"It is {i}.\n#### 1,00{i}"} for i in range(7)]
    lines(tmp_path / "gsm8k_test.jsonl", *reasoning)
    (tmp_path / "stsb").mkdir()
    (tmp_path / "stsb" / "stsb-en-test.csv").write_text('"A man, here.",A man.,3.5\na,b,0\nc,c,5.0\n')
    return tmp_path


def test_an_mmlu_prompt_is_the_documented_one_byte_for_byte(data: Path) -> None:
    first = load_task("mmlu", data).items[0]
    assert isinstance(first, Choice)
    assert first.context == (
        "The following are multiple choice questions (with answers) about elementary arithmetic.\n"
        "\n"
        "One plus one?\n"
        "A. 1\n"
        "B. 2\n"
        "C. 3\n"
        "D. 4\n"
        "Answer: B\n"
        "\n"
        'Is "x" odd?\n'
        "A. no\n"
        "B. yes, always\n"
        "C. perhaps\n"
        "D. never\n"
        "Answer: D\n"
        "\n"
        "Two times two?\n"
        "A. 1\n"
        "B. 2\n"
        "C. 3\n"
        "D. 4\n"
        "Answer:"
    )
    assert first.choices == (" A", " B", " C", " D")
    assert (first.answer, first.by_length) == (3, False)


def test_mmlu_options_ask_for_the_text_of_an_option(data: Path) -> None:
    first = load_task("mmlu-options", data, shots=1).items[0]
    assert isinstance(first, Choice)
    assert first.context == (
        "The following are questions (with answers) about elementary arithmetic.\n\n"
        "Question: One plus one?\nAnswer: 2\n\nQuestion: Two times two?\nAnswer:"
    )
    assert first.choices == (" 1", " 2", " 3", " 4")
    assert first.by_length


def test_mmlu_takes_subjects_in_turn_and_reads_letters_and_numbers(data: Path) -> None:
    items = load_task("mmlu", data).items
    assert [item.id for item in items] == ["elementary_arithmetic/0", "whales/0", "elementary_arithmetic/1"]
    assert [item.answer for item in items if isinstance(item, Choice)] == [3, 1, 1]


def test_lambada_asks_for_the_last_word(data: Path) -> None:
    first, second = load_task("lambada", data).items
    assert first == Ending("0", "The sea was calm,\nand so was", " Ahab")
    assert second == Ending("1", "a", " b")


def test_gsm8k_shows_its_first_questions_as_examples_and_asks_the_others(data: Path) -> None:
    first, *others = load_task("gsm8k", data).items
    assert len(others) == 1
    assert isinstance(first, Answer)
    assert first.id == "5"
    assert first.prompt.startswith("Question: How many is 0?\nAnswer: It is 0.\n#### 1,000\n\nQuestion: How many is 1?")
    assert first.prompt.endswith("#### 1,004\n\nQuestion: How many is 5?\nAnswer:")
    assert (first.answer, first.stop) == ("1005", ("Question:",))
    assert len(load_task("gsm8k", data, shots=0).items) == 7
    lines(data / "gsm8k_train.jsonl", {"question": "Train?", "answer": "#### 1"})
    assert load_task("gsm8k", data, shots=1).items[0].prompt.startswith("Question: Train?")


@pytest.mark.parametrize(
    ("text", "told"),
    [("so 18.", "18"), ("#### 1,018\n", "1018"), ("it costs $5.50", "5.50"), ("-3 or -4", "-4"), ("none", "")],
)
def test_the_answer_is_the_last_number(text: str, told: str) -> None:
    assert number(text) == told


def test_a_limit_takes_the_first_items(data: Path) -> None:
    assert [item.id for item in load_task("lambada", data, limit=1).items] == ["0"]


def test_a_users_task_is_one_flag_in_either_form(tmp_path: Path) -> None:
    choices = lines(tmp_path / "a.jsonl", {"prompt": "2+2=", "choices": ["3", "4"], "answer": "4"},
                    {"prompt": "1+1=", "choices": ["2", "3"], "answer": 0, "id": "sum"})  # fmt: skip
    assert [(item.id, item.answer) for item in load_task(str(choices)).items] == [("0", 1), ("sum", 0)]
    answers = lines(tmp_path / "b.jsonl", {"prompt": "2+2=", "answer": 4, "max_tokens": 3})
    assert load_task(str(answers)).items == [Answer("0", "2+2=", "4", ("\n",), 3)]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "x"}], "line 1 lacks 'answer'"),
        ([[1]], "line 1 lacks 'answer'"),
        ([{"prompt": "x", "answer": 2, "choices": ["a", "b"]}], "one of at least two choices"),
        ([{"prompt": "x", "answer": "a"}, {"prompt": "x", "answer": "a", "choices": ["a", "b"]}], "either every line"),
        ([], "holds no items"),
    ],
)
def test_a_task_of_another_form_is_refused_by_line(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_task(str(lines(tmp_path / "a.jsonl", *rows)))


def test_missing_files_and_unknown_names_say_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Did you mean 'lambada'.*FILE\.jsonl"):
        load_task("lambda", tmp_path)
    with pytest.raises(ConfigError, match="by --data"):
        load_task("lambada")
    with pytest.raises(DataError, match=r"lambada_test\.jsonl, which is not in"):
        load_task("lambada", tmp_path)
    (tmp_path / "bad.jsonl").write_text("{\n")
    with pytest.raises(DataError, match="line 1: this is not JSON"):
        load_task(str(tmp_path / "bad.jsonl"))


class Parrot:
    """A model of bytes that finds its fixed text the likeliest, each next byte of it by a factor of e^9."""

    words, ends, vocab_size, max_positions, about = ByteTokenizer(), (256,), 257, 512, ""

    def __init__(self, text: str) -> None:
        self.follows = dict(zip(text.encode(), [*text.encode()[1:], 256], strict=True))
        self.rows: list[int] = []

    def logits(self, rows: Tensor) -> Tensor:
        self.rows.append(len(rows))
        out = torch.zeros(*rows.shape, 257)
        for i, row in enumerate(rows.tolist()):
            for j, token in enumerate(row):
                out[i, j, self.follows.get(token, 0)] = 9.0
        return out

    def go_on(self, tokens: Sequence[int], most: int) -> Iterator[int]:
        token = tokens[-1]
        for _ in range(most):
            token = self.follows.get(token, 256)
            if token == 256:
                return
            yield token


def test_the_likeliest_choice_is_chosen_and_letters_share_a_row() -> None:
    model = Parrot("x: B")
    items = [Choice("0", "x:", (" A", " B"), 1), Choice("1", "x:", (" A", " B"), 0)]
    told = answering.answer(model, Task("t", items), items)
    assert [(r["chosen"], r["correct"]) for r in told] == [(1, 1), (1, 0)]
    assert told[0]["chance"] == 0.5
    assert model.rows == [1]  # "x: " for all four
    assert told[0]["log_likelihoods"][1] == pytest.approx(-2 * 0.0312, rel=0.05)  # -2 log(1 + 256 e^-9)


def test_an_ending_is_right_only_if_every_token_is_the_likeliest() -> None:
    items = [Ending("0", "so was", " Ahab"), Ending("1", "so was", " Ahaz")]
    told = answering.answer(Parrot("s Ahb"), Task("t", items), items)  # "b" follows "h" : not greedy
    assert [r["correct"] for r in told] == [0, 0]
    told = answering.answer(Parrot("was Ahz"), Task("t", [items[0]]), [Ending("2", "wa", "s Ahz")])
    assert told[0]["correct"] == 1
    assert told[0]["tokens"] == 5


def test_blanks_before_the_seam_belong_to_the_continuation() -> None:
    model = Parrot("ab")
    assert answering.request(model, "a ", "b") == answering.request(model, "a", " b")
    assert answering.request(model, "", "b").context == (256,)
    with pytest.raises(DataError, match="nothing to score"):
        answering.request(model, "a", "")


def test_what_is_too_long_is_cut_on_the_left() -> None:
    model = Parrot("ab")
    asked = answering.request(model, "x" * 600 + "y", " b")
    assert len(asked.context) + len(asked.continuation) - 1 == model.max_positions
    assert asked.context[-1] == ord("y")
    begun = answering.request(model, "x" * 600 + "y", " b", bos=256)
    assert (begun.context[0], len(begun.context)) == (256, len(asked.context))
    with pytest.raises(DataError, match="the model is too short"):
        answering.request(model, "x", "b" * 513)


def test_rows_of_a_batch_do_not_feel_each_other() -> None:
    model = Parrot("call me")
    asked = [answering.request(model, "c" * n, "all") for n in (1, 9, 4)]
    assert answering.likelihoods(model, asked, 3) == [answering.likelihoods(model, [one], 1)[0] for one in asked]


def test_generation_ends_at_a_stop_string_which_is_left_out() -> None:
    model = Parrot("Answer: 42\nQ")
    assert answering.until(model, "A", ("\n",), 50) == "nswer: 42"
    assert answering.until(model, "A", (), 3) == "nsw"
    (told,) = answering.answer(model, Task("t", [item := Answer("0", "r", ": 42", ("\n",), 9)]), [item])
    assert told == {"id": "0", "correct": 1, "answer": ": 42", "text": ": 42"}


def test_a_line_ends_at_a_line_feed_and_nowhere_else(tmp_path: Path) -> None:
    rows = [{"prompt": f"a{end}b", "choices": ["x", "y"], "answer": 0} for end in "\u2028\u2029\x85"]
    (tmp_path / "own.jsonl").write_bytes("\r\n".join(json.dumps(r, ensure_ascii=False) for r in rows).encode())
    assert [item.context for item in load_task(str(tmp_path / "own.jsonl")).items] == [r["prompt"] for r in rows]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "a", "answer": "b", "stop": "END"}, "'stop' is a list of texts, not 'END'"),
        ({"prompt": "a", "answer": 1, "choices": [1, 2]}, r"'choices' is a list of texts, not \[1, 2\]"),
        ({"prompt": 7, "answer": "b"}, "'prompt' is a text, not 7"),
        ({"prompt": "a", "answer": "b", "id": "0"}, "item 1 has the id of item 0"),
    ],
)
def test_own_items_of_another_kind_are_refused(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    first = {"prompt": "a", "answer": "b"} | ({"choices": ["b", "c"]} if "choices" in row else {})
    with pytest.raises(DataError, match=said):
        load_task(str(lines(tmp_path / "own.jsonl", first, row)))


def test_text_that_is_no_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "own.jsonl").write_bytes(b'{"prompt": "\xff\xfe", "answer": ""}\n')
    with pytest.raises(DataError, match="UTF-8"):
        load_task(str(tmp_path / "own.jsonl"))
