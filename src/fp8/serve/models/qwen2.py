"""Qwen2 and Qwen2.5: Llama with biases on q, k and v."""

from __future__ import annotations

from .llama import Attention, LlamaBlock


class Qwen2Attention(Attention):
    qkv_bias = True


class Qwen2Block(LlamaBlock):
    attention_class = Qwen2Attention
