"""The computed proofs behind docs/errata.md: each is named by an entry there, which falls when its test fails."""

from __future__ import annotations

import importlib.util
import itertools
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fp8
from fp8.calibrate.hadamard import Rotation
from fp8.formats import E4M3, E5M2, FORMATS

ERRATA = Path(__file__).parent.parent / "docs" / "errata.md"


def decimal_digits(row: fp8.Format) -> float:
    """Significant decimal digits: the leading bit and the stored ones."""
    return (row.mantissa_bits + 1) * math.log10(2)


def worst_rounding_error(row: fp8.Format) -> float:
    """The largest relative error over normal numbers, from every midpoint of neighbouring values."""
    values = sorted({row.decode(c) for c in row.codes() if row.smallest_normal <= row.decode(c) < math.inf})
    middles = [(a + b) / 2 for a, b in itertools.pairwise(values)]
    return max(abs(row.decode(row.encode(m)) - m) / m for m in middles)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dequantized(x: Tensor, tile: str | tuple[int, int] = "tensor") -> Tensor:
    """E4M3 and back, with the scale amax / 448 that the articles use."""
    return fp8.quantize(x, "e4m3", tile, scale_rounding="none").dequantize()


def signal_to_noise(x: Tensor, y: Tensor) -> float:
    return 10 * math.log10(float(x.double().square().sum() / (x - y).double().square().sum()))


def relative_rms(x: Tensor, true: Tensor) -> float:
    return float((x - true).square().mean().sqrt() / true.square().mean().sqrt())


# ---------------------------------------------------------------- FP8 Training and Inference


def test_e4m3_range_and_precision() -> None:
    assert (E4M3.max, E4M3.smallest_normal, E4M3.smallest_subnormal) == (448, 2**-6, 2**-9)
    assert FORMATS["fp16"].max == 65504  # the figure that the article gives to E4M3
    assert E4M3.binades < E5M2.binades
    assert 0.055 < worst_rounding_error(E4M3) < 0.0625
    assert decimal_digits(E4M3) < 1.21


def test_e5m2_range_and_precision() -> None:
    assert (E5M2.max, E5M2.smallest_normal, E5M2.smallest_subnormal) == (57344, 2**-14, 2**-16)
    assert 0.11 < worst_rounding_error(E5M2) < 0.125
    assert decimal_digits(E5M2) < 0.91


def test_binades() -> None:
    assert (E4M3.binades, E5M2.binades) == (18, 32)


def test_fp16_range() -> None:
    fp16 = FORMATS["fp16"]
    assert -7.3 < math.log10(fp16.smallest_subnormal) < -7.2
    assert 4.8 < math.log10(fp16.max) < 4.9


def test_e5m2_flushes_small_gradients() -> None:
    assert [E5M2.decode(E5M2.encode(v)) for v in (1e-6, 1e-7, 7.6e-6)] == [0, 0, 0]
    assert E5M2.decode(E5M2.encode(7.7e-6)) == 2**-16


def test_operand_rounding_dominates_where_signs_mix() -> None:
    a, b = gaussian(32, 4096), gaussian(32, 4096, seed=1)
    codes = fp8.quantize(a), fp8.quantize(b)
    exact = fp8.matmul(*codes, torch.float32, "exact").double()
    fast = fp8.matmul(*codes, torch.float32, "hopper_fast").double()
    rounding, accumulation = relative_rms(exact, a.double() @ b.double().T), relative_rms(fast, exact)
    assert 0.035 < rounding < 0.040
    assert 0.001 < accumulation < 0.002


def test_short_accumulator_is_biased_where_signs_agree() -> None:
    codes = fp8.quantize(gaussian(32, 4096).abs()), fp8.quantize(gaussian(32, 4096, seed=1).abs())
    exact = fp8.matmul(*codes, torch.float32, "exact").double()
    fast = fp8.matmul(*codes, torch.float32, "hopper_fast").double()
    promoted = fp8.matmul(*codes, torch.float32, "hopper_promoted").double()
    assert -0.075 < float(((fast - exact) / exact).mean()) < -0.065
    assert -0.001 < float(((promoted - exact) / exact).mean()) < 0


def article_scaler(amaxes: list[float], max_fp8: float) -> list[float]:
    """The scales that `DynamicScaler` uses: the mean of 32 scales, a new one every fourth step."""
    history, used = [65536.0] * 32, []
    for step, amax in enumerate(amaxes):
        if step % 4 == 0:
            history = [*history[1:], max_fp8 / (amax + 1e-8)]
        used.append(sum(history) / 32)
    return used


def overflowing(amaxes: list[float], scales: list[float]) -> list[int]:
    return [step for step, (a, s) in enumerate(zip(amaxes, scales, strict=True)) if a * s > E5M2.max]


