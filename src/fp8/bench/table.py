"""The README's table of GPU figures, made from `bench/results/*.json`: what was measured, and nothing else.

python -m fp8.bench.table bench/results README.md
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from ..report.readme import with_table

PEAK = 4.27e12  # bytes a second that a copy reaches on an H200


def markdown(folder: Path) -> str:
    """One row a figure, with the command that measures it."""
    rows = [*_steps(_read(folder / "train.json")), *_products(_read(folder / "gemm.json"))]
    rows += _casts(_read(folder / "quantize.json")) + _served(_read(folder / "serve.json"))
    machine = _read(folder / "gemm.json")["machine"]
    versions = f"One {machine['device']}, torch {machine['torch']}, Triton {machine['triton']}."
    head = "| on the GPU | BF16 | FP8 | | command |\n|---|---|---|---|---|"
    return "\n".join([versions, "", head, *rows])


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _steps(data: dict[str, Any]) -> list[str]:
    """The best mode of each arm of the layer stack, and of each peer."""
    arms = {k: arm for k, arm in data["results"]["workloads"]["stack 2x8192"]["arms"].items() if isinstance(arm, dict)}
    high = min(arm["ms"] for name, arm in arms.items() if "BF16" in name)
    best: dict[str, tuple[float, float]] = {}
    for name, arm in arms.items():
        who = " ".join(name.split()[:2])
        if "BF16" not in name and "modules" not in name:
            best[who] = min(best.get(who, (float("inf"), 0.0)), (arm["ms"], arm["peak_gib"]))
    return [
        f"| 4 Llama-3-8B layers, forward + backward, {who}, peak {peak:.1f} GiB | {high:.1f} ms | {ms:.1f} ms "
        f"| {high / ms:.2f} times | `fp8 bench train` |"
        for who, (ms, peak) in best.items()
    ]


def _products(data: dict[str, Any]) -> list[str]:
    rows = []
    for row in data["results"]:
        m, n, k = row["shape"]
        if (m, n, k) != (8192, 8192, 8192):
            continue
        for mode in ("tensor fast", "tensor promoted", "row fast", "1x128 128x128"):
            high, low = (2e-9 * m * n * k / row[name] for name in ("bf16", mode))
            rows.append(
                f"| product {m} x {n} x {k}, {mode} | {high:.0f} TFLOP/s | {low:.0f} TFLOP/s "
                f"| {low / high:.2f} times | `fp8 bench gemm` |"
            )
    return rows


def _casts(data: dict[str, Any]) -> list[str]:
    wanted = {
        "one tensor given": "cast, given scale",
        "both tensor given": "cast and transposed cast, given scale",
        "both tensor": "the same, scale measured first",
        "both 1x128": "1x128 both ways",
    }
    return [
        f"| {wanted[row['operation']]}, 16384 x 14336 | | {row['microseconds']:.0f} us | "
        f"{row['bytes'] / row['microseconds'] / PEAK * 1e6:.0%} of 4.27 TB/s | `fp8 bench quantize` |"
        for row in data["results"]["speed"]
        if row["operation"] in wanted and row["shape"] == [16384, 14336]
    ]


def _served(data: dict[str, Any]) -> list[str]:
    """Decode in FP8 with an FP8 cache: what a token took, host included, of each row that was measured."""
    high, low = (data["results"]["arms"][name]["rows"] for name in ("BF16", "FP8 + FP8 KV"))
    figures = []
    for row in low:
        if "itl" not in low[row]:
            continue
        bf16, ms = (1e3 * arm[row]["itl"]["p50"] if "itl" in arm[row] else None for arm in (high, low))
        assert ms is not None
        figures.append(
            f"| 8B decode, {row} tokens, {low[row]['share']:.0%} of the floor | {f'{bf16:.2f} ms' if bf16 else ''} "
            f"| {ms:.2f} ms | {f'{bf16 / ms:.2f} times' if bf16 else ''} | `fp8 bench serve` |"
        )
    return figures


def main(folder: str, page: str) -> None:
    path = Path(page)
    path.write_text(with_table(path.read_text(encoding="utf-8"), markdown(Path(folder)), "gpu"), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m fp8.bench.table FOLDER PAGE")
    main(*sys.argv[1:])
