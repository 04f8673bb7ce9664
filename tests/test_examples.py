"""The articles' programs run, on the CPU, print what is true, and execute FP8 products."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
import torch

import fp8
from fp8.errors import ConfigError

EXAMPLES = Path(__file__).parent.parent / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts every FP8 product, also those of `fp8.matmul` alone, at the one place where a backend is chosen."""
    room = sys.modules["fp8.matmul"]
    choose, counted = room.choose, Counter()

    def counting(operation: str, *arguments):  # type: ignore[no-untyped-def]
        choice = choose(operation, *arguments)
        counted[choice.name] += 1
        return choice

    monkeypatch.setattr(room, "choose", counting)
    return counted


@pytest.fixture(autouse=True)
def _one_thread():  # type: ignore[no-untyped-def]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(name: str, capsys: pytest.CaptureFixture[str]) -> tuple[str, Counter[str]]:
    """What an example prints, and how many products its layers ran, by role."""
    with fp8.count_products() as counted:
        load(name).main()
    roles = Counter()
    for (_, role), n in counted.counts.items():
        roles[role] += n
    return capsys.readouterr().out, roles


def test_every_example_is_tested_and_listed() -> None:
    assert NAMES == [
        "block_quantization", "dynamic_scaler", "fp8_gemm", "hyperparameters", "qat_loop", "serve_elsewhere",
        "train_tiny_transformer",
    ]  # fmt: skip
    listed = (EXAMPLES / "README.md").read_text()
    assert all(f"`{name}.py`" in listed for name in NAMES)
    assert "QAT loop" in listed


@pytest.mark.parametrize("name", NAMES)
def test_an_example_says_where_it_is_from_and_what_was_changed(name: str) -> None:
    said = load(name).__doc__ or ""
    assert re.search(r'the article "FP8', said)
    assert re.search(r"Changed|word for word|Mended", said)
    assert "Prints" in said


def test_the_training_example_runs_its_linear_layers_in_fp8(capsys, products) -> None:  # type: ignore[no-untyped-def]
    """Two blocks of four layers: 8 products of each role in each of ten batches, and 8 forwards of inference."""
    printed, roles = run("train_tiny_transformer", capsys)
    assert roles == {"forward": 88, "grad_x": 80, "grad_w": 80}
    assert sum(products.values()) == 248
    assert "Model Parameters: 2,093,032" in printed
    losses = [float(loss) for loss in re.findall(r"Loss: ([\d.]+)", printed)]
    assert len(losses) == 10
    assert all(6.9 < loss < 7.4 for loss in losses)
    assert "ln(1000) = 6.9078" in printed
    assert "torch.Size([4, 32])" in printed


def test_the_qat_loop_rounds_every_product_and_ends_in_codes(capsys, products) -> None:  # type: ignore[no-untyped-def]
    """Five layers (in_proj, out_proj, linear1, linear2, head): 30 batches and one evaluation rounded, then one forward
    of codes times codes, to the same loss."""
    printed, roles = run("qat_loop", capsys)
    assert roles == {"rounded": 155, "forward": 5}
    assert products["reference"] == 5
    losses = [float(loss) for loss in re.findall(r"Batch \d+, Loss: ([\d.]+)", printed)]
    assert len(losses) == 3 and all(6.9 < loss < 7.4 for loss in losses)
    rounded, codes = map(
        float, re.search(r"activations: ([\d.]+); FP8 codes times FP8 codes: ([\d.]+)", printed).groups()
    )  # type: ignore[union-attr]
    assert codes == pytest.approx(rounded, abs=1e-4)
    assert "lm_head: torch.float8_e4m3fn" in printed and "ln(1000) = 6.9078" in printed


def test_the_gemm_example_needs_its_scales(capsys, products) -> None:  # type: ignore[no-untyped-def]
    """Under scales of 1, data of 1e-4 is flushed (100 % off) and data of 1e4 clipped; scaled, it is 4 % off."""
    printed, _ = run("fp8_gemm", capsys)
    assert products["reference"] >= 9
    rows = [[float(v) for v in re.findall(r"([\d.]+)%", line)] for line in printed.splitlines() if "%" in line]
    assert [len(row) for row in rows] == [3, 3, 3]
    assert rows[0][0] == 100.0
    assert rows[2][0] > 90
    assert max(max(row[1:]) for row in rows) < 5


