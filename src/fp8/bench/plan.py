"""Is `fp8 plan` right? Five steps, predicted beside measured: time and peak memory, BF16 and FP8.

    python -m fp8.bench.plan --out DIR [--only WORD ...] [--recipe tensorwise] [--fused fp8] [--keep]

    4 Llama-3-8B layers            forward and backward          the shape that the table is fitted on (2 of its layers)
    Llama-3.2-1B                   whole step, head and AdamW    not fitted
    124M decoder                   whole step, 64 x 1024         not fitted
    2048 wide, 8 layers            forward and backward          not fitted
    8192 wide, 2 layers            forward and backward          not fitted

Whole steps: FP32 parameters under BF16 autocast, cross entropy, clipping, fused AdamW, weight codes refreshed once, as
`fp8 train` does. Stacks: BF16 parameters, no optimizer, every step quantizes the weights anew, as `fp8 bench train`
does. All compiled. The prediction is asked before the measurement runs, of the table in the package. `--fused fp8`
(or `all`: BF16 too) predicts with fused producers, for when `fp8.TransformerLayer` runs them.

A step counts as predicted within 10 %. `plan.json` is written after each arm, so a time limit costs only what was left;
`--keep` then adds to it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fp8
from fp8.cost import Architecture, Setting, memory, step
from fp8.models.llama import Decoder, DecoderConfig
from fp8.recipe import Recipe

from .machine import save
from .train import step_milliseconds

DEVICE = "cuda"
WARM, TIMED, LIMIT = 4, 9, 0.10
FITTED = (None, "tensorwise")
FUSED = ("no", "fp8", "all")
Run = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """A model and its batch. `whole`: with head, loss and optimizer; else a stack of layers."""

    name: str
    config: DecoderConfig
    batch: int
    tokens: int
    whole: bool

    @property
    def model(self) -> Architecture:
        c = self.config
        return Architecture(
            self.name, c.hidden_size, c.ffn_hidden_size, c.num_layers, c.num_attention_heads, c.num_kv_heads,
            c.vocab_size, tied=c.tie_embeddings, head=self.whole,
        )  # fmt: skip

    def setting(self, recipe: str | None, fused: bool) -> Setting:
        return Setting(
            self.batch * self.tokens, self.tokens, None if recipe is None else Recipe.of(recipe), fused=fused,
            weights=4 if self.whole else 2, optimizer=self.whole,
        )  # fmt: skip


def llama(layers: int) -> Case:
    """Llama-3-8B layers, as in `fp8 bench train`."""
    return Case(f"{layers} Llama-3-8B layers", _config(4096, 14336, layers, 32, 8), 2, 8192, whole=False)


def _config(
    hidden: int, ffn: int, layers: int, heads: int, kv: int, vocab: int = 256, tied: bool = False
) -> DecoderConfig:
    return DecoderConfig(vocab, hidden, ffn, layers, heads, kv, 8192, rope_theta=500000.0, tie_embeddings=tied)


def cases() -> tuple[Case, ...]:
    return (
        llama(4),
        Case("2048 wide, 8 layers", _config(2048, 8192, 8, 16, 8), 4, 4096, whole=False),
        Case("8192 wide, 2 layers", _config(8192, 28672, 2, 64, 8), 1, 8192, whole=False),
        Case("124M decoder", _config(768, 2048, 12, 12, 12, 50304), 64, 1024, whole=True),
        Case("Llama-3.2-1B", _config(2048, 8192, 16, 32, 8, 128256, tied=True), 2, 8192, whole=True),
    )


# --------------------------------------------------------------------------- the steps


def build(case: Case, recipe: str | None) -> Decoder:
    """The decoder on the GPU, in FP32 for a whole step and BF16 for a stack; FP8 where there is a recipe."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = Decoder(case.config)
    if not case.whole:
        model = model.to(torch.bfloat16)
    if recipe is not None:
        fp8.convert(model, recipe)
    return model


def stack_step(case: Case, model: Decoder) -> Run:
    """Forward and backward of the layers alone."""
    layers = nn.Sequential(*model.layers)
    call = torch.compile(layers)
    x = torch.randn(case.batch, case.tokens, case.config.hidden_size, device=DEVICE, dtype=torch.bfloat16)
    x.requires_grad_()
    grad = torch.randn_like(x)

    def run() -> None:
        call(x).backward(grad)
        for parameter in layers.parameters():
            parameter.grad = None
        x.grad = None
        fp8.update_scales(layers)

    return run


