"""The built-in byte-level tokenizer as the files that Hugging Face, and the servers that use its tokenizers, read.

257 tokens: token i < 256 is byte i, token 256 is `<|endoftext|>`. A `tokenizer.json` says the same as a byte-level BPE
without merges, whose letters stand for bytes: the printable ones of Latin-1 for themselves, all others, in order, for
the letters from U+0100 on (the convention of GPT-2). Our own loader sees the mark in `config.json` and needs no
tokenizer package.
"""

from __future__ import annotations

from typing import Any

END_OF_TEXT = "<|endoftext|>"
END_TOKEN = 256


def letters() -> dict[str, int]:
    """The letter that stands for each byte."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return {chr(byte if byte in printable else next(others)): byte for byte in range(256)}


def tokenizer_json() -> dict[str, Any]:
    """The content of `tokenizer.json`."""
    bytewise = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    end = {"id": END_TOKEN, "content": END_OF_TEXT, "single_word": False, "lstrip": False, "rstrip": False,
           "normalized": False, "special": True}  # fmt: skip
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
             "vocab": letters(), "merges": []}  # fmt: skip
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [end], "normalizer": None,
            "pre_tokenizer": bytewise, "post_processor": None, "decoder": bytewise, "model": model}  # fmt: skip


def tokenizer_config() -> dict[str, Any]:
    """The content of `tokenizer_config.json`."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }
