"""Greedy answers of the engine: many prompts, one model, one kind of cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...serve import Engine, EngineOptions, Request, SamplingParams
from .chunks import PAGE, pages_of


def answers(
    model: Any, prompts: Sequence[Sequence[int]], tokens: int, *, together: int = 64, graphs: bool = True
) -> list[list[int]]:
    """The likeliest `tokens` tokens after each prompt, in the order of the prompts; no token ends an answer.

    model      a served model with caches of one kind (`Cached`)
    together   sequences that run at once
    graphs     decode steps are CUDA graphs, on a GPU: worth capturing for many tokens
    """
    longest = max(len(prompt) for prompt in prompts) + tokens
    options = EngineOptions(
        page_size=PAGE, pages=together * pages_of(longest), max_running=together, prefix_caching=False,
        max_model_len=longest, graphs=graphs,
    )  # fmt: skip
    engine = Engine(model, options=options)
    greedy = SamplingParams(temperature=0, max_tokens=tokens)
    for i, prompt in enumerate(prompts):
        engine.add(Request(str(i), list(prompt), greedy))
    found: list[list[int]] = [[] for _ in prompts]
    while engine.has_work():
        for output in engine.step():
            found[int(output.id)] += output.new_tokens
    return found
