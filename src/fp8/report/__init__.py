"""Offline reports from the JSON that other rooms produce: the table (screen, page, README) and one HTML file."""

from __future__ import annotations

from .page import write_page
from .table import drawing, markdown, rows, verdict

__all__ = ["drawing", "markdown", "rows", "verdict", "write_page"]
