"""The measurements on a machine that cannot make them, and the table that is made from those that were."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fp8.bench import optimizer
from fp8.bench.command import command
from fp8.bench.table import markdown
from fp8.errors import BackendError, ConfigError

HERE = Path(__file__).parent.parent


def test_the_readme_shows_what_was_measured() -> None:
    assert markdown(HERE / "bench" / "results") in (HERE / "README.md").read_text(encoding="utf-8")


def test_an_unknown_measurement_is_named_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'gemm'"):
        command(["gem"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_runs_instead() -> None:
    with pytest.raises(BackendError, match=r"needs a CUDA device.*`fp8 demo` runs on any machine"):
        command(["gemm"])


def test_the_optimizers_are_measured_on_any_device_and_leave_no_stale_codes() -> None:
    rows = optimizer.measure(1, torch.float32, "cpu", matrices=((64, 32), (32, 64)), only=["blockwise", "no codes"])
    assert {row.stale for row in rows} == {None, 0}
    assert [row.recipe for row in rows].count("blockwise") == 5


def test_the_bytes_of_a_step() -> None:
    """By hand: FP32 weights and moments 28; codes and, where it is not in the same pass, another read."""
    of = lambda *rest: optimizer.bytes_of(1, *rest)  # noqa: E731
    assert of(torch.float32, None, None, False) == of(torch.float32, "fp32", None, False) == 28
    assert of(torch.float32, None, "blockwise", False) == 28 + 4 + 2
    assert of(torch.float32, "fp32", "blockwise", True) == 28 + 2
    assert of(torch.float32, "bf16", "tensorwise", True) == 20 + 4 + 2
    assert of(torch.bfloat16, "bf16", None, False) == 2 + 8 + 2 + 8
