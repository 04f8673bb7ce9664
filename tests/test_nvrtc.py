"""CUDA C++ at run time: what is kept, and what is said where it cannot run. Compiling itself needs NVRTC."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from fp8 import nvrtc
from fp8.errors import BackendError
from fp8.formats import format_of
from fp8.fused import Target, across
from fp8.tile import Tile

SOURCE = "fused/both.cu"
CONSTANTS = {
    "PRODUCER": 4, "MODE": 0, "FIRST": 0, "E4M3": 0, "H_E4M3": 1, "POWER": 1, "H_POWER": 1, "ROWS": 1, "COLS": 1,
    "FUNCTION": 0, "GATED": 1, "AGAIN": 1, "H32": 0, "W32": 0, "DIM": 128, "BM": 64, "BLOCKS": 2,
}  # fmt: skip


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """A cache of its own, and a compiler that notes what it is asked for."""
    asked: list[str] = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(nvrtc, "version", lambda: "13.0")
    monkeypatch.setattr(nvrtc, "build", lambda *a: asked.append(str(a)) or f"cubin {len(asked)}".encode())
    return asked


def test_a_kernel_is_built_once_for_all_that_goes_into_it(built: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    first = nvrtc.cached(SOURCE, CONSTANTS, "90")
    assert nvrtc.cached(SOURCE, dict(reversed(CONSTANTS.items())), "90") == first
    assert len(built) == 1
    others = [nvrtc.cached(SOURCE, CONSTANTS | {"BM": 128}, "90"), nvrtc.cached(SOURCE, CONSTANTS, "100")]
    monkeypatch.setattr(nvrtc, "version", lambda: "13.1")
    assert len({first, *others, nvrtc.cached(SOURCE, CONSTANTS, "90")}) == 4
    assert not [path for path in nvrtc.cache_folder().iterdir() if path.suffix != ".cubin"]


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(built: list[str], tmp_path: Path) -> None:
    (tmp_path / "fp8").write_text("a file where the folder would be")
    assert nvrtc.cached(SOURCE, CONSTANTS, "90") == b"cubin 1"
    assert nvrtc.cached(SOURCE, CONSTANTS, "90") == b"cubin 2"


def test_a_user_without_a_home_compiles_in_every_process(built: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", nowhere)
    assert nvrtc.cached(SOURCE, CONSTANTS, "90") == b"cubin 1"


def test_nothing_is_loaded_from_the_folder_one_happens_to_be_in(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "libnvrtc-builtins.so.13").write_text("whoever put this here")
    loaded: list[str] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(nvrtc, "libraries", lambda: ["libnvrtc.so.13"])
    monkeypatch.setattr(nvrtc.ctypes, "CDLL", loaded.append)
    nvrtc.library.__wrapped__()
    assert loaded == ["libnvrtc.so.13"]


@pytest.mark.gpu
def test_a_thread_that_has_called_nothing_yet_can_start_a_kernel() -> None:
    x, into = torch.randn(64, 128, device="cuda").bfloat16(), Target(format_of("e4m3"), Tile.of("tensor"))
    into = into.with_scale(torch.ones(1, 1, device="cuda"))
    want = across(x, into).codes_t
    with ThreadPoolExecutor(1) as pool:
        got = pool.submit(across, x, into).result().codes_t
    assert want is not None
    assert got is not None
    assert torch.equal(want.view(torch.uint8), got.view(torch.uint8))


def test_without_nvrtc_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "library", lambda: None)
    assert "NVRTC" in str(nvrtc.why_not())
    with pytest.raises(BackendError, match="comes with torch"):
        nvrtc.build(SOURCE, CONSTANTS)


@pytest.mark.skipif(nvrtc.library() is None, reason="NVRTC is not installed")
def test_a_source_compiles_for_hopper_and_a_wrong_one_says_why() -> None:
    assert nvrtc.build(SOURCE, CONSTANTS).startswith(b"\x7fELF")
    with pytest.raises(BackendError, match="DIM"):
        nvrtc.build(SOURCE, {name: value for name, value in CONSTANTS.items() if name != "DIM"} | {"PRODUCER": 2})
