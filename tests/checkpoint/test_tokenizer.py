"""The built-in tokenizer as Hugging Face files: the same tokens, byte for byte."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp8 import checkpoint
from fp8.checkpoint import byte_tokenizer
from fp8.checkpoint.export import end_token, tokenizer_files, tokenizer_source
from fp8.errors import CheckpointError


def test_every_byte_has_a_letter_of_its_own():
    letters = byte_tokenizer.letters()
    assert sorted(letters.values()) == list(range(256)) and letters["A"] == 65 and letters["Ġ"] == 32


@given(st.text())
def test_a_tokenizer_json_of_bytes_gives_bytes(text):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(byte_tokenizer.tokenizer_json()))
    if "<|endoftext|>" not in text:
        assert tokenizer.encode(text).ids == list(text.encode())
        assert tokenizer.decode(list(text.encode())) == text


def test_the_end_of_text_is_token_256():
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(byte_tokenizer.tokenizer_json()))
    assert tokenizer.encode("Ahab<|endoftext|>").ids == [*b"Ahab", 256]
    assert end_token(tokenizer_files("bytes")) == 256


def test_a_tokenizer_file_is_copied_and_its_end_found(tmp_path):
    plain = json.dumps({"added_tokens": [{"id": 7, "content": "</s>"}], "model": {}})
    (tmp_path / "any_name.json").write_text(plain)
    files = tokenizer_files(tokenizer_source(tmp_path / "any_name.json"))
    assert files == {"tokenizer.json": plain.encode()} and end_token(files) == 7


def test_no_tokenizer_is_said_to_be_none(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert checkpoint.tokenizer_name(tmp_path) is None and checkpoint.end_of_text(tmp_path) == ()
    with pytest.raises(CheckpointError, match="there is no tokenizer at"):
        tokenizer_files(tokenizer_source(tmp_path / "missing.json"))
    with pytest.raises(CheckpointError, match="not a int"):
        tokenizer_source(3)