def test_article_scaler_overflows_for_124_steps_twice() -> None:
    amaxes = [1.0] * 400 + [10.0] * 400
    steps = overflowing(amaxes, article_scaler(amaxes, E5M2.max))
    assert steps == [*range(124), *range(400, 524)]


def test_article_scaler_back_off_is_never_used() -> None:
    source = {"history": [65536.0] * 32, "scale": 65536.0}
    source["scale"] *= 0.99  # what check_overflow does: the history, whose mean is used, keeps its values
    assert sum(source["history"]) / 32 == 65536.0
    assert E5M2.decode(E5M2.encode(1.0 * 65536)) == 57344  # and a saturating cast leaves no Inf for it to find


def test_article_scaler_on_zeros() -> None:
    history = article_scaler([0.0] * 128, 240.0)
    assert history[-1] == pytest.approx(2.4e10)


def test_240_is_another_format() -> None:
    assert (FORMATS["e4m3_ieee"].max, FORMATS["e4m3_fnuz"].max, E5M2.max) == (240, 240, 57344)


def test_different_scales_on_two_ranks_are_harmless() -> None:
    def sent(grad: Tensor, scale: float) -> Tensor:
        return fp8.quantize(grad, "e5m2", scale=torch.tensor([[scale]])).dequantize()

    one, two = gaussian(64, 64), gaussian(64, 64, seed=1)
    one, two = (torch.where(g.abs() < 2**-6, 0.5, g) for g in (one, two))  # away from subnormals
    same = (sent(one, 2.0**-4) + sent(two, 2.0**-4)) / 2
    assert torch.equal((sent(one, 2.0**-4) + sent(two, 2.0**-5)) / 2, same)


def test_parameter_count() -> None:
    layers = [nn.TransformerEncoderLayer(256, 4, 1024) for _ in range(2)]
    model = nn.ModuleList([nn.Embedding(1000, 256), *layers, nn.LayerNorm(256), nn.Linear(256, 1000)])
    assert sum(p.numel() for p in model.parameters()) == 2_093_032


@pytest.mark.parametrize(("classes", "printed"), [(1000, 5.9234), (50257, 8.7834)])
def test_random_labels_have_a_floor(classes: int, printed: float) -> None:
    floor = math.log(classes)
    logits = gaussian(100, classes).double() * torch.linspace(0, 5, 100).double()[:, None]
    expected_loss = logits.logsumexp(1) - logits.mean(1)  # over labels drawn without looking at the input
    assert float(expected_loss.min()) >= floor - 1e-9
    assert printed < floor - 0.9


def test_learning_rate_prints_otherwise() -> None:
    assert str(0.0006 * 0.85) == "0.0005099999999999999"


def test_qat_is_int8_and_simulates_nothing() -> None:
    observers = pytest.importorskip("torch.ao.quantization", reason="torch.ao.quantization is gone from this torch")
    x = gaussian(8, 8)
    for observer, dtype in (("HistogramObserver", torch.quint8), ("PerChannelMinMaxObserver", torch.qint8)):
        assert not dtype.is_floating_point
        made = getattr(observers, observer).with_args(dtype=dtype)()
        assert not isinstance(made, observers.FakeQuantizeBase)
        assert torch.equal(made(x), x)


def test_percentages() -> None:
    assert round(100 * (1 - 28.6 / 45.2), 1) == 36.7
    assert round(100 * (5594 / 3521 - 1), 1) == 58.9
    assert round(100 * (1 - 1 / 1.2), 1) == 16.7
    assert round(2_000_000 * (1 - 1 / 1.2), -3) == 333_000
    assert round(100 * (1 - 1 / 1.23), 1) == 18.7


def test_fp8_for_the_last_fifth_caps_the_gain() -> None:
    gain = 1 / (0.8 + 0.2 / 1.23)
    assert round(100 * (gain - 1), 1) == 3.9
    assert 1 / 0.8 == 1.25  # were FP8 infinitely fast


# ---------------------------------------------------------------- FP8 In-Depth Analysis


def test_training_storage_is_mostly_not_fp8() -> None:
    master, moments, gradient = 4, 4 + 4, 2
    bf16 = master + moments + gradient + 2
    one_orientation, both = (master + moments + gradient + codes for codes in (1, 2))
    assert (bf16, one_orientation, both) == (16, 15, 16)


def test_torch_autocast_has_no_fp8() -> None:
    layer = nn.Linear(4, 4)
    with (
        pytest.warns(UserWarning, match="target dtype is not supported"),
        torch.autocast("cpu", dtype=torch.float8_e4m3fn),
    ):
        assert layer(gaussian(2, 4)).dtype == torch.float32


