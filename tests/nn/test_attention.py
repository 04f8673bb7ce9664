"""`fp8.MultiheadAttention` is `nn.MultiheadAttention` but for rounding, and torch's encoder layers really run in
FP8."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

import fp8
from fp8.errors import ShapeError

B, T, S, E, H = 2, 5, 7, 16, 4
HIDE_LAST = torch.tensor([[False] * S, [False] * (S - 2) + [True] * 2])
BAN = torch.rand(T, S, generator=torch.Generator().manual_seed(3)) < 0.3
BAN[:, 0] = False
ADD = torch.randn(T, S, generator=torch.Generator().manual_seed(4))

CASES = {
    "self": {},
    "weights of each head": {"average_attn_weights": False},
    "no weights": {"need_weights": False},
    "bool mask": {"attn_mask": BAN},
    "float mask": {"attn_mask": ADD},
    "mask of every head": {"attn_mask": BAN.expand(B * H, T, S)},
    "padding": {"key_padding_mask": HIDE_LAST},
    "float padding": {"key_padding_mask": HIDE_LAST.float() * -1e4},
    "both masks, no weights": {"attn_mask": ADD, "key_padding_mask": HIDE_LAST.float() * -1e4, "need_weights": False},
}
KINDS = {"plain": {}, "kdim and vdim": {"kdim": 12, "vdim": 20}, "no bias": {"bias": False}}


def pair(kind: str = "plain", **settings) -> tuple[nn.MultiheadAttention, nn.MultiheadAttention]:  # type: ignore[no-untyped-def]
    """torch's module, and a converted copy of it."""
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(E, H, **KINDS[kind], **settings)
    ours = copy.deepcopy(theirs)
    fp8.convert(ours, "rowwise")
    return theirs, ours


def near(a: Tensor, b: Tensor) -> bool:
    """Within what FP8 projections cost: some 4 % of the norm for each of up to three on the way."""
    return a.shape == b.shape and float((a - b).detach().norm() / b.detach().norm()) < 0.15


def same(ours: nn.Module, theirs: nn.Module, *inputs: Tensor, **keywords) -> bool:  # type: ignore[no-untyped-def]
    """Equal but for the order of sums where FP8 is switched off; near where it is on."""
    expected = theirs(*inputs, **keywords)
    with fp8.autocast(enabled=False):
        high = ours(*inputs, **keywords)
    low = ours(*inputs, **keywords)
    for a, b, c in zip(high, low, expected, strict=True):
        if c is None:
            assert a is b is None
        elif not (torch.allclose(a, c, atol=1e-6, rtol=1e-5) and near(b, c)):
            return False
    return True


