"""Laws of sensitivity and of the budget."""

from __future__ import annotations

import json
import math

import pytest
import torch

import tiny_models
from fp8.calibrate import budget as room
from fp8.calibrate import sensitivity as s
from fp8.calibrate.running import run_model
from fp8.checkpoint import frozen_model
from fp8.checkpoint.fp8_folder import Fp8Folder
from fp8.checkpoint.layers import choose_layers, skeleton
from fp8.checkpoint.quantize import Options, Scales, quantize_folder
from fp8.checkpoint.source import Source
from fp8.errors import ConfigError, DataError

ROWS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_models.build(tmp_path_factory.mktemp("models") / "llama", "llama")


def parts(folder, scheme="dynamic"):
    source = Source.open(folder)
    layers = choose_layers(source, skeleton(source))
    inputs = dict.fromkeys(layers.fp8, 2.0**-5) if scheme == "static" else {}
    return source, layers, room.quantized(source, layers, Options(scheme), Scales(inputs))


def measured(folder, scheme="dynamic", rows=ROWS):
    source, _, codes = parts(folder, scheme)
    with run_model(source, "cpu", False, head=True) as runner:
        return s.measure(runner.model, source, codes, rows)


@pytest.fixture(scope="module")
def seen(folder):
    return measured(folder)


def test_groups_are_what_servers_fuse(seen):
    sizes = [len(group.layers) for group in seen.groups]
    assert sizes == [3, 1, 2, 1] * 2
    assert sorted(n for g in seen.groups for n in g.layers) == sorted(layer.name for layer in seen.layers)


def test_a_backward_pass_predicts_what_each_group_costs(seen):
    logs = [math.log(group.fisher / group.kl) for group in seen.groups]
    assert all(abs(log) < math.log(4) for log in logs) and abs(sum(logs) / len(logs)) < math.log(2)


def test_what_is_measured_together_is_what_the_checkpoint_computes(folder, tmp_path, seen):
    quantize_folder(folder, tmp_path / "out")
    model, source = frozen_model(Fp8Folder.open(tmp_path / "out"), torch.float32), Source.open(folder)
    with run_model(source, "cpu", False, head=True) as runner, torch.no_grad():
        kl = sum(s.divergence(s.logits_of(runner.model, row), s.logits_of(model, row)) for row in ROWS)
    assert seen.together == kl / ROWS.numel()


def test_blocks_before_a_change_need_not_run(folder, monkeypatch, seen):
    monkeypatch.setattr(s.Replay, "before", lambda self, modules: s.ExitStack())
    assert measured(folder) == seen


def test_a_block_that_is_passed_twice_is_run_twice(folder):
    source, _, codes = parts(folder)
    seen = []
    for replayed in (True, False):
        with run_model(source, "cpu", False, head=True) as runner, pytest.MonkeyPatch.context() as patch:
            inner = runner.model.model
            inner.layers[1].register_forward_hook(lambda m, args, out, i=inner: i.layers[0](out, **i.kept))
            inner.layers[0].register_forward_pre_hook(
                lambda m, args, named, i=inner: setattr(i, "kept", named), with_kwargs=True
            )
            if not replayed:
                patch.setattr(s.Replay, "before", lambda self, modules: s.ExitStack())
            seen.append(s.measure(runner.model, source, codes, ROWS[:1]))
    assert seen[0] == seen[1]


def test_a_model_that_lies_on_disk_is_refused(folder):
    source, _, codes = parts(folder)
    with (
        run_model(source, "cpu", True, head=True) as runner,
        pytest.raises(DataError, match="whole model in memory"),
    ):
        s.measure(runner.model, source, codes, ROWS)


def test_the_model_is_left_as_it_was(folder):
    source, _, codes = parts(folder)
    with run_model(source, "cpu", False, head=True) as runner:
        before = s.logits_of(runner.model, ROWS[0]).detach()
        s.measure(runner.model, source, codes, ROWS[:1])
        assert torch.equal(s.logits_of(runner.model, ROWS[0]), before)
        assert not any("forward" in vars(block) for _, block in s.repeated(runner.model))


