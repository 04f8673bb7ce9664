"""What is sent back: OpenAI's bodies, from an engine's outputs.

Every output of a sequence is a piece: some text, and the log-probabilities of its tokens. A stream sends each as an
event; an answer in one piece is the same pieces, joined. So both say the same. A token that only begins a character has
its log-probability in the piece in which it came, and its text in the one in which the character is whole.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from ..request import Output, TokenLogprobs
from ..tokenizer import Tokenizer

LEAST = -9999.0  # what JSON shows for a probability of zero
DONE = b"data: [DONE]\n\n"


@dataclass
class Choice:
    """One text of an answer, and what the client wants to see of it.

    prompt, echo   the prompt, where a text begins with it
    most           alternatives to tell of each token
    silent         the one token that an engine makes at least is not wanted
    """

    index: int
    chat: bool
    tokenizer: Tokenizer | None
    prompt: Sequence[int] = ()
    echo: str | None = None
    most: int = 0
    silent: bool = False
    made: int = 0
    _told: int = 0  # characters whose tokens had log-probabilities

    def opening(self) -> dict[str, Any]:
        """What a chat stream begins with."""
        return self._body({"delta": {"role": "assistant", "content": ""}}, None, None)

    def piece(self, output: Output) -> dict[str, Any]:
        """One output as an element of `choices`, in a stream."""
        text, told = self._read(output)
        return self._body({"delta": {"content": text}} if self.chat else {"text": text}, told, output)

    def whole(self, outputs: Sequence[Output]) -> dict[str, Any]:
        """All outputs, to the last, as an element of `choices`."""
        pieces = [self._read(output) for output in outputs]
        text, told = "".join(text for text, _ in pieces), joined([told for _, told in pieces if told is not None])
        message = {"message": {"role": "assistant", "content": text, "refusal": None}}
        return self._body(message if self.chat else {"text": text}, told, outputs[-1])

    def _body(self, content: dict[str, Any], told: dict[str, Any] | None, output: Output | None) -> dict[str, Any]:
        finished, reason = (None, None) if output is None else (output.finished, output.stop_reason)
        if self.silent and finished:
            finished, reason = "length", None
        return {"index": self.index, **content, "logprobs": told, "finish_reason": finished, "stop_reason": reason}

    def _read(self, output: Output) -> tuple[str, dict[str, Any] | None]:
        tokens, entries, text = list(output.new_tokens), output.logprobs, output.new_text
        if self.silent:
            tokens, entries, text = [], None if entries is None else [], ""
        self.made += len(tokens)
        if self.chat:
            return text, None if entries is None else chat_logprobs(entries, tokens, self.most)
        every: list[TokenLogprobs | None] | None = None if entries is None else list(entries)
        if self.echo is not None:
            text, self.echo = self.echo + text, None
            if every is not None and output.prompt_logprobs is not None:
                tokens, every = [*self.prompt, *tokens], [*output.prompt_logprobs, *every]
        return text, None if every is None else self._text_logprobs(every, tokens)

    def _text_logprobs(self, entries: list[TokenLogprobs | None], tokens: list[int]) -> dict[str, Any]:
        """`{"text_offset", "tokens", "token_logprobs", "top_logprobs"}`; offsets in the joined texts of tokens."""
        words = [self._word(token) for token in tokens]
        ends = list(accumulate(map(len, words), initial=self._told))
        self._told = ends.pop()
        return {
            "text_offset": ends,
            "tokens": words,
            "token_logprobs": [e and max(e[t].logprob, LEAST) for e, t in zip(entries, tokens, strict=True)],
            "top_logprobs": [e and {named(e, t): max(e[t].logprob, LEAST) for t in e} for e in entries],
        }

    def _word(self, token: int) -> str:
        if self.tokenizer is None:
            return f"token_id:{token}"
        return self.tokenizer.decode([token], skip_special_tokens=False)


@dataclass
class Answer:
    """What all bodies of one HTTP request share, and what it used: each prompt once, every text."""

    id: str
    model: str
    chat: bool
    choices: dict[str, Choice]  # by the engine's id of the sequence
    prompt_tokens: int = 0
    cached: int = 0
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._body("chat.completion" if self.chat else "text_completion", choices) | {"usage": self.usage()}

    def piece(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> bytes:
        """One server-sent event. `usage`: {} for none asked for, {"usage": ...}."""
        return event(self._body("chat.completion.chunk" if self.chat else "text_completion", choices) | (usage or {}))

    def usage(self) -> dict[str, Any]:
        made = sum(choice.made for choice in self.choices.values())
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": made,
            "total_tokens": self.prompt_tokens + made,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}


def event(body: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(body, ensure_ascii=False, allow_nan=False).encode() + b"\n\n"


def chat_logprobs(entries: list[TokenLogprobs], tokens: list[int], most: int) -> dict[str, Any]:
    """`{"content": [{"token", "logprob", "bytes", "top_logprobs"}]}`."""

    def told(entry: TokenLogprobs, token: int) -> dict[str, Any]:
        text = named(entry, token)
        return {"token": text, "logprob": max(entry[token].logprob, LEAST), "bytes": list(text.encode())}

    def likeliest(entry: TokenLogprobs) -> list[int]:
        return sorted((t for t in entry if entry[t].rank <= most), key=lambda t: entry[t].rank)[:most]

    pairs = zip(entries, tokens, strict=True)
    content = [told(e, token) | {"top_logprobs": [told(e, t) for t in likeliest(e)]} for e, token in pairs]
    return {"content": content, "refusal": None}


def named(entry: TokenLogprobs, token: int) -> str:
    text = entry[token].decoded_token
    return f"token_id:{token}" if text is None else text


def joined(parts: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Log-probabilities of pieces, one after the other."""
    if not parts:
        return None
    lists = [name for name, value in parts[0].items() if isinstance(value, list)]
    return parts[0] | {name: [entry for part in parts for entry in part[name]] for name in lists}
