"""A tiny Llama in a folder, with the byte tokenizer, and a text: what an evaluation needs, in a second."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fp8.checkpoint.tensorfile import write_json, write_tensors
from fp8.models import Decoder, DecoderConfig
from fp8.models.huggingface import to_config, to_huggingface

CONFIG = DecoderConfig(257, 64, 128, 2, 4, 2, max_positions=256)
TEXT = "Call me Ishmael. Some years ago, never mind how long precisely, I went to sea. " * 4


def write_llama(folder: Path, seed: int = 0) -> Path:
    """A Hugging Face Llama with random weights that BF16 holds exactly."""
    torch.manual_seed(seed)
    model = Decoder(CONFIG)
    state = {name: weight.to(torch.bfloat16) for name, weight in model.state_dict().items()}
    folder.mkdir(parents=True)
    write_tensors(folder / "model.safetensors", to_huggingface(state, CONFIG))
    plain = to_config(CONFIG, torch.bfloat16, end_of_text=256)
    write_json(folder / "config.json", plain | {"fp8": {"tokenizer": "bytes"}})
    return folder


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path