def test_a_layer_that_rounds_nothing_costs_nothing(folder, tmp_path):
    model = tiny_models.copied(folder, tmp_path / "exact")
    name = "model.layers.1.mlp.down_proj.weight"
    weight = tiny_models.tensors(model)[name].float()
    tiny_models.retensor(model, name, weight.to(torch.float8_e4m3fn).bfloat16())
    seen = measured(model, "weight-only")
    layer, group = (next(x for x in xs if name[:-7] in str(x)) for xs in (seen.layers, seen.groups))
    assert layer.weight_sqnr is None and layer.output_error == layer.fisher == group.kl == 0
    assert layer.input_sqnr is None  # weight-only: no input is quantized


def test_static_scales_that_are_too_small_show(folder):
    seen = measured(folder, "static")
    assert all(layer.flushed >= 0 for layer in seen.layers)
    source, layers, _ = parts(folder)
    small = room.quantized(source, layers, Options("static"), Scales(dict.fromkeys(layers.fp8, 2.0**-12)))
    with run_model(source, "cpu", False, head=True) as runner:
        clipped = s.measure(runner.model, source, small, ROWS)
    assert all(a.saturated > b.saturated and a.output_error > b.output_error
               for a, b in zip(clipped.layers, seen.layers, strict=True))  # fmt: skip


def test_an_outlier_channel_is_counted(folder, tmp_path):
    model = tiny_models.copied(folder, tmp_path / "outlier")
    name = "model.layers.0.input_layernorm.weight"
    norm = tiny_models.tensors(model)[name].clone()
    norm[7] *= 100
    tiny_models.retensor(model, name, norm)
    q = next(layer for layer in measured(model).layers if "0.self_attn.q_proj" in layer.name)
    assert q.outliers == 1 and q.outlier_ratio > 50


def test_it_survives_json(seen):
    assert s.Sensitivity.from_dict(json.loads(json.dumps(seen.to_dict()))) == seen


# --------------------------------------------------------------------------- the budget


def sensitivity(*impacts, factor=1.0):
    groups = tuple(s.Group((f"m.{i}",), kl, kl, 100) for i, kl in enumerate(impacts))
    return s.Sensitivity(8, 1.0, factor * sum(impacts), (), groups)


