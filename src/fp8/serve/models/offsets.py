"""What a cache takes from all keys of a head before it stores them (`attention/paged/pages.py` says why it may).

    offset[layer, head] = mean of the keys of that head, after their rotation, over some text

The first position of a text is left out: much attention rests there, on a key like no other. The mean is taken after
the rotation: channels that turn many times average out, those that turn slowly, a fraction of a turn over a text, keep
their mean, and no mean before the rotation would stay the same for all positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..batch import equal_rows
from .served import ServedModel

PAGE = 64
AT_ONCE = 1 << 13  # tokens of a step


@torch.no_grad()
def mean_keys(model: ServedModel, texts: Tensor) -> Tensor:
    """Offsets for the caches of a model, FP32 [layers, KV, D]: `model.key_offsets` hands them to its next ones.

    texts   tokens [B, T], T at least 2: some thousand in all do
    """
    (count, length), c = texts.shape, model.config
    total = torch.zeros(c.num_layers, c.num_kv_heads, c.head_dim, dtype=torch.float64, device=model.embedding.device)
    for rows in texts.to(total.device).split(max(1, AT_ONCE // length)):
        cache = model.new_cache(len(rows) * -(-length // PAGE), PAGE, "bf16")
        model(equal_rows(rows, 0, length, PAGE), cache)
        for layer, pages in enumerate(cache.layers):
            keys = pages.key_codes.transpose(1, 2).reshape(len(rows), -1, c.num_kv_heads, c.head_dim)
            total[layer] += keys[:, 1:length].double().sum((0, 1))
    return (total / (count * (length - 1))).float()