def whole_step(case: Case, model: Decoder) -> Run:
    """Forward, loss, backward, clipping, AdamW, and the once-a-step work of FP8."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    fp8.attach(model, optimizer)
    tokens = torch.randint(case.config.vocab_size, (case.batch, case.tokens + 1), device=DEVICE)

    def loss_of(inputs: Tensor, targets: Tensor) -> Tensor:
        logits = model(inputs)
        return nn.functional.cross_entropy(logits.float().view(-1, logits.shape[-1]), targets.reshape(-1))

    call = torch.compile(loss_of)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def run() -> None:
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = call(inputs, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def timed(run: Run) -> dict[str, float]:
    """Median seconds of steps one after the other, their spread, and peak GiB."""
    for _ in range(WARM):
        run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times = [ms * 1e-3 for ms in step_milliseconds(run, TIMED)]
    peak = torch.cuda.max_memory_allocated() / 2**30
    return {"seconds": statistics.median(times), "spread": max(times) - min(times), "peak_gib": peak}


def row(case: Case, recipe: str | None, held: bool, fused: bool = False) -> dict[str, Any]:
    """One arm: measured, as `fp8.cost.fit` reads it."""
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    model = build(case, recipe)
    found = timed(whole_step(case, model) if case.whole else stack_step(case, model))
    setting = {"tokens": case.batch * case.tokens, "sequence": case.tokens, "recipe": recipe, "fused": fused,
               "weights": 4 if case.whole else 2, "optimizer": case.whole}  # fmt: skip
    name = f"{case.name}, {recipe or 'bf16'}"
    return {
        "name": name,
        "model": dataclasses.asdict(case.model),
        "setting": setting,
        **found,
        "held": held,
        "source": "bench plan",
    }


def predicted(case: Case, recipe: str | None, fused: bool) -> tuple[float, float]:
    """Seconds and GiB."""
    setting = case.setting(recipe, fused)
    return step(case.model, setting).seconds, memory(case.model, setting).gib


def is_fused(which: str, recipe: str | None) -> bool:
    """Whether an arm's producers are fused: "no", "fp8" or "all"."""
    return which == "all" or (which == "fp8" and recipe is not None)


HEAD = f"{'':34}{'predicted ms':>13}{'measured':>10}{'off':>8}{'predicted GiB':>15}{'measured':>10}{'off':>8}   in 10 %"


def line(found: dict[str, Any], seconds: float, gib: float) -> str:
    off, memory_off = seconds / found["seconds"] - 1, gib / found["peak_gib"] - 1
    good = "yes" if max(abs(off), abs(memory_off)) <= LIMIT else "NO"
    return (
        f"{found['name']:34}{seconds * 1e3:13.1f}{found['seconds'] * 1e3:10.1f}{off:+8.1%}"
        f"{gib:15.2f}{found['peak_gib']:10.2f}{memory_off:+8.1%}   {good}"
    )


def _before(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))["results"]["steps"] if path.is_file() else []


def main(arguments: list[str] | None = None) -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="bench/results", help="folder for plan.json")
    parser.add_argument("--only", nargs="*", default=[], help="only cases whose name holds one of these words")
    parser.add_argument("--recipe", default="tensorwise", help="of the FP8 arm")
    parser.add_argument("--fused", choices=FUSED, default="no", help="which arms are predicted with fused producers")
    parser.add_argument("--keep", action="store_true", help="keep what plan.json holds of other arms")
    options = parser.parse_args(arguments)
    steps, failed = _before(Path(options.out) / "plan.json") if options.keep else [], {}
    print(HEAD)
    for case in cases():
        if options.only and not any(word in case.name for word in options.only):
            continue
        for recipe in (None, options.recipe):
            fused = is_fused(options.fused, recipe)
            seconds, gib = predicted(case, recipe, fused)
            steps = [old for old in steps if old["name"] != f"{case.name}, {recipe or 'bf16'}"]
            try:
                steps.append(row(case, recipe, held=True, fused=fused))
            except Exception as error:  # noqa: BLE001 - a benchmark goes on, and says what failed
                failed[f"{case.name}, {recipe}"] = f"{type(error).__name__}: {error}"[:300]
                print(f"{case.name}, {recipe}: {failed[f'{case.name}, {recipe}']}", flush=True)
                continue
            steps[-1] |= {"predicted_seconds": seconds, "predicted_gib": gib}
            print(line(steps[-1], seconds, gib), flush=True)
            save(options.out, "plan", {"steps": steps, "failed": failed})


if __name__ == "__main__":
    main()
