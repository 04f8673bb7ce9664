"""The training loop: one function, `train`, over one object, `Trainer`, that knows how to do a step, evaluate and save.

A step is: set the learning rate, run the micro-batches and add up their gradients, clip, check that loss and gradient
are finite, let the optimizer step. What FP8 adds happens in hooks that `fp8.attach` puts on the optimizer: one update
of the delayed scales and one refresh of the weight codes a step. Nothing here depends on the recipe.
"""

from __future__ import annotations

import math
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from ..errors import ConfigError
from ..recipe import OPERANDS
from . import checkpoint
from . import resume as resuming
from .captured import Captured
from .config import TrainConfig
from .determinism import deterministic
from .divergence import Health
from .interrupt import Interrupt
from .loss_scale import make_scaler, update_scaler
from .metrics import Metrics, Record
from .model import as_decided, build, to_fp8
from .optimizer import gradient_variance, learning_rate, make_optimizer, trained
from .progress import Show
from .tokenizer import Tokenizer, tokenizer_of
from .tokens import batches, load_tokens, validation_batches

Callback = Callable[["Trainer", Record], None]


class Trainer:
    """A model, its optimizer and its data, at some step of a run.

    `model` maps tokens [B, T] (int64) to logits [B, T, vocabulary]; without one, the decoder of the settings is built.
    Raises `ConfigError`, `DataError`, or what `fp8.convert` raises.
    """

    def __init__(self, config: TrainConfig, model: nn.Module | None = None) -> None:
        self.config, self.device = config, device_of(config.device)
        self.tokenizer: Tokenizer = tokenizer_of(config.tokenizer)
        self.tokens = load_tokens(config, self.tokenizer)
        torch.manual_seed(config.seed)
        self.model = (model or build(config, self.tokenizer.vocab_size)).to(self.device).train()
        self.report = to_fp8(self.model, config)
        optimizer, scaler = make_optimizer(self.model, config), make_scaler(config, self.device)
        self.run = checkpoint.Run(self.model, optimizer, scaler)
        self._attached = attach(self.run, config)
        self._forward = torch.compile(self.model) if config.compile else self.model
        self._measured = Captured(self._measure, self.model, self.device) if config.graph else self._measure
        self._health = Health()

    @property
    def step(self) -> int:
        """Updates done so far."""
        return self.run.step

    def loss(self, rows: Tensor, reduction: str = "mean") -> Tensor:
        """The cross entropy, in FP32, of each token after the first: rows [B, T + 1] -> a scalar."""
        rows = rows.to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.config.precision == "bf16"):
            logits = self._forward(rows[:, :-1])
        return F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten(), reduction=reduction)

    def train_step(self) -> Record:
        """One update: its line of the log. `DivergedError`, before the update, where loss or gradient is lost."""
        start, rate = time.perf_counter(), learning_rate(self.step, self.config)
        scale = self.run.scaler.get_scale() if self.run.scaler else 1.0
        loss, norm = self._measured(batches(self.tokens.train, self.config, self.step)).tolist()
        skipped = self._health.skips(self.step + 1, loss, norm, self.run.scaler is not None)
        self._update(rate)
        speed = self.config.tokens_per_step / (time.perf_counter() - start)
        return {"kind": "step", "step": self.step, "loss": loss, "lr": rate, "grad_norm": norm, "loss_scale": scale,
                "skipped": skipped, "tokens_per_second": round(speed, 1), "time": round(time.time(), 3)}  # fmt: skip

    def _measure(self, batch: Sequence[Tensor]) -> Tensor:
        """Add up the gradients of micro-batches and clip them: `[mean loss, norm before clipping]`."""
        losses = []
        for rows in batch:
            loss = self.loss(rows)
            share = loss / self.config.gradient_accumulation
            (self.run.scaler.scale(share) if self.run.scaler else share).backward()
            losses.append(loss.detach())
        return torch.stack([torch.stack(losses).mean(), self._clipped_norm()])

    def _clipped_norm(self) -> Tensor:
        """Unscale and clip the gradient; its norm before clipping."""
        if self.run.scaler:
            self.run.scaler.unscale_(self.run.optimizer)
        parameters = [p for _, p in trained(self.model)]
        return nn.utils.clip_grad_norm_(parameters, self.config.clip or math.inf)

    def _update(self, rate: float) -> None:
        for group in self.run.optimizer.param_groups:
            group["lr"] = rate
        if self.run.scaler:
            self.run.scaler.step(self.run.optimizer)
            update_scaler(self.run.scaler, self.config)
        else:
            self.run.optimizer.step()
        self.run.optimizer.zero_grad(set_to_none=True)
        self.run.step += 1

    @torch.no_grad()
    def evaluate(self) -> Record:
        """The mean loss over the validation batches, in nats a token, and its perplexity: a line of the log."""
        self.model.eval()
        total, count = torch.zeros((), dtype=torch.float64, device=self.device), 0
        for rows in validation_batches(self.tokens.validation, self.config):
            total += self.loss(rows, reduction="sum")
            count += rows[:, 1:].numel()
        self.model.train()
        loss = float(total) / count
        perplexity = math.exp(min(loss, 700.0))
        return {
            "kind": "evaluation",
            "step": self.step,
            "loss": loss,
            "perplexity": perplexity,
            "time": round(time.time(), 3),
        }

    def save(self) -> Path:
        """Write a checkpoint; its folder."""
        return checkpoint.save(Path(self.config.out), self.run, self._facts(), self.config.keep_last)

    def resume(self, folder: Path) -> list[str]:
        """Go to the step of a checkpoint; what differs from the run that wrote it, a sentence each."""
        saved = checkpoint.read(folder)
        notes = resuming.compare(saved, self._facts())
        self.report = as_decided(self.model, self.config, saved.state.get("conversion"))
        checkpoint.restore(saved, self.run)
        if self.config.fp8_recipe:
            remake_codes(self.model)
        return notes

    def _facts(self) -> dict[str, Any]:
        conversion = {"conversion": self.report.to_dict() if self.report else None}
        return resuming.facts(self.config, self.tokens.fingerprint, self.device) | conversion


