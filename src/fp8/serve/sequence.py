"""A request while the engine works on it: its tokens, its pages, and how far each is.

    tokens     known to the host: prompt and answer
    pending    tokens that are only on the device yet: the steps that sample them are under way
    computed   tokens whose keys and values are in the cache, once every step that was launched has run

    ├─── computed ───┤─── to do ───┤
    ├─────────── length ───────────┤   = len(tokens) + pending

A step brings `computed` closer to `length`; where it reaches it, the step's last row is sampled, and `length` grows by
one. So a prompt, a chunk of it, one more token, and everything again after a preemption are the same thing to a
scheduler: some tokens to do.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .pages import next_name
from .request import Finish, Request, TokenLogprobs
from .text import Writer


@dataclass(eq=False)
class Sequence:
    """One request's state. The scheduler moves `computed`, `pages`, `seat`; the engine `tokens` and what is told."""

    request: Request
    order: int  # of arrival
    most: int  # tokens of prompt and answer at which it ends
    ends: frozenset[int]  # tokens that end it
    writer: Writer | None = None
    tokens: list[int] = field(default_factory=list)
    pending: int = 0
    computed: int = 0
    pages: list[int] = field(default_factory=list)
    names: list[bytes] = field(default_factory=list)  # of its first full pages
    published: int = 0  # pages that others can find
    seat: int | None = None  # its row in what the sampler keeps on the device; None: not running
    cached: int | None = None  # tokens of the prompt that were in the cache when it was first admitted
    told: int = 0  # tokens of the prompt whose log-probabilities were computed
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    finished: Finish | None = None

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt)

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt)

    @property
    def length(self) -> int:
        return len(self.tokens) + self.pending

    @property
    def to_do(self) -> int:
        """Tokens that the next step may compute: none where the last token of all is on its way."""
        return 0 if self.length >= self.most else self.length - self.computed

    @property
    def to_tell(self) -> bool:
        """Whether rows of the prompt still have to give log-probabilities."""
        return self.request.params.prompt_logprobs is not None and self.told < self.prompt_length - 1

    def name(self, page: int, page_size: int) -> bytes:
        """The name of one of its full pages, whose tokens must be known."""
        for i in range(len(self.names), page + 1):
            tokens = self.tokens[i * page_size : (i + 1) * page_size]
            self.names.append(next_name(self.names[-1] if self.names else b"", tokens))
        return self.names[page]
