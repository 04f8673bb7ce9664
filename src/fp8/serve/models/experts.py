"""A routed SwiGLU: each token goes to the best few of many experts.

    x      = norm(h)
    p      = softmax(x R^T)                        over all experts, FP32: the router's sums are not rounded
    share  = p of the chosen, descending           divided by their sum where the model says so
    h      = h + sum over the chosen of share * down(silu(gate(x)) * up(x))

The sum runs in FP32, over BF16 products, from the largest share to the smallest, and is rounded once, before the
residual. So a token's result depends on its own choice alone; which experts its neighbours meet, and how many rows an
expert multiplies, changes nothing (`layers.py`).

Tokens are sorted by expert, and each expert that has any multiplies its own in one product. How many those are is read
back from the device, once a layer: a CUDA graph cannot replay that. So on a Hopper GPU all experts are one grouped
product (`grouped.py`) where it takes their kind; `RoutedMLP.why_not_grouped` says why it does not.

Sources: Shazeer et al., "Outrageously large neural networks", 2017; Jiang et al., "Mixtral of experts", 2024.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...backends import why_not_triton
from ...models.architecture import Architecture, Experts
from .grouped import Grouped, Stack, why_not
from .layers import Linear, Matrix, Stream, gated, normed, product, settled
from .weights import Weights


class Expert(nn.Module):
    """One SwiGLU. `names`: what the file calls gate, up and down."""

    def __init__(self, weights: Weights, names: tuple[str, str, str], hidden: int, ffn: int) -> None:
        super().__init__()
        self.gate_up = weights.linear(names[:2], (2 * ffn, hidden))
        self.down = weights.linear(names[2:], (hidden, ffn))

    def forward(self, x: Tensor) -> Tensor:
        return product(gated(product(x, self.gate_up)), self.down)


class RoutedMLP(nn.Module):
    """All experts of a layer, and their router."""

    def __init__(self, weights: Weights, layer: str, module: str, parts: Sequence[str], config: Architecture) -> None:
        """`<layer>.<module>.gate` is the router, and `<layer>.<module>.experts.<e>.<part>` gate, up and down of one."""
        super().__init__()
        assert config.experts is not None
        self.routing: Experts = config.experts
        hidden, ffn, name = config.hidden_size, self.routing.ffn_hidden_size, f"{layer}.{module}"
        self.norm = weights.norm(f"{layer}.post_attention_layernorm", hidden, config.norm_eps)
        self.router = Linear(weights.high(f"{name}.gate.weight", (self.routing.count, hidden)))
        named = [[f"{name}.experts.{e}.{part}" for part in parts] for e in range(self.routing.count)]
        self.experts = nn.ModuleList(Expert(weights, (gate, up, down), hidden, ffn) for gate, up, down in named)
        self.why_not_grouped = why_not_triton(self.router.weight.device) or self.why_not_stacked()
        self.grouped = None if self.why_not_grouped else self.stacked()

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph can replay it."""
        return self.grouped is not None

    def why_not_stacked(self) -> str | None:
        """Why the experts are no grouped products; None when they are."""
        return why_not(self.matrices("gate_up")) or why_not(self.matrices("down"))

    def stacked(self) -> Grouped:
        """The experts' matrices, joined; they keep views."""
        return Grouped(Stack.of(self.matrices("gate_up")), Stack.of(self.matrices("down")))

    def matrices(self, part: str) -> list[Matrix]:
        """That part of each expert."""
        return [getattr(expert, part) for expert in self.experts]

    def forward(self, h: Stream) -> Tensor:
        h = settled(h)
        x = normed(h, self.norm)
        shares, chosen = self.route(x)
        answers = self.answers(x, chosen)
        total = shares[:, :1] * answers[:, 0]
        for rank in range(1, self.routing.chosen):
            total = total + shares[:, rank : rank + 1] * answers[:, rank]
        return h + total.to(h.dtype)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The shares, FP32 [T, chosen], descending, and the experts that have them."""
        shares, chosen = product(x, self.router, torch.float32).softmax(-1).topk(self.routing.chosen)
        return shares / shares.sum(-1, keepdim=True) if self.routing.normalized else shares, chosen

    def answers(self, x: Tensor, chosen: Tensor) -> Tensor:
        """What each chosen expert makes of its tokens: BF16 [T, chosen, hidden]."""
        if self.grouped is not None:
            return self.grouped(x, chosen)
        order = chosen.flatten().argsort(stable=True)
        counts = chosen.flatten().bincount(minlength=self.routing.count).tolist()
        given = x[order // self.routing.chosen].split(counts)
        made = [expert(rows) for expert, rows in zip(self.experts, given, strict=True) if len(rows)]
        answers = x.new_empty(len(order), x.shape[1])
        answers[order] = torch.cat(made)
        return answers.view(len(x), self.routing.chosen, -1)
