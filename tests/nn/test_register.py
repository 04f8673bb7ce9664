"""`fp8.register` teaches `convert` a type of one's own; Hugging Face's Conv1D it knows by name."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import fp8
from fp8.errors import ConvertError
from fp8.nn.convert import CONVERTERS, ORIGINALS
from fp8.recipe import Recipe


class Odd(nn.Linear):
    """A subclass, which nobody converts unasked."""


@pytest.fixture
def _table():  # type: ignore[no-untyped-def]
    held = dict(CONVERTERS), dict(ORIGINALS)
    yield
    for table, was in zip((CONVERTERS, ORIGINALS), held, strict=True):
        table.clear()
        table.update(was)


class Doubler(nn.Module):
    """An operator that nobody knows: 2 x W^T."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return 2 * nn.functional.linear(x, self.kernel)


class Fp8Doubler(nn.Module):
    def __init__(self, old: Doubler, recipe: Recipe, name: str) -> None:
        super().__init__()
        self.kernel = old.kernel
        self.fp8 = fp8.nn.Fp8Products(recipe, name)

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.fp8(x, self.kernel, None)

    def fp8_weights(self):  # type: ignore[no-untyped-def]
        yield self.fp8, self.kernel


@pytest.mark.usefixtures("_table")
def test_a_registered_type_is_replaced_wherever_it_is_held_and_put_back() -> None:
    one = Doubler()
    holder = nn.ModuleDict({"a": one, "b": nn.ModuleDict({"again": one})})
    assert fp8.convert(holder).kept["a"] == "no converter is registered for Doubler (fp8.register adds one)"
    fp8.register(Doubler, lambda module, recipe, name: Fp8Doubler(module, recipe, name))
    assert fp8.convert(holder, "rowwise").converted == ["a"]
    assert holder["a"] is holder["b"]["again"]
    assert isinstance(holder["a"], Fp8Doubler)
    with fp8.count_products() as products:
        holder["a"](torch.randn(2, 4)).sum().backward()
    assert products.counts == {("a", "forward"): 1, ("a", "grad_w"): 1}
    fp8.revert(holder)
    assert holder["a"] is one
    assert holder["b"]["again"] is one
    assert one.kernel.grad is not None


@pytest.mark.usefixtures("_table")
def test_a_registered_subclass_may_be_changed_in_place() -> None:
    def in_place(module: nn.Module, recipe: Recipe, name: str) -> None:
        module.fp8 = fp8.nn.Fp8Products(recipe, name)
        module.forward = lambda x: 2 * module.fp8(x, module.weight, module.bias)  # type: ignore[method-assign]

    fp8.register(Odd, in_place)
    converted = nn.ModuleDict({"odd": Odd(8, 8)})
    assert fp8.convert(converted).converted == ["odd"]
    with fp8.count_products() as products:
        converted["odd"](torch.ones(2, 8))
    assert products.layers() == {"odd"}


def test_only_module_types_can_be_registered() -> None:
    with pytest.raises(ConvertError, match=r"needs a subclass of torch\.nn\.Module"):
        fp8.register(int, lambda *_: None)


def conv1d() -> tuple[type[nn.Module], nn.Module]:
    """Hugging Face's Conv1D; without transformers, a class of the same name and make."""
    try:
        from transformers.pytorch_utils import Conv1D
    except ImportError:

        def __init__(self, nf: int, nx: int) -> None:  # type: ignore[no-untyped-def]  # noqa: N807
            nn.Module.__init__(self)
            self.nf = nf
            self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

        def forward(self, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
            y = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
            return y.view(*x.shape[:-1], self.nf)

        namespace = {"__init__": __init__, "forward": forward, "__module__": "transformers.pytorch_utils"}
        Conv1D = type("Conv1D", (nn.Module,), namespace)
    torch.manual_seed(0)
    return Conv1D, Conv1D(12, 8)


@pytest.mark.usefixtures("_table")
def test_conv1d_of_hugging_face_is_a_linear_layer_with_its_weight_on_its_side() -> None:
    kind, plain = conv1d()
    holder = nn.ModuleDict({"c_attn": copy.deepcopy(plain)})
    assert fp8.convert(holder, "rowwise").converted == ["c_attn"]
    x = torch.randn(2, 3, 8)
    w = holder["c_attn"].weight
    expected = fp8.matmul(
        fp8.quantize(x, tile="row"), fp8.quantize(w.t(), tile="row"), torch.float32, "fast", holder["c_attn"].bias
    )
    assert torch.equal(holder["c_attn"](x), expected)
    optimizer = torch.optim.SGD(holder.parameters(), 0.1)
    fp8.attach(holder, optimizer)
    holder["c_attn"](x).sum().backward()
    optimizer.step()
    part, weight = next(iter(holder["c_attn"].fp8_weights()))
    assert torch.equal(part.codes.view(torch.uint8), fp8.quantize(weight, tile="row").codes.view(torch.uint8))
    fp8.revert(holder)
    assert type(holder["c_attn"]) is kind
    with torch.no_grad():
        assert torch.allclose(holder["c_attn"](x), plain_result(x, *holder.parameters()), atol=1e-5)


def plain_result(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x @ weight + bias


@pytest.mark.usefixtures("_table")
def test_a_converted_conv1d_can_be_copied_and_pickled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its class is made while running, so pickle has to be told how to make it again."""
    import io
    import sys
    import types

    kind, plain = conv1d()
    if kind.__module__ not in sys.modules:
        for name in ("transformers", kind.__module__):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        monkeypatch.setattr(sys.modules[kind.__module__], "Conv1D", kind, raising=False)
    holder, x = nn.ModuleDict({"c_attn": plain}), torch.randn(2, 8)
    fp8.convert(holder, "rowwise")
    buffer = io.BytesIO()
    torch.save(holder, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(holder), torch.load(buffer, weights_only=False)):
        assert torch.equal(other["c_attn"](x), holder["c_attn"](x))
        assert type(fp8.revert(other)["c_attn"]) is kind
