"""`fp8.LLM`: an engine for scripts, in vLLM's words. A script written for vLLM runs with one import changed.

What is not here is refused by name, not ignored. Differences that a reader of vLLM's manual may notice:
`kv_cache_dtype` is "fp8" unless told otherwise ("auto", the model's own type, is BF16), with the checkpoint's scales
or, where it has none, a scale a token and head; and a request whose logits are not finite ends alone, with
finish_reason="error".
"""

from __future__ import annotations

import itertools
import operator
import re
import time
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from ..checkpoint.tensorfile import read_json
from ..errors import ConfigError, RequestError, suggest
from .engine import Engine
from .models import load_model
from .params import EngineOptions, SamplingParams
from .request import Output, Request, TokenLogprobs
from .tokenizer import Message, Tokenizer, read_tokenizer

Prompt = str | Sequence[int] | Mapping[str, Any]  # a text, tokens, {"prompt": text} or {"prompt_token_ids": tokens}
CACHES = {"auto": "bf16", "bfloat16": "bf16", "bf16": "bf16", "fp8": "fp8", "fp8_e4m3": "e4m3", "e4m3": "e4m3"}
CACHES |= {"fp8_e5m2": "e5m2", "e5m2": "e5m2"}
ONLY = {  # arguments of vLLM's that may ask for what is so anyway
    "tensor_parallel_size": (1,), "pipeline_parallel_size": (1,), "dtype": ("auto", "bfloat16"),
    "trust_remote_code": (False,), "enable_chunked_prefill": (True, None), "tokenizer_mode": ("auto",),
    "load_format": ("auto", "safetensors"),
}  # fmt: skip
WORDS = {  # vLLM's, for those of `EngineOptions`
    "block_size": "page_size", "gpu_memory_utilization": "memory_fraction", "max_num_seqs": "max_running",
    "num_gpu_blocks_override": "pages", "max_num_batched_tokens": "max_step_tokens",
    "enable_prefix_caching": "prefix_caching",
}  # fmt: skip
SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass
class CompletionOutput:
    """One text of a prompt. `cumulative_logprob` and `logprobs` are there if they were asked for."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: str | None = None

    def add(self, output: Output) -> None:
        """Take what one step brought."""
        self.text += output.new_text
        self.token_ids += output.new_tokens
        self.finish_reason, self.stop_reason, self.error = output.finished, output.stop_reason, output.error
        if output.logprobs is not None:
            self.logprobs = (self.logprobs or []) + output.logprobs
            came = zip(output.new_tokens, output.logprobs, strict=True)
            self.cumulative_logprob = (self.cumulative_logprob or 0.0) + sum(lp[token].logprob for token, lp in came)


@dataclass
class RequestOutput:
    """A prompt and its texts; `prompt` is None where tokens were given."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_cached_tokens: int = 0
    finished: bool = True