@pytest.mark.parametrize("row", [E4M3, E5M2], ids=lambda row: row.name)
def test_fp8_weights_are_exact_in_bf16(row: fp8.Format) -> None:
    values = torch.tensor([v for v in map(row.decode, row.codes()) if math.isfinite(v)])
    for exponent in range(-40, 41):
        scaled = values * 2.0**exponent
        assert torch.equal(scaled.bfloat16().float(), scaled)
    assert not torch.equal((values * 0.3).bfloat16().float(), values * 0.3)  # a power of two is what it takes


# ---------------------------------------------------------------- FP8 Inference


def test_kv_cache_of_a_70b_model() -> None:
    layers, kv_heads, head_dim, tokens = 80, 8, 128, 32 * 1024 * 16
    elements = 2 * layers * kv_heads * head_dim * tokens
    assert (round(elements * 2 / 1e9), round(elements / 1e9)) == (172, 86)


def test_mean_relative_error_does_not_shrink_with_the_tile() -> None:
    x = gaussian(1024, 1024)
    means = [float(((dequantized(x, tile) - x) / x).abs().mean()) for tile in ("tensor", (1, 128), (1, 32))]
    assert means == pytest.approx([0.0225, 0.0224, 0.0218], abs=2e-4)


def test_few_errors_are_below_half_a_percent() -> None:
    x = gaussian(1024, 1024)
    errors = ((dequantized(x) - x) / x).abs()
    assert 0.10 < float((errors < 0.005).double().mean()) < 0.13


def int8(x: Tensor) -> Tensor:
    step = x.abs().amax() / 127
    return (x / step).round() * step


def test_int8_is_better_without_outliers_and_worse_with() -> None:
    x = gaussian(1024, 1024)
    assert 31 < signal_to_noise(x, dequantized(x)) < 32
    assert 39 < signal_to_noise(x, int8(x)) < 40
    spiked = x.clone()
    spiked.view(-1)[::1000] *= 100
    assert 31 < signal_to_noise(spiked, dequantized(spiked)) < 33
    assert signal_to_noise(spiked, int8(spiked)) < 25


def test_values_a_binade() -> None:
    values = [v for v in map(E4M3.decode, E4M3.codes()) if v >= E4M3.smallest_normal]
    counts = [sum(2.0**e <= v < 2.0 ** (e + 1) for v in values) for e in range(-6, 9)]
    assert counts == [8] * 14 + [7]


def test_minimum_column_mixes_normal_and_subnormal() -> None:
    for name, printed in (("fp32", 1.2e-38), ("bf16", 1.2e-38), ("fp16", 6e-5)):
        assert FORMATS[name].smallest_normal == pytest.approx(printed, rel=0.03)
        assert FORMATS[name].smallest_subnormal < FORMATS[name].smallest_normal / 100
    assert (E4M3.smallest_subnormal, E5M2.smallest_subnormal) == (2**-9, 2**-16)


def test_bytes_bound_the_decode_speed_up() -> None:
    most = torch.bfloat16.itemsize / torch.float8_e4m3fn.itemsize  # if weights and cache were all that is read
    assert most == 2 < min(2.5, 2.4)


def test_an_outlier_flushes_the_rest() -> None:
    x = gaussian(256, 256)
    x[0, 0] = 1e5
    seen = fp8.quantize(x, statistics=True, scale_rounding="none").statistics
    assert seen is not None
    assert (float(seen.saturated), float(seen.flushed) > 0.1) == (0, True)


def test_input_channel_scales_must_go_into_the_weights() -> None:
    x, w = gaussian(4, 64).double(), gaussian(8, 64, seed=1).double()
    per_channel = torch.linspace(0.5, 50, 64).double()
    assert torch.allclose((x / per_channel) @ (w * per_channel).T, x @ w.T)
    ratio = (x @ w.T) / ((x / per_channel) @ w.T)  # no factor after the sum can repair it
    assert float(ratio.std()) > 0.1 * abs(float(ratio.mean()))


def test_rotation_spreads_the_noise_of_outliers_that_the_weights_expect() -> None:
    x, w = gaussian(128, 512), gaussian(64, 512, seed=1)
    x[:, :4] *= 100
    w[:, :4] /= 100
    turn, y = Rotation(512, seed=0).turn, x @ w.T
    turned = [turn(t).float() for t in (x, w)]
    pairs = ((x, w), turned)
    plain, rotated = (float((dequantized(a) @ dequantized(b).T - y).norm() / y.norm()) for a, b in pairs)
    assert plain < 0.045 < 0.2 < rotated


def test_block_sketch_divides_zero_by_zero() -> None:
    w = torch.zeros(2, 256, dtype=torch.bfloat16)
    blocks = w.view(2, 2, 128)
    scales = blocks.abs().amax(dim=-1, keepdim=True) / 448.0
    assert (blocks / scales).to(torch.float8_e4m3fn).float().isnan().all()
    assert torch.equal(fp8.quantize(w, tile=(1, 128)).dequantize(), w.float())