def test_the_scaler_of_the_article_clips_for_124_steps(capsys, products) -> None:  # type: ignore[no-untyped-def]
    printed, roles = run("dynamic_scaler", capsys)
    table = {line.split("  ")[0]: line.split()[-3:] for line in printed.splitlines() if line.endswith("%")}
    assert table["as printed (240)"][:2] == ["16", "0"]
    assert table["delayed_article"][:2] == ["124", "124"]
    assert table["delayed"][:2] == ["0", "1"]
    assert "scale 64880.64, but what is used, the mean, is still 65536.00" in printed
    assert "after a tensor of zeros: scale 2.4e+10" in printed
    assert roles["forward"] == roles["grad_w"] == 800
    assert sum(products.values()) == sum(roles.values())


def test_the_hyperparameter_example_prints_the_rule_and_its_effect(capsys, products) -> None:  # type: ignore[no-untyped-def]
    printed, roles = run("hyperparameters", capsys)
    assert "LR=0.0005099999999999999, Warmup=3000" in printed
    assert "FP8 Training: LR=0.00051, Warmup=3000" in printed
    assert roles["forward"] == 2 * 300 * 3
    assert products
    losses = [float(loss) for loss in re.findall(r"  (0\.\d{4})$", printed, re.MULTILINE)]
    assert len(losses) == 3
    high, same, adjusted = losses
    assert same < 2 * high
    assert adjusted > same


def test_the_block_sketches_fail_as_printed_and_agree_when_mended(capsys, products) -> None:  # type: ignore[no-untyped-def]
    printed, _ = run("block_quantization", capsys)
    assert "a block of zeros: 128 NaN weights" in printed
    assert printed.count("Error:") == 2
    assert "codes and scales equal to the byte: True" in printed
    assert "normal: per tensor 2.25%, per 128 2.24%, per 32 2.18%" in printed
    assert products["reference"] == 1


def test_settings_for_books_are_settings_of_a_run() -> None:
    from fp8.train import TrainConfig

    settings = TrainConfig.from_toml(EXAMPLES / "books.toml")
    assert settings.tokens_per_step == 65536 and settings.graph and settings.fp8_recipe is not None


def test_servers_elsewhere_get_the_flags_that_the_files_scales_ask_for(capsys) -> None:  # type: ignore[no-untyped-def]
    """And the page on serving at scale has the same lines, for the same checkpoints."""
    printed, _ = run("serve_elsewhere", capsys)
    for line in (
        "vllm serve per-head --kv-cache-dtype fp8 --attention-backend FLASH_ATTN",
        "fp8 convert per-head per-head-sglang --for sglang",
        "python -m sglang.launch_server --model-path per-head-sglang --kv-cache-dtype fp8_e4m3",
        "vllm serve per-tensor --tensor-parallel-size 2 --data-parallel-size 2 --kv-cache-dtype fp8",
        "python -m sglang.launch_server --model-path per-tensor --tp 2 --dp 2 --kv-cache-dtype fp8_e4m3",
        "vllm serve no-kv-scales --kv-cache-dtype fp8_per_token_head",
        "fp8 serve per-tensor",
    ):
        assert f"    {line}\n" in printed
        assert line in (EXAMPLES.parent / "docs" / "serving-at-scale.md").read_text()


def test_a_model_that_cannot_be_cut_so_is_told(tmp_path: Path) -> None:
    example = load("serve_elsewhere")
    folder = example.checkpoints(tmp_path)["one a tensor"]
    assert example.commands(folder, 2)["fp8"][1] == f"CUDA_VISIBLE_DEVICES=1 fp8 serve {folder} --port 8001 &"
    with pytest.raises(ConfigError, match="num_attention_heads=4 does not divide into 8"):
        example.commands(folder, 8, 8)
    with pytest.raises(ConfigError, match="3 GPUs cannot be grouped by 2"):
        example.commands(folder, 3, 2)
