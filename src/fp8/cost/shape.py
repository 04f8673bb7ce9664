"""A decoder as sizes, and the products of one training step."""

from __future__ import annotations

from dataclasses import dataclass

from ..recipe import PRODUCTS, Recipe
from .gemm import kind_of


@dataclass(frozen=True)
class Product:
    """One kind of linear layer: weight [n, k], how often a model has it, where its input comes from, where its gradient
    does.

    x_from       "norm", "attention" or "activation"
    grad_from    "rope", "activation" or "residual"
    """

    name: str
    n: int
    k: int
    count: int
    x_from: str
    grad_from: str

    @property
    def parameters(self) -> int:
        return self.n * self.k * self.count


@dataclass(frozen=True)
class Architecture:
    """A decoder: sizes in elements. `joined`: q, k, v are one product, and gate and up another (as in our decoder;
    Hugging Face keeps them apart). `head=False`: layers alone, without embedding, head and loss.
    """

    name: str
    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    head_dim: int = 0
    gated: bool = True
    rope: bool = True
    tied: bool = False
    positions: int = 0  # learned position embeddings
    joined: bool = True
    head: bool = True

    @property
    def width(self) -> int:
        """Channels of a head."""
        return self.head_dim or self.hidden // self.heads

    @property
    def qkv(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.width

    @property
    def context(self) -> int:
        """Width of attention's output."""
        return self.heads * self.width

    @property
    def up(self) -> int:
        return self.ffn * (2 if self.gated else 1)

    def products(self) -> tuple[Product, ...]:
        """The linear layers of all blocks."""
        once = self.layers
        kv, q = self.kv_heads * self.width, self.context
        grad = "rope" if self.rope else "residual"
        if self.joined:
            first = (Product("qkv", self.qkv, self.hidden, once, "norm", grad),)
            wide = (Product("up", self.up, self.hidden, once, "norm", "activation"),)
        else:
            first = (
                Product("q", q, self.hidden, once, "norm", grad),
                Product("k, v", kv, self.hidden, 2 * once, "norm", grad),
            )
            wide = (Product("gate, up" if self.gated else "up", self.ffn, self.hidden, once * (2 if self.gated else 1),
                            "norm", "activation"),)  # fmt: skip
        out = Product("out", self.hidden, q, once, "attention", "residual")
        return (*first, out, *wide, Product("down", self.hidden, self.ffn, once, "activation", "residual"))

    @property
    def head_product(self) -> Product:
        return Product("head", self.vocab, self.hidden, 1, "norm", "loss")

    @property
    def block_parameters(self) -> int:
        return sum(p.parameters for p in self.products()) + 2 * self.hidden * self.layers

    @property
    def table_parameters(self) -> int:
        """Embedding, head, position embeddings."""
        if not self.head:
            return 0
        return self.vocab * self.hidden * (1 if self.tied else 2) + self.positions * self.hidden + self.hidden

    @property
    def parameters(self) -> int:
        return self.block_parameters + self.table_parameters


def scheme_of(recipe: Recipe) -> str:
    """Which row of the byte tables a recipe follows: "current", "delayed", "row" or "block"."""
    if recipe.delayed is not None:
        return "delayed"
    tiles = [operand.tile for operand in (recipe.x, recipe.w, recipe.grad)]
    if not all(tile.constant_along_k for tile in tiles):
        return "block"
    return "row" if any(tile.rows == 1 for tile in tiles) else "current"


def kinds_of(recipe: Recipe | None) -> tuple[str, str, str]:
    """The kinds of a layer's three products: forward, gradient of x, gradient of w."""
    if recipe is None:
        return "bf16", "bf16", "bf16"
    return tuple(_kind(recipe, which) for which in PRODUCTS)  # type: ignore[return-value]


def _kind(recipe: Recipe, which: str) -> str:
    sides = {"forward": (recipe.x, recipe.w), "grad_x": (recipe.grad, recipe.w), "grad_w": (recipe.grad, recipe.x)}[
        which
    ]
    if recipe.blocked(which):
        return "1x128 128x128" if any(side.tile.rows > 1 for side in sides) else "1x128 1x128"
    word = "row" if any(side.tile.rows == 1 for side in sides) else "tensor"
    accumulate = getattr(recipe.accumulate, which)
    return kind_of(word, accumulate if accumulate == "fast" else "promoted")


def shapes_of(tokens: int, n: int, k: int) -> tuple[tuple[int, int, int], ...]:
    """(M, N, K) of forward, gradient of x and gradient of w on `tokens` rows."""
    return (tokens, n, k), (tokens, k, n), (n, k, tokens)
