"""`fp8.AdamW` as an optimizer: torch's results, skipped steps, states that go on bit for bit, and fresh codes."""

from __future__ import annotations

import copy
import importlib
import io
import math

import pytest
import torch
from torch import Tensor, nn

import fp8
from fp8.errors import ConfigError, RecipeError, TensorError
from fp8.fused.adamw import moments
from fp8.scaling import DelayedState
from waiting import never_waits

KINDS = tuple(moments.KINDS)
kinds = pytest.mark.parametrize("kind", KINDS)
RECIPES = ("tensorwise", "delayed", "rowwise", "blockwise", "delayed_article")


def model_of(dtype: torch.dtype = torch.float32, recipe: str | None = None) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 8)).to(dtype)
    return model if recipe is None else converted(model, recipe)


def converted(model: nn.Module, recipe: str) -> nn.Module:
    fp8.convert(model, recipe)
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, start: int = 0) -> None:
    """Steps whose gradients are a function of the step's number and the model."""
    for step in range(start, start + steps):
        draw = torch.Generator().manual_seed(step)
        x = torch.randn(16, 24, generator=draw).to(next(model.parameters()).dtype)
        optimizer.zero_grad()
        model(x).float().square().mean().backward()
        optimizer.step()


def bits(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().clone().contiguous().view(-1).view(torch.uint8) for name, t in tensors.items()}


def everything(model: nn.Module, optimizer: fp8.AdamW) -> dict[str, Tensor]:
    """The bits of all that a step changes."""
    states = {f"{n}/{k}": t for n, p in model.named_parameters() for k, t in optimizer.state.get(p, {}).items()}
    buffers = {n: b for n, b in model.named_buffers() if b is not None}
    return bits({**dict(model.named_parameters()), **states, **buffers})


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --------------------------------------------------------------------------- torch's results


def test_it_is_torchs_adamw_but_for_roundings() -> None:
    """Each step may differ by one unit in the last place of the parameter, and by 2^-21 of the step itself."""
    mine, torchs = model_of(), model_of()
    settings = {"lr": 0.01, "betas": (0.9, 0.99), "weight_decay": 0.1}
    a, b = fp8.AdamW(mine.parameters(), **settings), torch.optim.AdamW(torchs.parameters(), **settings)
    for _ in range(20):
        for p, q in zip(mine.parameters(), torchs.parameters(), strict=True):
            p.grad = q.grad = torch.randn_like(p)
        a.step()
        b.step()
    for p, q in zip(mine.parameters(), torchs.parameters(), strict=True):
        bound = 20 * (torch.maximum(p.abs(), q.abs()) * 2.0**-23 + 0.01 * 2.0**-21)
        assert bool(((p - q).abs() <= bound).all())


def test_a_master_takes_steps_that_bf16_cannot() -> None:
    p = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = fp8.AdamW([p], lr=1e-4, weight_decay=0.0)
    for _ in range(50):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert optimizer.state[p]["master"].tolist() == pytest.approx([1 - 50e-4] * 4, rel=1e-5)
    assert torch.equal(p, optimizer.state[p]["master"].bfloat16())


def test_a_model_gives_two_groups() -> None:
    optimizer = fp8.AdamW(model_of(), weight_decay=0.3)
    assert [(group["weight_decay"], len(group["params"])) for group in optimizer.param_groups] == [(0.3, 2), (0.0, 2)]


def test_groups_have_their_own_settings_and_missing_gradients_keep_their_step() -> None:
    p, q, r = (nn.Parameter(torch.ones(3)) for _ in range(3))
    optimizer = fp8.AdamW([{"params": [p, r], "lr": 0.5, "moments": "fp8"}, {"params": [q]}], lr=0.25, weight_decay=0.0)
    for step in range(2):
        p.grad, q.grad = torch.ones(3), torch.ones(3) if step else None
        optimizer.step()
    assert p.tolist() == pytest.approx([0.0] * 3, abs=1e-6)
    assert q.tolist() == pytest.approx([0.75] * 3)
    assert r.tolist() == [1.0] * 3
    assert r not in optimizer.state
    assert [optimizer.state[x]["step"].item() for x in (p, q)] == [2.0, 1.0]
    assert optimizer.state[p]["exp_avg"].dtype == torch.float8_e4m3fn


def test_a_learning_rate_in_a_tensor_is_the_same_as_a_number() -> None:
    first, second = model_of(), model_of()
    rate = torch.tensor(0.03)
    train(first, fp8.AdamW(first, lr=rate), 3)
    train(second, fp8.AdamW(second, lr=float(rate)), 3)
    assert same(bits(dict(first.named_parameters())), bits(dict(second.named_parameters())))