@dataclass(frozen=True)
class Result:
    """What a run came to. Losses are in nats a token; `losses[i]` is that of update i + 1."""

    config: TrainConfig = field(repr=False)
    trainer: Trainer = field(repr=False)
    losses: list[float] = field(repr=False)
    evaluations: list[Record]
    gradient_variance: float
    tokens_per_second: float
    metrics: Path
    checkpoint: Path | None
    interrupted: bool

    @property
    def step(self) -> int:
        return len(self.losses)

    @property
    def validation_loss(self) -> float:
        """Of the last evaluation; NaN where a run was interrupted before its first."""
        return self.evaluations[-1]["loss"] if self.evaluations else math.nan

    @property
    def perplexity(self) -> float:
        return self.evaluations[-1]["perplexity"] if self.evaluations else math.nan

    def steps_to(self, loss: float, window: int = 10) -> int | None:
        """The first step at which the mean training loss of the last `window` steps is at most `loss`; None: never."""
        for step in range(window, len(self.losses) + 1):
            if sum(self.losses[step - window : step]) / window <= loss:
                return step
        return None


def train(config: TrainConfig, *, resume: bool = False, overwrite: bool = False, model: nn.Module | None = None,
          callbacks: Sequence[Callback] = (), console: Console | None = None) -> Result:  # fmt: skip
    """Run the settings to their last step, or on from the newest checkpoint under `config.out`.

    `callbacks` are called as `callback(trainer, record)` after each step and evaluation; `console` shows progress.
    Ctrl-C finishes the step, saves, and returns with `interrupted` set. Raises `ConfigError`, `DataError`,
    `CheckpointError`, `DivergedError`; the last good checkpoint stays in each case.
    """
    out = Path(config.out)
    start = checkpoint.latest(out) if resume else None
    if start is None:
        make_way(out, overwrite)
    trainer = Trainer(config, model)
    notes = trainer.resume(start) if start else []
    with ExitStack() as stack:
        show = stack.enter_context(Show(console, title(config), trainer.step, config.steps))
        interrupt = stack.enter_context(
            Interrupt(lambda: show.say("finishing this step, then saving; Ctrl-C again stops now"))
        )
        metrics = Metrics(out / "metrics.jsonl", trainer.step)
        stack.callback(metrics.close)
        stack.enter_context(deterministic(trainer.device, config.deterministic))
        for note in notes:
            show.say(f"the losses will differ from those of an uninterrupted run: {note}")
        folder = loop(trainer, metrics, interrupt, (lambda _, record: show.record(record), *callbacks)) or start
    return result(trainer, metrics, folder, interrupt.asked and trainer.step < config.steps)


