"""The inline assembly of the unpackers, run by a few lines of PTX emulation on every 16-bit word."""

from __future__ import annotations

import numpy as np
import pytest
from tests.kernels.ptx import bits, emulate, numbers

from llmops_kernels._unpack import base, programs
from llmops_kernels.reference.int_linear import HIGH_BITS

PROGRAMS = [(width, bf16, zero, "") for width in (2, 3, 4, 8) for bf16 in (False, True) for zero in (None, -3, 1)]


@pytest.mark.parametrize("width, bf16, zero, parts", [*PROGRAMS, (8, True, None, "exact"), (8, True, None, "stored")])
def test_every_field_of_every_word(width: int, bf16: bool, zero: int | None, parts: str) -> None:
    every = np.arange(1 << 16, dtype=np.uint32)
    other = np.random.default_rng(0).permutation(every)
    pairs = every | other << np.uint32(16)  # a register: two words
    high = np.random.default_rng(1).integers(0, 1 << 32, 1 << 16, dtype=np.uint32)
    kind, half = "bf16x2" if bf16 else "f16x2", 1 << (width - 1)
    made = programs(width, bf16, zero is not None, parts)
    for i in range(16 if width == 3 else 16 // width):
        add = 0.0 if zero is None else -(base(i, width, bf16) + zero)
        given = {"$1": pairs, "$2": high, "$3": bits(np.full((1 << 16, 2), add), kind)}
        got = numbers(emulate(made[i], given)["$0"], kind)
        if parts:  # added by the tensor cores
            got = got + numbers(emulate(made[i + 2], given)["$0"], kind)
        if parts == "stored":
            got = -0.5 * got - half
        for lane, words in enumerate((every, other)):
            top = (high >> np.uint32(16 * lane) & 0xFFFF).astype(np.int64)
            word = words.astype(np.int64)
            if width == 8:
                code = ((word >> 8 * i) & 255) - half
            elif width == 3:
                code = ((word >> 2 * (i % 8)) & 3 | (top >> HIGH_BITS[i] & 1) << 2) - half
            else:
                code = (word >> width * i & ((1 << width) - 1)) - half
            assert np.array_equal(got[:, lane], code - (zero or 0)), (i, lane)
