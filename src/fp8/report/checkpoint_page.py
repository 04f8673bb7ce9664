"""The report of a checkpoint: one HTML file and the same as JSON, from `calibrate/survey.py` and from `fp8 eval`."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from ..errors import DataError
from . import checkpoint_figures as figures

MISSING = "Pictures need matplotlib: pip install 'fp8[report]', then make the report again."
Data = dict[str, Any]


def page(data: Data) -> str:
    """The HTML of a survey, whose `judged` holds the rows of `fp8 eval`."""
    room = resources.files("fp8.report")
    source, style = (room.joinpath(n).read_text(encoding="utf-8") for n in ("checkpoint.html.jinja", "style.css"))
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"share": share, "number": number, "size": size, "duration": duration, "together": together}
    return environment.from_string(source).render(
        data=data, style=Markup(style), pictures=pictures(data), missing=MISSING, summary=list(summary(data)),
        tables=layer_rows(data), kept_groups=kept_groups(data), kinds=figures.KINDS,
    )  # fmt: skip


def pictures(data: Data) -> dict[str, list[Markup]]:
    """The pictures by section; none without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return {}
    weights, seen = data["weights"], data["sensitivity"] or {"layers": [], "groups": []}
    draw = figures.by_depth
    drawn = {
        "sensitivity": [
            draw(seen["groups"], lambda g: g["kl"], "kl", "Impact of each group alone", "KL, nats a token", True),
            figures.estimate_against_measure(seen["groups"]),
            draw(seen["layers"], lambda r: 100 * r["output_error"], "error", "Error of the output", "percent"),
        ],
        "weights": [
            draw(weights, lambda r: r["sqnr"], "sqnr", "Weights: signal to noise", "dB"),
            draw(weights, lambda r: 100 * r["saturated"], "saturated", "Weights at the largest code", "percent"),
            draw(weights, lambda r: 100 * lost(r), "flushed", flushed_title(data), "percent"),
            figures.scale_histogram(data["scales"]),
        ],
        "inputs": [
            draw(seen["layers"], lambda r: r["input_sqnr"], "input-sqnr", "Inputs: signal to noise", "dB"),
            draw(seen["layers"], lambda r: 100 * r["saturated"], "x-high", "Inputs at the largest code", "percent"),
            draw(seen["layers"], lambda r: 100 * r["flushed"], "x-flushed", "Inputs flushed to zero", "percent"),
        ],
        "outliers": [
            draw(weights, lambda r: r["outlier_ratio"], "w-ratio", "Weights: largest channel", "over the median", True),
            draw(seen["layers"], lambda r: r["outlier_ratio"], "x-ratio", "Inputs: largest channel", "over the median",
                 True),
        ],
        "kv": [figures.kv_heat(data["kv"], which) for which in ("k", "v")],
        "judged": [figures.losses(rows)] if (rows := [r for r in data["judged"] if r["loss"] is not None]) else [],
    }  # fmt: skip
    return {section: [Markup(one) for one in made if one] for section, made in drawn.items()}


def lost(row: Mapping[str, Any]) -> float:
    return row["zeros"] if row["flushed"] is None else row["flushed"]


def flushed_title(data: Data) -> str:
    return "Weights that are zero" if data["against"] is None else "Weights flushed to zero"


# --------------------------------------------------------------------------- tables


def summary(data: Data) -> Iterator[tuple[str, str]]:
    """What a reader wants first: a label and what is said of it."""
    total, bf16 = data["bytes"]["total"], data["bytes"]["bf16"]
    yield "layers in FP8", f"{len(data['weights'])}; {len(data['kept'])} linear layers stay"
    yield "size", f"{size(total)}, {100 * total / bf16:.0f} % of {size(bf16)} in BF16"
    for gpu, speed in data["speed"].items():
        decode, prompt = (speed[kind]["bf16"] / speed[kind]["fp8"] for kind in ("decode", "prompt"))
        yield (
            f"predicted on one {gpu}",
            f"decoding {decode:.2f} times BF16, linear layers of a prompt {prompt:.2f} times",
        )
    if ratios := [row["sqnr"] for row in data["weights"] if row["sqnr"] is not None]:
        yield "weights, signal to noise", f"{min(ratios):.1f} to {max(ratios):.1f} dB"
    if budget := data["budget"]:
        check = budget["held_out"]
        ends, by_kl = ("{:+.2f} to {:+.2f}".format(*check[key]) for key in ("interval", "kl_interval"))
        yield (
            f"budget {budget['percent']:g} % of perplexity",
            f"predicted {budget['predicted_percent']:+.2f} %; on {check['tokens']:,} held-out tokens "
            f"{check['percent']:+.2f} % ({ends}), by KL {check['kl_percent']:+.2f} % ({by_kl}): {check['kl_verdict']}",
        )
    for row in data["judged"]:
        if row["loss"] is not None:
            yield row["label"], f"{row['loss']:+.2f} {row['unit']} ({row['interval']}): {row['verdict']}"


