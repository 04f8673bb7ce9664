"""One HTML file with everything in it, style, pictures and text: nothing is fetched, so it opens offline."""

from __future__ import annotations

import importlib.util
import json
import math
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from ..errors import DataError
from ..recipe import OPERANDS, PRODUCTS
from . import figures, table

MISSING = "Pictures need matplotlib: pip install 'fp8[report]', then run the demo again."


def write_page(results: dict[str, Any], path: Path) -> Path:
    """Write the report of a demo's results. Raises `DataError` where it cannot be written."""
    return written(path, html(results))


def write_json(path: Path, results: dict[str, Any]) -> Path:
    """Write the results as strict JSON: a number that is not finite becomes null."""
    return written(path, json.dumps(finite(results), indent=1, allow_nan=False) + "\n")


def finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def written(path: Path, text: str) -> Path:
    """Write aside, then rename: a reader finds the whole file or the one before."""
    aside = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise DataError(f"cannot write {path}: {error.strerror}. Make room there, or give another --out.") from None
    return path


def html(results: dict[str, Any]) -> str:
    """The page."""
    room = resources.files("fp8.report")
    source, style = (room.joinpath(n).read_text(encoding="utf-8") for n in ("demo.html.jinja", "style.css"))
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    names = table.heads(results)
    return page.from_string(source).render(
        results=results, style=Markup(style), names=names, heads=names, rows=table.rows(results),
        verdict=table.verdict(results), caption=table.caption(results),
        roles=figures.ROLES, products=PRODUCTS, pictures=pictures(results),
        missing=MISSING, parts=dict(zip(figures.PARTS, ("one", "two", "three", "four"), strict=True)),
    )  # fmt: skip


def pictures(results: dict[str, Any]) -> dict[str, Any]:
    """The pictures of both arms, and those of each FP8 arm by its name; none without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return {}
    arms, names = results["arms"], table.heads(results)
    drawn: dict[str, Any] = {"loss": [figures.loss_curves(arms, names), figures.loss_differences(arms, names)]}
    for arm in arms[1:]:
        drawn[arm["name"]] = {
            "scales": [figures.scale_histories(arm, role) for role in OPERANDS],
            "codes": [figures.code_histogram(arm, role) for role in OPERANDS],
            "shares": [figures.share_history(arm, what) for what in ("saturated", "flushed")],
        }
    return {key: safe(value) for key, value in drawn.items()}


def safe(drawn: Any) -> Any:
    """Our own SVG, marked so that it is not escaped."""
    if isinstance(drawn, dict):
        return {key: safe(value) for key, value in drawn.items()}
    return [Markup(one) for one in drawn]
