"""FP8 checkpoints in the `compressed-tensors` format, which vLLM, SGLang and Hugging Face read:
`save` and `load` for decoders of ours; `quantize_folder`, `convert_folder`, `lint`, `verify` for the folders of anyone.

What a training run needs to go on is another file, and the trainer's: `train/`.
"""

from __future__ import annotations

from .convert import Converted, convert_folder
from .export import Saved, encode, save
from .frozen import frozen_model
from .lint import Report, lint
from .load import end_of_text, load, tokenizer_name
from .quantize import Options, Scales, Written, quantize_folder
from .verify import Verdict, verify

__all__ = [
    "Converted",
    "Options",
    "Report",
    "Saved",
    "Scales",
    "Verdict",
    "Written",
    "convert_folder",
    "encode",
    "end_of_text",
    "frozen_model",
    "lint",
    "load",
    "quantize_folder",
    "save",
    "tokenizer_name",
    "verify",
]