@pytest.mark.parametrize("percent", [0.1, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("factor", [0.8, 1.3])
def test_the_prediction_is_within_the_budget_and_no_group_stays_for_nothing(percent, factor):
    seen = sensitivity(1e-3, 9e-3, 4e-3, 2e-5, 6e-3, factor=factor)
    sizes = dict(zip(seen.groups, (100, 900, 100, 400, 50), strict=True))
    kept = room.choose(seen, sizes, room.budget_nats(percent))
    assert room.predicted(seen, kept) <= percent + 1e-9
    assert all(room.predicted(seen, [g for g in kept if g is not one]) > percent for one in kept)


def test_a_larger_budget_keeps_no_more_bytes():
    seen = sensitivity(*(1e-3 * (i % 5 + 1) for i in range(12)))
    sizes = {group: 10 + 7 * i % 40 for i, group in enumerate(seen.groups)}
    held = [sum(sizes[g] for g in room.choose(seen, sizes, room.budget_nats(p))) for p in (0.2, 0.5, 1, 2, 5)]
    assert held == sorted(held, reverse=True) and held[-1] == 0


def test_impact_per_byte_goes_first():
    seen = sensitivity(2e-3, 1e-3)
    assert room.choose(seen, dict(zip(seen.groups, (1000, 10), strict=True)), 2e-3) == [seen.groups[1]]


def test_a_budget_is_said_in_percent():
    assert room.parse_budget(" 0.5% ") == 0.5
    for wrong in ("0.5", "half%", ""):
        with pytest.raises(ConfigError, match=r"--budget 0\.5%"):
            room.parse_budget(wrong)
    with pytest.raises(ConfigError, match="between 0 and 100"):
        room.Budget(0.0)


@pytest.fixture(scope="module")
def some(seen):
    """A budget that needs about half of what FP8 costs."""
    return room.Budget(room.predicted(seen, ()) / 2, samples=2, length=24)


def test_a_budget_keeps_whole_groups_and_says_why(folder, tmp_path, some):
    written = quantize_folder(folder, tmp_path / "out", choose=some)
    told = json.loads((tmp_path / "out" / "config.json").read_text())
    stays = {name for group in told["fp8"]["quantized"]["budget"]["kept"] for name in group["layers"]}
    assert stays and stays <= set(told["quantization_config"]["ignore"])
    assert stays == set(written.layers.kept) - {"lm_head"}
    assert all("for a budget of" in written.layers.kept[name] for name in stays)
    for group in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        assert all(n.replace(group[0], part) in stays for n in stays if group[0] in n for part in group)
    held = tiny_models.tensors(tmp_path / "out")
    assert all(held[f"{name}.weight"].dtype == torch.bfloat16 for name in stays)


def test_the_check_measures_what_was_written(folder, tmp_path, some):
    quantize_folder(folder, tmp_path / "out", choose=some)
    told = json.loads((tmp_path / "out" / "config.json").read_text())["fp8"]["quantized"]["budget"]
    model, source = frozen_model(Fp8Folder.open(tmp_path / "out"), torch.float32), Source.open(folder)
    text = room.rows_of(room.read_texts(some.texts), room.tokenizer_for(folder, None), 4, 24, 260)[1::2]
    with run_model(source, "cpu", False, head=True) as runner, torch.no_grad():
        kl = sum(s.divergence(s.logits_of(runner.model, row), s.logits_of(model, row)) for row in text)
    check = told["held_out"]
    assert check["kl_percent"] == pytest.approx(room.percent_of(kl / text.numel()), rel=1e-9)
    assert check["kl_interval"][0] < check["kl_percent"] < check["kl_interval"][1]
    assert told["held_out"]["tokens"] == text.numel() == 48


def test_a_verdict_is_a_word_for_an_interval():
    rise = [torch.full((32,), 0.01 + 0.001 * sign) for sign in (-1, 1, -1, 1)]
    words = [room.judged(rise, percent)["verdict"] for percent in (0.5, 1.0, 2.0)]
    assert words == ["above", "inconclusive", "within"]


def test_the_choice_survives_an_interruption(folder, tmp_path, some, monkeypatch):
    from fp8.checkpoint import partial

    def stop(self, name, tensor):
        raise KeyboardInterrupt

    monkeypatch.setattr(partial.Place, "put", stop)
    with pytest.raises(KeyboardInterrupt):
        quantize_folder(folder, tmp_path / "out", choose=some)
    monkeypatch.undo()
    monkeypatch.setattr(room, "measure", None)  # not asked again
    assert quantize_folder(folder, tmp_path / "out", choose=some).resumed


def test_what_cannot_be_chosen_is_said(folder, tmp_path):
    with pytest.raises(ConfigError, match="leaves no layer in FP8"):
        quantize_folder(folder, tmp_path / "out", choose=room.Budget(1e-9, samples=2, length=24))
    assert not list(tmp_path.glob("out*"))
    bert = tiny_models.build(tmp_path / "bert", "bert")
    with pytest.raises(DataError, match="does not predict each next token"):
        quantize_folder(bert, tmp_path / "out", choose=room.Budget(1.0, samples=2, length=24))


@pytest.mark.gpu
def test_a_gpu_measures_what_a_cpu_measures(folder, seen):
    source, _, codes = parts(folder)
    with run_model(source, "cuda", False, head=True) as runner:
        there = s.measure(runner.model.float(), source, codes, ROWS)
    assert there.together == pytest.approx(seen.together, rel=0.1)
    assert [g.kl for g in there.groups] == pytest.approx([g.kl for g in seen.groups], rel=0.2)
    assert [g.fisher for g in there.groups] == pytest.approx([g.fisher for g in seen.groups], rel=0.5)