def inputs(theirs: nn.MultiheadAttention, batch_first: bool) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(B, T, E), torch.randn(B, S, theirs.kdim), torch.randn(B, S, theirs.vdim)
    return (q, k, v) if batch_first else (q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("batch_first", [True, False])
def test_cross_attention_is_torchs(kind: str, case: str, batch_first: bool) -> None:
    theirs, ours = pair(kind, batch_first=batch_first)
    q, k, v = inputs(theirs, batch_first)
    assert same(ours, theirs, q, k, v, **CASES[case])


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("case", ["self", "no weights", "causal", "causal hint"])
def test_self_attention_is_torchs(case: str, batch_first: bool) -> None:
    theirs, ours = pair(batch_first=batch_first)
    x = torch.randn(B, T, E) if batch_first else torch.randn(T, B, E)
    causal = torch.ones(T, T, dtype=torch.bool).triu(1)
    settings = {
        "causal": {"attn_mask": causal},
        "causal hint": {"attn_mask": causal, "is_causal": True, "need_weights": False},
    }
    keywords = settings.get(case, CASES.get(case, {}))
    assert same(ours, theirs, x, x, x, **keywords)


def test_unbatched_input_is_torchs() -> None:
    theirs, ours = pair()
    q, k = torch.randn(T, E), torch.randn(S, E)
    masks = {"attn_mask": BAN, "key_padding_mask": HIDE_LAST[1]}
    for keywords in ({}, masks, {"attn_mask": BAN.expand(H, T, S)}):
        assert same(ours, theirs, q, k, k, **keywords)
    with pytest.raises(ShapeError, match="all be batched"):
        ours(torch.randn(T, B, E), k, k)


def test_gradients_reach_every_parameter_and_are_torchs() -> None:
    theirs, ours = pair(batch_first=True)
    x = torch.randn(B, T, E)
    for module in (theirs, ours):
        module(x, x, x)[0].square().sum().backward()
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        if "bias" not in name:  # the key bias has no gradient but noise
            assert near(a.grad, b.grad), name


def test_each_projection_is_counted_under_its_own_name() -> None:
    _, ours = pair(batch_first=True)
    model = nn.ModuleDict({"attend": ours})
    fp8.revert(model)
    fp8.convert(model)
    x, y = torch.randn(B, T, E), torch.randn(B, S, E)
    with fp8.count_products() as itself:
        ours(x, x, x)
    with fp8.count_products() as other:
        ours(x, y, y)
    assert itself.layers() == {"attend.in_proj", "attend.out_proj"}
    assert other.layers() == {"attend.q_proj", "attend.k_proj", "attend.v_proj", "attend.out_proj"}


# --------------------------------------------------------------------------- torch's encoder


def encoder(layers: int = 2, **settings) -> nn.Module:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    settings = {"batch_first": True, "dropout": 0.0, **settings}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch tells why its fast path will not be taken
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, 32, **settings), layers)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_an_encoder_runs_every_projection_in_fp8(grad: bool, training: bool, padded: bool) -> None:
    """In evaluation without gradients torch would jump to a fused kernel that knows of no FP8; with a padding mask it
    would pass nested tensors on the way. Both are switched off, and on again by `revert`."""
    model = encoder().train(training)
    plain = copy.deepcopy(model)
    report = fp8.convert(model, "rowwise")
    assert len(report.converted) == 6
    x = torch.randn(B, S, E)
    keywords = {"src_key_padding_mask": HIDE_LAST} if padded else {}
    with torch.set_grad_enabled(grad), fp8.count_products() as products:
        y = model(x, **keywords)
    names = {
        f"layers.{i}.{part}"
        for i in range(2)
        for part in ("self_attn.in_proj", "self_attn.out_proj", "linear1", "linear2")
    }
    assert products.counts == dict.fromkeys(((name, "forward") for name in names), 1)
    plain.train()
    expected = plain(x, **keywords)
    seen = ~HIDE_LAST if padded else torch.ones(B, S, dtype=torch.bool)
    assert near(y[seen], expected[seen])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_revert_gives_the_fast_path_back() -> None:
    model = encoder().eval()
    with torch.no_grad():
        before = model(torch.ones(B, S, E), src_key_padding_mask=HIDE_LAST)
        fp8.revert(model) if fp8.convert(model) else None
        after = model(torch.ones(B, S, E), src_key_padding_mask=HIDE_LAST)
    assert model.use_nested_tensor
    assert [layer.activation_relu_or_gelu for layer in model.layers.children()] == [1, 1]
    assert torch.equal(before, after)


def test_a_trace_tells_which_layers_ran() -> None:
    """A layer that is converted but never called is not FP8, and the report says so."""
    model = nn.ModuleDict({"used": encoder(1), "spare": nn.Linear(4, 4)})
    report = fp8.convert(model)

    class Caller(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return model["used"](x)

    traced = report.trace(Caller().eval(), torch.randn(B, S, E))
    ran = {decision.name: decision.ran for decision in traced.decisions if decision.fp8}
    assert ran == {
        "used.layers.0.self_attn": True,
        "used.layers.0.linear1": True,
        "used.layers.0.linear2": True,
        "spare": False,
    }
    assert "spare" in str(traced)
    assert "NOT RUN" in str(traced)


def test_is_causal_alone_is_the_causal_mask() -> None:
    """torch asks for the mask beside it; here it is made."""
    torch.manual_seed(0)
    ours, x = fp8.MultiheadAttention(8, 2, batch_first=True, recipe="rowwise"), torch.randn(2, 5, 8)
    hidden = torch.ones(5, 5, dtype=torch.bool).triu(1)
    for need_weights in (False, True):
        alone = ours(x, x, x, is_causal=True, need_weights=need_weights)[0]
        assert torch.equal(alone, ours(x, x, x, attn_mask=hidden, need_weights=need_weights)[0])


def test_the_weights_returned_in_training_are_those_after_dropout() -> None:
    """As torch's: the same elements are zero for the same seed."""
    torch.manual_seed(0)
    theirs, x = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True), torch.randn(2, 5, 8)
    ours = fp8.MultiheadAttention(8, 2, dropout=0.5, batch_first=True, recipe="tensorwise")
    ours.load_state_dict(theirs.state_dict())
    zeros = []
    for module in (ours, theirs):
        torch.manual_seed(1)
        zeros.append(module(x, x, x, average_attn_weights=False)[1] == 0)
    assert zeros[0].any()
    assert torch.equal(*zeros)
