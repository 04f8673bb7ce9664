"""A small convolutional network with batch norm learns the handwritten digits of scikit-learn: in FP8 within one point
of FP32, and, as a control, not at all when its gradients are broken on the way."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor, nn

import fp8
from fp8.recipe import Operand, Recipe

once_a_step = importlib.import_module("fp8.nn.attach")  # fp8.nn.attach is the function


datasets = pytest.importorskip("sklearn.datasets")


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """1797 images of 8 x 8, shuffled: 1347 to learn from, 450 to be judged by."""
    images, labels = datasets.load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x = (torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16)[order]
    y = torch.tensor(labels, dtype=torch.int64)[order]
    return x[:1347], y[:1347], x[1347:], y[1347:]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 24, 3, padding=1, stride=2, bias=False), nn.BatchNorm2d(24), nn.ReLU(),
        nn.Flatten(), nn.Linear(24 * 4 * 4, 48), nn.ReLU(), nn.Linear(48, 10),
    )  # fmt: skip


def accuracy(model: nn.Module, epochs: int = 4) -> float:
    """Percent of the test images named rightly after training with AdamW."""
    x, y, x_test, y_test = digits()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    fp8.attach(model, optimizer)
    generator = torch.Generator().manual_seed(1)
    for _ in range(epochs):
        for batch in torch.randperm(len(y), generator=generator).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        return 100 * float((model(x_test).argmax(1) == y_test).float().mean())


@pytest.fixture(scope="module")
def in_fp32() -> float:
    return accuracy(network())


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", "rowwise", "blockwise"])
def test_fp8_is_within_a_point_of_fp32(recipe: str, in_fp32: float) -> None:
    model = network()
    report = fp8.convert(model, recipe)
    assert report.converted == ["0", "3", "7", "9"]
    assert set(report.kept.values()) == {"normalization stays in high precision"}
    assert in_fp32 > 96
    assert accuracy(model) >= in_fp32 - 1


@pytest.mark.parametrize("control", ["stale scale", "no mantissa"])
def test_a_control_fails(control: str, in_fp32: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same check on two broken libraries: gradients under a scale 2^24 too large, so that all of them are flushed
    to zero; codes cut down to their sign and exponent."""
    from fp8.nn import products

    right = products._quantize

    def stale_scale(x, operand, power_of_two, scale, both, amax):  # type: ignore[no-untyped-def]
        if operand.format == "e5m2":
            scale = fp8.quantize(x, "e5m2").scale * 2.0**24 * 57344
        return right(x, operand, power_of_two, scale, both, amax)

    def no_mantissa(*arguments):  # type: ignore[no-untyped-def]
        def cut(q: fp8.Quantized | None) -> fp8.Quantized | None:
            keep = 0xF8 if q is not None and q.format.name == "e4m3" else 0xFC
            return q and fp8.Quantized(
                (q.codes.view(torch.uint8) & keep).view(q.codes.dtype), q.scale, q.tile, q.format
            )

        q, turned, amax = right(*arguments)
        return cut(q), cut(turned), amax

    monkeypatch.setattr(once_a_step, "write_codes", lambda weights, keys=None: [part.forget() for part, _ in weights])
    monkeypatch.setattr(products, "_quantize", stale_scale if control == "stale scale" else no_mantissa)
    model = network()
    fp8.convert(model, Recipe(grad=Operand("e5m2")))
    assert accuracy(model) < in_fp32 - 1
