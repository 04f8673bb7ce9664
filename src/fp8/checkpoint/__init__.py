"""FP8 checkpoints in the `compressed-tensors` format, which vLLM, SGLang and Hugging Face read: `save` and `load`.

What a training run needs to go on is another file, and the trainer's: `train/`.
"""

from __future__ import annotations

from .export import Saved, encode, save
from .load import end_of_text, load, tokenizer_name

__all__ = ["Saved", "encode", "end_of_text", "load", "save", "tokenizer_name"]
