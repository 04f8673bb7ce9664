"""Laws about the project itself: who may import whom, how files are named, how long they are, that examples run."""

from __future__ import annotations

import ast
import doctest
import importlib
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "fp8"
SOURCES = sorted(PACKAGE.rglob("*.py"))
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])

# The order in which numbers pass through the house. A room imports only from rooms before it.
ROOMS: tuple[str, ...] = (
    *(
        "errors",
        "formats",
        "formats_table",
        "tile",
        "recipe",
        "backends",
        "nvrtc",
        "triton_launch",
        "quantize",
        "matmul",
        "scaling",
        "cost",
        "fused",
    ),
    *("attention", "distributed", "nn", "models", "checkpoint", "train", "calibrate", "evaluate", "hf", "serve"),
    *("report", "advise", "playground", "bench", "demo", "cli", "__main__"),
)
NAMELESS = {"utils", "util", "common", "core", "helpers", "helper", "base", "misc"}
MOST_LINES = 400  # a kernel may be longer


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_rooms(path: Path) -> Iterator[tuple[int, str]]:
    """The rooms of this package that a file imports from, with the line; relative imports resolved."""
    package = path.relative_to(PACKAGE.parent).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            targets = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = list(package[: len(package) - node.level + 1]) if node.level else []
            stem = start + (node.module.split(".") if node.module else [])
            targets = [[*stem, alias.name] if len(stem) == 1 else stem for alias in node.names]
        else:
            continue
        yield from ((node.lineno, t[1]) for t in targets if t[0] == "fp8" and len(t) > 1)


def test_a_room_imports_only_from_rooms_above_it() -> None:
    wrong = []
    for path in SOURCES:
        here = room_of(path)
        if here == "__init__":
            continue
        above = ROOMS[: ROOMS.index(here) + 1]
        rooms = ((line, room) for line, room in imported_rooms(path) if room in ROOMS)
        wrong += [f"{name_of(path)}:{line} imports {room}" for line, room in rooms if room not in above]
    assert wrong == []


def test_every_room_has_its_place() -> None:
    assert {room_of(path) for path in SOURCES} - {"__init__"} <= set(ROOMS)


def test_only_kernel_files_need_triton() -> None:
    needs = [p for p in SOURCES if re.search(r"^(import|from) triton\b", p.read_text(), re.MULTILINE)]
    assert [name_of(p) for p in needs if "triton" not in p.stem] == []


def test_names_say_what_is_held() -> None:
    folders = {path.parent for path in SOURCES}
    assert [name_of(p) for p in [*SOURCES, *folders] if p.stem in NAMELESS] == []


def test_no_bare_except() -> None:
    handlers = [(p, n) for p in SOURCES for n in ast.walk(ast.parse(p.read_text())) if isinstance(n, ast.ExceptHandler)]
    assert [f"{name_of(p)}:{n.lineno}" for p, n in handlers if n.type is None] == []


def test_files_are_short() -> None:
    files = [*SOURCES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "examples").rglob("*.py")]
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in files if "triton" not in p.stem}
    assert {name: n for name, n in lengths.items() if n > MOST_LINES} == {}


def test_functions_are_short() -> None:
    lengths = [
        (node.end_lineno or node.lineno) - node.body[0].lineno + 1
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert statistics.median(lengths) <= 15


IMPORT = """
import sys, time
import torch
sys.modules["triton"] = None  # importing it now fails
start = time.perf_counter()
import fp8
print(time.perf_counter() - start)
"""


def test_import_needs_no_triton_and_is_quick() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 2


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda p: p.name)
def test_python_on_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for block in blocks(page):
        exec(compile(block, str(page), "exec"), {"__name__": page.stem})


# Kernel files are left out: whether Triton compiles or interprets is settled when they are first imported.
WITH_EXAMPLES = [p for p in SOURCES if ">>> " in p.read_text() and "triton" not in p.stem]


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=name_of)
def test_examples_in_docstrings_run(path: Path) -> None:
    result = doctest.testmod(importlib.import_module(module_of(path)), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted
    assert not result.failed


def test_links_between_pages_lead_somewhere() -> None:
    links = [(p, link) for p in PAGES for link in re.findall(r"\]\(([^)#\s]+)", p.read_text()) if "://" not in link]
    assert [f"{p.name}: {link}" for p, link in links if not (p.parent / link).exists()] == []


def test_the_readme_shows_the_house_as_it_is() -> None:
    tree = re.search(r"^src/fp8/\n((?:  \S.*\n)+)", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert tree is not None
    shown = [line.split()[0].rstrip("/").removesuffix(".py") for line in tree[1].splitlines()]
    real = {room_of(path) for path in SOURCES} - {"__init__", "__main__"}
    assert set(shown) - {"demo_text"} == real
    assert [room for room in ROOMS if room in shown] == [room for room in shown if room in ROOMS]
