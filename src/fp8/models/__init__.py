"""One Llama-family decoder, used by training and by serving; its Hugging Face names; generating text with it."""

from __future__ import annotations

from .generate import Generation, Sampling, generate, stream, text_pieces
from .llama import Decoder, DecoderConfig

__all__ = ["Decoder", "DecoderConfig", "Generation", "Sampling", "generate", "stream", "text_pieces"]
