"""`fp8 generate`: text from a folder, and clear errors."""

from __future__ import annotations

import pytest
import torch

import fp8.nn
from fp8 import checkpoint
from fp8.cli import main
from fp8.models import Decoder, DecoderConfig


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(257, 32, 48, 1, 2, 1, max_positions=64))
    fp8.nn.convert(model, "rowwise")
    checkpoint.save(model, tmp_path / "out", "bytes")
    return tmp_path / "out"


def run(capsys, *argv):
    with pytest.raises(SystemExit) as left:
        main(["generate", *map(str, argv)])
    out, err = capsys.readouterr()
    return left.value.code, out, err


def test_text_goes_on_from_the_prompt_and_repeats(folder, capsys):
    options = (folder, "--prompt", "Ahab", "--max-tokens", 9, "--temperature", 1, "--seed", 4, "--device", "cpu")
    code, text, _ = run(capsys, *options)
    assert code == 0 and text.startswith("Ahab") and len(text) > 6
    assert run(capsys, *options)[1] == text


def test_errors_are_one_line(folder, capsys):
    code, _, err = run(capsys, folder / "nowhere")
    assert code == 2 and "there is no config.json" in err
    code, _, err = run(capsys, folder, "--kv-cache-dtype", "fp9", "--device", "cpu")
    assert code == 2 and "Did you mean 'fp8'" in err
    code, _, err = run(capsys, folder, "--device", "cpu", "--prompt", "x" * 64)
    assert code == 2 and "64 tokens" in err
    checkpoint.save(checkpoint.load(folder), folder.with_name("mute"))
    code, _, err = run(capsys, folder.with_name("mute"), "--device", "cpu")
    assert code == 2 and "--tokenizer" in err
