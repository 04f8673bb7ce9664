"""Qwen3: Llama with an RMS norm on each head of q and of k, before the rotation. `rope_write` computes it."""

from __future__ import annotations

from .llama import Attention, LlamaBlock


class Qwen3Attention(Attention):
    head_norms = True


class Qwen3Block(LlamaBlock):
    attention_class = Qwen3Attention
