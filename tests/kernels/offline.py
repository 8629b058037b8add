"""Compile a kernel for Hopper (sm_90) without a GPU, and read from the machine code what decides its speed.

Everything needed comes in Triton's wheel: ptxas, cuobjdump, nvdisasm. What can be read: registers, stack, spills and
shared memory from the compiler; from the disassembly the main loop (the longest backward branch), its matrix
instructions, how wide its asynchronous copies are, its conversions, and *thread-instructions per weight*: instructions
of the loop x threads / weights that one turn of the loop consumes. An H200 issues about 3.3e13 thread-instructions and
reads 8.6e12 int4 weights in a second, so 3.9 a weight, everything included, is where a kernel stops being bound by
memory. What cannot be read: time.

Arguments are marked divisible by 16 as the launcher marks aligned pointers and sizes: without it the compiler emits not
one asynchronous copy. Needs a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

SHARED_LIMIT = 227 * 1024  # bytes of shared memory that a block can have on sm_90
_INSTRUCTION = re.compile(r"^\s+(?:/\*[0-9a-f]+\*/\s+)?(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.[A-Z0-9_.]+)?)(.*)$")
_LABEL = re.compile(r"^\s*(\.L_[\w.]+):")


@dataclass(frozen=True)
class Compiled:
    """One kernel with one set of tiles, and what its machine code has to satisfy."""

    name: str  # as the table shows it
    kernel: Any  # the @triton.jit function
    types: dict[str, str]  # argument -> "*fp16", "*u8", "fp32", ...; an argument in neither dict is an i32
    constants: dict[str, Any]  # constexpr argument -> value
    warps: int = 4
    stages: int = 3
    odd: tuple[str, ...] = ()  # arguments that the launcher could not mark divisible by 16
    weights: int = 0  # weights that one program consumes in one turn of its main loop; 0: not counted
    limit: float = 0.0  # thread-instructions per weight, at most; 0: not gated
    matrix: str = ""  # matrix instruction that must occur: "HGMMA", "QGMMA", "IGMMA", "IMMA", "HMMA"; "" for none
    copies: bool = True  # every asynchronous copy must be 16 bytes wide, and there must be one


@dataclass(frozen=True)
class Code:
    """What the compiler made of it."""

    name: str
    registers: int
    stack: int
    spills: int
    shared: int
    instructions: int
    loop: int  # instructions of the main loop, one turn
    per_weight: float | None  # thread-instructions
    matrix: dict[str, int]  # matrix instructions of the whole kernel, by kind
    async16: int  # asynchronous copies of 16 bytes a thread
    async_all: int
    mix: dict[str, int] = field(repr=False)  # opcodes of the main loop


@cache
def _tools() -> Path:
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def binary(case: Compiled) -> tuple[bytes, int]:
    """The cubin for sm_90, and its bytes of shared memory."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    signature = {name: "constexpr" if name in case.constants else case.types.get(name, "i32") for name in names}
    unknown = (set(case.types) | set(case.constants) | set(case.odd)) - set(names)
    assert not unknown, f"{case.name}: the kernel has no argument {sorted(unknown)}"
    marked = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names)
              if name not in case.constants and name not in case.odd and not signature[name].startswith(("fp", "bf"))}
    made = triton.compile(ASTSource(fn=case.kernel, signature=signature, constexprs=case.constants, attrs=marked),
                          target=GPUTarget("cuda", 90, 32),
                          options={"num_warps": case.warps, "num_stages": case.stages})
    return made.asm["cubin"], int(made.metadata.shared)


def disassemble(cubin: bytes) -> tuple[str, str]:
    """(resource usage, SASS)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        commands = ([_tools() / "cuobjdump", "-res-usage", file.name], [_tools() / "nvdisasm", "-c", file.name])
        usage, sass = (subprocess.run([str(part) for part in command], capture_output=True, text=True,
                                      check=True).stdout for command in commands)
    return usage, sass


def instructions(sass: str) -> tuple[list[str], list[str]]:
    """(all opcodes, opcodes of the longest loop: from the target of a backward branch to the branch)."""
    labels: dict[str, int] = {}
    every: list[str] = []
    longest: tuple[int, int] = (0, 0)
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(every)
        elif found := _INSTRUCTION.match(line):
            every.append(found[1])
            target = re.search(r"`\((\.L_[\w.]+)\)", found[2])
            if found[1].startswith("BRA") and target and target[1] in labels:
                start = labels[target[1]]
                if 1 < len(every) - start > longest[1] - longest[0]:
                    longest = (start, len(every))
    return every, every[slice(*longest)]


def inspect(case: Compiled) -> Code:
    cubin, shared = binary(case)
    usage, sass = disassemble(cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    every, loop = instructions(sass)
    kinds = Counter(op.split(".")[0] for op in every)
    copies = [op for op in every if op.startswith("LDGSTS")]
    bulk = sum(op.startswith(("UTMALDG", "UBLKCP")) for op in every)
    return Code(
        name=case.name, registers=int(found[1]), stack=int(found[2]), spills=kinds["LDL"] + kinds["STL"], shared=shared,
        instructions=len(every), loop=len(loop),
        per_weight=len(loop) * case.warps * 32 / case.weights if case.weights else None,
        matrix={name: kinds[name] for name in ("HGMMA", "QGMMA", "IGMMA", "IMMA", "HMMA", "QMMA") if kinds[name]},
        async16=sum(".128" in op for op in copies) + bulk, async_all=len(copies) + bulk,
        mix=dict(Counter(op.split(".")[0] for op in loop).most_common()))


def faults(case: Compiled, code: Code) -> list[str]:
    """What the machine code breaks of the case's requirements, a line each; empty when it is as it should be."""
    wrong = []
    if code.stack or code.spills:
        wrong.append(f"{code.stack} bytes of stack, {code.spills} spills")
    if code.shared > SHARED_LIMIT:
        wrong.append(f"{code.shared} bytes of shared memory, of {SHARED_LIMIT}")
    if case.matrix and not code.matrix.get(case.matrix):
        wrong.append(f"no {case.matrix}, but {code.matrix or 'no matrix instruction'}")
    if case.copies and (code.async_all == 0 or code.async16 != code.async_all):
        wrong.append(f"{code.async16} of {code.async_all} asynchronous copies are 16 bytes wide")
    if case.limit and (code.per_weight is None or code.per_weight > case.limit):
        wrong.append(f"{code.per_weight} thread-instructions a weight, of {case.limit}")
    return [f"{case.name}: {line}" for line in wrong]
