"""The serving engine: from requests to tokens, in FP8 from the weights to the cache.

    params.py, request.py       what may be asked, and what is answered
    sequence.py, pages.py, scheduler.py   who computes what in a step, over which pages; the host alone
    batch.py, inputs.py         that step as tensors
    models/                     what computes it
    sampler.py, text.py, tokenizer.py     from logits to tokens to text
    graphs.py                   a decode step as one CUDA graph
    forward.py                  a step on the device, launched or replayed, and the memory that is left to a cache
    engine.py                   all of it, a step at a time
    llm.py, command.py          the doors: `fp8.LLM`, `fp8 generate`, `fp8 chat`
    http/                       the door for everybody else: `fp8 serve`

Read `engine.py` first, then `scheduler.py`.
"""

from __future__ import annotations

from .batch import Batch
from .engine import Engine
from .llm import LLM, CompletionOutput, RequestOutput
from .params import EngineOptions, SamplingParams
from .request import EngineStats, Logprob, Output, Request

__all__ = [
    "LLM",
    "Batch",
    "CompletionOutput",
    "Engine",
    "EngineOptions",
    "EngineStats",
    "Logprob",
    "Output",
    "Request",
    "RequestOutput",
    "SamplingParams",
]
