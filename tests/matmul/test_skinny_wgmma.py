"""FP8 products of 17 to 64 rows on warpgroups: plan, resources where NVRTC is, sums on a GPU and, with g++, here."""

from __future__ import annotations

import pytest
import torch

import cuda_on_cpu
from fp8 import nvrtc, quantize
from fp8.matmul.budget import budget, exact_product
from fp8.matmul.skinny import wgmma
from fp8.quantize.record import Quantized
from sass import resources

CONSTANTS = {
    "TOKENS": 64, "GROUPS": 3, "STAGES": 4, "CLUSTER": 4, "BIAS": 0, "OUT32": 0, "RESIDUAL": 0, "ROW_X": 1, "ROW_W": 1,
}  # fmt: skip
TILES = [("row", "row"), ("tensor", "tensor"), ("row", "tensor"), ("tensor", "row")]
SHAPES = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096), (320, 768)]
gpu = pytest.mark.gpu


@pytest.mark.parametrize(("cols", "depth"), SHAPES)
def test_a_plan_fits_and_k_is_sliced_alike_for_any_number_of_rows(cols: int, depth: int) -> None:
    plans = [plan for tokens in (32, 64) if (plan := wgmma.plan(cols, depth, tokens)) is not None]
    assert len({plan.slices for plan in plans}) == 1 and len(plans) == 2
    for plan, tokens in zip(plans, (32, 64), strict=True):
        assert plan.shared(tokens, depth) <= wgmma.SHARED and 3 <= plan.stages <= 8 and depth % plan.slices == 0


def test_what_has_no_room_or_no_whole_tiles_is_refused() -> None:
    assert wgmma.plan(4096, 28672) is None and wgmma.plan(4096, 128) is None
    for rows, cols, depth, tile in (
        (16, 64, 256, "row"),
        (65, 64, 256, "row"),
        (20, 96, 256, "row"),
        (20, 64, 256, "1x128"),
    ):
        x, w = operands(rows, cols, depth, (tile, "128x128" if tile == "1x128" else tile))
        assert wgmma.why_not(x, w) is not None
    assert wgmma.why_not(*operands(20, 64, 256, TILES[1])) is None


@pytest.mark.skipif(nvrtc.why_not() is not None, reason="NVRTC is not installed")
@pytest.mark.parametrize(
    "other", [{}, {"TOKENS": 8}, {"GROUPS": 4, "CLUSTER": 8}, {"TOKENS": 32, "BIAS": 1, "RESIDUAL": 1}]
)
def test_no_register_is_spilled(other: dict[str, int], tmp_path) -> None:
    used = resources(nvrtc.build(wgmma.SOURCE, CONSTANTS | other, "90a"), tmp_path)
    assert used["STACK"] == 0 and used["REG"] <= 168


def operands(rows: int, cols: int, depth: int, tiles: tuple[str, str]) -> tuple[Quantized, Quantized]:
    torch.manual_seed(rows)
    x, w = torch.randn(rows, depth).bfloat16(), torch.randn(cols, depth).bfloat16()
    return quantize(x, "e4m3", tiles[0]), quantize(w, "e4m3", tiles[1])


def there(q: Quantized, device: str = "cuda") -> Quantized:
    return Quantized(q.codes.to(device), q.scale.to(device), q.tile, q.format)


def within_its_budget(
    rows: int, cols: int, depth: int, tiles: tuple[str, str], device: str, use: wgmma.Plan | None = None
) -> None:
    x, w = operands(rows, cols, depth, tiles)
    bias, residual = torch.randn(cols).bfloat16(), torch.randn(rows, cols).bfloat16().to(device)
    a, b = there(x, device), there(w, device)
    plan = use or wgmma.plan(cols, depth)
    assert plan is not None
    y = wgmma.skinny(a, b, torch.float32, bias.to(device), None, use)
    allowed = budget(x, w, torch.float32, "promoted", bias=bias, splits=plan.slices)
    assert ((y.cpu().double() - exact_product(x, w, bias)).abs() <= allowed).all()
    added = wgmma.skinny(a, b, torch.bfloat16, bias.to(device), residual, use)
    assert torch.equal(added, residual + y.bfloat16())


# ------------------------------------------------------------------------------- on a CPU


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    if (reason := cuda_on_cpu.why_not()) is not None:
        pytest.skip(reason)
    cuda_on_cpu.on_cpu(monkeypatch)
    monkeypatch.setattr(wgmma, "BLOCKS", 2)


@pytest.mark.parametrize(
    ("rows", "cols", "tiles", "use"),
    [
        (5, 64, TILES[2], wgmma.Plan(2, 1, 2)),
        (20, 128, TILES[0], wgmma.Plan(2, 1, 3)),
        (41, 192, TILES[1], wgmma.Plan(2, 2, 3)),
    ],
)
def test_here_the_product_is_within_its_budget(here, rows, cols, tiles, use) -> None:
    within_its_budget(rows, cols, 512, tiles, "cpu", use)


# ------------------------------------------------------------------------------- on a GPU


@gpu
@pytest.mark.parametrize("tiles", TILES, ids="*".join)
@pytest.mark.parametrize(
    ("rows", "cols", "depth"), [(17, 320, 768), (64, 4096, 4096), (33, 6144, 4096), (50, 4096, 14336)]
)
def test_the_product_is_within_its_budget(rows: int, cols: int, depth: int, tiles: tuple[str, str]) -> None:
    within_its_budget(rows, cols, depth, tiles, "cuda")


@gpu
@pytest.mark.parametrize(("cols", "depth"), [(6144, 4096), (4096, 14336)])
def test_a_row_has_the_same_bits_in_company_and_in_every_plan(cols: int, depth: int) -> None:
    x, w = (there(q) for q in operands(64, cols, depth, TILES[0]))
    plan = wgmma.plan(cols, depth)
    assert plan is not None
    whole = wgmma.skinny(x, w, torch.float32, None, None)
    for rows in (1, 9, 16, 17, 32, 33, 63):
        some = Quantized(x.codes[:rows].contiguous(), x.scale[:rows].contiguous(), x.tile, x.format)
        for early in (True, False):
            assert torch.equal(wgmma.skinny(some, w, torch.float32, None, None, early=early), whole[:rows])
    for groups, stages in ((1, 4), (2, 3)):
        use = wgmma.Plan(plan.slices, groups, stages)
        assert torch.equal(wgmma.skinny(x, w, torch.float32, None, None, use), whole)


@gpu
def test_a_chain_that_starts_early_reads_what_was_written() -> None:
    """Each product of a graph reads the codes of the last one's output: none may run ahead of it."""
    w = there(operands(1, 1024, 1024, TILES[0])[1])
    x = torch.randn(40, 1024, device="cuda").bfloat16()

    def chain(early: bool) -> torch.Tensor:
        y = x
        for _ in range(8):
            y = wgmma.skinny(quantize(y, "e4m3", "row"), w, torch.bfloat16, None, None, early=early)
        return y

    expected = chain(False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain(True)
    for _ in range(20):
        y.zero_()
        graph.replay()
        assert torch.equal(y, expected)
