"""Products of few rows in CUDA: plan, resources where NVRTC is, sums on a GPU and, with g++, here."""

from __future__ import annotations

import pytest
import torch

import cuda_on_cpu
from fp8 import nvrtc, quantize
from fp8.matmul.budget import budget, exact_product
from fp8.matmul.skinny import cuda
from fp8.quantize.record import Quantized
from sass import resources

CONSTANTS = {
    "R": 2, "TOKENS": 16, "WARPS": 16, "STAGES": 4, "KEEP": 1, "BF16": 0, "ALONG": 0, "BIAS": 0, "OUT32": 0,
    "RESIDUAL": 0, "ROW_X": 1, "ROW_W": 1,
}  # fmt: skip
TILES = [("row", "row"), ("tensor", "tensor"), ("row", "tensor"), ("1x128", "128x128")]
gpu = pytest.mark.gpu


@pytest.mark.parametrize("tokens", [8, 16])
@pytest.mark.parametrize("depth", [64, 4096, 8192, 14336, 57344])
@pytest.mark.parametrize("cols", [1, 100, 4096, 6144, 28672, 128256])
def test_a_plan_fits_and_sums_are_divided_alike_for_every_shape(cols: int, depth: int, tokens: int) -> None:
    plan = cuda.plan(cols, depth, tokens)
    assert plan.shared(tokens, depth) <= cuda.SHARED
    assert plan.warps == 16 and plan.stages >= 2


@pytest.mark.skipif(nvrtc.why_not() is not None, reason="NVRTC is not installed")
@pytest.mark.parametrize(
    "other", [{}, {"R": 3}, {"R": 3, "ALONG": 1, "KEEP": 0}, {"BF16": 1, "OUT32": 1}, {"R": 1, "BIAS": 1}]
)
def test_no_register_is_spilled(other: dict[str, int], tmp_path) -> None:
    used = resources(nvrtc.build(cuda.SOURCE, CONSTANTS | other, "90"), tmp_path)
    assert used["STACK"] == 0 and used["REG"] <= 128


def operands(rows: int, cols: int, depth: int, tiles: tuple[str, str]) -> tuple[Quantized, Quantized]:
    torch.manual_seed(rows)
    x, w = torch.randn(rows, depth).bfloat16(), torch.randn(cols, depth).bfloat16()
    return quantize(x, "e4m3", tiles[0]), quantize(w, "e4m3", tiles[1])


def there(q: Quantized, device: str = "cuda") -> Quantized:
    return Quantized(q.codes.to(device), q.scale.to(device), q.tile, q.format)


def within_its_budget(rows: int, cols: int, depth: int, tiles: tuple[str, str], device: str) -> None:
    x, w = operands(rows, cols, depth, tiles)
    bias = torch.randn(cols).bfloat16()
    y = cuda.skinny(there(x, device), there(w, device), torch.float32, bias.to(device), None).cpu().double()
    allowed = budget(x, w, torch.float32, "promoted", bias=bias)
    assert ((y - exact_product(x, w, bias)).abs() <= allowed).all()


def the_same_bits_in_company(tiles: tuple[str, str], device: str, most: int, cols: int, depth: int) -> None:
    x, w = (there(q, device) for q in operands(most, cols, depth, tiles))
    whole = cuda.skinny(x, w, torch.float32, None, None)
    for rows in (1, 2, 7, 8, 9, 15) if device == "cuda" else (1, 9):
        scale = x.scale if str(x.tile) == "tensor" else x.scale[:rows].contiguous()
        some = Quantized(x.codes[:rows].contiguous(), scale, x.tile, x.format)
        for early in (True, False) if device == "cuda" else (True,):
            assert torch.equal(cuda.skinny(some, w, torch.float32, None, None, early=early), whole[:rows])


# ------------------------------------------------------------------------------- on a CPU


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    if (reason := cuda_on_cpu.why_not()) is not None:
        pytest.skip(reason)
    cuda_on_cpu.on_cpu(monkeypatch)
    monkeypatch.setattr(cuda, "plan", lambda cols, depth, tokens: cuda.Plan(2, 4, 3))  # a thread here is a thread


@pytest.mark.parametrize(
    ("rows", "cols", "depth", "tiles"),
    [(5, 100, 1040, TILES[0]), (9, 33, 528, TILES[1]), (3, 140, 272, TILES[3])],
)
def test_here_the_product_is_within_its_budget(here, rows, cols, depth, tiles) -> None:
    within_its_budget(rows, cols, depth, tiles, "cpu")


