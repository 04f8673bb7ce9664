"""What `fp8 bench train` trains: a stack of layers, a plain Llama, whole models; in BF16, by us, and by peers.

    stack        4 Llama-3-8B layers, forward and backward; each timed step quantizes the weights anew
    plain        the same shapes as `nn.Linear`s that `fp8.convert` converts: nothing fused
    1b           a Llama-3.2-1B shape with its head in BF16: a whole step with AdamW, weights in BF16
    124m         768 wide, 12 layers, FP32 weights under autocast: a whole step with clipping and AdamW
    124m-graph   the same with 4 x 1024 tokens, each step one CUDA graph

An arm is a name, "what recipe mode"; building it gives a step without arguments and the model that it trains.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fp8

from ..models import Decoder, DecoderConfig
from .plain_llama import PlainStack

Step = Callable[[], Any]
RECIPES = ("delayed", "tensorwise", "blockwise", "rowwise")
LLAMA_8B = {"hidden": 4096, "ffn": 14336, "heads": 32, "kv_heads": 8}
LLAMA_1B = DecoderConfig(128256, 2048, 8192, 16, 32, 8, rope_theta=500000.0, tie_embeddings=True)
SMALL = DecoderConfig(50304, 768, 2048, 12, 12, 12)
TE_RECIPES = {
    "delayed": "DelayedScaling", "tensorwise": "Float8CurrentScaling", "blockwise": "Float8BlockScaling",
}  # fmt: skip


@dataclass(frozen=True)
class Workload:
    """Sizes, and which arms: (who, recipe, mode) in the order in which they run."""

    name: str
    batch: int
    tokens: int
    arms: tuple[tuple[str, str | None, str], ...]
    layers: int = 4

    @property
    def flops(self) -> float:
        """Floating-point operations of the model's products and attention in one step, backward included."""
        width, ffn, heads, kv, layers, vocabulary = self.shape
        each = width * width * (2 + 2 * kv / heads) + 3 * width * ffn
        rows = self.batch * self.tokens
        attention = 2.0 * rows * self.tokens * width  # causal: half of two products
        return 3 * layers * (2.0 * rows * each + attention) + 6.0 * rows * width * vocabulary

    @property
    def shape(self) -> tuple[int, int, int, int, int, int]:
        if self.name in ("stack", "plain"):
            return *LLAMA_8B.values(), self.layers, 0  # type: ignore[return-value]
        c = LLAMA_1B if self.name == "1b" else SMALL
        heads = c.num_attention_heads, c.num_kv_heads
        return c.hidden_size, c.ffn_hidden_size, *heads, c.num_layers, c.vocab_size


def workload(name: str, batch: int | None = None, tokens: int | None = None, layers: int = 4) -> Workload:
    """A workload by name, in other sizes if asked."""
    arms, sizes = ARMS[name], SIZES[name]
    return Workload(name, batch or sizes[0], tokens or sizes[1], arms, layers)


SIZES = {"stack": (2, 8192), "plain": (2, 8192), "1b": (2, 8192), "124m": (64, 1024), "124m-graph": (4, 1024)}
_peers = tuple(("TransformerEngine", recipe, "eager") for recipe in TE_RECIPES)
_torchao = (("torchao", "tensorwise", "compiled"), ("torchao", "rowwise", "compiled"))
ARMS: dict[str, tuple[tuple[str, str | None, str], ...]] = {
    "stack": (
        ("torch", None, "compiled"), ("fp8", None, "eager"), ("fp8", None, "compiled"),
        *(("fp8", recipe, mode) for recipe in RECIPES for mode in ("eager", "compiled")),
        *(("fp8", recipe, "modules compiled") for recipe in RECIPES), *_torchao, *_peers,
    ),
    "plain": (
        ("torch", None, "compiled"), ("torch", None, "eager"), ("fp8", "tensorwise", "compiled"),
        ("fp8", "tensorwise", "eager"), ("fp8", "delayed", "compiled"), _torchao[0],
    ),
    "1b": (
        ("torch", None, "compiled"), ("fp8", None, "eager"), ("fp8", "delayed", "eager"),
        ("fp8", "tensorwise", "eager"), ("fp8 with FP8 head", "tensorwise", "eager"), _torchao[0],
    ),
    "124m": (
        ("torch", None, "compiled"), ("fp8", None, "eager"), ("fp8", "delayed", "eager"),
        ("fp8", "tensorwise", "eager"), ("fp8", "tensorwise", "compiled"), _torchao[0],
    ),
    "124m-graph": (("fp8", None, "graph"), ("fp8", "delayed", "graph"), ("fp8", "tensorwise", "graph")),
}  # fmt: skip


def why_not(arm: tuple[str, str | None, str]) -> str | None:
    """Why an arm cannot run here; None when it can."""
    package = {"torchao": "torchao", "TransformerEngine": "transformer_engine"}.get(arm[0])
    return None if package is None or importlib.util.find_spec(package) else f"{package} is not installed"


def build(work: Workload, arm: tuple[str, str | None, str]) -> tuple[Step, nn.Module]:
    """The step of an arm and the model it trains."""
    torch.manual_seed(0)
    builder = {"stack": _stack, "plain": _stack}.get(work.name, _whole)
    return builder(work, *arm)


# --------------------------------------------------------------------------- layers alone: forward and backward