def test_matmul_sketch_does_not_run() -> None:
    x, w = torch.ones(4, 2, 128), torch.ones(8, 2, 128)  # the shapes that the sketch's quantizer returns
    with pytest.raises(RuntimeError, match="Promotion for Float8"):
        _ = x.to(torch.float8_e4m3fn) * torch.ones(4, 2, 1, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="size"):
        _ = x @ w
    assert (x.view(4, 256) @ w.view(8, 256).T).shape == (4, 8)


def test_the_two_articles_scales_are_reciprocals() -> None:
    x = gaussian(64, 64).clamp(-3.5, 3.5)
    x[0, 0] = 3.5
    multiplied, divided = x * (448 / 3.5), x / (3.5 / 448)
    assert torch.equal(multiplied, divided)
    assert float(divided.abs().max()) == 448


# ---------------------------------------------------------------- what the assembler takes


def assemble(body: str, target: str) -> str:
    """The errors of NVIDIA's assembler on a kernel with this body; "" if it assembles."""
    ptxas = shutil.which("ptxas")
    triton = importlib.util.find_spec("triton")
    if ptxas is None and triton is not None and triton.submodule_search_locations:
        ptxas = shutil.which(str(Path(triton.submodule_search_locations[0], "backends/nvidia/bin/ptxas")))
    if ptxas is None:
        pytest.skip("no ptxas on PATH: install the CUDA toolkit or triton to check what the assembler takes")
    source = f".version 8.4\n.target {target}\n.address_size 64\n.visible .entry k() {{\n{body}\nret;\n}}\n"
    command = [ptxas, "-arch", target, "-o", "/dev/null", "-"]
    done = subprocess.run(command, input=source, capture_output=True, text=True, check=False)
    return done.stderr if done.returncode else ""


def wgmma(instruction: str, registers: int, scale: int = 1) -> str:
    names = ", ".join(f"%f{i}" for i in range(registers))
    declare = f".reg .f32 %f<{registers}>; .reg .b64 %d<2>; .reg .pred %p;"
    return assemble(f"{declare}\n{instruction} {{{names}}}, %d0, %d1, %p, {scale}, 1;", "sm_90a")


@pytest.mark.parametrize("keys", [128, 8192])
def test_e5m2_caches_err_twice_as_much_at_any_length(keys: int) -> None:
    """One row of attention over so many keys and values in codes, a scale each, against the exact one."""
    q, k, v = gaussian(1, 64, seed=1), gaussian(keys, 64, seed=2), gaussian(keys, 64, seed=3)

    def attention(k: Tensor, v: Tensor) -> Tensor:
        return (q.double() @ k.double().T / 8).softmax(-1) @ v.double()

    def error(row: fp8.Format) -> float:
        codes = (fp8.quantize(x, row.name, tile="row").dequantize() for x in (k, v))
        return float((attention(*codes) - attention(k, v)).norm())

    assert 1.5 < error(E5M2) / error(E4M3) < 2.7


def test_wgmma_shape_and_registers() -> None:
    right = "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3"
    assert wgmma(right, 64) == ""
    assert "Illegal matrix shape" in wgmma(right.replace("k32", "k16"), 64)
    assert "Argument vector size mismatch" in wgmma(right, 8)
    assert "Unknown modifier" in wgmma(right.replace(".e4m3", ".f8e4m3"), 64)
    assert "Unknown modifier" in wgmma("wgmma.fp8.fp8.f32", 64)


def test_tensor_cores_neither_scale_nor_cast() -> None:
    right = "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3"
    assert "expected to be -1 or 1" in wgmma(right, 64, scale=2)
    cast = ".reg .f32 %f<2>; .reg .b16 %h;\ncvt.rn.satfinite.e4m3x2.f32 %h, %f0, %f1;"
    assert assemble(cast, "sm_90") == ""  # a cast is an instruction that somebody must issue


def test_fp8_products_need_sm_89() -> None:
    mma = "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32"
    declare = ".reg .f32 %f<4>; .reg .b32 %r<6>;"
    body = f"{declare}\n{mma} {{%f0,%f1,%f2,%f3}}, {{%r0,%r1,%r2,%r3}}, {{%r4,%r5}}, {{%f0,%f1,%f2,%f3}};"
    assert "requires .target sm_89 or higher" in assemble(body, "sm_80")  # A100
    assert assemble(body, "sm_89") == ""  # Ada: L4, L40, RTX 40
    assert assemble(body, "sm_90") == ""


# ---------------------------------------------------------------- the page and this file


def test_page_and_tests_name_each_other() -> None:
    named = set(re.findall(r"`(test_\w+)`", ERRATA.read_text()))
    here = {name for name in globals() if name.startswith("test_")} - {"test_page_and_tests_name_each_other"}
    assert named == here
