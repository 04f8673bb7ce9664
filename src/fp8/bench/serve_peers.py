"""The same rows through vLLM and transformers, where they are installed: what `fp8 bench serve` stands beside.

Each runs in a process of its own, so that its memory is gone afterwards, on the same shape with random weights and the
same prompts. Neither tells of single steps, so a token's time is (seconds of the whole row - seconds of a row with one
token) / (tokens - 1), and the second of these is the prefill. One row to warm up, one measured.

A peer that is missing or fails gives a reason instead of figures, and the others go on.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import BackendError
from .apart import apart
from .serve_row import Row, requests

Config = Mapping[str, Any]
Answer = Callable[[list[list[int]], int], Any]  # prompts and tokens of each answer, until all is done


def vllm(
    config: Config, rows: Sequence[Row], device: str, quantization: str | None, cache: str
) -> Iterator[dict[str, Any]]:
    """vLLM with weights of its own `dummy` loader."""
    import vllm as peer  # type: ignore[import-not-found]

    longest = max(row.longest for row in rows)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(dict(config)))
        llm = peer.LLM(
            model=folder, load_format="dummy", skip_tokenizer_init=True, quantization=quantization,
            kv_cache_dtype=cache, max_model_len=longest + 1, enable_prefix_caching=False, gpu_memory_utilization=0.92,
        )  # fmt: skip

        def answer(prompts: list[list[int]], tokens: int) -> Any:
            params = peer.SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
            return llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)

        yield timed(answer, rows, config["vocab_size"])


def transformers(config: Config, rows: Sequence[Row], device: str) -> Iterator[dict[str, Any]]:
    """transformers' `generate` in BF16, with its default attention and cache."""
    import transformers as peer

    torch.manual_seed(0)
    described = peer.AutoConfig.for_model(**config)
    with torch.device(device):
        model = peer.AutoModelForCausalLM.from_config(described, dtype=torch.bfloat16).eval()

    def answer(prompts: list[list[int]], tokens: int) -> Any:
        ids = torch.tensor(prompts, device=device)
        with torch.no_grad():
            done = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens,
                pad_token_id=0,
            )  # fmt: skip
        return done.cpu()

    yield timed(answer, rows, config["vocab_size"])


PEERS: dict[str, tuple[str, Callable[..., Iterator[dict[str, Any]]], tuple[Any, ...]]] = {
    "vLLM BF16": ("vllm", vllm, (None, "auto")),
    "vLLM FP8": ("vllm", vllm, ("fp8", "auto")),
    "vLLM FP8 + FP8 KV": ("vllm", vllm, ("fp8", "fp8")),
    "transformers BF16": ("transformers", transformers, ()),
}


def timed(answer: Answer, rows: Sequence[Row], vocabulary: int) -> dict[str, Any]:
    """Every row by the clock."""
    found = {}
    for row in rows:
        prompts = [request.prompt for request in requests(row, vocabulary)]
        try:
            answer(prompts, 4)
            first, whole = (_seconds(answer, prompts, tokens) for tokens in (1, row.tokens))
        except torch.OutOfMemoryError as error:
            found[row.name] = {"why_not": str(error).splitlines()[0]}
            continue
        token = (whole - first) / (row.tokens - 1)
        once = {"p50": token, "p99": token}
        found[row.name] = {"itl": once, "ttft": {"p50": first}, "prefill_seconds": first, "e2e": {"p50": whole},
                           "tokens_per_second": row.batch / token}  # fmt: skip
    return found


def _seconds(answer: Answer, prompts: list[list[int]], tokens: int) -> float:
    start = time.perf_counter()
    answer(prompts, tokens)
    return time.perf_counter() - start


def run(names: Sequence[str] | None, config: Config, rows: Sequence[Row], device: str) -> dict[str, Any]:
    """The peers by name: None: none; empty: all that are installed. Arms as those of `serve.py`."""
    from .serve import line

    arms: dict[str, Any] = {}
    for name in [] if names is None else names or PEERS:
        arms[name] = found = figures(name, config, rows, device)
        told = [line(name, row, found["rows"][row.name]) for row in rows] if "rows" in found else [found["why_not"]]
        print("\n".join(told if "rows" in found else [f"{name}: {told[0]}"]), flush=True)
    return arms


def figures(name: str, config: Config, rows: Sequence[Row], device: str) -> dict[str, Any]:
    """{"rows": ...} of a peer, or {"why_not": ...}."""
    if name not in PEERS:
        return {"why_not": f"known are {', '.join(PEERS)}"}
    package, run_peer, more = PEERS[name]
    if importlib.util.find_spec(package) is None:
        return {"why_not": f"{package} is not installed"}
    try:
        (found,) = apart(run_peer, dict(config), list(rows), device, *more)
    except BackendError as error:
        return {"why_not": str(error)}
    return {"rows": found}
