"""The studies of what FP8 costs a served model: each measures what it says, and every command runs, small."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fp8.attention.paged import PagedCache
from fp8.bench.quality import agreement, long_keys, needles, perplexity, retrieval, teaching
from fp8.bench.quality.caches import CONTROL, KINDS, Cached, Calibration, Kind, arms, mean_keys, whole
from fp8.bench.quality.command import main
from fp8.bench.quality.forced import forced
from fp8.bench.quality.remedies import remedied
from fp8.checkpoint.tensorfile import write_json, write_tensors
from fp8.models import Decoder, DecoderConfig
from fp8.models.huggingface import to_config, to_huggingface
from fp8.serve.models import ServedModel, load_model

SHAPE = DecoderConfig(257, 64, 96, 2, 4, 2, max_positions=512)
TEXT = "Call me Ishmael. Some years ago, never mind how long precisely, I went to sea. " * 40


def decoder(shape: DecoderConfig = SHAPE) -> Decoder:
    torch.manual_seed(0)
    return Decoder(shape)


@pytest.fixture(scope="module")
def served() -> ServedModel:
    return load_model(decoder())


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    return torch.randint(257, (3, 97), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def calibration(served: ServedModel, rows: torch.Tensor) -> Calibration:
    return Calibration.of(served, rows)


# --------------------------------------------------------------------------- caches


@pytest.mark.parametrize("kind", ["bf16", "e4m3", "e4m3, static, offsets"])
def test_chunks_change_no_bit_of_a_forced_text(
    kind: str, served: ServedModel, rows: torch.Tensor, calibration: Calibration
) -> None:
    arm = Cached(served, KINDS[kind], calibration)
    a, b = forced(arm, rows, chunk=96), forced(arm, rows, chunk=20, at_once=40)
    assert torch.equal(a.losses, b.losses) and torch.equal(a.best, b.best)
    assert a.losses.shape == (3, 96) and bool((a.losses > 0).all())


def test_the_bf16_cache_is_what_the_others_differ_from(
    served: ServedModel, rows: torch.Tensor, calibration: Calibration
) -> None:
    found = {name: forced(arm, rows).losses for name, arm in arms(served, calibration).items()}
    off = {name: float((losses - found["bf16"]).abs().mean()) for name, losses in found.items()}
    assert off["bf16"] == 0 < off["e4m3"] < off["e5m2"] < off[CONTROL]


def test_the_control_keeps_only_a_few_codes(served: ServedModel, calibration: Calibration, rows: torch.Tensor) -> None:
    arm = Cached(served, KINDS[CONTROL], calibration)
    recorded = long_keys.record(served, rows[:, :64], 60, 2)
    codes = long_keys.stored(arm, 0, recorded[0]).key_codes.view(torch.uint8)
    assert len({int(c) & 0x7F for c in codes.unique()}) <= 3


def test_static_scales_hold_every_key_of_the_calibration_text(
    served: ServedModel, rows: torch.Tensor, calibration: Calibration
) -> None:
    for kind in ("e4m3, static", "e4m3, static, offsets"):
        assert forced(Cached(served, KINDS[kind], calibration), rows[:, :-1]).clipped == 0


# --------------------------------------------------------------------------- key offsets


def test_offsets_are_the_mean_of_rotated_keys_without_the_first(served: ServedModel, rows: torch.Tensor) -> None:
    cache = whole(served, rows)
    keys = torch.stack([cache.layers[1].key_codes[2 * i : 2 * i + 2].transpose(1, 2).flatten(0, 1) for i in range(3)])
    offsets = mean_keys(cache, 97)
    assert torch.allclose(offsets[1], keys[:, 1:97].double().mean((0, 1)).float(), rtol=1e-6, atol=1e-7)


def test_what_is_taken_from_all_keys_leaves_attention_as_it_was() -> None:
    torch.manual_seed(0)
    q, keys, values = torch.randn(3, 4, 8), torch.randn(50, 2, 8), torch.randn(50, 2, 8)
    lengths = torch.tensor([48, 49, 50])
    plain = long_keys.exact(q, keys.double(), values, lengths, 0.4)
    moved = long_keys.exact(q, keys.double() - 7 * torch.randn(2, 8).double(), values, lengths, 0.4)
    assert torch.allclose(plain.out, moved.out, rtol=1e-9, atol=1e-12)


def one_layer(offset: torch.Tensor | None = None, full: bool = False) -> Any:
    """What `layer_errors` asks of a kind of cache, for one layer of 2 key heads of 16 channels."""
    kind = Kind("e4m3", offsets=offset is not None, full_keys=full)
    arm: Any = Cached.__new__(Cached)
    arm.kind, arm.offsets, arm.otherwise = kind, None if offset is None else offset[None], offset is not None or full
    arm.new_layer = lambda layer, pages: PagedCache(1, pages, 64, 2, 16).layers[0]
    return arm


def test_offsets_make_keys_with_a_mean_more_exact() -> None:
    """Keys of mean 6 and spread 1: a code errs by a share of 6, or of 1."""
    torch.manual_seed(0)
    mean = 6 * torch.sign(torch.randn(2, 16))
    keys, q = torch.randn(40, 2, 16) + mean, torch.randn(2, 4, 16)
    held = long_keys.Recorded(q.bfloat16(), keys.bfloat16(), torch.randn(40, 2, 16).bfloat16())
    plain, less = (long_keys.layer_errors(one_layer(offset), 0, held) for offset in (None, mean))
    assert float(plain["bound"].max()) <= 1 and float(less["bound"].max()) <= 1
    assert float(less["format"].square().mean()) < 0.4**2 * float(plain["format"].square().mean())


def test_a_full_scale_leaves_the_largest_channel_without_error() -> None:
    """Keys with one channel 50 times the others: its error decides every score."""
    torch.manual_seed(0)
    keys = torch.randn(300, 2, 16)
    keys[..., 3] = 50 + torch.rand(300, 2)
    held = long_keys.Recorded(torch.randn(2, 4, 16).bfloat16(), keys.bfloat16(), torch.randn(300, 2, 16).bfloat16())
    pages = long_keys.stored(one_layer(full=True), 0, held)
    codes, _ = long_keys.decoded(pages, 300, None)
    assert torch.allclose(codes[..., 3], held.keys[..., 3].float(), rtol=1e-6)
    rounded, full = (long_keys.layer_errors(one_layer(full=full), 0, held) for full in (False, True))
    assert float(full["bound"].max()) <= 1
    assert float(full["format"].square().mean()) < 0.5**2 * float(rounded["format"].square().mean())


def test_a_remedy_that_changes_nothing_changes_no_bit(served: ServedModel, rows: torch.Tensor) -> None:
    arm = Cached(served, KINDS["e4m3"])
    plain = forced(arm, rows)
    arm.model = remedied(served, torch.zeros(2, 2, 16), full=False)
    assert torch.equal(forced(arm, rows, chunk=40).losses, plain.losses)


# --------------------------------------------------------------------------- needles


@pytest.fixture(scope="module")
def text() -> torch.Tensor:
    return torch.frombuffer(bytearray(TEXT.encode()), dtype=torch.uint8)


@pytest.mark.parametrize("length", [32, 200])
def test_every_question_is_answered_by_its_needle(length: int, text: torch.Tensor) -> None:
    rows = needles.hide(text, 20, length, torch.Generator().manual_seed(0))
    count = needles.needles_in(length)
    assert rows.tokens.shape == (20, length) and rows.asked == count
    for i, row in enumerate(rows.tokens.tolist()):
        body, tail = row[: -4 * count], row[-4 * count :]
        hidden = [body[j + 1 : j + 4] for j, token in enumerate(body) if token == needles.MARK]
        asked = [tail[j + 1 : j + 4] for j in range(0, len(tail), 4)]
        assert sorted(hidden) == sorted(asked)
        assert asked == [[int(k), *a] for k, a in zip(rows.keys[i], rows.answers[i].tolist(), strict=True)]
        assert len({t for needle in hidden for t in needle}) == 3 * count, "no key and no symbol comes twice"
        assert tail[::4] == [needles.ASK] * count and sum(t < 256 for t in body) == len(body) - 4 * count


def test_rows_are_a_pure_function_of_the_seed(text: torch.Tensor) -> None:
    one, two = (needles.hide(text, 4, 64, torch.Generator().manual_seed(5), asked=1) for _ in range(2))
    assert torch.equal(one.tokens, two.tokens)
    assert one.prompts.shape == (4, 62) and one.prompts[:, -1].tolist() == one.keys[:, 0].tolist()


def test_depths_cover_the_row(text: torch.Tensor) -> None:
    rows = needles.hide(text, 2000, 64, torch.Generator().manual_seed(0), asked=1)
    assert float(rows.depths.min()) < 0.03 and float(rows.depths.max()) > 0.97
    assert all(share is not None for share in retrieval.by_depth([1] * 2000, rows.depths[:, 0]))


def test_a_lesson_that_is_known_becomes_longer_and_the_rate_ends_at_zero(text: torch.Tensor) -> None:
    model = needles.decoder(64, hidden=32, layers=1, heads=2)
    lessons = teaching.Lessons((32, 64), tokens=64, known=0.0, updates=24, cooldown=8, warmup=2)
    before = [p.clone() for p in model.parameters()]
    taught = teaching.teach(model, text, lessons, every=4)
    assert taught.reached == 64 and taught.updates == 24 and not model.training
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_an_answer_counts_when_both_symbols_are_right(text: torch.Tensor) -> None:
    rows = needles.hide(text, 8, 64, torch.Generator().manual_seed(0))

    class Knows(torch.nn.Module):
        def __init__(self, wrong: int) -> None:
            super().__init__()
            self.wrong = wrong

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            out = torch.nn.functional.one_hot(rows.tokens[:, 1:], needles.VOCABULARY).float() * 30
            out[: self.wrong, -1] = 0  # the last symbol of the last answer
            return out

    for wrong, share in ((0, 1.0), (4, 1 - 4 / (8 * rows.asked))):
        loss, right = teaching.loss_of(Knows(wrong), rows)  # type: ignore[arg-type]
        assert math.isclose(float(right), share, rel_tol=1e-6) and math.isfinite(float(loss))


# --------------------------------------------------------------------------- what is told


def test_the_same_answers_never_part() -> None:
    told = agreement.compared([[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [4, 5, 6]])
    assert told["never_differ"]["value"] == told["equal_tokens"]["value"] == 1 and told["places"] == [3, 3]
    told = agreement.compared([[1, 2, 3, 4]] * 2, [[1, 2, 3, 4], [1, 9, 3, 4]])
    assert told["places"] == [4, 1] and told["equal_tokens"]["value"] == 0.875 and told["never_differ"]["value"] == 0.5


def test_a_rise_is_that_of_the_positions_it_names() -> None:
    torch.manual_seed(0)
    losses = torch.rand(6, 256) + 3
    worse = losses.clone()
    worse[:, 128:] += math.log(1.02)
    base, arm = (perplexity.Forced(x, torch.zeros(6, 256, dtype=torch.int32), 0) for x in (losses, worse))
    first, second = perplexity.told(base, arm, [0, 128, 256])["buckets"]
    assert abs(first["rise_percent"]["value"]) < 1e-4 and abs(second["rise_percent"]["value"] - 2) < 1e-3
    assert second["rise_percent"]["low"] <= 2.001 and second["rise_percent"]["high"] >= 1.999


def test_the_budget_of_the_codes_is_met_where_errors_are_independent() -> None:
    torch.manual_seed(0)
    keys, values = (torch.randn(2000, 2, 16).bfloat16() for _ in range(2))
    row = long_keys.layer_errors(one_layer(), 0, long_keys.Recorded(torch.randn(8, 4, 16).bfloat16(), keys, values))
    ratio = float((row["format"].square().mean() / row["budget"].square().mean()).sqrt())
    assert 0.85 < ratio < 1.15 and float(row["bound"].max()) <= 1


# --------------------------------------------------------------------------- the commands


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quality")
    state = {name: weight.to(torch.bfloat16) for name, weight in decoder().state_dict().items()}
    write_tensors(path / "model.safetensors", to_huggingface(state, SHAPE))
    write_json(path / "config.json", to_config(SHAPE, torch.bfloat16, end_of_text=256))
    (path / "text.txt").write_text(TEXT)
    return path


COMMANDS = {
    "agreement": ["--prompts", "3", "--prompt", "16", "--tokens", "4", "--window", "32"],
    "perplexity": ["--windows", "4", "--window", "64", "--chunk", "32"],
    "long-keys": ["--window", "128", "--keys", "300", "--queries", "2"],
    "needles": ["--longest", "64", "--count", "4", "--step-tokens", "128", "--updates", "6", "--cooldown", "3",
                "--hidden", "32", "--layers", "1", "--heads", "2"],
}  # fmt: skip


@pytest.mark.parametrize("study", COMMANDS)
def test_a_study_writes_json_and_draws_a_table(study: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["--test" if study == "needles" else "--calibration", str(folder / "text.txt")]
    model = [] if study == "needles" else ["--model", str(folder), "--calibration-texts", "2", "--tokenizer", "bytes"]
    main([study, "--text", str(folder / "text.txt"), *texts, *model, "--out", str(folder), "--device", "cpu",
          *COMMANDS[study]])  # fmt: skip
    told = json.loads((folder / f"quality-{study}.json").read_text())["results"]
    assert f"quality-{study}.json has every number" in capsys.readouterr().out
    kinds = next(iter((told["arms"] if "arms" in told else told.get("keys") or told["retrieval"]["lengths"]).values()))
    assert kinds
    if study == "long-keys":
        assert all(row["bound_share"] <= 1 for arms in told["keys"].values() for row in arms.values())
