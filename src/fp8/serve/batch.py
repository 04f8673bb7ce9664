"""One step's work, as the model sees it: the new tokens of some sequences, flat, and where their keys and values lie.

    tokens, positions, slots   one entry a new token; the tokens of a sequence stand together, in order
    starts, lengths, pages     one entry a sequence
    wanted                     one entry a row of logits

A sequence brings one token (it decodes) or many (a chunk of its prompt); both kinds may stand in one batch, and nothing
is padded. `slots` says where a token's K and V are written (page * page_size + offset), `pages` where those of all
`lengths` positions are read, in the order of positions.

A batch that a CUDA graph replays has a fixed number of rows. What is not used is marked, not removed: a slot of -1
writes nothing, and a length of 0 reads nothing (its attention is 0).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """New tokens of S sequences, one after the other, without padding; T in all.

    tokens      int64 [T]
    positions   int32 [T]: of each token in its sequence
    slots       int64 [T]: where its K and V go, page * page_size + offset; -1: nowhere
    starts      int32 [S + 1]: sequence s has the rows starts[s] : starts[s + 1]
    lengths     int32 [S]: keys that sequence s has once this step is written; 0: none are read
    pages       int32 [S, most pages]: the page numbers of each sequence, in order; 0 beyond its last
    wanted      int64 [S']: the rows of T whose logits are wanted
    decode      every sequence has exactly one new token, and attention may go another way for it (deterministic engines
                never say so)
    """

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    starts: Tensor
    lengths: Tensor
    pages: Tensor
    wanted: Tensor
    decode: bool
