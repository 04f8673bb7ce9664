"""`fp8 generate` and `fp8 chat`: a text that goes on, a conversation, both as they are made."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from ..errors import Fp8Error

if TYPE_CHECKING:
    from .llm import LLM
    from .params import SamplingParams
    from .request import Output

Folder = Annotated[Path, typer.Argument(help="A checkpoint: BF16, or FP8 as `fp8 quantize` writes it.")]
KvCache = Annotated[str, typer.Option(help="fp8 (E4M3), e5m2 or bf16.")]
Quantization = Annotated[str | None, typer.Option(help="fp8: quantize a BF16 checkpoint while it is loaded.")]
Words = Annotated[str | None, typer.Option(help="'bytes', a tokenizer.json or its folder; else the checkpoint's.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Longest = Annotated[int | None, typer.Option(help="Most tokens of prompt and answer; else as many as the model holds.")]


def generate_command(
    folder: Folder,
    prompt: Annotated[str, typer.Option(help="The text to go on from.")] = "Call me Ishmael.",
    max_tokens: Annotated[int, typer.Option(help="Most tokens to write.")] = 200,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw among the k likeliest only; 0: among all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw among the likeliest that make up this probability.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Draw among those at least so likely, the likeliest being 1.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: tokens that came are less likely.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Same seed, same text.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="A text to stop before; may be given again.")] = None,
    kv_cache_dtype: KvCache = "fp8",
    quantization: Quantization = None,
    max_model_len: Longest = None,
    tokenizer: Words = None,
    device: Device = "auto",
) -> None:
    """Go on from a prompt, over a paged FP8 KV cache; text appears as it is made.

    [bold]Examples[/]

    [cyan]fp8 generate runs/demo/fp8 --prompt "The whale"[/]  the likeliest text

    [cyan]fp8 generate runs/demo/fp8 --temperature 0.8 --top-k 40 --seed 1[/]  a drawn one
    """
    from .params import SamplingParams

    params = SamplingParams(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed, max_tokens=max_tokens,
        repetition_penalty=repetition_penalty, stop=stop,
    )  # fmt: skip
    llm = open_llm(folder, tokenizer, device, quantization, kv_cache_dtype, max_model_len)
    outputs = llm.stream(prompt, params)
    typer.echo(prompt, nl=False)
    for piece in text_of(outputs, max_tokens):
        typer.echo(piece, nl=False)
    typer.echo()


def chat_command(
    folder: Folder,
    system: Annotated[str | None, typer.Option(help="What the model is told before the conversation.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 1024,
    temperature: Annotated[
        float | None, typer.Option(help="0: always the likeliest; else what the model asks for.")
    ] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw among the likeliest that make up this probability.")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same answers.")] = None,
    kv_cache_dtype: KvCache = "fp8",
    quantization: Quantization = None,
    max_model_len: Longest = None,
    device: Device = "auto",
) -> None:
    """Talk to a chat model in the terminal. /reset begins anew, Ctrl-C stops an answer, Ctrl-D leaves.

    [bold]Examples[/]

    [cyan]fp8 chat smollm2-fp8[/]  with a checkpoint that `fp8 quantize` wrote

    [cyan]fp8 chat smollm2 --quantization fp8 --system "Answer in one sentence."[/]  quantized while it is loaded
    """
    llm = open_llm(folder, None, device, quantization, kv_cache_dtype, max_model_len)
    given: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "seed": seed}
    changes = {name: value for name, value in given.items() if value is not None}
    params = replace(llm.get_default_sampling_params(), max_tokens=max_tokens, **changes)
    Conversation(llm, params, system, Console(highlight=False, soft_wrap=True)).run()


class Conversation:
    """A chat at a terminal, or over a pipe: a line in, an answer out."""

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None, console: Console) -> None:
        self.llm, self.params, self.console = llm, params, console
        self._start = [] if system is None else [{"role": "system", "content": system}]
        self.messages = list(self._start)

    def run(self) -> None:
        self.console.print("[dim]/reset begins anew, Ctrl-C stops an answer, Ctrl-D leaves.[/]")
        while (line := self.ask()) is not None:
            if line.strip() == "/reset":
                self.messages = list(self._start)
            elif line.strip():
                self.answer(line)

    def ask(self) -> str | None:
        """The next line; None at the end."""
        try:
            return self.console.input("[bold cyan]> [/]")
        except KeyboardInterrupt:
            self.console.print()
            return ""
        except EOFError:
            self.console.print()
            return None

    def answer(self, line: str) -> None:
        """Ask the model, and show its answer as it comes. What was said before a Ctrl-C stays said."""
        self.messages.append({"role": "user", "content": line})
        said = ""
        try:
            with closing(text_of(self.llm.stream(self.messages, self.params), self.params.max_tokens)) as pieces:
                for piece in pieces:
                    said += piece
                    self.console.print(piece, end="", markup=False)
        except KeyboardInterrupt:
            self.console.print(" [dim](stopped)[/]", end="")
        except Fp8Error as error:
            self.messages.pop()
            self.console.print(f"[red]{escape(str(error))}[/]\n[dim]/reset begins anew.[/]")
            return
        self.console.print()
        self.messages.append({"role": "assistant", "content": said})


def text_of(outputs: Generator[Output], most: int | None = None) -> Generator[str]:
    """The pieces of an answer; one that fails raises. Says so where it ends before `most` tokens for want of room."""
    made = 0
    for output in outputs:
        if output.error is not None:
            raise Fp8Error(output.error)
        made += len(output.new_tokens)
        yield output.new_text
        if output.finished == "length" and most is not None and made < most:
            held = output.prompt_tokens + made
            typer.echo(f"\n[the model holds no more than these {held} tokens of prompt and answer]", err=True, nl=False)


def open_llm(
    folder: Path, tokenizer: str | None, device: str, quantization: str | None, kv_cache_dtype: str, longest: int | None
) -> LLM:
    """An engine for one conversation."""
    from ..checkpoint import tokenizer_name
    from ..train.loop import device_of
    from .llm import LLM

    if tokenizer is None and tokenizer_name(folder) is None:
        raise Fp8Error(f"{folder} has no tokenizer: name one by --tokenizer (a tokenizer.json, or 'bytes').")
    return LLM(
        folder, tokenizer=tokenizer, device=device_of(device), quantization=quantization, max_num_seqs=1,
        kv_cache_dtype=kv_cache_dtype, max_model_len=longest, max_num_batched_tokens=2048,
    )  # fmt: skip
