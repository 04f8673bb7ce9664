"""What may be sent: OpenAI's bodies, as pydantic reads them, and the `SamplingParams` that they become.

Types are strict ("5" is no number, true is no count), and a field that nothing here answers to is refused by name. Some
of OpenAI's fields change no answer (`user`, `metadata`, ...): they are taken and left alone. Some ask for what this
server cannot do (`tools`, `suffix`, ...): they are refused with the reason, unless they ask for what is so anyway.
Beside OpenAI's fields there are vLLM's for sampling. Numbers have the ranges that OpenAI's manual gives; what
`SamplingParams` itself refuses keeps its own words.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from ...errors import RequestError
from ..params import SamplingParams


def unicode(text: str) -> str:
    """JSON can write half a character (`"\\ud800"`), which no tokenizer takes."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"character {error.start} is half of a surrogate pair") from None
    return text


String = Annotated[str, AfterValidator(unicode)]
Number = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**64)]
Token = Annotated[int, Field(ge=0, lt=2**31)]
Tokens = Annotated[list[Token], Field(min_length=1)]
Text = Annotated[String, Field(min_length=1)]
MOST_TEXTS = 128  # of one prompt

VLLM = ("top_k", "min_p", "repetition_penalty", "stop_token_ids", "include_stop_str_in_output", "ignore_eos",
        "min_tokens", "skip_special_tokens")  # fmt: skip
SHARED = ("n", "temperature", "top_p", "presence_penalty", "frequency_penalty", "seed", "stop", "logit_bias", *VLLM)


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", protected_namespaces=())

    model: String | None = None


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Sampled(Body):
    """What completions and chat have in common."""

    n: Annotated[int, Field(ge=1, le=MOST_TEXTS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)] | None = None
    seed: Seed | None = None
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = None
    logit_bias: dict[String, Number] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # vLLM's
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100, allow_inf_nan=False)] | None = None
    stop_token_ids: Annotated[list[Token], Field(max_length=256)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    skip_special_tokens: bool | None = None
    # taken, and left alone: they change no answer
    user: String | None = None
    metadata: dict[String, String] | None = None
    service_tier: String | None = None
    store: bool | None = None
    safety_identifier: String | None = None
    prompt_cache_key: String | None = None

    @property
    def usage_wanted(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def most_asked(self) -> int | None:
        """The length of an answer that the body itself asks for; None: it leaves that to the server."""
        named = [
            getattr(self, name) for name in ("max_completion_tokens", "max_tokens") if name in self.model_fields_set
        ]
        return next((value for value in named if value is not None), None)

    def check(self) -> None:
        """Refuse what cannot be done here. Raises `RequestError`."""
        for name, why in self.refused().items():
            if getattr(self, name):
                raise RequestError(f"{name} is not served here: {why}")
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options say how to stream, and stream is not true.")

    def refused(self) -> dict[str, str]:
        """Fields that ask for what this server cannot do, and why."""
        return {}

    def sampling(self, defaults: dict[str, Any], **others: Any) -> SamplingParams:
        """The parameters, over the checkpoint's defaults. Raises `RequestError`."""
        given = {name: value for name in SHARED if (value := getattr(self, name)) is not None}
        return SamplingParams(**(defaults | given | others))


class CompletionBody(Sampled):
    """`POST /v1/completions`."""

    prompt: (
        String | Tokens | Annotated[list[String], Field(min_length=1)] | Annotated[list[Tokens], Field(min_length=1)]
    )
    max_tokens: Annotated[int, Field(ge=0)] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    suffix: String | None = None
    best_of: int | None = None

    def refused(self) -> dict[str, str]:
        return {"suffix": "the models go on from a text, and fill no gaps."}

    @property
    def prompts(self) -> list[str | list[int]]:
        """One or more, each a text or tokens."""
        prompt: Any = self.prompt
        return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt

    def params(self, defaults: dict[str, Any]) -> SamplingParams:
        self.check()
        if self.best_of not in (None, self.n or 1):
            raise RequestError(f"best_of={self.best_of} is not served here: ask for n texts, and choose among them.")
        if self.max_tokens == 0 and not self.echo:
            raise RequestError("max_tokens=0 asks for nothing: it goes with echo only.")
        told = self.logprobs if self.echo else None
        most = None if self.max_tokens is None else max(1, self.max_tokens)
        return self.sampling(defaults, max_tokens=most, logprobs=self.logprobs, prompt_logprobs=told)


class Part(BaseModel):
    """A part of a message: text alone."""

    model_config = ConfigDict(strict=True)

    type: Literal["text"]
    text: String


class ChatMessage(BaseModel):
    model_config = ConfigDict(strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: String | list[Part]
    name: String | None = None

    def plain(self) -> dict[str, str]:
        """As a chat template takes it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": content}


class ChatBody(Sampled):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    functions: list[Any] | None = None
    response_format: dict[String, Any] | None = None
    modalities: list[String] | None = None
    audio: Any = None
    reasoning_effort: String | None = None
    parallel_tool_calls: bool | None = None

    def refused(self) -> dict[str, str]:
        why = "answers are plain text, and nobody calls a function for the model."
        return {"tools": why, "functions": why, "audio": "answers are text."}

    def params(self, defaults: dict[str, Any]) -> SamplingParams:
        self.check()
        if self.tool_choice not in (None, "none", "auto"):
            raise RequestError("tool_choice is not served here: answers are plain text.")
        if (self.response_format or {}).get("type", "text") != "text":
            raise RequestError("response_format is not served here: answers are plain text, which follow no grammar.")
        if set(self.modalities or ["text"]) != {"text"}:
            raise RequestError("modalities other than text are not served here.")
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs goes with logprobs=true.")
        told = (self.top_logprobs or 0) if self.logprobs else None
        most = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        chosen = {"max_tokens": most} if most is not None or "max_tokens" not in defaults else {}
        return self.sampling(defaults, logprobs=told, **chosen)


class TokenizeBody(Body):
    """`POST /tokenize`: a text, or a conversation."""

    prompt: String | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None


class DetokenizeBody(Body):
    """`POST /detokenize`."""

    tokens: list[Token]
