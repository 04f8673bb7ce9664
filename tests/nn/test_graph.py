"""A captured step gives the losses, weights and scales of the step itself."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import fp8
from fp8.errors import ConfigError
from fp8.nn.graph import Graphed, _states, _updated
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


class Recorded:
    """In place of a CUDA graph, where there is no GPU."""

    replays = 0

    def replay(self) -> None:
        self.replays += 1


def test_a_graph_says_that_its_weight_codes_are_no_longer_the_models() -> None:
    """Loading and moving drop them; a replay would use the old weights' codes, and write to memory that is not its."""
    model = fp8.Linear(16, 16, recipe="delayed")
    fp8.refresh(model)
    replay = Graphed(Recorded(), None, model, lambda: None)  # type: ignore[arg-type]
    replay()
    fp8.refresh(model)
    replay()
    model.load_state_dict(model.state_dict())
    fp8.refresh(model)
    with pytest.raises(ConfigError, match="capture the step again"):
        replay()
    assert replay.graph.replays == 2  # type: ignore[attr-defined]


def test_a_replay_counts_a_step_of_states_that_an_autocast_made() -> None:
    model = fp8.Linear(16, 16)
    with fp8.autocast(recipe="delayed"):
        model(torch.randn(16, 16)).sum().backward()
    fp8.update_scales(model)
    replay = Graphed(Recorded(), None, model, lambda: None)  # type: ignore[arg-type]
    replay()
    assert replay.states[0].steps == 2


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="no CUDA GPU"):
        fp8.graph(lambda: None, nn.Linear(2, 2))


def test_scales_with_an_interval_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    model = fp8.Linear(16, 16, recipe=fp8.Recipe.of("delayed").replace(delayed=Delayed(update_every=4)))
    states = _states(model)
    assert not _updated(states, {state: state.steps for state in states})  # none was updated: it may be in between
    fp8.update_scales(model)
    with pytest.raises(ConfigError, match="update_every=1"):
        _updated(states, {})
    with pytest.raises(ConfigError, match="warm_up"):
        fp8.graph(lambda: None, nn.Linear(2, 2), warm_up=0)
    with pytest.raises(ConfigError, match="two steps"):
        fp8.graph(lambda: None, fp8.Linear(16, 16, recipe="delayed"), warm_up=1)


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["tensorwise", "delayed"])
def test_the_optimizer_may_run_between_replays(recipe: str) -> None:
    x = torch.randn(2, 64, 256, device="cuda", dtype=torch.bfloat16)
    losses = []
    for captured in (False, True):
        model = layer(recipe)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        fp8.attach(model, optimizer)

        def measure(model: nn.Module = model) -> Tensor:
            for parameter in model.parameters():
                parameter.grad = None
            loss = model(x).float().square().mean()
            loss.backward()
            return loss.detach()

        seen, call = [], measure
        for step in range(6):
            if captured and step == 2:
                call = fp8.graph(measure, model, warm_up=2)
            seen.append(float(call()))
            optimizer.step()
        losses.append(seen)
    assert losses[0] == losses[1]
