"""Checkpoints from which a run goes on as if it had never stopped, bit for bit.

What makes step n + 1 what it is, and where each part of it lies in `<out>/checkpoints/step_00000700/`:

    model.safetensors      the model's state_dict: FP32 master weights, and for delayed scaling each layer's history of
                           amaxes, its scales and what is pending. Weight codes are not kept: they are a pure function
                           of the master weight and the scale, and `fp8.refresh` makes the same bytes again (law 7).
    training.safetensors   AdamW's two moments and step count by parameter name; the states of torch's generators.
    state.json             the step, the settings with the recipe, which layers are FP8 and why, the loss scale and its
                           growth count, Python's random generator, the fingerprint of the text, the versions, size and
                           SHA-256 of the other files.

What needs no keeping, because it is a pure function of the step: the learning rate, and which tokens are in which
row. What no file can keep: the order in which a machine adds numbers up. The same bits are promised for the same
machine, torch version and thread count; where one of them differs, resuming says so and goes on.

A checkpoint is whole or absent. It is written into a hidden folder beside its place, flushed to the disk, and
renamed, which is one step for the file system; older checkpoints are deleted after that. A disk that fills up, or a
process killed at any moment, leaves the previous checkpoint as it was. Files hold no time and no path of a temporary
folder: a checkpoint written, read and written again is the same bytes (law 6). Tensors that share memory (a tied
output head) are written once, and the other names are listed under `aliases`.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from ..errors import CheckpointError
from .optimizer import trained

FORMAT = 1
MODEL, TRAINING, STATE = "model.safetensors", "training.safetensors", "state.json"


@dataclass
class Run:
    """Everything of a run that changes from step to step."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: GradScaler | None
    step: int = 0


@dataclass(frozen=True)
class Saved:
    """A checkpoint in memory: `state` is the content of state.json; tensors are on the CPU."""

    folder: Path
    state: dict[str, Any]
    model: dict[str, Tensor]
    training: dict[str, Tensor]


# Writing


