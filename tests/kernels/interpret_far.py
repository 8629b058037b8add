"""Run by test_far.py under Triton's interpreter: offsets past 2^31 in packed weights, in dense ones and in workspaces.

Weights of that size are made of addresses alone: memory that is reserved and not touched (`room`). Of a launch over
them the interpreter runs one program, the last, whose offsets are the largest, with the arguments of the whole
(`only`); only what this one reads is filled in. The same numbers at the beginning of a small weight give what it has to
make. An offset in 32 bits would wrap, and read or crash elsewhere.
"""

from __future__ import annotations

import json
import mmap
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from benchmarks.kernels import sparse24_int4_linear as int4_cases
from benchmarks.kernels import sparse24_linear as sparse_cases
from torch import Tensor
from triton.runtime import interpreter

from llmops_kernels import (
    _group_sums,
    _split,
    int_linear,
    int_matmul,
    nf4_linear,
    sparse24_int4_linear,
    sparse24_linear,
)
from llmops_kernels._dequantize import dense_integers, dense_pairs, dequantize_integers_kernel, dequantize_pairs_kernel

HALF = torch.float16
FAR = 1 << 31
UNRESERVED = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)


def room(*shape: int, dtype: torch.dtype) -> Tensor:
    """Addresses for so many numbers, none of them backed by memory before it is written."""
    count = torch.Size(shape).numel()
    held = mmap.mmap(-1, count * dtype.itemsize, flags=UNRESERVED)
    return torch.frombuffer(held, dtype=dtype, count=count).view(shape)


@contextmanager
def only(*program: int) -> Iterator[None]:
    """Launches run this program alone, in a grid that they believe to be whole."""
    place = (*program, 0, 0)[:3]
    begin, builder = interpreter.GridExecutor.__init__, interpreter.interpreter_builder
    interpreter.GridExecutor.__init__ = lambda self, fn, names, grid, *more: begin(self, fn, names, (1, 1, 1), *more)
    builder.set_grid_idx = lambda *ran: setattr(builder, "grid_idx", place)
    try:
        yield
    finally:
        interpreter.GridExecutor.__init__ = begin
        del builder.set_grid_idx


