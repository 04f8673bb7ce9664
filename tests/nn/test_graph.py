"""A captured step gives the losses, weights and scales of the step itself."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import fp8
from fp8.errors import ConfigError
from fp8.recipe import Delayed


def layer(recipe: str) -> fp8.TransformerLayer:
    torch.manual_seed(0)
    return fp8.TransformerLayer(
        256, 384, 2, num_kv_heads=1, norm="rmsnorm", activation="swiglu", bias=False, causal=True, rope_theta=1e4,
        recipe=recipe,
    ).to("cuda", torch.bfloat16)  # fmt: skip


def stepper(model: nn.Module, x: Tensor):  # type: ignore[no-untyped-def]
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(1e-3, device="cuda"), fused=True, capturable=True)
    fp8.attach(model, optimizer)

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = model(x).float().square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", "rowwise", "blockwise"])
def test_replays_are_the_steps_themselves(recipe: str) -> None:
    torch.use_deterministic_algorithms(True)
    x = torch.randn(2, 64, 256, device="cuda", dtype=torch.bfloat16)
    plain = layer(recipe)
    captured = copy.deepcopy(plain)
    step = stepper(plain, x)
    want = [step().clone() for _ in range(7)]
    replay = fp8.graph(stepper(captured, x), captured, warm_up=3)  # a capture runs nothing: three steps so far
    got = [replay().clone() for _ in range(4)]
    torch.use_deterministic_algorithms(False)
    assert [float(v) for v in want[3:]] == [float(v) for v in got]
    for (name, a), b in zip(plain.state_dict().items(), captured.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.gpu
def test_delayed_scales_that_a_step_never_updates_are_refused() -> None:
    model, x = layer("delayed"), torch.randn(1, 16, 256, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match="update_scales"):
        fp8.graph(lambda: model(x).sum().backward(), model)


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="no CUDA GPU"):
        fp8.graph(lambda: None, nn.Linear(2, 2))


def test_scales_with_an_interval_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    model = fp8.Linear(16, 16, recipe=fp8.Recipe.of("delayed").replace(delayed=Delayed(update_every=4)))
    with pytest.raises(ConfigError, match="update_every=1"):
        fp8.graph(lambda: None, model)
    with pytest.raises(ConfigError, match="warm_up"):
        fp8.graph(lambda: None, nn.Linear(2, 2), warm_up=0)
