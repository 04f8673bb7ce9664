"""What happens once a step: the delayed scales are updated, then the weight codes are written anew.

`attach` hangs both on an optimizer, after its step; `refresh` and `update_scales` are the two halves, for loops of
one's own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..fused.adamw import AdamW, After
from ..quantize.many import Cast, run_many
from ..scaling import ScaleState, scale_gradients, update
from .linear import Weighted
from .products import Fp8Products


def refresh(model: nn.Module) -> None:
    """Write the codes of every FP8 weight as it is now; forwards use them until the weights are moved, cast or loaded.

    From then on, call it after each change of the weights, or let `attach` do it. Without any refresh, every forward
    quantizes its weight. So does, always, a layer whose weight is no parameter but computed from some (by
    `weight_norm`, a parametrization, or a reordering of a channels-last kernel): its codes would be stale at once.
    """
    write_codes(list(_weights(model)))


def _weights(model: nn.Module) -> Iterator[Weighted]:
    """The FP8 parts with a recipe and the weights whose codes they hold. A computed weight's codes are dropped here."""
    for module in model.modules():
        weights = getattr(module, "fp8_weights", None)
        if weights is None:
            continue
        stored = {p.untyped_storage().data_ptr() for p in module.parameters()}
        for part, weight in weights():
            if weight.untyped_storage().data_ptr() not in stored:
                part.forget()
            elif part.recipe is not None:
                yield part, weight


@torch.no_grad()
def write_codes(weights: Sequence[Weighted], keys: dict[Fp8Products, Tensor] | None = None) -> None:
    """Write the codes of all these weights: those of one device and one way to quantize in one go. `keys`: where the
    amax was measured already."""
    groups: dict[tuple[Any, ...], list[tuple[Fp8Products, Tensor, Cast]]] = {}
    for part, weight in weights:
        cast = dataclasses.replace(part.cast(weight), key=(keys or {}).get(part))
        groups.setdefault((weight.device, *part.weight_form()), []).append((part, weight, cast))
    for (_, form, tile, power_of_two), members in groups.items():
        holder = members[0][0]  # keeps what was prepared for the next time
        holder.prepared = run_many([cast for _, _, cast in members], form, tile, power_of_two, holder.prepared)
        for part, weight, _ in members:
            part.wrote(weight)


def update_scales(model: nn.Module, found_inf: Tensor | bool | None = None) -> None:
    """The one update of delayed scaling a step, after the optimizer's. `found_inf`: the step was skipped and leaves no
    trace."""
    update(_states(model), found_inf)


def _states(model: nn.Module) -> Iterator[ScaleState]:
    for module in model.modules():
        if isinstance(module, Fp8Products) and module.delayed is not None:
            yield module.delayed


class Attached:
    """What `attach` returns: `remove()` takes the hooks off again."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, grad_scaler: Any) -> None:
        self.model, self.optimizer, self.scaler = model, optimizer, grad_scaler
        self.stepped = self.updated = False
        self.following: dict[Fp8Products, Tensor] = {}
        if isinstance(optimizer, AdamW):
            optimizer.before_update.append(self._before_update)
        if grad_scaler is not None:
            _refuse_a_second(grad_scaler.update, model)
            self._update = grad_scaler.update
            grad_scaler.update = self._after_scaler
        self.hook = optimizer.register_step_post_hook(self._after_step)

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self.stepped = True
        if not self.updated:
            update_scales(self.model, getattr(optimizer, "found_inf", None))
        self.updated = False
        self._refresh()

    def _before_update(self, found_inf: Tensor | None) -> dict[Tensor, After]:
        """Called by `fp8.AdamW` when the gradients are final: the scales of the next step, and which codes to write."""
        update_scales(self.model, found_inf)
        self.updated, self.following = True, {}
        whole = {p.data_ptr(): p for group in self.optimizer.param_groups for p in group["params"]}
        follows: dict[Tensor, After] = {}
        for part, weight in _weights(self.model):
            parameter = whole.get(weight.data_ptr())
            if parameter is None or parameter in follows or parameter.numel() != weight.numel():
                continue
            if part.codes_follow and weight.is_contiguous():
                follows[parameter] = After(part.cast(weight), *part.weight_form())
                self.following[part] = parameter
        return follows

    def _refresh(self) -> None:
        """Write the codes that the optimizer has not written."""
        done = self.optimizer.followed if isinstance(self.optimizer, AdamW) else {}
        left, keys = [], {}
        for part, weight in _weights(self.model):
            after = done.get(self.following[part]) if part in self.following else None
            if after is not None and after.cast.key is None:
                part.wrote(weight)
                continue
            left.append((part, weight))
            if after is not None:
                keys[part] = after.cast.key
        self.following = {}
        write_codes(left, keys)

    def _after_scaler(self, new_scale: Any = None) -> None:
        """In place of `GradScaler.update`: a step that it skipped is discarded; a new loss scale moves the gradients'
        history."""
        if not self.stepped:
            update_scales(self.model, True)
            refresh(self.model)  # which notes the amax of the weights again, as after a step
        self.stepped = False
        before = self.scaler.get_scale()
        self._update(new_scale)
        after = self.scaler.get_scale()
        if after != before:
            scale_gradients(_states(self.model), after / before)

    def remove(self) -> None:
        self.hook.remove()
        if isinstance(self.optimizer, AdamW) and self._before_update in self.optimizer.before_update:
            self.optimizer.before_update.remove(self._before_update)
        if self.scaler is not None:
            self.scaler.update = self._update


def _refuse_a_second(update_of_scaler: Any, model: nn.Module) -> None:
    """Two handles that follow one scaler for one model would move its gradient history twice."""
    while isinstance(holder := getattr(update_of_scaler, "__self__", None), Attached):
        if holder.model is model:
            raise ConfigError(
                "this model already follows this GradScaler through another attach: give grad_scaler to one of them."
            )
        update_of_scaler = holder._update


def attach(model: nn.Module, optimizer: torch.optim.Optimizer, grad_scaler: Any = None) -> Attached:
    """After each step of `optimizer`, update the delayed scales of `model` once and refresh its weight codes.

    grad_scaler   a `torch.amp.GradScaler` whose skipped steps are then discarded and whose loss scale is followed

    The weights are quantized once a step, however many micro-batches it has. Returns a handle with `remove()`.
    """
    if not (isinstance(model, nn.Module) and isinstance(optimizer, torch.optim.Optimizer)):
        given = f"{type(model).__name__} and {type(optimizer).__name__}"
        raise ConfigError(f"attach takes a model and its optimizer, in this order; got {given}.")
    refresh(model)
    return Attached(model, optimizer, grad_scaler)
