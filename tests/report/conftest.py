"""The numbers of a demo, made up: one high-precision arm, one FP8 arm, one layer."""

from __future__ import annotations

from typing import Any

import pytest

from fp8.recipe import OPERANDS, PRESETS


@pytest.fixture
def results() -> dict[str, Any]:
    seen = {"scale": 0.5, "scale_max": 0.5, "amax": 200.0, "saturated": 0.0, "flushed": 0.0025, "elements": 100}
    probe = {
        "step": 1, "layers": {"layers.0.mlp.up": {role: dict(seen) for role in OPERANDS}}, "products": {},
        "histogram": {role: [i % 7 for i in range(256)] for role in OPERANDS},
    }  # fmt: skip
    arm: dict[str, Any] = {
        "losses": [3.0 - 0.05 * i for i in range(20)], "evaluations": [{"step": 20, "loss": 2.0, "perplexity": 7.39}],
        "perplexity": 7.389, "steps_to_target": 17, "tokens_per_second": 1234.5,
    }  # fmt: skip
    high = arm | {"name": "fp32", "recipe": None, "validation_loss": 2.0}
    low = arm | {
        "name": "blockwise", "recipe": PRESETS["blockwise"].to_dict(), "validation_loss": 2.005, "reloaded_loss": 2.01,
        "steps_to_target": None, "probes": [probe, probe | {"step": 2}], "checkpoint": "out/fp8",
        "gradient": {"ratio": 1.0021, "error": 0.05, "variance_high": 1.0, "variance_fp8": 1.0021, "batches": 8},
        "products": {"layers.0.mlp.up": {"forward": 1, "grad_x": 1, "grad_w": 1}},
        "conversion": {"decisions": [{"name": "layers.0.mlp.up", "type": "Linear", "fp8": True, "reason": "recipe",
                                      "parameters": 1000, "ran": True}]},
        "weights": {"nbytes": 1_060_000, "bytes_in_bf16": 2_000_000, "fp8_nbytes": 510, "fp8_bytes_in_bf16": 1000},
        "cache": {"tokens": 215, "bytes": 123_840, "bytes_in_bf16": 220_160},
        "generated": {"prompt": "Call me", "text": " <b>Ishmael</b> & co"},
    }  # fmt: skip
    settings = {"precision": "fp32", "device": "cpu", "steps": 20, "sequence_length": 8, "batch_size": 2, "seed": 0,
                "gradient_accumulation": 1}  # fmt: skip
    machine = {"device": "a processor", "threads": 2, "torch": "2.13.0", "fp8": "0.1.0"}
    return {"arms": [high, low], "settings": settings, "machine": machine, "parameters": 900_000, "command": "fp8 demo",
            "target_loss": 2.1, "seconds": 100.0, "peak_memory": 600_000_000}  # fmt: skip
