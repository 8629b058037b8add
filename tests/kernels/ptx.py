"""A few lines of PTX: enough of it, in numpy, to run the inline assembly of the kernels on every input there is."""

from __future__ import annotations

import re

import numpy as np
import torch


def numbers(words: np.ndarray, kind: str) -> np.ndarray:
    """uint32 -> two fp16 or bf16 numbers each, as float64 (n, 2)."""
    halves = torch.from_numpy(words.view(np.int16).reshape(-1, 2).copy())
    return halves.view(torch.float16 if kind == "f16x2" else torch.bfloat16).double().numpy()


def bits(values: np.ndarray, kind: str) -> np.ndarray:
    """The inverse of `numbers`; what does not fit exactly is an error of the program."""
    half = torch.from_numpy(values).to(torch.float16 if kind == "f16x2" else torch.bfloat16)
    assert np.array_equal(half.double().numpy(), values), "a step of the program rounds"
    return half.view(torch.int16).numpy().view(np.uint32).reshape(-1)


def permute(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """prmt: byte i of the result is the byte that bits 4i..4i+2 name; bit 4i+3 spreads that byte's top bit instead."""
    eight = b.astype(np.uint64) << np.uint64(32) | a.astype(np.uint64)
    made = np.zeros_like(a)
    for i in range(4):
        pick = (selector >> np.uint32(4 * i) & np.uint32(15)).astype(np.uint64)
        byte = (eight >> (np.uint64(8) * (pick & np.uint64(7))) & np.uint64(255)).astype(np.uint32)
        byte = np.where(pick & np.uint64(8), np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0)), byte)
        made |= byte.astype(np.uint32) << np.uint32(8 * i)
    return made


def emulate(program: str, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run one program on registers of uint32; every register as it is in the end, $0 among them."""
    at, like = dict(given), next(iter(given.values()))

    def read(name: str) -> np.ndarray:
        return np.full_like(like, int(name, 0)) if name[0].isdigit() else at[name]

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
        elif op in ("add.u32", "and.b32"):
            made = read(names[0]) + read(names[1]) if op == "add.u32" else read(names[0]) & read(names[1])
        elif op == "prmt.b32":
            made = permute(*(read(name) for name in names))
        else:
            kind = op.split(".")[-1]
            terms = [numbers(read(name), kind) for name in names]
            value = terms[0] + terms[1] if op.startswith("add") else terms[0] * terms[1] + terms[2]
            made = bits(np.maximum(value, 0) if ".relu." in op else value, kind)
        at[out] = made.astype(np.uint32)
    return at
