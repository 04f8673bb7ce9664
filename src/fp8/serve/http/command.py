"""`fp8 serve`: a checkpoint behind OpenAI's HTTP."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...errors import ConfigError
from ..command import Device, Folder, KvCache, Longest, Quantization, Words

if TYPE_CHECKING:
    from ..llm import LLM
    from .door import Door, ServerOptions


def serve_command(
    folder: Folder,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 for all of them.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at; 0 for a free one.", min=0, max=65535)] = 8000,
    served_model_name: Annotated[str | None, typer.Option(help="What clients call it; else the folder's name.")] = None,
    api_key: Annotated[str | None, typer.Option(help="What clients must send.", envvar="FP8_API_KEY")] = None,
    kv_cache_dtype: KvCache = "fp8",
    quantization: Quantization = None,
    max_model_len: Longest = None,
    max_num_seqs: Annotated[int, typer.Option(help="Sequences in one step.", min=1)] = 256,
    max_num_batched_tokens: Annotated[int, typer.Option(help="Tokens in one step.", min=1)] = 8192,
    gpu_memory_utilization: Annotated[float, typer.Option(help="Share of the GPU's memory to use.")] = 0.9,
    block_size: Annotated[int, typer.Option(help="Positions of a page of the cache; a multiple of 16.")] = 64,
    num_gpu_blocks_override: Annotated[
        int | None, typer.Option(help="Pages of the cache; else as many as fit.", min=1)
    ] = None,
    enforce_eager: Annotated[bool, typer.Option("--enforce-eager", help="No CUDA graphs.")] = False,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="Same answers in any company, on a GPU too.")
    ] = False,
    max_waiting: Annotated[int, typer.Option(help="Sequences that may wait; more are answered 429.", min=0)] = 1024,
    max_body_mib: Annotated[int, typer.Option(help="Largest body of a request, in MiB.", min=1)] = 8,
    timeout: Annotated[float, typer.Option(help="Most seconds of a request, waiting and all; 0: any.", min=0)] = 600,
    drain_timeout: Annotated[float, typer.Option(help="Seconds to finish in after a SIGTERM.", min=0)] = 30,
    log_format: Annotated[str, typer.Option(help="text or json.")] = "text",
    tokenizer: Words = None,
    device: Device = "auto",
) -> None:
    """Serve a checkpoint over HTTP, in OpenAI's words: completions, chat, models, and Prometheus metrics.

    [bold]Examples[/]

    [cyan]fp8 serve smollm2-fp8[/]  at http://127.0.0.1:8000/v1

    [cyan]fp8 serve llama --quantization fp8 --host 0.0.0.0 --api-key secret[/]  quantized while it is loaded

    [cyan]curl localhost:8000/v1/completions -H 'content-type: application/json' -d '{"prompt": "The whale"}'[/]
    """
    need_packages()
    if log_format not in ("text", "json"):
        raise ConfigError(f"--log-format cannot be {log_format!r}: text or json.")
    from ...train.loop import device_of
    from ..llm import LLM
    from .door import ServerOptions
    from .server import log_to_stderr, server_of

    options = ServerOptions(
        api_key=api_key, max_body_bytes=max_body_mib << 20, timeout=timeout or None, drain_timeout=drain_timeout
    )
    log_to_stderr(log_format)
    llm = LLM(
        folder, tokenizer=tokenizer, quantization=quantization, kv_cache_dtype=kv_cache_dtype,
        max_model_len=max_model_len, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens,
        gpu_memory_utilization=gpu_memory_utilization, block_size=block_size, enforce_eager=enforce_eager,
        num_gpu_blocks_override=num_gpu_blocks_override, deterministic=deterministic, device=device_of(device),
    )  # fmt: skip
    name = served_model_name or folder.expanduser().resolve().name
    server_of(door_of(llm, folder.expanduser(), name, options, max_waiting), host, port).run()


def door_of(llm: LLM, folder: Path, name: str, options: ServerOptions, max_waiting: int = 1024) -> Door:
    """What a server shares, of an `LLM` of a checkpoint; the `LLM` is not to be used otherwise from now on."""
    from ..llm import sampling_defaults
    from .async_engine import AsyncEngine
    from .door import Door

    defaults = sampling_defaults(folder)
    return Door(AsyncEngine(llm.engine, max_waiting=max_waiting), name, llm.tokenizer, defaults, options)


def need_packages() -> None:
    """Raises `ConfigError` where the server's packages are not installed."""
    missing = [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"fp8 serve needs {' and '.join(missing)}: pip install 'fp8[serve]'.")
