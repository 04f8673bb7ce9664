"""A backend is chosen for a reason, refused for a reason, and both can be read."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

from fp8 import backends
from fp8.backends import Backend, choose
from fp8.errors import BackendError

PICKY = Backend("picky", "the moon", lambda request: "the moon is not up", "fp8.quantize.triton")
REFERENCE = Backend("reference", "nothing", lambda request: None, "fp8.quantize.reference")
HERE = SimpleNamespace(device=torch.device("cpu"))


def test_the_first_that_accepts_runs_and_the_refusals_are_kept() -> None:
    choice = choose("quantize", (PICKY, REFERENCE), HERE)
    assert choice.name == "reference"
    assert choice.refused == (("picky", "the moon is not up"),)
    assert str(choice) == "reference (picky: the moon is not up)"


def test_when_none_accepts_every_reason_is_told() -> None:
    with pytest.raises(BackendError, match=r"no backend can run quantize\. picky: the moon is not up"):
        choose("quantize", (PICKY,), HERE)


def test_an_unknown_backend_is_named_with_the_nearest() -> None:
    with pytest.raises(BackendError, match="Did you mean 'reference'"):
        choose("quantize", (PICKY, REFERENCE), HERE, forced="referense")


def test_a_gpu_older_than_hopper_runs_the_definitions_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """An A100 has compute capability 8.0."""
    monkeypatch.setattr(backends, "capability", lambda index: (8, 0))
    older = SimpleNamespace(device=torch.device("cuda", 0))
    with pytest.warns(
        UserWarning, match=r"reference implementation: the GPU has compute capability 8.0.*only_if_faster"
    ):
        assert choose("quantize", (REFERENCE,), older).name == "reference"
    assert "are those of 9.0 (Hopper)" in (backends.why_not_triton(older.device) or "")


@pytest.mark.parametrize("have", [(10, 0), (10, 3), (12, 0)])
def test_a_gpu_newer_than_hopper_gets_the_definitions_until_someone_measures_it(
    have: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """B200, B300 and RTX 50: FP8 tensor cores, but not the ones whose bits this library promises."""
    monkeypatch.setattr(backends, "capability", lambda index: have)
    newer = SimpleNamespace(device=torch.device("cuda", 0))
    with pytest.warns(UserWarning, match=r"newer than 9.0 \(Hopper\): its accumulator is another one"):
        assert choose("quantize", (REFERENCE,), newer).name == "reference"
    for why in (backends.why_not_hopper, backends.why_not_triton):
        assert f"compute capability {have[0]}.{have[1]}" in (why(newer.device) or "")


def test_a_hopper_gpu_is_not_spoken_of(monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder) -> None:
    monkeypatch.setattr(backends, "capability", lambda index: (9, 0))
    assert choose("quantize", (REFERENCE,), SimpleNamespace(device=torch.device("cuda", 0))).name == "reference"
    assert not recwarn.list


def test_kernels_start_on_the_gpu_that_holds_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton starts them on the current one."""
    entered: list[torch.device] = []
    monkeypatch.setattr(backends, "why_not_hopper", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device) or contextlib.nullcontext())
    monkeypatch.setattr(backends, "function", lambda module, name: lambda: name)
    for index in (0, 1):
        request = SimpleNamespace(device=torch.device("cuda", index))
        assert choose("quantize", (REFERENCE,), request).run() == "quantize"
    assert entered == [torch.device("cuda", 1)]
