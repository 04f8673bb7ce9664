"""One Llama-family decoder, used by training and by serving; its Hugging Face names; generating text with it; and what
other architectures, which are only served, look like."""

from __future__ import annotations

from .architecture import Architecture
from .generate import Generation, Sampling, generate, stream, text_pieces
from .llama import Decoder, DecoderConfig
from .rope import Rope

__all__ = [
    "Architecture",
    "Decoder",
    "DecoderConfig",
    "Generation",
    "Rope",
    "Sampling",
    "generate",
    "stream",
    "text_pieces",
]
