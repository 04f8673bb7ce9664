"""Text to tokens to batches; and every text that cannot be used."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fp8.errors import DataError
from fp8.train import ByteTokenizer, TrainConfig, moby_dick, tokenizer_of
from fp8.train import tokens as room
from fp8.train.tokenizer import pieces

Make = Callable[..., TrainConfig]


def test_the_text_that_ships() -> None:
    raw = moby_dick().read_bytes()
    assert hashlib.sha256(raw).hexdigest() == "fe282a57094ed62e7144fb7c804a9748fc1c909bf3b49d06e7276015f9f67240"
    assert (moby_dick().parent / "NOTICE").read_text().count("CC0") == 1


def test_bytes_there_and_back() -> None:
    text = "Ahab — 鯨\n<|endoftext|>next"
    tokens = ByteTokenizer().encode(text)
    assert tokens.max() == 256
    assert ByteTokenizer().decode(tokens.tolist()) == text


@pytest.fixture
def tokenizer_json(tmp_path: Path) -> Path:
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.WordLevel({"the": 0, "whale": 1, "?": 2}, unk_token="?")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def test_any_tokenizer_json(tokenizer_json: Path) -> None:
    for name in (tokenizer_json, tokenizer_json.parent):
        tokenizer = tokenizer_of(str(name))
        assert (tokenizer.vocab_size, tokenizer.end_of_text) == (4, 3)
        assert tokenizer.encode("the white whale<|endoftext|>").tolist() == [0, 2, 1, 3]


def test_long_texts_are_cut_behind_lines() -> None:
    text = "".join(f"line {i}\n" for i in range(100)) + "no end"
    parts = list(pieces(text, 50))
    assert "".join(parts) == text
    assert all(part.endswith("\n") for part in parts[:-1])


def test_tokenizers_missing_or_no_tokenizer(
    tmp_path: Path, tokenizer_json: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match="no tokenizer at"):
        tokenizer_of(str(tmp_path / "absent.json"))
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(DataError, match=r"is not a tokenizer\.json"):
        tokenizer_of(str(tmp_path / "bad.json"))
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(DataError, match=r"pip install 'fp8\[hf\]'"):
        tokenizer_of(str(tokenizer_json))


def test_the_last_twentieth_validates(make: Make, book: Path) -> None:
    config = make()
    found = room.load_tokens(config, ByteTokenizer())
    raw = book.read_bytes()
    assert bytes(found.train.astype(np.uint8)) + bytes(found.validation.astype(np.uint8)) == raw
    assert len(found.validation) == len(raw) // 20
    assert found.train.dtype == np.uint16
    assert isinstance(found.train, np.memmap)


def test_a_text_is_tokenized_once(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    first = room.load_tokens(make(), ByteTokenizer())
    monkeypatch.setattr(ByteTokenizer, "encode", None)
    assert room.load_tokens(make(), ByteTokenizer()).fingerprint == first.fingerprint


def test_a_validation_text_of_its_own(make: Make, tmp_path: Path, book: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("Queequeg " * 20)
    found = room.load_tokens(make(validation_text=str(other)), ByteTokenizer())
    assert (len(found.train), len(found.validation)) == (book.stat().st_size, 180)
    assert found.fingerprint != room.load_tokens(make(), ByteTokenizer()).fingerprint


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b" \n\n", "is empty"), (b"Call me\0Ishmael", "zero byte at 7"),
     ("caf\xe9 ".encode("latin-1") * 9, "not UTF-8 at byte 3"), ("Ahab —".encode()[:-1], "ends inside a character"),
     (b"short", "gives 5 tokens to train on, but sequence_length=16 needs at least 17"),
     (b"x" * 100, "gives 5 tokens to validate on")],
)  # fmt: skip
def test_a_text_that_cannot_be_used(content: bytes, message: str, make: Make, tmp_path: Path) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        room.load_tokens(make(text=str(path)), ByteTokenizer())
    assert str(path) in str(caught.value)


def test_a_text_that_is_not_there(make: Make, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read the text .*absent\.txt: No such file"):
        room.load_tokens(make(text=str(tmp_path / "absent.txt")), ByteTokenizer())
    with pytest.raises(DataError, match="is a folder"):
        room.load_tokens(make(text=str(tmp_path)), ByteTokenizer())


@pytest.mark.parametrize("damage", [lambda r: r[:-1], lambda r: r[:40], lambda r: b"", lambda r: b"x" + r])
def test_a_file_of_tokens_that_was_cut(damage: object, make: Make) -> None:
    config = make()
    room.load_tokens(config, ByteTokenizer())
    (file,) = (Path(config.out) / "tokens").glob("*.npy")
    file.write_bytes(damage(file.read_bytes()))  # type: ignore[operator]
    with pytest.raises(DataError, match="Delete that file"):
        room.load_tokens(config, ByteTokenizer())


def test_no_space_for_the_tokens(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(DataError, match=r"No space left on device. They need 0\.0 MB"):
        room.load_tokens(make(), ByteTokenizer())
    assert not list((Path(make().out) / "tokens").iterdir())


def test_a_batch_is_a_function_of_seed_and_step(make: Make) -> None:
    tokens = np.arange(1000, dtype=np.uint16)
    first = room.batches(tokens, make(), 7)
    room.batches(tokens, make(), 3)
    assert torch.equal(first[0], room.batches(tokens, make(), 7)[0])
    assert not torch.equal(first[0], room.batches(tokens, make(), 8)[0])
    assert not torch.equal(first[0], room.batches(tokens, make(seed=1), 7)[0])
    assert first[0].shape == (2, 17)
    assert torch.equal(first[0][:, 1:], first[0][:, :-1] + 1)


def test_the_sampler_is_fixed_for_all_time() -> None:
    """These numbers are Philox4x64's: if they change, no old run can be resumed."""
    assert room.offsets(seed=1, step=2, count=4, choices=1_000_000).tolist() == [
        290377, 299050, 196683, 583234,
    ]  # fmt: skip


def test_micro_batches_are_the_same_rows(make: Make) -> None:
    tokens = np.arange(1000, dtype=np.uint16)
    whole = room.batches(tokens, make(batch_size=8), 5)[0]
    parts = room.batches(tokens, make(batch_size=2, gradient_accumulation=4), 5)
    assert torch.equal(torch.cat(parts), whole)


def test_offsets_cover_the_text_and_stay_inside() -> None:
    starts = np.concatenate([room.offsets(0, step, 64, 10) for step in range(20)])
    assert set(starts.tolist()) == set(range(10))


def test_validation_rows_do_not_overlap(make: Make) -> None:
    tokens = np.arange(200, dtype=np.uint16)
    rows = torch.cat(list(room.validation_batches(tokens, make(eval_batches=100))))
    assert rows.shape == (12, 17)
    assert (rows[1:, 0] >= rows[:-1, 0] + 16).all()
    few = torch.cat(list(room.validation_batches(tokens, make(eval_batches=2))))
    assert few.shape == (4, 17)


def test_the_default_text_is_found() -> None:
    assert TrainConfig().text == "moby-dick"
    assert json.dumps(TrainConfig().to_dict())