def loop(trainer: Trainer, metrics: Metrics, interrupt: Interrupt, callbacks: Sequence[Callback]) -> Path | None:
    """Step, evaluate and save until the last step or Ctrl-C; the last checkpoint written."""
    config, folder = trainer.config, None

    def log(record: Record) -> None:
        metrics.write(record)
        for callback in callbacks:
            callback(trainer, record)

    while trainer.step < config.steps and not interrupt.asked:
        log(trainer.train_step())
        last = trainer.step == config.steps
        if last or due(trainer.step, config.eval_interval):
            log(trainer.evaluate())
        if last or interrupt.asked or due(trainer.step, config.checkpoint_interval):
            folder = trainer.save()
    return folder


def due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def result(trainer: Trainer, metrics: Metrics, folder: Path | None, interrupted: bool) -> Result:
    steps = metrics.of("step")
    return Result(
        config=trainer.config,
        trainer=trainer,
        losses=[record["loss"] for record in steps],
        evaluations=metrics.of("evaluation"),
        gradient_variance=gradient_variance(trainer.run.optimizer),
        tokens_per_second=statistics.median([record["tokens_per_second"] for record in steps] or [0.0]),
        metrics=metrics.path,
        checkpoint=folder,
        interrupted=interrupted,
    )


def make_way(out: Path, overwrite: bool) -> None:
    """Refuse to start over a run that has checkpoints, unless told to delete it."""
    found = checkpoint.checkpoints(out)
    if found and not overwrite:
        raise ConfigError(
            f"{out} holds a run at {found[-1].name}: resume it (--resume), delete it (--overwrite), or set another out."
        )
    shutil.rmtree(out / "checkpoints", ignore_errors=True)


def title(config: TrainConfig) -> str:
    return config.fp8_recipe.name if config.fp8_recipe else config.precision


def device_of(name: str) -> torch.device:
    """The device that a setting names; `auto` is the first GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device cannot be {name!r}: it is auto, cpu, cuda or cuda:N.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device={name!r} is not here: this machine has {torch.cuda.device_count()} CUDA GPUs. Use cpu."
        )
    return device


def attach(run: checkpoint.Run, config: TrainConfig) -> Any:
    """Let the optimizer update scales and weight codes after each step, where the run has a recipe."""
    from ..nn import attach as attach_hooks

    return attach_hooks(run.model, run.optimizer, run.scaler) if config.fp8_recipe else None


def remake_codes(model: nn.Module) -> None:
    """Make the weight codes that were in use when the model's state was saved.

    That state has noted this step's weights already, so the codes are made in evaluation mode, which notes nothing (the
    article's scaler would push a second scale); what is then left to do is to mark the weights as seen in this step.
    """
    from ..nn import refresh
    from ..scaling import DelayedState

    model.eval()
    refresh(model)
    model.train()
    for module in model.modules():
        if isinstance(module, DelayedState):
            module.expect(OPERANDS.index("w"))
