"""The outlier suite: where per-tensor scales break, what brings the error back, and that no observer loses to max."""

from __future__ import annotations

import json

import pytest

from fp8.calibrate.observers import OBSERVERS
from fp8.errors import ConfigError
from fp8.evaluate.outliers import CASES, LIMIT, PUBLISHED, Suite, main, ratios, run

SMALL = {"tokens": 128, "channels": 512, "outputs": 128}


@pytest.fixture(scope="module")
def found():
    return run(Suite(**SMALL, factors=(20.0, PUBLISHED, 3e4)))


def test_per_tensor_fp8_holds_at_published_factors_and_int8_does_not(found):
    for case in CASES:
        tensor, int8 = (ratios(found, way)[case] for way in ("tensor", "int8 tensor"))
        assert max(tensor["20"], tensor["200"]) < LIMIT < 2 * LIMIT < int8["20"]


def test_per_tensor_breaks_where_a_token_sinks_the_rest_and_each_remedy_brings_it_back(found):
    assert ratios(found, "tensor")["tokens"]["30000"] > 2
    for remedy in ("channel", "block", "tensor + rotation", "tensor + smoothing"):
        assert ratios(found, remedy)["tokens"]["30000"] < LIMIT, remedy


def test_rotation_spreads_the_noise_of_channels_that_the_weights_expect(found):
    rotated = ratios(found, "channel + rotation")["balanced"]
    assert LIMIT < rotated["20"] < rotated["200"] and rotated["200"] > 5
    assert ratios(found, "channel")["balanced"]["200"] < LIMIT
    assert (
        ratios(found, "tensor + smoothing")["balanced"]["30000"] < LIMIT < ratios(found, "tensor")["balanced"]["30000"]
    )


def test_a_static_scale_that_has_not_seen_the_outliers_breaks_and_rotation_helps_while_they_are_few(found):
    unseen, rotated = (ratios(found, way)["tokens"] for way in ("static, unseen", "static, unseen + rotation"))
    assert unseen["20"] > LIMIT > rotated["20"]


@pytest.mark.parametrize("scales", ["power_of_two", "none"])
def test_every_observer_beats_or_ties_max(found, scales):
    """With powers of two exactly; free scales shift the grid, and other data decide the last part in a hundred."""
    suite = found if scales == "power_of_two" else run(Suite(**SMALL, scales=scales, factors=(20.0, PUBLISHED)))
    slack = 1 if scales == "power_of_two" else 1.01
    for by_factor in [{"1": suite["plain"]}, *suite["cases"].values()]:
        for errors in by_factor.values():
            assert all(errors[f"static, {o}"] <= slack * errors["static, max"] for o in OBSERVERS)


def test_the_command_prints_tables_and_writes_json(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fp8.evaluate.outliers.Suite", lambda **given: Suite(**SMALL, factors=(20.0,), **given))
    main(["--out", str(tmp_path / "deep" / "suite.json")])
    told = capsys.readouterr().out
    assert "balanced: error / error without outliers" in told and "per-tensor FP8 without outliers errs by" in told
    plain = json.loads((tmp_path / "deep" / "suite.json").read_text())
    assert plain["cases"].keys() == set(CASES) and plain["suite"]["scales"] == "power_of_two"
    with pytest.raises(ConfigError, match="128 channels"):
        Suite(channels=64)