def save(out: Path, run: Run, facts: dict[str, Any], keep_last: int) -> Path:
    """Write a checkpoint of the run and delete all but the last `keep_last`; `facts` join state.json.

    Returns its folder. Raises `CheckpointError` where it cannot be written; those before it are then untouched.
    """
    parent = out / "checkpoints"
    folder, aside = parent / f"step_{run.step:08d}", parent / f".step_{run.step:08d}.partial"
    model, aliases = unshared(run.model.state_dict())
    training = optimizer_tensors(run) | random_tensors()
    needed = sum(t.numel() * t.element_size() for t in (*model.values(), *training.values())) + (1 << 20)
    try:
        discard_leftovers(parent)
        refuse_full_disk(parent, needed)
        aside.mkdir()
        save_file(model, aside / MODEL)
        save_file(training, aside / TRAINING)
        write_state(aside, run, facts | {"aliases": aliases})
        publish(aside, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(cannot_write(folder, error, needed)) from None
    for old in checkpoints(out)[:-keep_last]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def unshared(tensors: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Contiguous tensors with one name each, and {other name: first name} for those that share memory."""
    first: dict[tuple[Any, ...], str] = {}
    kept: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, tensor in tensors.items():
        assert isinstance(tensor, Tensor), f"{name} in the state_dict is no tensor"
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.dtype)
        if tensor.numel() and place in first:
            aliases[name] = first[place]
        else:
            first[place] = name
            kept[name] = tensor.detach().contiguous()
    return kept, aliases


def optimizer_tensors(run: Run) -> dict[str, Tensor]:
    """The optimizer's state by parameter name: `weight/exp_avg`, `weight/exp_avg_sq`, `weight/step`."""
    state = run.optimizer.state
    return {
        f"{name}/{key}": value.detach().contiguous()
        for name, parameter in trained(run.model)
        for key, value in state.get(parameter, {}).items()
    }


def random_tensors() -> dict[str, Tensor]:
    """The state of torch's generator on the CPU and on every GPU."""
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"random/cpu": torch.get_rng_state()} | {f"random/cuda.{i}": state for i, state in enumerate(gpus)}


def write_state(folder: Path, run: Run, facts: dict[str, Any]) -> None:
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": digest(folder / name)} for name in (MODEL, TRAINING)
    }
    state = {"format": FORMAT, "step": run.step, **facts, "files": files}
    state["loss_scale"] = run.scaler.state_dict() if run.scaler else None
    state["random"] = random.getstate()
    (folder / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")


def digest(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def publish(aside: Path, folder: Path) -> None:
    """Flush the files to the disk, then give the folder its name; one of the same step, if any, is replaced."""
    for name in (MODEL, TRAINING):  # the safetensors library makes files that only their owner can read
        (aside / name).chmod((aside / STATE).stat().st_mode)
    for path in (*aside.iterdir(), aside):
        flush(path)
    replaced = folder.with_name(f".{folder.name}.replaced.partial")
    if folder.exists():
        folder.rename(replaced)
    aside.rename(folder)
    flush(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def discard_leftovers(parent: Path) -> None:
    """Make the folder, and delete what a killed process left half-written in it."""
    parent.mkdir(parents=True, exist_ok=True)
    for left in parent.glob(".step_*.partial"):
        shutil.rmtree(left, ignore_errors=True)


def refuse_full_disk(parent: Path, needed: int) -> None:
    if (free := shutil.disk_usage(parent).free) < needed:
        raise OSError(f"No space left on device: {free / 1e6:.1f} MB are free")


def cannot_write(folder: Path, error: Exception, needed: int) -> str:
    before = [one.name for one in checkpoints(folder.parent.parent)]
    kept = f"{before[-1]}, written before, is whole" if before else "no checkpoint was written before"
    return (
        f"cannot write the checkpoint {folder}: {error}. It needs {needed / 1e6:.1f} MB. {kept}. "
        "Make room there (or lower keep_last) and resume; another out starts a new run."
    )


# Reading


def checkpoints(out: Path) -> list[Path]:
    """The checkpoints of a run, oldest first; half-written ones are never among them."""
    return sorted(path for path in (out / "checkpoints").glob("step_*") if path.is_dir())


def latest(out: Path) -> Path:
    """The newest checkpoint under `out`; `CheckpointError` where there is none."""
    found = checkpoints(out)
    if not found:
        raise CheckpointError(
            f"there is no checkpoint under {out / 'checkpoints'}: start without resume, or correct out."
        )
    return found[-1]


def read(folder: Path) -> Saved:
    """Read and verify a checkpoint: every file present, of the size and SHA-256 that state.json tells."""
    state = read_state(folder)
    for name, expected in state["files"].items():
        verify(folder / name, expected)
    try:
        model, training = load_file(folder / MODEL), load_file(folder / TRAINING)
    except SafetensorError as error:
        raise CheckpointError(damaged(folder, str(error))) from None
    for name, first in state["aliases"].items():
        model[name] = model[first]
    return Saved(folder, state, model, training)


def read_state(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise CheckpointError(
            f"there is no checkpoint at {folder}; give the folder of one, as in checkpoints/step_00000100."
        )
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(damaged(folder, f"{STATE}: {error.strerror}")) from None
    except ValueError as error:
        raise CheckpointError(damaged(folder, f"{STATE} is cut or no JSON: {error}")) from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        written = state.get("fp8", "unknown") if isinstance(state, dict) else "unknown"
        raise CheckpointError(
            f"{folder} is not in checkpoint format {FORMAT} (it was written by fp8 {written}). "
            f"Resume it with that version (pip install fp8=={written}), or start a new run in another out."
        )
    missing = {"step", "config", "data", "files", "aliases", "loss_scale", "random"} - set(state)
    if missing:
        raise CheckpointError(damaged(folder, f"{STATE} lacks {', '.join(sorted(missing))}"))
    return state


def verify(path: Path, expected: dict[str, Any]) -> None:
    if not path.is_file():
        raise CheckpointError(damaged(path.parent, f"{path.name} is missing"))
    if (size := path.stat().st_size) != expected["bytes"]:
        raise CheckpointError(damaged(path.parent, f"{path.name} has {size} bytes of {expected['bytes']}"))
    if digest(path) != expected["sha256"]:
        raise CheckpointError(damaged(path.parent, f"{path.name} has other content than was written (SHA-256 differs)"))


def damaged(folder: Path, what: str) -> str:
    others = [path.name for path in checkpoints(folder.parent.parent) if path.name < folder.name]
    way_out = f"Delete that folder to resume from {others[-1]}" if others else "Start again without resume"
    return f"the checkpoint {folder} is damaged: {what}. {way_out}, or copy it again from where it is whole."


def restore(saved: Saved, run: Run) -> None:
    """Put a checkpoint into a run that was built with the same settings. The caller refreshes weight codes."""
    try:
        run.model.load_state_dict(saved.model)
    except RuntimeError as error:
        raise CheckpointError(
            f"{saved.folder} does not fit the model: {error}. Build it with the same settings."
        ) from None
    restore_optimizer(saved, run)
    if run.scaler and saved.state["loss_scale"]:
        run.scaler.load_state_dict(saved.state["loss_scale"])
    restore_random(saved)
    run.step = saved.state["step"]


def restore_optimizer(saved: Saved, run: Run) -> None:
    plain = run.optimizer.state_dict()
    plain["state"] = {}
    for index, (name, _) in enumerate(trained(run.model)):
        prefix = f"{name}/"
        found = {key[len(prefix) :]: value for key, value in saved.training.items() if key.startswith(prefix)}
        if found:
            plain["state"][index] = found
    run.optimizer.load_state_dict(plain)


def restore_random(saved: Saved) -> None:
    torch.set_rng_state(saved.training["random/cpu"])
    for index in range(torch.cuda.device_count()):
        if (state := saved.training.get(f"random/cuda.{index}")) is not None:
            torch.cuda.set_rng_state(state, index)
    version, numbers, gauss = saved.state["random"]
    random.setstate((version, tuple(numbers), gauss))
