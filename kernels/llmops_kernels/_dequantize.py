"""Packed weights -> a dense matrix in fp16 or bf16, for calls with so many tokens that a dense matmul is the better
way.

One pass: the codes are read once, the matrix is written once. `int_linear` and `nf4_linear` use it above the number of
tokens that their tables (or rules) name; the matrix lives for one call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._interpret import narrow
from ._triton import tl, triton
from ._unpack import field, less

__all__ = ["dense_integers", "dense_pairs", "dequantize_integers_kernel", "dequantize_pairs_kernel"]


@triton.jit  # type: ignore[untyped-decorator]  # a kernel is no Python function
def dequantize_integers_kernel(q_ptr, scale_ptr, zero_ptr, out_ptr, N, K, chunks,  # type: ignore[no-untyped-def]
                               BITS: tl.constexpr, RUN: tl.constexpr, FIELDS: tl.constexpr, GROUPS: tl.constexpr,
                               NEAR: tl.constexpr, ZERO: tl.constexpr, PROGRAMS: tl.constexpr, TILE: tl.constexpr):
    """Half a tile of `reference/int_linear.py`'s layout: (TILE / 2 rows, RUN * FIELDS columns) of out (N, K)."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    ROWS: tl.constexpr = TILE // 2
    PER: tl.constexpr = 8 if BITS == 3 else 16 // BITS  # fields of a word
    WORDS: tl.constexpr = 3 if BITS == 3 else FIELDS // PER
    SIDES: tl.constexpr = GROUPS // FIELDS if GROUPS > FIELDS else 1  # groups of a run
    FEW: tl.constexpr = FIELDS * SIDES // GROUPS if GROUPS > 0 else FIELDS  # fields of a group
    chunk = tl.program_id(0)
    tile = (tl.program_id(1) // 2).to(tl.int64) * chunks + chunk
    rn = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    for side in tl.static_range(SIDES):
        rk = side * (RUN // SIDES) + tl.arange(0, RUN // SIDES)
        q = q_ptr + tile * (WORDS * TILE * RUN) + ((rn % TILE) * (WORDS * RUN))[:, None] + rk[None, :]
        if BITS == 3:
            high = tl.load(q + 2 * RUN)
        for i in tl.static_range(FIELDS):
            if i % PER == 0:
                word = tl.load(q + (i // PER) * RUN)
                if BITS != 3:
                    high = word
            at = rn.to(tl.int64)
            if GROUPS > 0:
                group = i * SIDES // FEW + side
                at = (tile * GROUPS + group // NEAR * NEAR) * TILE + (rn % TILE) * NEAR + group % NEAR
            add = word
            if ZERO:
                add = less(tl.load(zero_ptr + at), i, BITS, dtype)[:, None]
            w = field(word, high, add, BITS, ZERO, False, False, PROGRAMS, dtype, i % 2 if BITS == 8 else i)
            w = w.to(tl.float32) * tl.load(scale_ptr + at).to(tl.float32)[:, None]
            columns = (chunk * FIELDS + i) * RUN + rk
            tl.store(out_ptr + rn[:, None].to(tl.int64) * K + columns[None, :], narrow(w, dtype),
                     mask=(rn[:, None] < N) & (columns[None, :] < K))


@triton.jit  # type: ignore[untyped-decorator]  # a kernel is no Python function
def dequantize_pairs_kernel(q_ptr, absmax_ptr, table_ptr, out_ptr, elements,  # type: ignore[no-untyped-def]
                            BLOCKSIZE: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK bytes of two 4-bit codes, the first in the high half -> 2 * BLOCK elements table[code] * absmax."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = 2 * at < elements
    codes = tl.load(q_ptr + at, mask=here, other=0).to(tl.int32)
    absmax = tl.load(absmax_ptr + 2 * at // BLOCKSIZE, mask=here, other=0.0)
    both = tl.join(tl.load(table_ptr + (codes >> 4)) * absmax, tl.load(table_ptr + (codes & 15)) * absmax)
    out = 2 * (tl.program_id(0).to(tl.int64) * BLOCK) + tl.arange(0, 2 * BLOCK)
    tl.store(out_ptr + out, narrow(both.reshape(2 * BLOCK), out_ptr.dtype.element_ty), mask=out < elements)


def dense_integers(words: Tensor, scale: Tensor, zero: Tensor | None, rows: int, columns: int, dtype: torch.dtype,
                   constants: dict[str, Any]) -> Tensor:
    """(rows, columns) in dtype; `constants` from `int_linear.constants`, for that dtype and scaled weights."""
    out = torch.empty(rows, columns, dtype=dtype, device=words.device)
    kept = {name: constants[name] for name in ("BITS", "RUN", "FIELDS", "GROUPS", "NEAR", "ZERO", "PROGRAMS", "TILE")}
    dequantize_integers_kernel[(words.shape[1], 2 * words.shape[0])](
        words, scale, scale if zero is None else zero, out, rows, columns, words.shape[1], **kept,
        num_warps=4)
    return out


def dense_pairs(codes: Tensor, absmax: Tensor, table: Tensor, blocksize: int, rows: int, columns: int,
                dtype: torch.dtype) -> Tensor:
    """(rows, columns) in dtype; absmax float32, one a block; table float32 (16)."""
    out = torch.empty(rows, columns, dtype=dtype, device=codes.device)
    dequantize_pairs_kernel[(triton.cdiv(rows * columns, 4096),)](codes, absmax, table, out, rows * columns,
                                                                  BLOCKSIZE=blocksize, BLOCK=2048, num_warps=8)
    return out
