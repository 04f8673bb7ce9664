"""The same rows through vLLM and transformers, where they are installed: what `fp8 bench serve` stands beside.

Each runs in a process of its own, so that its memory is gone afterwards, on the same shape with random weights and the
same prompts. Neither tells of single steps, so a token's time is (seconds of the whole row - seconds of a row with one
token) / (tokens - 1), and the second of these is the prefill. One row to warm up, one measured.

A peer that is missing or fails gives a reason instead of figures, and the others go on.
"""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .serve import Row

Config = Mapping[str, Any]
Answer = Callable[[list[list[int]], int], Any]  # prompts and tokens of each answer, until all is done


def vllm(config: Config, rows: Sequence[Row], device: str, quantization: str | None, cache: str) -> dict[str, Any]:
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

        return timed(answer, rows, config["vocab_size"])


def transformers(config: Config, rows: Sequence[Row], device: str) -> dict[str, Any]:
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

    return timed(answer, rows, config["vocab_size"])


PEERS: dict[str, tuple[str, Callable[..., dict[str, Any]], tuple[Any, ...]]] = {
    "vLLM BF16": ("vllm", vllm, (None, "auto")),
    "vLLM FP8": ("vllm", vllm, ("fp8", "auto")),
    "vLLM FP8 + FP8 KV": ("vllm", vllm, ("fp8", "fp8")),
    "transformers BF16": ("transformers", transformers, ()),
}


def timed(answer: Answer, rows: Sequence[Row], vocabulary: int) -> dict[str, Any]:
    """Every row by the clock."""
    from .serve import requests

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

    if names is None:
        return {}
    arms: dict[str, Any] = {}
    for name in names or PEERS:
        package = PEERS[name][0] if name in PEERS else name
        why = None if name in PEERS else f"known are {', '.join(PEERS)}"
        if why is None and importlib.util.find_spec(package) is None:
            why = f"{package} is not installed"
        got = apart(name, config, rows, device) if why is None else why
        arms[name] = {"why_not": got} if isinstance(got, str) else {"rows": got}
        print(
            "\n".join([line(name, row, got[row.name]) for row in rows] if isinstance(got, dict) else [f"{name}: {got}"])
        )
    return arms


def apart(name: str, config: Config, rows: Sequence[Row], device: str) -> dict[str, Any] | str:
    """A peer in a process of its own: its figures, or why there are none."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    worker = context.Process(target=_child, args=(theirs, name, dict(config), list(rows), device))
    worker.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        worker.join()
        return f"its process ended with {worker.exitcode}"
    finally:
        worker.join()


def _child(pipe: Any, name: str, config: Config, rows: Sequence[Row], device: str) -> None:
    _, run_peer, more = PEERS[name]
    try:
        pipe.send(run_peer(config, rows, device, *more))
    except Exception as error:  # noqa: BLE001 - a peer that fails must not cost our own figures
        pipe.send(f"{type(error).__name__}: {error}"[:300])
