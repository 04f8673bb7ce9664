"""What a measurement ran on: the figures mean nothing without it."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import torch


def machine() -> dict[str, Any]:
    """The GPU (or CPU) and the versions of what computes on it."""
    packages = ("torch", "triton", "nvidia-cublas", "nvidia-cublas-cu12", "nvidia-cudnn-cu13", "fp8")
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU",
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        **{name: found for name in packages if (found := version(name)) is not None},
    }


def version(package: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def save(folder: str | Path, name: str, results: Any) -> Path:
    """Write `{"machine": ..., "results": ...}` to `folder/name.json`."""
    path = Path(folder) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n")
    return path
