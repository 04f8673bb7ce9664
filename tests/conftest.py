"""What every test shares: GPU tests skip visibly where there is no Hopper, and property tests carry no deadline."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# Child processes import this checkout too, whatever is installed.
SOURCE = str(Path(__file__).parent.parent / "src")
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [SOURCE, os.environ.get("PYTHONPATH")]))

settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


def why_no_hopper() -> str | None:
    """The reason why GPU tests cannot run here, or None."""
    if not torch.cuda.is_available():
        return "no CUDA GPU"
    major, minor = torch.cuda.get_device_capability()
    return None if (major, minor) == (9, 0) else f"compute capability {major}.{minor}, not 9.0 (Hopper)"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = why_no_hopper()
    if reason:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each law on the CPU and, where there is one, on the GPU."""
    return torch.device(request.param)