def layer_rows(data: Data) -> list[Data]:
    """Weights, with what passed through them and the impact of their group."""
    seen = data["sensitivity"] or {"layers": [], "groups": []}
    inputs = {row["name"]: row for row in seen["layers"]}
    groups = {name: group for group in seen["groups"] for name in group["layers"]}
    return [dict(row) | {"input": inputs.get(row["name"]), "group": groups.get(row["name"])} for row in data["weights"]]


def kept_groups(data: Data) -> list[Data]:
    return (data["budget"] or {}).get("kept", [])


def judged(paths: Sequence[Path], checkpoint: str) -> list[Data]:
    """Rows of what `fp8 eval --json` measured; those of other models than the checkpoint and its base are left out."""
    rows = [row for path in paths for row in _judged(read(path), path)]
    mine = [row for row in rows if row["base"] or row["folder"] == checkpoint]
    if rows and not any(row["folder"] == checkpoint for row in rows):
        raise DataError(f"{paths[0]} has no figures of {checkpoint}: judge it by fp8 eval first.")
    return mine


def read(path: Path) -> Data:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}.") from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}): give what `fp8 eval --json` printed.") from None


def _judged(plain: Data, path: Path) -> Iterator[Data]:
    try:
        folders = {model["name"]: Path(model["folder"]).name for model in plain["models"]}
        for measurement, outcomes in plain["measurements"].items():
            for outcome in outcomes:
                yield from (
                    _row(f"{measurement}, {figure['measure']}", outcome["model"], folders, figure)
                    for figure in outcome["figures"]
                )
    except (KeyError, TypeError, AttributeError):
        raise DataError(f"{path} is no file of `fp8 eval --json`.") from None


def _row(label: str, model: str, folders: Mapping[str, str], figure: Data) -> Data:
    loss = figure.get("loss")
    ends = (None, None) if loss is None else (loss["low"], loss["high"])
    return {
        "label": label, "model": model, "folder": folders[model], "base": loss is None,
        "value": figure["value"]["value"], "items": figure["value"]["units"],
        "loss": None if loss is None else loss["value"], "low": ends[0], "high": ends[1],
        "unit": figure.get("loss_unit", ""), "verdict": figure.get("verdict", "base"),
        "interval": "unknown" if None in ends else f"{ends[0]:+.2f} to {ends[1]:+.2f}",
    }  # fmt: skip


# --------------------------------------------------------------------------- words


def share(value: float | None) -> str:
    """A share as a percentage; a dash for none.

    >>> share(0.00012), share(0.0), share(None)
    ('0.012 %', '0 %', '–')
    """
    return "–" if value is None else "0 %" if value == 0 else f"{100 * value:.2g} %"


def together(names: Sequence[str]) -> str:
    """Layers of one parent, which is named once.

    >>> together(["m.0.attn.q_proj", "m.0.attn.k_proj"])
    'm.0.attn.q_proj, k_proj'
    """
    return ", ".join([names[0], *(name.rpartition(".")[2] for name in names[1:])])


def number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}g}"


def size(count: float) -> str:
    """
    >>> size(163_500_000), size(700)
    ('163.5 MB', '0.7 kB')
    """
    unit, name = next((u, n) for u, n in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if count >= u or n == "kB")
    return f"{count / unit:.1f} {name}"


def duration(seconds: float) -> str:
    """
    >>> duration(0.0123), duration(4.2e-05)
    ('12.3 ms', '42 µs')
    """
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"
