"""The report: one file, nothing fetched, text escaped, pictures that follow the page's colours."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from balanced_html import Balanced
from fp8.errors import DataError
from fp8.formats import format_of
from fp8.report import figures, write_page
from fp8.report.page import html, write_json


def test_the_page_is_whole_and_fetches_nothing(results: dict[str, Any]) -> None:
    page = Balanced()
    page.feed(html(results))
    assert page.open == []
    assert all(place.startswith(("#", "data:")) for place in page.places)


def test_generated_text_is_escaped(results: dict[str, Any]) -> None:
    assert "&lt;b&gt;Ishmael&lt;/b&gt; &amp; co" in html(results)


def test_pictures_take_their_colours_from_the_page(results: dict[str, Any]) -> None:
    page = html(results)
    drawn = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    assert drawn.count("<svg") == 2 + 8
    assert set(re.findall(r"#[0-9a-f]{6}", drawn)) <= {"#000000", "#ffffff"}
    identifiers = re.findall(r'\bid="([^"]+)"', drawn)
    assert len(set(identifiers)) == len(identifiers)


def test_the_same_numbers_give_the_same_page(results: dict[str, Any]) -> None:
    assert html(results) == html(results)


def test_without_matplotlib_the_page_says_how_to_get_pictures(
    results: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    page = html(results)
    assert "pip install &#39;fp8[report]&#39;" in page
    assert "<svg" not in page


@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_the_histogram_lies_in_the_order_of_values(name: str) -> None:
    row = format_of(name)
    codes = [code for code in range(256) if math.isfinite(row.decode(code)) and code != 128]
    wanted = sorted(codes, key=row.decode)
    numbers = list(range(256))
    numbers[128] = 0  # the negative zero is counted with the positive one
    assert figures.by_value(numbers, row) == wanted


def test_what_is_not_finite_is_null_and_a_full_disk_is_told(results: dict[str, Any], tmp_path: Path) -> None:
    results["arms"][1]["losses"][3] = float("nan")
    path = write_json(tmp_path / "demo.json", results)
    assert json.loads(path.read_text())["arms"][1]["losses"][3] is None
    (tmp_path / "report.html").mkdir()
    with pytest.raises(DataError, match="give another --out"):
        write_page(results, tmp_path / "report.html")


def test_a_short_run_has_whole_steps_on_its_axis() -> None:
    figure, axes = figures.panel(xlabel="step")
    axes.plot([1, 2, 3], [0.0, 1.0, 2.0])
    figure.draw_without_rendering()
    assert all(tick == int(tick) for tick in axes.get_xticks())
