"""`fp8.AdamW`: the optimizer as torch knows one, over the two functions called `adamw`.

It holds what torch's own does, a state for each parameter and groups of settings, and adds: FP32 masters of BF16
parameters, moments in BF16 or FP8, and `before_update`, by which `fp8.attach` has the codes of the weights written in
the same pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...backends import Backend, Choice, choose, why_not_triton
from ...errors import ConfigError, TensorError, suggest
from ...recipe import one_of
from ...tile import Tile
from . import moments as kept
from .reference import After, Settings, Slot

BACKENDS = (
    Backend("triton", "a Hopper GPU and Triton", lambda p: why_not_triton(p.device), "fp8.fused.adamw.triton"),
    Backend("reference", "nothing", lambda p: None, "fp8.fused.adamw.reference"),
)
BeforeUpdate = Callable[[Tensor | None], dict[Tensor, After]]
STORED = (torch.float32, torch.bfloat16, torch.float16)
ROUNDING = ("stochastic", "nearest")


class AdamW(torch.optim.Optimizer):
    """AdamW with decoupled weight decay, in one pass over all parameters.

    params        a model (its matrices decay, its vectors do not), or parameters or groups, as torch's optimizers take
    lr            a number, or a float32 tensor of one element on the parameters' device, read there at every step
    betas, eps, weight_decay    as in `torch.optim.AdamW`
    moments       what the two moments are kept in: "fp32" (8 bytes an element), "bf16" (4) or "fp8" (2.1, with an
                  expanded range: see `moments.py`)
    rounding      of moments: "stochastic" or "nearest"; None: stochastic in BF16, nearest in FP8 (`moments.py` has why)
    seed          of the stochastic rounding: the same seed, the same bits

    Parameters are FP32; or BF16 or FP16, for which an FP32 master is kept in the state (4 bytes an element) and takes
    every update. Gradients are dense and contiguous. Every setting but `seed` may differ from group to group.

    It takes `found_inf` and `grad_scale` from a `torch.amp.GradScaler` as torch's fused optimizers do: a step that
    overflowed changes nothing, decided on the device. The gradient is left as it is, not divided in place. Nothing is
    read back to the host. With `fp8.attach(model, optimizer)` the weights' codes are written in the same pass (scales
    of 128x128 or delayed), or their amax is measured in it (tensorwise).

    On a CPU the same bits come from the reference. Against `torch.optim.AdamW` with FP32 moments each step differs by
    a few roundings of the last place: the order of operations is in `reference.py`. Raises `ConfigError`,
    `TensorError`.

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.ones(2, 2))
    >>> optimizer = AdamW([weight], lr=0.5, weight_decay=0.0, moments="fp8")
    >>> weight.sum().backward()
    >>> optimizer.step()
    >>> weight[0].tolist()
    [0.5, 0.5]
    """

    _step_supports_amp_scaling = True
    found_inf: Tensor | None
    grad_scale: Tensor | None

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        moments: str = "fp32",
        rounding: str | None = None,
        seed: int = 0,
    ) -> None:
        if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 1 << 32:
            raise ConfigError(f"seed is a whole number from 0 to below 2^32, not {seed!r}.")
        groups = decaying(params, weight_decay) if isinstance(params, nn.Module) else params
        same = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "moments": moments,
                "rounding": rounding, "seed": seed}  # fmt: skip
        self.before_update: list[BeforeUpdate] = []
        self._captured: list[Any] = []  # tables that a captured graph copies from the host again at each replay
        self._forget()
        super().__init__(groups, same)

    def _forget(self) -> None:
        self.followed: dict[Tensor, After] = {}
        self._keys: dict[Tensor, Tensor] = {}
        self._prepared: dict[Any, Any] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name in ("before_update", "_captured"):  # loading a state keeps what it has; a copy begins with nothing
            self.__dict__.setdefault(name, [])
        self._forget()
        super().__setstate__(state)
        for group in self.param_groups:  # of torch's own AdamW
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; refuses settings and parameters that cannot be."""
        check({**self.defaults, **param_group})
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            if parameter.dtype not in STORED or parameter.layout != torch.strided or not parameter.is_contiguous():
                self.param_groups.pop()
                raise TensorError(
                    "fp8.AdamW takes dense, contiguous parameters in float32, bfloat16 or float16, not "
                    f"{told(parameter)}. Give that one to torch.optim.AdamW."
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every parameter that has a gradient. `closure` computes the loss anew, and its gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        follows: dict[Tensor, After] = {}
        for before in self.before_update:
            follows |= before(getattr(self, "found_inf", None))
        self.followed = {}
        for place, (slots, settings) in enumerate(self._work(follows)):
            run, before = self._choose(slots[0].parameter).run, self._prepared.get(place)
            made = self._prepared[place] = run(slots, settings, before)
            if made is not before and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                self._captured.append(made)
        return loss

    def moments(self, parameter: Tensor) -> tuple[Tensor, Tensor]:
        """Both moments of a parameter as they are kept, in FP32 and of its shape."""
        first, second = (kept.read(self.state[parameter], name) for name in kept.NAMES)
        return first, second

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which would turn every tensor into the parameter's type: here each keeps its own, and its bits.
        A state of `torch.optim.AdamW` fits FP32 moments."""
        super().load_state_dict(state_dict)
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for parameter, number in zip(group["params"], saved["params"], strict=True):
                if number in state_dict["state"]:
                    self.state[parameter] = restored(state_dict["state"][number], parameter, group["moments"])

    def _choose(self, parameter: Tensor) -> Choice:
        return choose("adamw", BACKENDS, parameter)

    def _work(self, follows: dict[Tensor, After]) -> Iterator[tuple[list[Slot], Settings]]:
        """What has a gradient, by group and device."""
        number = 0
        for group in self.param_groups:
            devices: dict[torch.device, list[Slot]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    slot = self._slot(parameter, group["moments"], number, follows.get(parameter))
                    devices.setdefault(parameter.device, []).append(slot)
                number += 1
            for device, slots in devices.items():
                yield slots, self._settings(group, device)

    def _slot(self, parameter: Tensor, moments: str, number: int, after: After | None) -> Slot:
        grad = parameter.grad
        assert grad is not None
        if grad.layout != torch.strided or not grad.is_contiguous() or grad.dtype not in STORED:
            raise TensorError(
                f"fp8.AdamW takes dense, contiguous gradients in float32, bfloat16 or float16, not {told(grad)}: "
                "make it so with p.grad = p.grad.to_dense().contiguous() (nn.Embedding: sparse=False)."
            )
        state = self.state[parameter]
        if not state:
            state |= fresh(parameter, moments)
        slot = Slot(parameter, grad, state, number)
        if after is None or not parameter.numel():
            return slot
        if after.tile == Tile(0, 0) and after.cast.given is None:
            key = self._keys.setdefault(parameter, torch.zeros(1, dtype=torch.int32, device=parameter.device))
            after = dataclasses.replace(after, cast=dataclasses.replace(after.cast, key=key))
        followed = dataclasses.replace(slot, after=after)
        if self._choose(parameter).name == "triton":
            from .triton import fits

            if not fits(followed):
                return slot
        self.followed[parameter] = after
        return followed

    def _settings(self, group: dict[str, Any], device: torch.device) -> Settings:
        found_inf, grad_scale = (
            None if value is None else value.to(device)
            for value in (getattr(self, name, None) for name in ("found_inf", "grad_scale"))
        )
        return Settings(
            group["lr"], tuple(group["betas"]), group["eps"], group["weight_decay"], group["moments"],
            (group["rounding"] or kept.ROUNDING[group["moments"]]) == "stochastic",
            group["seed"], found_inf, grad_scale,
        )  # fmt: skip


def decaying(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The parameters that train: matrices with decay, vectors without."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = [p for p in trained if p.ndim >= 2], [p for p in trained if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def fresh(parameter: Tensor, moments: str) -> dict[str, Tensor]:
    """The state of a parameter before its first step."""
    state = {"step": torch.zeros((), device=parameter.device), **kept.fresh(parameter, moments)}
    if parameter.dtype != torch.float32:
        state["master"] = parameter.detach().float()
    return state


def restored(saved: dict[str, Any], parameter: Tensor, moments: str) -> dict[str, Tensor]:
    """A state that was saved, on the parameter's device, each tensor in its own type."""
    state = {name: torch.as_tensor(value).detach().to(parameter.device, copy=True) for name, value in saved.items()}
    held = state["exp_avg"].dtype
    if held != kept.KINDS[moments]:
        raise ConfigError(
            f"this state holds moments in {str(held)[6:]}, and this optimizer has moments={moments!r}: make it with "
            f"moments={next((k for k, v in kept.KINDS.items() if v == held), '?')!r}."
        )
    if parameter.dtype != torch.float32 and "master" not in state:
        state["master"] = parameter.detach().float()
    state["step"] = state["step"].float().reshape(())
    return state


def check(group: dict[str, Any]) -> None:
    """Refuse settings out of range."""
    if group["moments"] not in kept.KINDS:
        raise ConfigError(f"moments cannot be {group['moments']!r}. {suggest(group['moments'], kept.KINDS)}")
    if group["rounding"] is not None:
        one_of(group["rounding"], ROUNDING, "rounding")
    lr, betas = group["lr"], group["betas"]
    if isinstance(lr, Tensor):
        if lr.dtype != torch.float32 or lr.numel() != 1:
            raise ConfigError(f"lr as a tensor is float32 of one element, not {told(lr)}.")
    elif not (isinstance(lr, (int, float)) and 0 <= lr < float("inf")):
        raise ConfigError(f"lr must be a number from 0, not {lr!r}.")
    if not (len(betas) == 2 and all(0 <= beta < 1 for beta in betas)):
        raise ConfigError(f"betas are two numbers from 0 to below 1, not {betas!r}.")
    for name, low in (("eps", 0.0), ("weight_decay", 0.0)):
        if not low <= group[name] < float("inf"):
            raise ConfigError(f"{name} must be a number from {low:g}, not {group[name]!r}.")


def told(tensor: Tensor) -> str:
    """What is particular about a tensor, for a message."""
    layout = "sparse" if tensor.layout != torch.strided else "contiguous" if tensor.is_contiguous() else "strided"
    return f"{str(tensor.dtype)[6:]} {tuple(tensor.shape)}, {layout}"
