"""The demo's table: what it says, in a terminal and as Markdown, and how it gets into the README."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fp8.errors import DataError
from fp8.report import markdown, rows, verdict
from fp8.report.readme import main, read_results, with_table
from fp8.report.table import percent, size


def cells(results: dict[str, Any], label: str) -> list[str]:
    return next(row.cells for row in rows(results) if row.label.startswith(label))


def test_each_row_has_a_cell_for_each_arm(results: dict[str, Any]) -> None:
    assert all(len(row.cells) == 2 for row in rows(results))


def test_the_cells(results: dict[str, Any]) -> None:
    assert cells(results, "final validation loss") == ["2.0000", "2.0050"]
    assert cells(results, "against high precision") == ["–", "+0.25 %"]
    assert cells(results, "steps to a training loss of 2.10") == ["17", "not reached"]
    assert cells(results, "weights of the FP8 layers") == ["1 kB", "510 B (51 %)"]
    assert cells(results, "KV cache of 215 tokens") == ["220 kB", "124 kB (56 %)"]
    assert cells(results, "saturated") == ["–", "0, 0, 0 %"]
    assert cells(results, "flushed") == ["–", "0.250, 0.250, 0.250 %"]
    assert cells(results, "FP8 products") == ["0", "3 in 1 layers"]


def test_speed_is_told_on_a_gpu_only(results: dict[str, Any]) -> None:
    assert not any("second" in row.label for row in rows(results))
    results["settings"]["device"] = "cuda"
    assert cells(results, "tokens a second") == ["1,234", "1,234"]


def test_the_verdict_goes_both_ways(results: dict[str, Any]) -> None:
    assert verdict(results) == "FP8 blockwise ends 0.25 % above FP32 (within 0.5 % of its loss)."
    for loss, told in ((2.02, "1.00 % above FP32 (NOT within"), (1.98, "1.00 % below FP32 (NOT within")):
        results["arms"][1]["validation_loss"] = loss
        assert told in verdict(results)


def test_small_numbers_are_not_called_zero() -> None:
    assert [percent(share) for share in (0, 1e-9, 0.00123, 0.5)] == ["0", "<0.001", "0.123", "50.0"]
    assert [size(count) for count in (999, 1234, 1_060_000, 4_270_000_000)] == [
        "999 B",
        "1.23 kB",
        "1.06 MB",
        "4.27 GB",
    ]


def test_the_readme_gets_the_table_and_keeps_the_rest(results: dict[str, Any], tmp_path: Path) -> None:
    page, numbers = tmp_path / "README.md", tmp_path / "demo.json"
    page.write_text("# fp8\n<!-- table:demo -->\nold\n<!-- /table -->\nrest\n")
    numbers.write_text(json.dumps(results))
    main(str(numbers), str(page))
    once = page.read_text()
    assert once.startswith("# fp8\n<!-- table:demo -->\n|")
    assert once.endswith("<!-- /table -->\nrest\n")
    assert "old" not in once
    assert "a processor, 2 threads, torch 2.13.0" in once
    assert markdown(results) in once
    main(str(numbers), str(page))
    assert page.read_text() == once


def test_a_page_without_a_place_is_refused(results: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no '<!-- table:demo -->'"):
        with_table("# fp8", markdown(results))
    with pytest.raises(DataError, match="Run `fp8 demo` first"):
        read_results(tmp_path / "none.json")