def made(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def integers(bits: int) -> tuple[Tensor, Tensor]:
    """`int_linear` on 2^31 words and some; its last 64 rows."""
    k, half = 256, 1 << (bits - 1)
    codes = torch.randint(-half, half, (128, k), generator=made(), dtype=torch.int8)
    scale = (torch.rand(128, 2, generator=made(1)) + 0.1).to(HALF)
    x = torch.randn(3, k, generator=made(2)).to(HALF)
    near = int_linear.pack(codes, scale, None, bits=bits, group_size=128)
    tiles = FAR // near.words[0].numel() + 2
    words = room(tiles, *near.words.shape[1:], dtype=torch.int16)
    scales = room(tiles, *near.scale.shape[1:], dtype=HALF)
    words[-1], scales[-1] = near.words[0], near.scale[0]
    assert words[:-1].numel() >= FAR
    tile = {"BLOCK_M": 16, "BLOCK_N": 64, "PARTS": 1, "num_warps": 4, "num_stages": 2}
    with only(2 * tiles - 1):
        y = int_linear.launch(x, words, scales, None, None, bits, 128, 128 * tiles, tile=tile)
    return y[:, -64:], int_linear.launch(x, near.words, near.scale, None, None, bits, 128, 128, tile=tile)[:, -64:]


def integers_made_dense(bits: int) -> tuple[Tensor, Tensor]:
    """Words and the dense matrix both past 2^31: the last chunk of the second 64 rows."""
    half, how = 1 << (bits - 1), int_linear.layout(bits, 128)
    codes = torch.randint(-half, half, (128, how.chunk), generator=made(), dtype=torch.int8)
    near = int_linear.pack(codes, torch.rand(128, how.chunk // 128, generator=made(1)) + 0.1, None, bits=bits,
                           group_size=128)
    chunks = FAR // near.words[0, 0].numel() + 1
    words = room(1, chunks, *near.words.shape[2:], dtype=torch.int16)
    words[0, -1] = near.words[0, 0]
    a_chunk = near.scale.shape[1]
    scale = room(1, chunks * a_chunk, *near.scale.shape[2:], dtype=torch.float32)
    scale[0, -a_chunk:] = near.scale[0]
    dense = room(128, chunks * how.chunk, dtype=HALF)
    known = int_linear.constants(bits, 128, False, False, False, True)
    kept = {name: known[name] for name in ("BITS", "RUN", "FIELDS", "GROUPS", "NEAR", "ZERO", "PROGRAMS", "TILE")}
    with only(chunks - 1, 1):
        dequantize_integers_kernel[(chunks, 2)](words, scale, scale, dense, 128, dense.shape[1], chunks, **kept)
    near_dense = dense_integers(near.words, near.scale, None, 128, how.chunk, HALF, known)
    return dense[64:, -how.chunk:], near_dense[64:]


def general(bits: int) -> tuple[Tensor, Tensor]:
    """`int_matmul`, whose rows may have any stride: here, the last of three begins past 2^31."""
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, (3, 200), generator=made(), dtype=torch.int8)
    near, scale = int_matmul.pack_codes(codes, bits), torch.rand(3, 1, generator=made(1)) + 0.1
    x = torch.randn(3, 200, generator=made(2)).to(HALF)
    far, close = (int_matmul.launch(x, each, scale, None, bits, 200) for each in (apart(near), near))
    return far, close


def apart(near: Tensor) -> Tensor:
    """Its three rows, the last past 2^31 (a stride that does not fit 32 bits itself would be passed in 64)."""
    row = (FAR // 2 + 16) * (4 if near.dtype == HALF else 1)  # which these kernels read as words of four, or of two
    return room(2 * row + near.shape[1], dtype=near.dtype).as_strided(near.shape, (row, 1)).copy_(near)


def pairs() -> tuple[Tensor, Tensor]:
    """`nf4_linear` on 2^31 bytes and some; its last 128 rows."""
    k, rows = 256, FAR // 128 + 128
    near = torch.randint(0, 256, (128 * k // 2,), generator=made(), dtype=torch.uint8)
    absmax = torch.rand(128 * k // 64, generator=made(1)) + 0.1
    x = torch.randn(3, k, generator=made(2)).to(HALF)
    codes, far = room(rows * k // 2, dtype=torch.uint8), room(rows * k // 64, dtype=torch.float32)
    codes[-near.numel():], far[-absmax.numel():] = near, absmax
    tile = {"BLOCK_M": 16, "BLOCK_N": 128, "PARTS": 1, "num_warps": 4, "num_stages": 2}
    more = (None, None, None, None, "nf4", 64)
    with only(rows // 128 - 1):
        y = nf4_linear.launch(x, codes, far, *more, rows, tile=tile)
    return y[:, -128:], nf4_linear.launch(x, near, absmax, *more, 128, tile=tile)


def pairs_made_dense() -> tuple[Tensor, Tensor]:
    table = torch.tensor(nf4_linear.TABLES["nf4"])
    near = torch.randint(0, 256, (2048,), generator=made(), dtype=torch.uint8)
    absmax = torch.rand(64, generator=made(1)) + 0.1
    count = FAR + 2048
    codes, far = room(count, dtype=torch.uint8), room(count // 32, dtype=torch.float32)
    dense = room(2 * count, dtype=HALF)
    codes[-2048:], far[-64:] = near, absmax
    with only(count // 2048 - 1):
        dequantize_pairs_kernel[(count // 2048,)](codes, far, table, dense, 2 * count, BLOCKSIZE=64, BLOCK=2048)
    return dense[-4096:], dense_pairs(near, absmax, table, 64, 1, 4096, HALF).view(-1)


def sparse(dense: bool) -> tuple[Tensor, Tensor]:
    """Tokens, values and places, multiplied, or values and places made dense."""
    x = torch.randn(3, 256, generator=made(2)).to(HALF)
    near = sparse24_linear.pack(sparse_cases.weight(3, 256, 0, HALF))[:2]
    tiles = sparse24_linear.rule(3, 3, 256, 132)
    results = [sparse24_linear.to_dense(*each) if dense else
               sparse24_linear.launch(y, *each, None, None, tiles)
               for y, *each in ([apart(part) for part in (x, *near)], (x, *near))]
    return results[0], results[1]


def sparse_int4(dense: bool) -> tuple[Tensor, Tensor]:
    x = torch.randn(3, 256, generator=made(2)).to(HALF)
    codes, scale, _ = int4_cases.weight(3, 256, False, 0, HALF)
    near = sparse24_int4_linear.pack(codes, scale)
    tiles = sparse24_int4_linear.rule(3, 3, 256, 132)
    results = [sparse24_int4_linear.to_dense(*each, HALF) if dense else
               sparse24_int4_linear.launch(y, *each, None, tiles)
               for y, *each in ([apart(part) for part in (x, *near[:2])] + [near[2]], (x, *near))]
    return results[0], results[1]


def parts() -> tuple[Tensor, Tensor]:
    """The second kernel of split products: the third part of 2^30 sums begins at 2^31."""
    n, near = (1 << 30) + 1024, torch.randn(3, 1, 1024, generator=made())
    sums, y = room(3, 1, n, dtype=torch.float32), room(1, n, dtype=HALF)
    sums[:, :, -1024:] = near
    with only(n // 1024 - 1, 0):
        _split.sum_parts(sums, None, y)
    return y[:, -1024:], _split.sum_parts(near, None, torch.empty(1, 1024, dtype=HALF))


def joined() -> tuple[Tensor, Tensor]:
    """Its scales past 2^31: the last rows of a weight with many groups."""
    tiles, groups = FAR // (128 * 128) + 1, 128
    near = torch.rand(1, groups // 8, 128, 8, generator=made()).to(HALF)
    points = torch.randint(-128, 128, near.shape, generator=made(1), dtype=torch.int16)
    scale, zero = (room(tiles, *near.shape[1:], dtype=each.dtype) for each in (near, points))
    scale[-1], zero[-1] = near[0], points[0]
    sums, close = torch.randn(3, 1, groups, generator=made(2)).bfloat16(), torch.randn(1, 1, 128, generator=made(3))
    parts = room(1, 1, 128 * tiles, dtype=torch.float32)
    parts[..., -128:] = close
    y = room(1, 128 * tiles, dtype=HALF)
    with only(4 * tiles - 1):
        _group_sums.join(parts, sums, scale, zero, 128, None, y)
    return y[:, -32:], _group_sums.join(close, sums, near, points, 128, None, torch.empty(1, 128, dtype=HALF))[:, -32:]


CASES = {"integers": integers, "integers made dense": integers_made_dense, "general": general, "pairs": pairs,
         "pairs made dense": pairs_made_dense, "sparse": sparse, "sparse int4": sparse_int4, "parts": parts,
         "joined": joined}

if __name__ == "__main__":
    for name, *arguments in json.loads(sys.argv[1]):
        found, wanted = CASES[name](*arguments)
        print(json.dumps({"equal": bool(torch.equal(found, wanted)), "any": bool(wanted.count_nonzero())}), flush=True)
