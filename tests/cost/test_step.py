"""Whole steps and their memory: sums that must add up, and measured ones that must come out."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from fp8.cost import Architecture, Setting, fit, memory, rates, step
from fp8.cost.rates import write
from fp8.recipe import Recipe

ROOT = Path(__file__).parent.parent.parent
MEASURED = json.loads((ROOT / "bench" / "results" / "rates.json").read_text(encoding="utf-8"))["results"]
LLAMA = Architecture("8B", 4096, 14336, 32, 32, 8, 128256)
HERE = Setting(16384, 8192, Recipe.of("tensorwise"))


def test_the_table_in_the_package_is_fitted_from_the_measurements_in_the_repository() -> None:
    fresh = json.loads(json.dumps(write(fit.fit(MEASURED))))
    known = json.loads(fit.TABLE.read_text(encoding="utf-8"))
    assert fresh == known


def test_steps_that_were_not_fitted_are_predicted() -> None:
    """Within 10 % of the measured time and memory: the promise of `fp8 plan`."""
    held = [p for p in fit.errors(MEASURED, rates()) if p.held and p.unit in ("ms", "GiB")]
    assert len(held) >= 20
    assert not {p.what: p.error for p in held if abs(p.error) > 0.1}


def test_products_that_were_not_fitted_are_predicted() -> None:
    """For training shapes; two runs of one product differ by 5 % and, on a hot GPU, by 30 %, so the median counts."""
    points = [p for p in fit.errors(MEASURED, rates()) if p.held and " x " in p.what and not p.what.startswith("16 x")]
    off = sorted(abs(p.error) for p in points)
    assert off[len(off) // 2] < 0.08


def test_parameters_of_known_models() -> None:
    assert LLAMA.parameters == 8_030_261_248
    assert Architecture("1B", 2048, 8192, 16, 32, 8, 128256, tied=True).parameters == 1_235_814_400


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", "rowwise", "blockwise"])
def test_fp8_changes_products_and_casts_and_nothing_else(recipe: str) -> None:
    high, low = (step(LLAMA, dataclasses.replace(HERE, recipe=r)).parts for r in (None, Recipe.of(recipe)))
    for kind in set(high) - {"products, BF16"}:
        assert low[kind] == high[kind]
    assert set(low) - set(high) == {"products, FP8", "quantize, cast"}


def test_a_product_that_is_kept_costs_what_it_did() -> None:
    names = frozenset(p.name for p in LLAMA.products())
    assert (
        step(LLAMA, dataclasses.replace(HERE, keep=names)).parts
        == step(LLAMA, dataclasses.replace(HERE, recipe=None)).parts
    )


def test_time_and_memory_grow_with_tokens_and_layers() -> None:
    more, deep = dataclasses.replace(HERE, tokens=32768), dataclasses.replace(LLAMA, layers=64)
    assert step(LLAMA, more).gpu > 1.8 * step(LLAMA, HERE).gpu
    assert memory(LLAMA, more).saved == pytest.approx(2 * memory(LLAMA, HERE).saved)
    assert step(deep, HERE).seconds > 1.7 * step(LLAMA, HERE).seconds
    assert memory(deep, HERE).peak > memory(LLAMA, HERE).peak


def test_sharing_divides_the_state() -> None:
    one, eight = (memory(LLAMA, dataclasses.replace(HERE, shards=n)) for n in (1, 8))
    assert eight.moments == one.moments / 8
    assert eight.gradients == one.gradients / 8
    assert eight.saved == one.saved


def test_fused_producers_save_time_and_memory() -> None:
    fused = dataclasses.replace(HERE, fused=True)
    assert step(LLAMA, fused).gpu < step(LLAMA, HERE).gpu
    assert memory(LLAMA, fused).saved < memory(LLAMA, HERE).saved


def test_short_sequences_attend_for_less() -> None:
    short = dataclasses.replace(HERE, sequence=2048)
    assert step(LLAMA, short).parts["attention"] < 0.4 * step(LLAMA, HERE).parts["attention"]
