"""A short quantization-aware training of a Hugging Face folder: `train_folder`.

    OUT/high    the trained weights in FP32, a folder like MODEL: training goes on from it, `fp8 quantize` takes it
    OUT/fp8     its FP8 checkpoint, with the scales that training went by; `fp8 verify OUT/fp8 --against OUT/high`
    OUT/qat.json  settings, losses, and perplexity on held-out rows before and after

A few hundred steps at a low learning rate move each weight by less than the distance of two codes, so what is learned
is which way to round. **Distillation**, the default, teaches the rounded model the unrounded one's distribution of the
next token (the Kullback-Leibler divergence, Hinton et al., 2015): a target of a whole vocabulary a token, and none of
the text's own, so the model does not learn the text. Without it the text is the target, and a model that has not seen
its like gets better at it, which says nothing about rounding.

Masters are FP32, in which BF16 files go exactly; on a GPU the rest runs under BF16 autocast. AdamW without weight
decay, gradients clipped at 1, a warm-up over a tenth of the steps, then a straight line to zero.

Every eighth row, at most 16, is held out and judges. Ctrl-C saves, and the same command goes on; on a CPU to the same
bits. OUT appears when it is complete.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from ..checkpoint.partial import Partial, alone
from ..checkpoint.quantize import Options, Scales, quantize_folder, refuse_quantized
from ..checkpoint.source import Source
from ..checkpoint.tensorfile import refuse_full_disk, write_json
from ..errors import CheckpointError, ConfigError, DataError
from ..nn.fake_quantize import MeasuredScale
from ..train.interrupt import Interrupt
from ..train.loop import device_of
from ..train.progress import Show
from .qat import prepare_qat, trained_scales
from .running import loaded
from .text import digest, read_texts, rows_of, tokenizer_for

STATE = "state.pt"
MOST_HELD_OUT = 16


@dataclass(frozen=True)
class ShortQat:
    """What decides the training. Raises `ConfigError`.

    texts       files, `*.jsonl` with a field "text", or `moby-dick`
    steps       of the optimizer, each of `batch` rows of `length` tokens
    lr          the largest learning rate
    distill     learn from the unrounded model, else from the text
    kv          "head", "token" or None, as for `prepare_qat`
    rounding    False: nothing is rounded and only OUT/high written: the control, which says what training alone does
    tokenizer   "bytes" or a folder, where the model's is not beside it
    """

    texts: tuple[str, ...] = ("moby-dick",)
    steps: int = 100
    batch: int = 8
    length: int = 256
    lr: float = 1e-5
    distill: bool = True
    kv: str | None = "head"
    seed: int = 0
    tokenizer: str | None = None
    device: str = "auto"
    save_every: int = field(default=50, compare=False)
    rounding: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "device", str(device_of(self.device)))
        for name, low in (("steps", 1), ("batch", 1), ("length", 2), ("save_every", 1)):
            if getattr(self, name) < low:
                raise ConfigError(f"{name} must be at least {low}, not {getattr(self, name)}.")
        if not 0 < self.lr < 1:
            raise ConfigError(f"lr must be between 0 and 1, not {self.lr}; 1e-5 suits most models.")

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        warm = max(self.steps // 10, 1)
        return self.lr * min((step + 1) / warm, (self.steps - step) / max(self.steps - warm, 1))


@dataclass(frozen=True)
class Trained:
    """How a run ended, and perplexities of the held-out rows: "model", it "rounded", and rounded and "trained"."""

    folder: Path
    step: int
    interrupted: bool
    perplexity: Mapping[str, float]

    def __str__(self) -> str:
        if self.interrupted:
            return f"stopped after step {self.step}; it is kept in {self.folder}.partial, and the same command goes on."
        base, before, after = (self.perplexity[name] for name in ("model", "rounded", "trained"))
        change = [f"{100 * (value / base - 1):+.2f} %" for value in (before, after)]
        return (
            f"held-out perplexity: {base:.4f}; rounded {before:.4f} ({change[0]}); rounded and trained {after:.4f} "
            f"({change[1]})\n{self.folder / 'high'}: the trained weights in FP32\n{self.folder / 'fp8'}: the FP8 "
            "checkpoint"
        )


def train_folder(
    model: str | Path, out: str | Path, options: Options, how: ShortQat, console: Console | None = None
) -> Trained:
    """Train the rounding of a Hugging Face folder, and write both results into the folder `out`.

    Raises `CheckpointError` for a model that is damaged, quantized already or predicts no next token, and for an `out`
    that exists; `DataError` for a text that is too short.
    """
    source = Source.open(model)
    refuse_quantized(source)
    with alone(Path(out)):
        partial = Partial(Path(out), facts(source, options, how))
        refuse_full_disk(Path(out).absolute().parent, 2 * 4 * source.nbytes)
        return trained(Run(source, options, how, partial), console)


def trained(run: Run, console: Console | None) -> Trained:
    """Train to the last step, or until Ctrl-C, and write the results."""
    how, partial = run.how, run.partial
    with Interrupt(lambda: console.print("stopping after this step") if console else None) as interrupt:
        with Show(console, "qat", run.step, how.steps) as show:
            run.train(show, lambda: interrupt.asked)
        if run.step < how.steps:
            return Trained(partial.out, run.step, True, run.perplexity)
        run.perplexity["trained"] = perplexity(run.model, run.held)
        run.write()
    return Trained(partial.out, run.step, False, run.perplexity)


def facts(source: Source, options: Options, how: ShortQat) -> dict[str, Any]:
    """All that decides what is trained."""
    from .. import __version__

    plain = {k: v for k, v in asdict(how).items() if k != "save_every"}
    return {"fp8": __version__, "source": source.fingerprint(), "options": asdict(options)} | {
        "qat": plain | {"texts": digest(how.texts)}
    }


class Run:
    """A model that is being trained, from the start or from where an interrupted run stopped."""

    def __init__(self, source: Source, options: Options, how: ShortQat, partial: Partial) -> None:
        self.source, self.options, self.how, self.partial = source, options, how, partial
        tokenizer = tokenizer_for(source.folder, how.tokenizer)
        self.rows, self.held = split(rows_for(source, how, tokenizer))
        self.model: Any = loaded(source, torch.float32).to(how.device)
        if not getattr(self.model, "can_generate", lambda: False)():
            raise CheckpointError(
                f"{source.folder} predicts no next token: train it in a loop of your own, with fp8.prepare_qat."
            )
        self.step, self.losses, self.perplexity = 0, list[float](), dict[str, float]()
        self.teacher = self._teacher() if how.distill else None
        if not partial.resumed:
            self.perplexity["model"] = perplexity(self.model, self.held)
        if how.rounding:
            layers = (options.scheme, options.skip, how.kv)
            prepare_qat(self.model, *layers, head=options.head, scale_rounding=options.scales)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=how.lr, betas=(0.9, 0.95), weight_decay=0.0)
        self.order = order(len(self.rows), how.steps * how.batch, how.seed)
        if (partial.folder / STATE).is_file():
            self.load()
        else:
            torch.manual_seed(how.seed)
            self.perplexity["rounded"] = perplexity(self.model, self.held)

    def _teacher(self) -> nn.Module:
        teacher = copy.deepcopy(self.model).eval().requires_grad_(False)
        return teacher.to(torch.bfloat16) if self.how.device != "cpu" else teacher

    def train(self, show: Show, stop: Callable[[], bool]) -> None:
        """Until the last step, or until told to stop; either is saved."""
        while self.step < self.how.steps and not stop():
            started = time.perf_counter()
            loss = self.one_step()
            speed = self.how.batch * self.how.length / (time.perf_counter() - started)
            rate = self.how.rate(self.step - 1)
            show.record({"kind": "step", "step": self.step, "loss": loss, "tokens_per_second": speed, "lr": rate})
            if self.step % self.how.save_every == 0 and self.step < self.how.steps:
                self.save()
        self.save()

    def one_step(self) -> float:
        first = self.step * self.how.batch
        rows = self.rows[self.order[first : first + self.how.batch]].to(self.how.device)
        for group in self.optimizer.param_groups:
            group["lr"] = self.how.rate(self.step)
        self.optimizer.zero_grad()
        loss = self.loss(rows)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.losses.append(float(loss.detach()))
        if not math.isfinite(self.losses[-1]):
            raise CheckpointError(f"the loss of step {self.step + 1} is {self.losses[-1]}: lower the learning rate.")
        self.step += 1
        return self.losses[-1]

    def loss(self, rows: Tensor) -> Tensor:
        student = logits(self.model.train(), rows)
        if self.teacher is None:
            return next_token_loss(student, rows)
        with torch.no_grad():
            target = logits(self.teacher, rows)
        learned, known = (F.log_softmax(x.flatten(0, 1).float(), -1) for x in (student, target))
        return F.kl_div(learned, known, reduction="batchmean", log_target=True)

    # ----------------------------------------------------------------------- stopping and going on

    def save(self) -> None:
        if not self.partial.resumed and self.step == 0:
            return
        self.partial.note("step", self.step)
        state = {
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step,
            "losses": self.losses, "perplexity": self.perplexity, "random": torch.get_rng_state(),
            "seen": {name: part.seen for name, part in measured(self.model)},
        }  # fmt: skip
        aside = self.partial.folder / f"{STATE}.writing"
        torch.save(state, aside)
        aside.replace(self.partial.folder / STATE)

    def load(self) -> None:
        state = torch.load(self.partial.folder / STATE, map_location="cpu", weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.losses, self.perplexity = state["step"], state["losses"], state["perplexity"]
        torch.set_rng_state(state["random"])
        for name, part in measured(self.model):
            part.seen.copy_(state["seen"][name])

    # ----------------------------------------------------------------------- writing

    def write(self) -> None:
        """Both folders and the record, then the name."""
        high, scales = self.partial.folder / "high", self.scales()
        self.model.cpu().save_pretrained(high)
        for relative in self.source.beside(self.partial.folder):
            if not (high / relative).exists():
                (high / relative).parent.mkdir(parents=True, exist_ok=True)
                (high / relative).write_bytes((self.source.folder / relative).read_bytes())
        if self.how.rounding and not (self.partial.folder / "fp8").exists():
            quantize_folder(high, self.partial.folder / "fp8", self.options, ScalesOfTraining(scales))
        record = {"settings": asdict(self.how), "options": asdict(self.options)}
        write_json(self.partial.folder / "qat.json", record | {"losses": self.losses, "perplexity": self.perplexity})
        for name in (STATE, "manifest.json"):
            (self.partial.folder / name).unlink()
        self.partial.folder.rename(self.partial.out)

    def scales(self) -> Scales:
        found = trained_scales(self.model)
        told = {"observer": "the largest in training", "texts": list(self.how.texts), "tokens": self.how.length
                * self.how.batch * self.how.steps}  # fmt: skip
        return Scales(found.inputs, found.keys, found.values, told if found.inputs or found.keys else {})


class ScalesOfTraining:
    """What `quantize_folder` asks of a calibration, answered by the training."""

    def __init__(self, scales: Scales) -> None:
        self.scales, self.facts = scales, asdict(scales)

    def __call__(self, source: Source, layers: Any) -> Scales:
        return self.scales


def measured(model: nn.Module) -> Iterator[tuple[str, MeasuredScale]]:
    """The scales that training measures."""
    for name, part in model.named_modules():
        if isinstance(part, MeasuredScale):
            yield name, part


# --------------------------------------------------------------------------- rows and losses


def rows_for(source: Source, how: ShortQat, tokenizer: Any) -> Tensor:
    """As many rows as the training wants and an eighth to judge it by, or as the text has."""
    wanted = how.steps * how.batch
    wanted += min(max(wanted // 8, 2), MOST_HELD_OUT)
    vocabulary = int(source.config.get("vocab_size") or 1 << 62)
    limit = int(source.config.get("max_position_embeddings") or 1 << 62)
    if how.length > limit:
        raise DataError(f"length={how.length} is more than the {limit} positions that this model knows.")
    return rows_of(read_texts(how.texts), tokenizer, wanted, how.length, vocabulary)


def split(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows to learn from, and every eighth, or fewer, to judge by."""
    step = max(8, -(-len(rows) // MOST_HELD_OUT))
    out = torch.arange(len(rows)) % step == min(step, len(rows)) - 1
    return rows[~out], rows[out]


def order(rows: int, count: int, seed: int) -> Tensor:
    """Which row comes when: all of them in a random order, then again in another."""
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([torch.randperm(rows, generator=generator) for _ in range(-(-count // rows))])[:count]


def logits(model: Any, rows: Tensor) -> Tensor:
    with torch.autocast(rows.device.type, torch.bfloat16, enabled=rows.device.type == "cuda"):
        return model(input_ids=rows, use_cache=False).logits


def next_token_loss(logits: Tensor, rows: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), rows[:, 1:].flatten())


@torch.no_grad()
def perplexity(model: nn.Module, rows: Tensor) -> float:
    """Of each row's tokens after its first, in evaluation mode."""
    device = next(model.parameters()).device
    losses = [float(next_token_loss(logits(model.eval(), row[None].to(device)), row[None].to(device))) for row in rows]
    return math.exp(sum(losses) / len(losses))
