"""The inline assembly of the unpackers, run by a few lines of PTX emulation on every 16-bit word."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from llmops_kernels._unpack import base, programs
from llmops_kernels.reference.int_linear import HIGH_BITS, layout


def numbers(words: np.ndarray, kind: str) -> np.ndarray:
    """uint32 -> two fp16 or bf16 numbers each, as float64 (n, 2)."""
    halves = torch.from_numpy(words.view(np.int16).reshape(-1, 2).copy())
    return halves.view(torch.float16 if kind == "f16x2" else torch.bfloat16).double().numpy()


def bits(values: np.ndarray, kind: str) -> np.ndarray:
    """The inverse of `numbers`; what does not fit exactly is an error of the program."""
    half = torch.from_numpy(values).to(torch.float16 if kind == "f16x2" else torch.bfloat16)
    assert np.array_equal(half.double().numpy(), values), "a step of the program rounds"
    return half.view(torch.int16).numpy().view(np.uint32).reshape(-1)


def emulate(program: str, given: dict[str, np.ndarray]) -> np.ndarray:
    """Run one program on registers of uint32 and give $0."""
    at = dict(given)

    def read(name: str) -> np.ndarray:
        return np.full_like(given["$1"], int(name, 0)) if name[0].isdigit() else at[name]

    for line in program.strip("{} ").split(";")[1:-1]:
        op, rest = line.strip().split(" ", 1)
        out, *names = re.split(r",\s*", rest)
        if op == "lop3.b32":
            (a, b, c), table = (read(name) for name in names[:3]), int(names[3], 0)
            made = np.zeros_like(a)
            for row in range(8):
                if table >> row & 1:
                    made |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
        elif op in ("mov.b32", "shr.b32", "shl.b32"):
            a = read(names[0])
            by = np.uint32(int(names[1])) if len(names) > 1 else np.uint32(0)
            made = a << by if op == "shl.b32" else a >> by
        else:
            kind = op.split(".")[-1]
            terms = [numbers(read(name), kind) for name in names]
            made = bits(terms[0] + terms[1] if op.startswith("add") else terms[0] * terms[1] + terms[2], kind)
        at[out] = made.astype(np.uint32)
    return at["$0"]


@pytest.mark.parametrize("bf16", [False, True], ids=["fp16", "bf16"])
@pytest.mark.parametrize("width", [2, 3, 4, 8])
@pytest.mark.parametrize("zero", [None, -3, 1])
def test_every_field_of_every_word(width: int, bf16: bool, zero: int | None) -> None:
    every = np.arange(1 << 16, dtype=np.uint32)
    other = np.random.default_rng(0).permutation(every)
    pairs = every | other << np.uint32(16)  # a register: two words
    high = np.random.default_rng(1).integers(0, 1 << 32, 1 << 16, dtype=np.uint32)
    kind, half = "bf16x2" if bf16 else "f16x2", 1 << (width - 1)
    made = programs(width, bf16, zero is not None)
    for i in range(layout(width, 128).fields):
        add = 0.0 if zero is None else -(base(i, width, bf16) + zero)
        given = {"$1": pairs, "$2": high, "$3": bits(np.full((1 << 16, 2), add), kind)}
        got = numbers(emulate(made[i], given), kind)
        if width == 8 and bf16 and zero is None:  # two parts, added by the tensor cores
            got = got + numbers(emulate(made[i + 2], given), kind)
        for lane, words in enumerate((every, other)):
            top = (high >> np.uint32(16 * lane) & 0xFFFF).astype(np.int64)
            word = words.astype(np.int64)
            if width == 8:
                code = (word >> 8 * i) & 255
                code = np.where(code > 127, code - 256, code)
            elif width == 3:
                code = ((word >> 2 * (i % 8)) & 3 | (top >> HIGH_BITS[i] & 1) << 2) - half
            else:
                code = (word >> width * i & ((1 << width) - 1)) - half
            assert np.array_equal(got[:, lane], code - (zero or 0)), (i, lane)
