"""The measurements on a machine that cannot make them, and the table that is made from those that were."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

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