class LLM:
    """A model that answers.

    model            the folder of a checkpoint: BF16, or FP8 as `fp8 quantize` and others write it
    tokenizer        a folder to read it from instead, or "bytes"
    quantization     None, or the file's own method by name: as the file says; "fp8": quantize a BF16 checkpoint while
                     it is loaded
    kv_cache_dtype   "fp8" (E4M3), "fp8_e5m2", or "auto" (BF16)
    max_model_len, max_num_seqs, max_num_batched_tokens, gpu_memory_utilization, enable_prefix_caching, block_size,
    num_gpu_blocks_override, enforce_eager
                     vLLM's names of what `EngineOptions` says
    deterministic    results that do not depend on the company, on a GPU too
    device           None: the first GPU where there is one

    Raises `CheckpointError`, `ConfigError`.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        tokenizer: str | Path | None = None,
        quantization: str | None = None,
        kv_cache_dtype: str = "fp8",
        max_model_len: int | None = None,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int = 16384,
        gpu_memory_utilization: float = 0.9,
        enable_prefix_caching: bool = True,
        block_size: int = 64,
        num_gpu_blocks_override: int | None = None,
        enforce_eager: bool = False,
        deterministic: bool = False,
        device: torch.device | str | None = None,
        **others: Any,
    ) -> None:
        refuse(others)
        if kv_cache_dtype not in CACHES:
            raise ConfigError(f"kv_cache_dtype cannot be {kv_cache_dtype!r}. {suggest(kv_cache_dtype, CACHES)}")
        sizes = {
            "block_size": block_size, "gpu_memory_utilization": gpu_memory_utilization, "max_num_seqs": max_num_seqs,
            "num_gpu_blocks_override": num_gpu_blocks_override, "max_num_batched_tokens": max_num_batched_tokens,
            "enable_prefix_caching": enable_prefix_caching,
        }  # fmt: skip
        with in_their_words():
            options = EngineOptions(
                graphs=not enforce_eager,
                deterministic=deterministic,
                max_model_len=max_model_len,
                **{WORDS[name]: value for name, value in sizes.items()},
            )
        folder = Path(model).expanduser()
        self.tokenizer: Tokenizer | None = read_tokenizer(folder, tokenizer)
        self._defaults = sampling_defaults(folder)
        if quantization is not None and quantization == method_of(folder):
            quantization = None
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        served = load_model(folder, device=device, quantization=quantization)
        with in_their_words():
            self.engine = Engine(served, self.tokenizer, options, kv_cache_dtype=CACHES[kv_cache_dtype])
        self._numbers = itertools.count()
        self._mail: dict[str, list[Output]] = {}

    def get_tokenizer(self) -> Tokenizer:
        """The tokenizer; raises `RequestError` where the checkpoint has none."""
        if self.tokenizer is None:
            raise RequestError("this checkpoint has no tokenizer: give prompts as tokens, or LLM a tokenizer.")
        return self.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What `generation_config.json` recommends; where it says nothing, `SamplingParams()`."""
        return SamplingParams(**self._defaults)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """All answers, in the order of the prompts.

        sampling_params   one for all, or one each; None: what the checkpoint's authors recommend
        use_tqdm          show progress

        Raises `RequestError` for the first prompt that cannot be served; then none is. Warns of a `max_tokens` that is
        more than there is room for: such an answer ends where the room does, with finish_reason="length".
        """
        given = listed(prompts)
        params = self._each(sampling_params, len(given))
        results = [self._begin(prompt, p) for prompt, p in zip(given, params, strict=True)]
        if sampling_params is not None:
            self._tell_of_room(results, params)
        asked = [self._requests(result, p) for result, p in zip(results, params, strict=True)]
        places = {request.id: (r, i) for r, each in zip(results, asked, strict=True) for i, request in enumerate(each)}
        with Progress(console=Console(stderr=True), disable=not use_tqdm, transient=True) as bar:
            task = bar.add_task("answers", total=len(places))
            for output in self._run([request for each in asked for request in each]):
                result, i = places[output.id]
                result.outputs[i].add(output)
                result.num_cached_tokens = output.cached_tokens if i == 0 else result.num_cached_tokens
                result.prompt_logprobs = output.prompt_logprobs or result.prompt_logprobs
                bar.advance(task, output.finished is not None)
        return results

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        **template: Any,
    ) -> list[RequestOutput]:
        """Answers to one conversation, or to several: lists of {"role": ..., "content": ...}.

        `template`: more words for the chat template, such as `enable_thinking=False`.
        """
        several = messages if messages and not isinstance(messages[0], Mapping) else [messages]
        tokens = [self.get_tokenizer().chat(list(each), **template) for each in several]  # type: ignore[arg-type]
        return self.generate(tokens, sampling_params, use_tqdm)

    def stream(
        self, prompt: Prompt | Sequence[Message], sampling_params: SamplingParams | None = None
    ) -> Generator[Output]:
        """One answer as it is made: to a text, tokens, or a conversation. Closing it ends the request.

        Raises `RequestError` at once, if the request cannot be served.
        """
        if isinstance(prompt, Sequence) and len(prompt) and isinstance(prompt[0], Mapping):
            prompt = self.get_tokenizer().chat(list(prompt))  # type: ignore[arg-type]
        params = replace(sampling_params or self.get_default_sampling_params(), n=1)
        requests = self._requests(self._begin(prompt, params), params)  # type: ignore[arg-type]
        self.engine.check(requests[0])
        return self._run(requests)

    # ------------------------------------------------------------------ inside

    def _each(self, params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
        if params is None or isinstance(params, SamplingParams):
            return [params or self.get_default_sampling_params()] * count
        if len(params) != count:
            raise RequestError(f"{count} prompts and {len(params)} sampling_params: give one for all, or one each.")
        return list(params)

    def _begin(self, prompt: Prompt, params: SamplingParams) -> RequestOutput:
        """An empty result."""
        inner = prompt
        if isinstance(prompt, Mapping):
            inner = prompt["prompt_token_ids"] if "prompt_token_ids" in prompt else prompt.get("prompt")
        if not isinstance(inner, str | Sequence):
            raise RequestError(f"a prompt is a text, a list of tokens, or one of both under its name; not {prompt!r}.")
        text = inner if isinstance(inner, str) else None
        tokens = self.get_tokenizer().encode(inner) if isinstance(inner, str) else numbers(inner)
        outputs = [CompletionOutput(i) for i in range(params.n)]
        return RequestOutput(str(next(self._numbers)), text, tokens, outputs)

    def _tell_of_room(self, results: list[RequestOutput], params: list[SamplingParams]) -> None:
        """Warn of the first answer that may not become as long as was asked."""
        for result, p in zip(results, params, strict=True):
            length = len(result.prompt_token_ids)
            if p.max_tokens is not None and 0 < self.engine.max_model_len - length < p.max_tokens:
                warnings.warn(
                    f"max_tokens={p.max_tokens} is more than is left behind a prompt of {length} tokens: this engine "
                    f"holds {self.engine.max_model_len} in all, and the answer ends there with finish_reason='length'. "
                    "max_tokens=None asks for as many as there are.",
                    stacklevel=3,
                )
                return

    def _requests(self, result: RequestOutput, params: SamplingParams) -> list[Request]:
        """One request a text: they share the prompt's pages."""
        return list(requests_of(result.request_id, result.prompt_token_ids, params))

    def _run(self, requests: list[Request]) -> Generator[Output]:
        """Outputs until all these requests have ended; whoever stops listening ends them. Several may take turns."""
        left = {request.id for request in requests}
        self._mail |= {name: [] for name in left}
        try:
            for request in requests:
                self.engine.add(request)
            while left:
                for output in self.engine.step():
                    self._mail.get(output.id, []).append(output)
                for output in [output for name in left for output in self._mail[name]]:
                    self._mail[output.id].remove(output)
                    left -= {output.id} if output.finished is not None else set()
                    yield output
        finally:
            for request in requests:
                self._mail.pop(request.id, None)
                self.engine.abort(request.id)


@contextmanager
def in_their_words() -> Iterator[None]:
    """An error that names a setting of the engine's names it as the user did."""
    try:
        yield
    except ConfigError as error:
        names = {ours: theirs for theirs, ours in WORDS.items()}
        raise ConfigError(re.sub(r"pages(?==)|\w+_\w+", lambda word: names.get(word[0], word[0]), str(error))) from None


def requests_of(
    name: str, prompt: list[int], params: SamplingParams, arrival: float | None = None
) -> Iterator[Request]:
    """The `n` requests of one prompt, "name-0" and so on, each with a seed of its own."""
    arrival = time.monotonic() if arrival is None else arrival
    for i in range(params.n):
        seed = None if params.seed is None else params.seed + i
        yield Request(f"{name}-{i}", prompt, replace(params, n=1, seed=seed), arrival)


def listed(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Many prompts, where one may have been given."""
    single = isinstance(prompts, str | Mapping) or (len(prompts) > 0 and isinstance(prompts[0], int))
    return [prompts] if single else list(prompts)  # type: ignore[list-item,arg-type]


def numbers(tokens: Sequence[Any]) -> list[int]:
    """Token numbers, from whatever counts as whole numbers (NumPy's and torch's too)."""
    try:
        return [operator.index(token) for token in tokens]
    except TypeError:
        raise RequestError(f"a prompt's tokens are whole numbers; got {list(tokens)[:5]!r}.") from None


def refuse(others: Mapping[str, Any]) -> None:
    """Refuse arguments of vLLM's that nothing here answers to, unless they ask for what is so anyway."""
    for name, value in others.items():
        if name in ONLY and value in ONLY[name]:
            continue
        if name in ONLY:
            raise ConfigError(f"{name}={value!r}: here it is {' or '.join(map(repr, ONLY[name]))}.")
        known = [n for n in LLM.__init__.__annotations__ if n not in ("others", "return")]
        raise ConfigError(f"LLM has no argument {name!r}. {suggest(name, known)}")


def method_of(folder: Path) -> str | None:
    """How a checkpoint was quantized, as it says itself: "compressed-tensors", "fp8"; None: it was not."""
    path = folder / "config.json"
    return (read_json(path).get("quantization_config") or {}).get("quant_method") if path.is_file() else None


def sampling_defaults(folder: Path) -> dict[str, Any]:
    """What a checkpoint's authors recommend, as vLLM reads it."""
    path = folder / "generation_config.json"
    plain = read_json(path) if path.is_file() else {}
    found = {name: plain[name] for name in SAMPLING_DEFAULTS if plain.get(name) is not None}
    return found | ({"max_tokens": plain["max_new_tokens"]} if plain.get("max_new_tokens") else {})
