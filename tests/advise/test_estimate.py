"""`fp8 estimate`: its bytes are those of models and caches that were made, its floors those that the formulae give."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from fp8.advise import models
from fp8.advise.estimate import ARMS, Estimate, cache_token_bytes, decode_seconds, estimate, prompt_floor, weight_bytes
from fp8.attention.paged import PagedCache
from fp8.cli import main
from fp8.cost.datasheets import SHEETS, datasheet, scaled_rates
from fp8.cost.rates import rates
from fp8.errors import ConfigError
from fp8.models.huggingface import to_config
from fp8.models.llama import DecoderConfig
from fp8.serve.models import random_model

SHAPES = [
    DecoderConfig(257, 64, 192, 3, 4, 2),
    DecoderConfig(300, 96, 128, 2, 3, 1, tie_embeddings=True),
    DecoderConfig(64, 128, 320, 1, 2, 2, tie_embeddings=True),
]


@pytest.mark.parametrize("kind", ["bf16", "fp8"])
@pytest.mark.parametrize("config", SHAPES, ids=["apart", "tied", "one layer"])
def test_weights_take_the_bytes_that_a_served_model_holds(config: DecoderConfig, kind: str) -> None:
    made = random_model(to_config(config, torch.bfloat16), quantization=None if kind == "bf16" else kind)
    assert weight_bytes(models.architecture(config), kind) == made.nbytes


@pytest.mark.parametrize(("kind", "static"), [("bf16", False), ("fp8", False), ("fp8", True)])
def test_a_token_takes_the_bytes_of_its_place_in_a_page(kind: str, static: bool) -> None:
    for config in SHAPES:
        model = models.architecture(config)
        page = PagedCache.bytes_per_page(config.num_layers, 16, config.num_kv_heads, model.width, kind, static)
        assert 16 * cache_token_bytes(model, kind, static) == page


@pytest.mark.parametrize(
    ("batch", "context", "milliseconds"),
    [(1, 1024, 1.85), (16, 1024, 2.1), (64, 1024, 2.9), (16, 16384, 5.8), (64, 8192, 9.8)],
)  # fmt: skip
def test_the_floors_of_an_8b_are_those_of_its_bytes_over_the_speed_of_reading(
    batch: int, context: int, milliseconds: float
) -> None:
    """Reckoned by hand for an H200: 4.37 TB/s, an 8B with its head in BF16, a cache with a scale a head."""
    model = models.named("llama-3-8b")
    token = cache_token_bytes(model, "fp8", static=True)
    assert 1e3 * decode_seconds(model, "fp8", token, batch, context, SHEETS["H200"]) == pytest.approx(
        milliseconds, rel=0.04
    )


def test_a_batch_of_short_sequences_is_bound_by_products() -> None:
    model, sheet = models.named("llama-3-8b"), SHEETS["H200"]
    alone, many = (decode_seconds(model, "fp8", 0, b, 1, sheet) for b in (1, 4096))
    assert many > 10 * alone
    assert decode_seconds(model, "fp8", 0, 64, 1, sheet) == alone


def test_no_bytes_are_halved_more_than_once() -> None:
    """The article's table has gains of up to 2.5 in decoding: weights and cache in half the bytes cannot."""
    for gpu in SHEETS:
        assert 1 < estimate("llama-3-70b", gpu).gain < 2


def test_without_fp8_units_a_prompt_gains_nothing_and_a_token_does() -> None:
    high, low, _ = estimate("llama-3-8b", "A100").arms
    assert low.prompt == high.prompt
    assert low.first_token < 0.7 * high.first_token
    assert estimate("llama-3-8b", "H100").arms[1].prompt < 0.7 * high.prompt


def test_the_rates_of_the_measured_gpu_are_the_measured_ones() -> None:
    assert scaled_rates(SHEETS["H200"]) == rates("H200")
    model = models.named("llama-3-8b")
    assert prompt_floor(model, "fp8", 16384, SHEETS["H200"]) < prompt_floor(model, "bf16", 16384, SHEETS["H200"])


def test_users_fill_the_room_and_longer_contexts_leave_fewer() -> None:
    for arm in estimate("llama-3-8b", "H200").arms:
        counts = [arm.users[context] for context in sorted(arm.users)]
        assert counts == sorted(counts, reverse=True)
        for context, users in arm.users.items():
            assert users * context * arm.cache_token <= arm.room
            assert (users + 1) * (context + 64) * arm.cache_token > arm.room


def test_what_does_not_fit_is_an_answer(capsys: pytest.CaptureFixture[str]) -> None:
    found = estimate("llama-3.1-405b", "H100", price=2.0)
    assert all(arm.room < 0 and arm.batch == 0 and arm.dollars is None for arm in found.arms)
    assert run(capsys, "llama-3.1-405b", "--gpu", "h100", "--price", "2")[1].count("does not fit") > 3


def test_a_batch_that_does_not_fit_has_no_figures() -> None:
    arms = estimate("llama-3-8b", batch=150, price=1.0).arms
    assert [arm.batch for arm in arms] == [0, 0, 150] and arms[0].users[8192] < 150 < arms[2].users[8192]
    assert arms[0].dollars is None and arms[2].dollars is not None


def test_dollars_are_the_price_over_what_an_hour_makes() -> None:
    arm = estimate("llama-3-8b", price=3.6, batch=10, share=0.5).arms[0]
    assert arm.tokens_per_second == pytest.approx(10 / arm.step_seconds)
    assert arm.dollars == pytest.approx(3.6 / (3600 * arm.tokens_per_second) * 1e6)
    assert arm.step_seconds == pytest.approx(2 * estimate("llama-3-8b", batch=10).arms[0].step_seconds)


@pytest.mark.parametrize(
    ("asked", "message"),
    [({"context": 0}, "context must be above 0"), ({"share": 1.5}, "share is a part of a whole"),
     ({"price": -1}, "price"),
     ({"memory_fraction": float("nan")}, "memory-fraction must be"), ({"batch": -3}, "batch")],
)  # fmt: skip
def test_what_cannot_be_asked_is_named(asked: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        estimate("llama-3-8b", **asked)
    with pytest.raises(ConfigError, match="Did you mean 'H200'"):
        datasheet("H20")


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        main(["estimate", *argv])
    return int(stop.value.code or 0), capsys.readouterr().out


def test_json_holds_what_the_function_returns(capsys: pytest.CaptureFixture[str]) -> None:
    code, out = run(capsys, "llama-3.2-1b", "--json", "--price", "3.5", "--static-scales")
    found: Estimate = estimate("llama-3.2-1b", price=3.5, static_scales=True)
    plain = json.loads(out)
    assert code == 0
    assert [arm["name"] for arm in plain["arms"]] == list(ARMS)
    assert plain == json.loads(json.dumps(found.to_dict()))
    assert dataclasses.asdict(found.asked) == plain["asked"]


def test_all_gpus_are_shown_with_what_is_not_measured(capsys: pytest.CaptureFixture[str]) -> None:
    code, out = run(capsys, "llama-3-8b", "--gpu", "all", "--price", "3")
    assert code == 0
    assert all(name in out for name in SHEETS)
    assert "not measured" in out and "fnuz" in out and "Formulae" in out
