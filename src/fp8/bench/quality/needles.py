"""Needles in real text: what a small decoder is taught to find.

    text text text [MARK key a b] text text [MARK key' a' b'] text ... [ASK key'] -> a' b'

A needle is a key and the two symbols that it stands for; needles overwrite stretches of real text, at places that
`place` draws, so that none overlaps another. The text is bytes (token i < 256 is byte i); keys and symbols are tokens
of their own. Within a row no key and no symbol comes twice: finding is then one look for the key, and one step on, and
an answer is right or it is not. A guess is right once in 16,256 times; a guess among the row's own needles, once in as
many as there are.

Source of the task: Arora et al., "Zoology: measuring and improving recall in efficient language models", 2023
(associative recall of many keys), between needles as in Kamradt, "Needle in a haystack", 2023.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...models import Decoder, DecoderConfig
from ...models.llama import EMBEDDING_STD

KEYS, SYMBOLS = 64, 128
MARK, ASK = 257, 258
FIRST_KEY = 259
FIRST_SYMBOL = FIRST_KEY + KEYS
VOCABULARY = 512  # a multiple of 64 that holds FIRST_SYMBOL + SYMBOLS
NEEDLE, ANSWER = 4, 2  # tokens of a needle, and of an answer


@dataclass(frozen=True)
class Rows:
    """Rows of text with needles in them.

    tokens    int64 [B, T]: text with needles, and questions with their answers at the end, `asked` of them
    keys      int64 [B, asked]: what is asked for, in the order of the questions
    answers   int64 [B, asked, 2]
    depths    FP32 [B, asked]: where in the row the needle of each question lies, from 0 to 1
    """

    tokens: Tensor
    keys: Tensor
    answers: Tensor
    depths: Tensor

    @property
    def asked(self) -> int:
        return self.keys.shape[1]

    @property
    def prompts(self) -> Tensor:
        """The rows up to their first answer: `[B, T']`."""
        return self.tokens[:, : self.tokens.shape[1] - NEEDLE * self.asked + 2]


def needles_in(length: int) -> int:
    """How many needles a row of so many tokens hides. Up to 256, they and the questions about all are the whole row."""
    return max(2, min(32, length // 8))


def place(rows: int, needles: int, room: int, generator: torch.Generator) -> Tensor:
    """Where needles begin in `room` tokens: int64 [rows, needles], ascending, none overlapping another."""
    free = room - needles * NEEDLE + 1
    start = torch.randint(free, (rows, needles), generator=generator, device=generator.device).sort(1).values
    return start + NEEDLE * torch.arange(needles, device=generator.device)


def drawn(rows: int, many: int, of: int, generator: torch.Generator) -> Tensor:
    """`many` different numbers below `of`, in a random order, for each row: int64 [rows, many]."""
    return torch.rand(rows, of, generator=generator, device=generator.device).argsort(1)[:, :many]


def hide(text: Tensor, rows: int, length: int, generator: torch.Generator, asked: int | None = None) -> Rows:
    """Draw rows of `length` tokens, questions included: a pure function of the generator's state.

    text    uint8 [N], on the generator's device
    asked   how many needles are asked for; None: all
    """
    device, count = text.device, needles_in(length)
    asked = count if asked is None else asked
    room = length - NEEDLE * asked
    begin = torch.randint(len(text) - room, (rows, 1), generator=generator, device=device)
    tokens = text[begin + torch.arange(room, device=device)].long()
    keys = FIRST_KEY + drawn(rows, count, KEYS, generator)
    symbols = FIRST_SYMBOL + drawn(rows, ANSWER * count, SYMBOLS, generator).view(rows, count, ANSWER)
    start = place(rows, count, room, generator)
    needle = torch.cat([torch.full_like(keys, MARK)[..., None], keys[..., None], symbols], 2)
    at = start[..., None] + torch.arange(NEEDLE, device=device)
    tokens.scatter_(1, at.flatten(1), needle.flatten(1))
    chosen = drawn(rows, asked, count, generator)
    wanted = needle.gather(1, chosen[..., None].expand(-1, -1, NEEDLE))
    question = torch.cat([torch.full_like(wanted[..., :1], ASK), wanted[..., 1:]], 2)
    depth = start.gather(1, chosen) / max(1, room - NEEDLE)
    return Rows(torch.cat([tokens, question.flatten(1)], 1), wanted[..., 1], wanted[..., 2:], depth.float())


def decoder(longest: int, hidden: int = 256, layers: int = 4, heads: int = 4, seed: int = 0) -> Decoder:
    """A decoder for needles; heads of `hidden / heads` channels, two query heads a key head.

    All embeddings share a vector. Without one, a query and a key of two tokens have nothing in common that a rotation
    could turn into "the token before", and looking up does not begin: 5,000 updates on a GPU did not suffice, with it
    some hundred do.
    """
    torch.manual_seed(seed)
    model = Decoder(
        DecoderConfig(VOCABULARY, hidden, 2 * hidden, layers, heads, heads // 2, max_positions=longest + NEEDLE)
    )
    with torch.no_grad():
        model.embedding.weight += EMBEDDING_STD * torch.sign(torch.randn(hidden))
    return model
