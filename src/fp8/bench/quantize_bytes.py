"""Hard values, and the cases in which the GPU's quantizer must equal the reference in bytes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..formats import FORMATS
from ..quantize import reference
from ..tile import NAMES, Tile

BIG_SEED = (1 << 63) + 12345


@dataclass(frozen=True)
class Case:
    """One call of one kernel form."""

    shape: tuple[int, int]
    dtype: str
    tile: str
    format: str
    power_of_two: bool
    stochastic: bool
    both: bool
    given: bool
    calm: bool = True


def cases() -> Iterator[Case]:
    """All forms on BF16 at an even and an uneven shape; other types and shapes take the forms in turn."""
    doors = [(tile, False, given) for tile in NAMES for given in (False, True)]
    doors += [(tile, True, False) for tile in NAMES] + [("tensor", True, True)]
    forms = list(itertools.product(("e4m3", "e5m2"), (True, False), (False, True)))
    for shape, form, door in itertools.product(((384, 512), (300, 392)), forms, doors):
        yield _case(shape, "bfloat16", form, door, len(door[0]) % 2 == 0)
    few = [(130, 264), (257, 129), (64, 20000), (1, 1), (3, 16), (1000, 256)]
    rest = [(shape, "bfloat16") for shape in few]
    rest += [(shape, dtype) for shape in [(384, 512), (300, 392), (257, 129)] for dtype in ("float32", "float16")]
    for number, ((shape, dtype), door) in enumerate(itertools.product(rest, doors)):
        yield _case(shape, dtype, forms[number * 5 % len(forms)], door, number % 3 > 0)


def _case(shape, dtype, form, door, calm):  # type: ignore[no-untyped-def]
    return Case(shape, dtype, door[0], *form, both=door[1], given=door[2], calm=calm)


def hard_values(shape: tuple[int, int], dtype: torch.dtype, calm: bool = True, seed: int = 0) -> Tensor:
    """A matrix of `shape` with whatever breaks quantizers. `calm`: finite values stay below 500, so that a scale of the
    whole tensor does not flush the rest."""
    draw = torch.Generator().manual_seed(seed)
    rows = shape[0]
    codes = torch.tensor([FORMATS[f].decode(c) for f in ("e4m3", "e5m2") for c in range(0x78)], dtype=torch.float64)
    codes = codes[codes.abs() <= 500].unique()
    middle = (codes[1:] + codes[:-1]) / 2
    table = torch.cat([codes, -codes, middle, -middle, middle * (1 + 2**-20), middle * (1 - 2**-20)]).float()
    edges = [0.0, -0.0, 448, 449, 464, 465, -464, -465, 1e-45, -1e-45, 1e-38, torch.inf, -torch.inf, torch.nan]
    edges = torch.tensor(edges if calm else [*edges, 3.4e38, -3.4e38, 57344, 61439, 61440, 65504])
    pick = lambda values: values[torch.randint(len(values), shape, generator=draw)]  # noqa: E731
    x = torch.randn(shape, generator=draw) * torch.exp2(torch.randint(-30, 6, (rows, 1), generator=draw).float())
    chance = torch.rand(shape, generator=draw)
    x = torch.where(chance < 0.4, pick(table), x)
    x = torch.where((chance > 0.97) & (torch.arange(rows)[:, None] % 3 == 0), pick(edges), x)
    x = torch.where(torch.arange(rows)[:, None] % 7 == 1, pick(torch.tensor([0.0, -0.0])), x)
    x = torch.where(torch.arange(rows)[:, None] % 7 == 2, pick(torch.tensor([torch.inf, -torch.inf, torch.nan])), x)
    x = torch.where(torch.arange(rows)[:, None] % 7 == 4, x * 1e-38, x)
    return x.to(dtype)


def differing_bytes(case: Case, device: str = "cuda", repeats: int = 3) -> int:
    """How many bytes of codes, scales and amax differ from the reference's, over `repeats` calls."""
    from ..quantize import triton

    x = hard_values(case.shape, getattr(torch, case.dtype), case.calm, seed=sum(case.shape))
    tile, form, scale = Tile.of(case.tile), FORMATS[case.format], None
    if case.given:
        draw = torch.Generator().manual_seed(1)
        scale = torch.exp2(torch.randint(-4, 4, tile.scale_shape(*case.shape), generator=draw).float())
        scale = scale if case.power_of_two else scale * 1.3
    seed = BIG_SEED if case.stochastic else None
    rest = (form, tile, case.power_of_two, seed, 7)
    name = "quantize_both" if case.both else "quantize"
    want = getattr(reference, name)(x, scale, *rest)
    on_device = x.to(device), None if scale is None else scale.to(device)
    count = 0
    for _ in range(repeats):
        got = getattr(triton, name)(*on_device, *rest)
        count += sum(_differ(a, b) for a, b in zip(want, got, strict=True))
    return count


def _differ(want: Tensor, got: Tensor) -> int:
    assert want.shape == got.shape, f"shape {tuple(got.shape)} for {tuple(want.shape)}"
    assert want.dtype == got.dtype, f"{got.dtype} for {want.dtype}"
    left, right = (t.cpu().contiguous().view(-1).view(torch.uint8) for t in (want, got))
    return int((left != right).sum())


def _work(case: Case) -> tuple[Case, int | str]:
    torch.set_num_threads(1)
    try:
        return case, differing_bytes(case)
    except Exception as error:  # noqa: BLE001 - one form that fails must not hide the others
        return case, f"{type(error).__name__}: {error}"[-400:]


def check(pool: ProcessPoolExecutor) -> dict[str, Any]:
    """Runs all cases; prints each one that differs or fails."""
    todo, wrong = list(cases()), []
    for done in as_completed([pool.submit(_work, case) for case in todo]):
        case, found = done.result()
        if found:
            wrong.append({**asdict(case), "found": found})
            print("DIFFERS" if isinstance(found, int) else "FAILED", found, case, flush=True)
    counted = sum(w["found"] for w in wrong if isinstance(w["found"], int))
    failed = sum(isinstance(w["found"], str) for w in wrong)
    print(f"bytes: {len(todo)} cases, {counted} differing bytes, {failed} failures", flush=True)
    return {"cases": len(todo), "differing_bytes": counted, "failures": failed, "wrong": wrong}


def check_long(rows: int = 32776, cols: int = 65664) -> int | str:
    """Differing bytes in the last rows of a matrix of more than 2^31 elements, against those rows alone."""
    from ..quantize import triton

    try:
        x = torch.randn(rows, cols, device="cuda", dtype=torch.bfloat16)
        scale = torch.full((1, 1), 2.0**-6, device="cuda")
        rest = (FORMATS["e4m3"], Tile.of("tensor"), True, None)
        tail = triton.quantize(x[-72:].contiguous(), scale, *rest)[0]
        count = _differ(tail, triton.quantize(x, scale, *rest)[0][-72:])
        codes, _, turned, _, amax = triton.quantize_both(x, scale, *rest)
        count += _differ(tail, codes[-72:]) + _differ(tail.t().contiguous(), turned[:, -72:])
        count += _differ(amax, triton.quantize(x, None, *rest)[2])
        rest = (FORMATS["e4m3"], Tile.of("1x128"), True, None)
        want = triton.quantize(x[-72:].contiguous(), None, *rest)
        codes, scale, _, _, _ = triton.quantize_both(x, None, *rest)
        return count + _differ(want[0], codes[-72:]) + _differ(want[1], scale[-72:])
    except Exception as error:  # noqa: BLE001
        return repr(error)[-400:]
