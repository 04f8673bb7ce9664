"""Running a Hugging Face model over rows of tokens, in memory or layer by layer from disk.

A model that does not fit into memory is built without any (on the meta device). What lies outside its layers is read
once; a layer's weights are read when its turn comes and let go when it is done. A forward pass so reads the file once,
for as many rows as are in the batch, and needs the memory of one layer and of the rows. The numbers are the same.

A CPU computes in FP32, which it does several times faster than BF16, and no worse; a GPU in the type of the file.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.layers import hf_config, model_class, need_transformers, skeleton
from ..checkpoint.source import Source
from ..errors import CheckpointError

Record = Callable[[Tensor, Tensor, int], None]
SHARE = 0.6  # of the free memory that a model may take


class Runner:
    """A model and how to run it: `run(rows [B, T], record)` hands keys and values [B, KV, T, D] of each layer over."""

    def __init__(self, model: nn.Module, device: str, head: bool, batch: int) -> None:
        self.model, self.device, self.batch = model, device, batch
        self.inner: Any = model if head else getattr(model, "base_model", model)

    @property
    def generates(self) -> bool:
        """Whether the model has a KV cache."""
        return bool(getattr(self.model, "can_generate", lambda: False)())

    @torch.no_grad()
    def run(self, rows: Tensor, record: Record | None) -> None:
        rows = rows.to(self.device)
        if record is None:
            self.inner(input_ids=rows)
        else:
            self.inner(input_ids=rows, past_key_values=recording(self.model, record), use_cache=True)


def recording(model: nn.Module, record: Record) -> Any:
    """A cache that shows what it is given. It keeps its layer's keys and values only until the next layer's come."""
    from transformers import DynamicCache

    class Recording(DynamicCache):
        def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            record(key_states, value_states, layer_idx)
            return key_states, value_states

    config: Any = model.config
    return Recording(config=config)


@contextmanager
def run_model(source: Source, device: str, stream: bool | None, head: bool) -> Iterator[Runner]:
    """The model of a checkpoint, ready to run."""
    free = free_memory()
    if stream is None:
        stream = device == "cpu" and free is not None and 4 * parameters(source) > SHARE * free
    model = streamed(source, device, head) if stream else loaded(source, computing(source, device)).to(device)
    yield Runner(model.eval(), device, head, batch=16 if stream else 8)


def computing(source: Source, device: str) -> torch.dtype:
    """The type that the model runs in."""
    return torch.float32 if device == "cpu" else source.dtype


def parameters(source: Source) -> int:
    return sum(math.prod(entry.shape) for entry in source.entries.values())


def free_memory() -> int | None:
    """Bytes that can be had without swapping, where the system tells."""
    try:
        with open("/proc/meminfo") as file:
            line = next(line for line in file if line.startswith("MemAvailable"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        pages = os.sysconf_names.get("SC_AVPHYS_PAGES")
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if pages is not None else None


def loaded(source: Source, dtype: torch.dtype) -> nn.Module:
    """The model in memory."""
    quiet(need_transformers())
    config = hf_config(source.folder, source.config)
    tensors = {name: source.read(name) for name in source.entries}
    return model_class(source.config).from_pretrained(None, config=config, state_dict=tensors, dtype=dtype)


def quiet(transformers: Any) -> None:
    """No progress bars of its own, and no warnings of what the file has too much."""
    transformers.utils.logging.disable_progress_bar()


# --------------------------------------------------------------------------- layer by layer


def streamed(source: Source, device: str, head: bool) -> nn.Module:
    """The model with its layers on disk, and its head only where that is asked for.

    Raises `CheckpointError` where a layer's tensors are not found by name.
    """
    model, blocks = hollow(source, device, head)
    for _, block, mine in blocks:
        block.register_forward_pre_hook(partial(_come, model, source, mine, device))
        block.register_forward_hook(_go)
    return model


def hollow(source: Source, device: str, head: bool) -> tuple[nn.Module, list[tuple[str, nn.Module, list[str]]]]:
    """The model with all but its layers in memory, and the layers: name, module, and the tensors to `fill` it with."""
    model = skeleton(source)
    model.eval().requires_grad_(False)
    blocks = repeated(model)
    inside = {name for prefix, _ in blocks for name in held(model) if name.startswith(prefix + ".")}
    base = "" if head else getattr(model, "base_model_prefix", "") + "."
    base = base if any(name.startswith(base) for name in held(model)) else ""
    fill(model, source, [name for name in held(model) if name not in inside and name.startswith(base)], device)
    remake_buffers(model, device)
    return model, [(p, block, [n for n in sorted(inside) if n.startswith(p + ".")]) for p, block in blocks]


def _come(model: nn.Module, source: Source, names: list[str], device: str, block: nn.Module, args: Any) -> None:
    fill(model, source, names, device)


def _go(block: nn.Module, args: Any, out: Any) -> None:
    block.to("meta")


def repeated(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers: the members of the longest list of modules."""
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    if not lists:
        raise CheckpointError(
            "this model has no list of layers to go through one by one: calibrate it on a machine with more memory, or "
            "go without by --no-kv-cache."
        )
    name, longest = max(lists, key=lambda pair: sum(p.numel() for p in pair[1].parameters()))
    return [(f"{name}.{i}", block) for i, block in enumerate(longest)]


def held(model: nn.Module) -> list[str]:
    """The names of parameters and of buffers that files hold; tied ones once."""
    return list({id(t): name for name, t in reversed(list(model.state_dict(keep_vars=True).items()))}.values())


def fill(model: nn.Module, source: Source, names: list[str], device: str) -> None:
    """Put the file's tensors in the place of the model's empty ones."""
    for name in names:
        there = stored_as(model, source, name)
        if there is None and name.endswith(("lm_head.weight",)):
            continue  # tied
        if there is None:
            raise CheckpointError(
                f"{source.folder} has no tensor {name!r}: transformers makes it of several, which cannot be streamed. "
                "Calibrate on a machine with more memory, or go without by --no-kv-cache."
            )
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        tensor = source.read(there)
        tensor = tensor.to(device, computing(source, device) if tensor.is_floating_point() else None)
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        else:
            module._buffers[leaf] = tensor


def stored_as(model: nn.Module, source: Source, name: str) -> str | None:
    """What the file calls a tensor of the model."""
    prefix = getattr(model, "base_model_prefix", "") + "."
    options = (name, prefix + name, name.removeprefix(prefix))
    return next((option for option in options if option in source.entries), None)


def remake_buffers(model: nn.Module, device: str) -> None:
    """Compute the buffers that no file holds: the tables of rotary embeddings."""
    for name, module in list(model.named_modules()):
        if not any(b.device.type == "meta" for b in module._buffers.values() if b is not None):
            continue
        try:
            made = type(module)(config=model.config)
        except TypeError:
            raise CheckpointError(
                f"{name} ({type(module).__name__}) computes a table that cannot be made alone: calibrate on a machine "
                "with more memory, or go without by --no-kv-cache."
            ) from None
        if any(True for _ in module.parameters()):  # those come from the file
            module._buffers.update({key: None if b is None else b.to(device) for key, b in made._buffers.items()})
            continue
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, made.to(device).eval())