def test_a_closure_is_called_with_gradients_on() -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = fp8.AdamW([p], lr=0.5, weight_decay=0.0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = p.sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 2.0
    assert p.tolist() == pytest.approx([0.5, 0.5])


# --------------------------------------------------------------------------- gradient scalers


@kinds
def test_a_step_that_overflowed_changes_nothing(kind: str) -> None:
    model = model_of(recipe="blockwise")
    optimizer = fp8.AdamW(model, moments=kind)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    fp8.attach(model, optimizer, scaler)
    for bad in (False, True):
        before = everything(model, optimizer)
        optimizer.zero_grad()
        scaler.scale(model(torch.randn(4, 24)).square().mean()).backward()
        if bad:
            next(model.parameters()).grad.fill_(torch.inf)  # type: ignore[union-attr]
        scaler.step(optimizer)
        scaler.update()
        assert same(before, everything(model, optimizer)) == bad
    assert scaler.get_scale() == 2.0**9


def test_a_scaled_gradient_gives_the_bits_of_an_unscaled_one() -> None:
    """For a loss scale that is a power of two."""
    plain, scaled = model_of(), model_of()
    a, b = fp8.AdamW(plain, moments="bf16"), fp8.AdamW(scaled, moments="bf16")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for _ in range(3):
        x = torch.randn(4, 24)
        for model, optimizer in ((plain, a), (scaled, b)):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            (scaler.scale(loss) if optimizer is b else loss).backward()
        a.step()
        scaler.step(b)
        scaler.update()
    assert same(everything(plain, a), everything(scaled, b))


# --------------------------------------------------------------------------- states


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_that_was_saved_goes_on_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    whole, half = model_of(dtype), model_of(dtype)
    one, first = (fp8.AdamW(m, lr=0.01, moments=kind, seed=5) for m in (whole, half))
    train(whole, one, 6)
    train(half, first, 3)
    file = io.BytesIO()
    torch.save([half.state_dict(), first.state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file)
    resumed = model_of(dtype)
    second = fp8.AdamW(resumed, lr=0.5, moments=kind)
    resumed.load_state_dict(weights)
    second.load_state_dict(state)
    assert same(everything(half, first), everything(resumed, second))
    train(resumed, second, 3, start=3)
    assert same(everything(whole, one), everything(resumed, second))


def test_a_state_of_torchs_adamw_goes_on() -> None:
    model, twin = model_of(), model_of()
    torchs = torch.optim.AdamW(model.parameters())
    train(model, torchs, 2)
    twin.load_state_dict(model.state_dict())
    mine = fp8.AdamW(twin.parameters())
    mine.load_state_dict(torchs.state_dict())
    train(twin, mine, 1, start=2)
    train(model, torchs, 1, start=2)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-6, atol=1e-9)


def test_a_copy_of_the_optimizer_is_another_one() -> None:
    model = model_of()
    optimizer = fp8.AdamW(model, moments="fp8")
    train(model, optimizer, 1)
    twin = copy.deepcopy(optimizer)
    assert twin.param_groups[0]["params"][0] is not optimizer.param_groups[0]["params"][0]
    assert twin.state_dict()["state"].keys() == optimizer.state_dict()["state"].keys()


def test_the_seed_and_nothing_else_moves_the_rounding() -> None:
    found = []
    for seed in (1, 1, 2):
        model = model_of()
        train(model, fp8.AdamW(model, moments="bf16", seed=seed), 4)
        found.append(bits(dict(model.named_parameters())))
    assert same(found[0], found[1])
    assert not same(found[0], found[2])


# --------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"moments": "fp9"}, ConfigError, "Did you mean 'fp8'"),
        ({"rounding": "up"}, RecipeError, "rounding"),
        ({"lr": -1.0}, ConfigError, "lr must be"),
        ({"lr": torch.tensor([1.0, 2.0])}, ConfigError, "one element"),
        ({"betas": (0.9, 1.0)}, ConfigError, "betas"),
        ({"eps": math.nan}, ConfigError, "eps"),
        ({"seed": -1}, ConfigError, "seed"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        fp8.AdamW(model_of(), **settings)


@pytest.mark.parametrize(
    "p", [torch.ones(2, dtype=torch.float64), torch.ones(2, dtype=torch.cfloat), torch.ones(3, 2).t()]
)
def test_parameters_that_cannot_be_updated_are_refused(p: Tensor) -> None:
    with pytest.raises(TensorError, match=r"torch\.optim\.AdamW"):
        fp8.AdamW([nn.Parameter(p)])


def test_gradients_that_cannot_be_read_are_refused() -> None:
    p = nn.Parameter(torch.ones(3, 2))
    optimizer = fp8.AdamW([p])
    p.grad = torch.ones(2, 3).t()
    with pytest.raises(TensorError, match="strided"):
        optimizer.step()
    p.grad = torch.ones(3, 2).to_sparse()
    with pytest.raises(TensorError, match="to_dense"):
        optimizer.step()


def test_moments_of_another_kind_are_refused() -> None:
    model = model_of()
    old, new = fp8.AdamW(model, moments="bf16"), fp8.AdamW(model_of(), moments="fp8")
    train(model, old, 1)
    state = old.state_dict()
    for group in state["param_groups"]:
        group["moments"] = "fp8"
    with pytest.raises(ConfigError, match="moments='bf16'"):
        new.load_state_dict(state)


# --------------------------------------------------------------------------- codes


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_that_follow_are_those_of_a_refresh(recipe: str, dtype: torch.dtype) -> None:
    """The same run with codes written by the optimizer, and by a refresh after it: parameters, states, codes, scales
    and the delayed state, bit for bit."""
    ends = []
    for followed in (True, False):
        model = model_of(dtype, recipe)
        optimizer = fp8.AdamW(model, lr=0.01, moments="bf16")
        fp8.attach(model, optimizer)
        if not followed:
            optimizer.before_update.clear()
        train(model, optimizer, 4)
        ends.append(everything(model, optimizer))
        fresh = copy.deepcopy(model).eval()
        fp8.refresh(fresh)
        for held, made in zip(parts(model), parts(fresh), strict=True):
            assert (
                torch.equal(held.codes.view(torch.uint8), made.codes.view(torch.uint8)) or recipe == "delayed_article"
            )
    assert same(*ends)


def parts(model: nn.Module) -> list[fp8.nn.Fp8Products]:
    return [module for module in model.modules() if isinstance(module, fp8.nn.Fp8Products)]


@pytest.mark.parametrize(("recipe", "left"), [("blockwise", 0), ("delayed", 0), ("tensorwise", 2), ("rowwise", 2)])
def test_a_weight_is_quantized_once_a_step(
    recipe: str, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """What is left for the refresh: nothing; or the cast of a tensor whose amax was measured; or all."""
    model = model_of(recipe=recipe)
    optimizer = fp8.AdamW(model)
    handle = fp8.attach(model, optimizer)
    room = importlib.import_module("fp8.nn.attach")
    casts, run = [], room.run_many
    monkeypatch.setattr(room, "run_many", lambda found, *rest: casts.extend(found) or run(found, *rest))
    train(model, optimizer, 2)
    assert len(casts) == 2 * left
    assert all((cast.key is not None) == (recipe == "tensorwise") for cast in casts)
    handle.remove()
    assert optimizer.before_update == []


def test_loading_a_state_keeps_what_is_attached_and_a_copy_has_nothing() -> None:
    model = converted(model_of(), "delayed")
    optimizer = fp8.AdamW(model, lr=1e-3)
    fp8.attach(model, optimizer)
    train(model, optimizer, 2)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, 1, 2)
    assert len(optimizer.followed) == 2
    assert copy.deepcopy(optimizer).before_update == []


def test_weights_of_which_the_optimizer_holds_nothing_are_refreshed() -> None:
    """A frozen layer under delayed scaling gets its new scale all the same; its amax is noted."""
    model = model_of(recipe="delayed")
    model[0].weight.requires_grad_(False)
    optimizer = fp8.AdamW(model)
    fp8.attach(model, optimizer)
    train(model, optimizer, 2)
    states = [module for module in model.modules() if isinstance(module, DelayedState)]
    assert all(state.pending[1] >= 0 for state in states)
    assert all(part.codes is not None for part in parts(model))


# --------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", RECIPES[:4])
def test_nothing_waits_for_the_gpu_and_a_graph_replays(recipe: str) -> None:
    """Steps under torch's sync detector; then the same steps from a captured graph: the same bits."""
    ends = []
    for captured in (False, True):
        torch.manual_seed(0)
        model = converted(nn.Sequential(nn.Linear(256, 512), nn.Linear(512, 256)).cuda(), recipe)
        optimizer = fp8.AdamW(model, lr=torch.tensor(0.01, device="cuda"), moments="fp8")
        fp8.attach(model, optimizer)
        x = torch.randn(64, 256, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())

        def step(model: nn.Module = model, optimizer: fp8.AdamW = optimizer, x: Tensor = x) -> None:
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)

        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
            with never_waits():
                step()
        torch.cuda.current_stream().wait_stream(stream)
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            for _ in range(3):
                graph.replay()
        else:
            for _ in range(3):
                step()
        torch.cuda.synchronize()
        ends.append(everything(model, optimizer))
    assert same(*ends)
