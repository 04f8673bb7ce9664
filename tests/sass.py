"""Does a compiled kernel read a register that nothing wrote?

The ptxas of CUDA 12.8 did so with codes that were both stored and transposed: right on paper, right in PTX, wrong on
the GPU. A forward dataflow over the disassembly shows it without one: a register that no path has written before it is
read.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

LINE = re.compile(r"\s+/\*([0-9a-f]{4,5})\*/\s+(?:(@!?U?P\w+)\s+)?(\S+)\s*(.*?)\s*;")
NO_RESULT = {
    "ST", "STG", "STS", "STL", "RED", "BAR", "BRA", "EXIT", "RET", "CALL", "BSYNC", "BSSY", "NOP", "ISETP", "FSETP",
    "MEMBAR", "R2UR", "WARPSYNC", "VOTEU", "PLOP3", "R2P",
}  # fmt: skip
Instruction = tuple[int, str | None, str, str]


def compiled(kernel: Any, constants: dict[str, Any], types: dict[str, str], aligned: set[str], **options: Any) -> Any:
    """A kernel for sm_90, built without a GPU: `types` of its arguments (an int32 where none is named), and which of
    them are multiples of 16. The result has `asm["ptx"]` and `asm["cubin"]`."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as build

    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    places = {(names.index(name),): value for name, value in constants.items()}
    known = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, signature=signature, constexprs=places, attrs=known)
    return build(source, target=GPUTarget("cuda", 90, 32), options=options)


def resources(cubin: bytes, folder: Path) -> dict[str, int]:
    """Registers a thread and bytes of stack (spilled registers) of a kernel: {"REG": 96, "STACK": 0, ...}."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    text = subprocess.run([str(tool), "-res-usage", str(path)], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"([A-Z]+):(\d+)", text)}


def disassemble(cubin: bytes, folder: Path) -> str:
    """The SASS of a kernel, by the tool that comes with Triton."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    return subprocess.run([str(tool), "-sass", str(path)], capture_output=True, text=True, check=True).stdout


def reads_and_writes(op: str, args: str) -> tuple[list[int], list[int]]:
    """The 32-bit registers that one instruction reads and writes."""
    parts, writes = args.split(",") if args else [], []
    if parts and op.split(".")[0] not in NO_RESULT:
        place = 1 if re.match(r"\s*(PT|P\d)", parts[0]) else 0
        result = re.match(r"\s*R(\d+)", parts[place]) if len(parts) > place else None
        if result:
            wide = 4 if ".128" in op else 2 if re.search(r"\.[US]?64|WIDE", op) else 1
            writes = [int(result.group(1)) + i for i in range(wide)]
            parts = parts[:place] + parts[place + 1 :]
    return [int(r) for r in re.findall(r"\bR(\d+)", ",".join(parts))], writes


def successors(code: list[Instruction]) -> list[list[int]]:
    """Where each instruction may be followed on; a call may go to its target or come back at once."""
    at = {address: i for i, (address, *_) in enumerate(code)}
    after_calls = [i + 1 for i, (_, _, op, _) in enumerate(code) if op.startswith("CALL")]
    joins: dict[str, list[int]] = {}
    for _, _, op, args in code:
        if op == "BSSY":
            barrier, target = args.split(",")
            joins.setdefault(barrier.strip(), []).append(at[int(target, 16)])
    found = []
    for i, (_, guard, op, args) in enumerate(code):
        name, targets = (
            op.split(".")[0],
            [at[int(t, 16)] for t in re.findall(r"0x([0-9a-f]+)", args) if int(t, 16) in at],
        )
        falls = guard or name not in ("BRA", "EXIT", "RET") or (name == "BRA" and re.match(r"!?U?P", args))
        jumps = {"BRA": targets, "CALL": targets, "RET": after_calls, "BSYNC": joins.get(args.strip(), [])}.get(
            name, []
        )
        found.append([n for n in jumps + ([i + 1] if falls else []) if n < len(code)])
    return found


def never_written(sass: str) -> list[str]:
    """The instructions that read a register which no path to them has written.

    Left out as harmless: filling one half, or clearing one bit, of a register whose rest nobody reads; and spilling.
    """
    code = [(int(m[1], 16), m[2], m[3], m[4]) for m in map(LINE.match, sass.splitlines()) if m]
    moves, follow = [reads_and_writes(op, args) for _, _, op, args in code], successors(code)
    written: list[int | None] = [0] + [None] * (len(code) - 1)
    todo = [0]
    while todo:
        i = todo.pop()
        after = written[i] or 0
        for register in moves[i][1]:
            after |= 1 << register
        for n in follow[i]:
            old = written[n]
            if old is None or old | after != old:
                written[n] = after | (old or 0)
                todo.append(n)
    bad = []
    for (_, _, op, args), (reads, writes), before in zip(code, moves, written, strict=True):
        keeps = op.startswith(("PRMT", "LOP3")) and writes
        unknown = [r for r in reads if before is not None and not before >> r & 1 and not (keeps and r == writes[0])]
        if unknown and not op.startswith("STL"):
            bad.append(f"{op} {args}")
    return bad