def _stack(work: Workload, who: str, recipe: str | None, mode: str) -> tuple[Step, nn.Module]:
    shape = (work.batch, work.tokens, LLAMA_8B["hidden"])
    x = torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn_like(x)
    if who == "TransformerEngine":
        model, call = _transformer_engine(work, str(recipe))
    else:
        model = _plain_layers(work) if work.name == "plain" else _our_layers(work, mode)
        _convert(model, who, recipe)
        call = torch.compile(model) if "compiled" in mode else model

    def step() -> None:
        call(x).backward(grad)
        for parameter in model.parameters():
            parameter.grad = None
        x.grad = None
        fp8.update_scales(model)

    return step, model


def _our_layers(work: Workload, mode: str) -> nn.Module:
    with torch.device("cuda"):
        blocks = [
            fp8.TransformerLayer(
                LLAMA_8B["hidden"], LLAMA_8B["ffn"], LLAMA_8B["heads"], num_kv_heads=LLAMA_8B["kv_heads"],
                norm="rmsnorm", activation="swiglu", bias=False, causal=True, rope_theta=500000.0,
            )
            for _ in range(work.layers)
        ]  # fmt: skip
    model = fp8.revert(nn.Sequential(*blocks).to(torch.bfloat16))
    return by_modules(model) if mode == "modules compiled" else model


def _plain_layers(work: Workload) -> nn.Module:
    with torch.device("cuda"):
        return PlainStack(work.layers, **LLAMA_8B, tokens=work.tokens).to(torch.bfloat16)


def by_modules(model: nn.Module) -> nn.Module:
    """The model, its blocks kept from the fused kernels."""
    for module in model.modules():
        if isinstance(module, fp8.TransformerLayer):
            module.why_not_fused = lambda x: "this arm measures it module by module"  # type: ignore[method-assign]
    return model


def _convert(model: nn.Module, who: str, recipe: str | None) -> None:
    if who == "torch":
        by_modules(model)
    elif who == "torchao":
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training  # type: ignore[import-not-found]

        by_modules(model)
        config = Float8LinearConfig.from_recipe_name(recipe)
        convert_to_float8_training(model, config=config, module_filter_fn=lambda _, name: "head" not in name)
    elif recipe is not None:
        fp8.convert(model, recipe)


def _transformer_engine(work: Workload, recipe: str) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    import transformer_engine.pytorch as te  # type: ignore[import-not-found]
    from transformer_engine.common import recipe as recipes  # type: ignore[import-not-found]

    s = LLAMA_8B
    layers = nn.ModuleList(
        te.TransformerLayer(
            s["hidden"], s["ffn"], s["heads"], num_gqa_groups=s["kv_heads"], hidden_dropout=0.0, attention_dropout=0.0,
            normalization="RMSNorm", activation="swiglu", bias=False, fuse_qkv_params=True,
            params_dtype=torch.bfloat16, attn_input_format="bshd", self_attn_mask_type="causal",
        )
        for _ in range(work.layers)
    ).cuda()  # fmt: skip
    positions = te.RotaryPositionEmbedding(s["hidden"] // s["heads"])(work.tokens).cuda()
    scaling = getattr(recipes, TE_RECIPES[recipe])()

    def call(x: Tensor) -> Tensor:
        with te.autocast(enabled=True, recipe=scaling):
            for layer in layers:
                x = layer(x, rotary_pos_emb=positions)
        return x

    return layers, call


# --------------------------------------------------------------------------- whole models: a step with an optimizer


def _whole(work: Workload, who: str, recipe: str | None, mode: str) -> tuple[Step, nn.Module]:
    config = LLAMA_1B if work.name == "1b" else SMALL
    with torch.device("cuda"):
        model = Decoder(config)
    fp8.revert(model)
    half = work.name == "1b"
    if half:
        model.to(torch.bfloat16)
    _convert(model, "fp8" if who.startswith("fp8") else who, recipe)
    if "head" in who:
        _give_fp8_head(model, str(recipe))
    if mode == "compiled":
        for layer in model.layers:
            layer.compile()
    rows = torch.randint(config.vocab_size, (work.batch, work.tokens + 1), device="cuda")
    loss_of = torch.compile(_loss)
    rate = torch.tensor(1e-4, device="cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, fused=True, capturable=mode == "graph")
    if who.startswith("fp8") and recipe is not None:
        fp8.attach(model, optimizer)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=not half):
            hidden = _hidden(model, rows[:, :-1])
            loss = loss_of(model.head, hidden, rows[:, 1:])
        loss.backward()
        if not half:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad()

    return (fp8.graph(step, model) if mode == "graph" else step), model


def _hidden(model: Decoder, tokens: Tensor) -> Tensor:
    x = model.embedding(tokens)
    for layer in model.layers:
        x = layer(x)
    return model.norm(x)


def _loss(head: nn.Module, hidden: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden).float().flatten(0, 1), tokens.flatten())


def _give_fp8_head(model: Decoder, recipe: str) -> None:
    """The head's product in FP8 as well; its weight stays the embedding's."""
    head = model.head
    model.head = fp8.Linear(head.in_features, head.out_features, bias=False, recipe=recipe, device="meta")
    model.head.weight = head.weight


def names(arms: tuple[tuple[str, str | None, str], ...]) -> Iterator[str]:
    for who, recipe, mode in arms:
        yield f"{who} {recipe or 'BF16'} {mode}"