def test_here_a_row_has_the_same_bits_alone_and_in_company(here) -> None:
    the_same_bits_in_company(TILES[0], "cpu", 16, 20, 528)


def test_here_the_residual_is_added_to_the_rounded_product(here) -> None:
    x, w = operands(6, 20, 512, ("row", "tensor"))
    residual = torch.randn(6, 20).bfloat16()
    y = cuda.skinny(x, w, torch.bfloat16, None, None)
    assert torch.equal(cuda.skinny(x, w, torch.bfloat16, None, residual), residual + y)


def test_here_bf16_sums_in_fp32(here) -> None:
    x, w = torch.randn(3, 520).bfloat16(), torch.randn(20, 520).bfloat16()
    exact = x.double() @ w.double().t()
    error = (cuda.skinny(x, w, torch.float32, None, None).double() - exact).abs()
    assert (error <= 2.0**-20 * (x.double().abs() @ w.double().abs().t())).all()


def test_here_x_may_be_kept_and_units_be_of_any_size(here) -> None:
    x, w = operands(11, 200, 1040, ("row", "row"))
    expected = cuda.skinny(x, w, torch.float32, None, None, cuda.Plan(1, 4, 2))
    for sixteens, stages, keep in ((2, 3, True), (3, 2, True)):
        use = cuda.Plan(sixteens, 4, stages, keep)
        assert torch.equal(cuda.skinny(x, w, torch.float32, None, None, use), expected)


# ------------------------------------------------------------------------------- on a GPU


@gpu
@pytest.mark.parametrize("tiles", TILES, ids="*".join)
@pytest.mark.parametrize(
    ("rows", "cols", "depth"), [(1, 256, 4096), (5, 200, 1040), (16, 96, 14336), (13, 33, 512), (16, 5000, 2048)]
)
def test_the_product_is_within_its_budget(rows: int, cols: int, depth: int, tiles: tuple[str, str]) -> None:
    within_its_budget(rows, cols, depth, tiles, "cuda")


@gpu
@pytest.mark.parametrize("tiles", TILES, ids="*".join)
def test_a_row_has_the_same_bits_alone_and_in_company(tiles: tuple[str, str]) -> None:
    the_same_bits_in_company(tiles, "cuda", 16, 6144, 4096)


@gpu
def test_the_residual_is_added_to_the_rounded_product() -> None:
    x, w = (there(q) for q in operands(6, 512, 1024, ("row", "row")))
    residual = torch.randn(6, 512, device="cuda").bfloat16()
    y = cuda.skinny(x, w, torch.bfloat16, None, None)
    assert torch.equal(cuda.skinny(x, w, torch.bfloat16, None, residual), residual + y)
    assert torch.equal(y, cuda.skinny(x, w, torch.float32, None, None).bfloat16())


@gpu
@pytest.mark.parametrize("rows", [1, 16])
def test_bf16_sums_in_fp32(rows: int) -> None:
    x, w = (torch.randn(n, 4096, device="cuda").bfloat16() for n in (rows, 100))
    exact = x.double() @ w.double().t()
    error = (cuda.skinny(x, w, torch.float32, None, None).double() - exact).abs()
    assert (error <= 2.0**-20 * (x.double().abs() @ w.double().abs().t())).all()


@gpu
def test_every_plan_gives_the_same_bits() -> None:
    x, w = (there(q) for q in operands(16, 6144, 4096, ("row", "row")))
    expected = cuda.skinny(x, w, torch.float32, None, None)
    for sixteens, stages, keep in ((1, 4, True), (2, 3, True), (2, 4, False), (3, 2, True), (3, 3, False)):
        use = cuda.Plan(sixteens, 16, stages, keep)
        for early in (True, False):
            assert torch.equal(cuda.skinny(x, w, torch.float32, None, None, use, early), expected), use


@gpu
def test_a_chain_that_starts_early_reads_what_was_written() -> None:
    """Each product of a graph reads the last one's output: none may run ahead of it."""
    x = torch.randn(4, 1024, device="cuda").bfloat16()
    ws = [(torch.randn(1024, 1024, device="cuda") / 32).bfloat16() for _ in range(12)]

    def chain(early: bool) -> torch.Tensor:
        y = x
        for w in ws:
            y = cuda.skinny(y, w, torch.bfloat16, None, None, early=early)
        return y

    expected = chain(False)
    assert torch.equal(chain(True), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain(True)
    for _ in range(20):
        y.zero_()
        graph.replay()
        assert torch.equal(y, expected)
