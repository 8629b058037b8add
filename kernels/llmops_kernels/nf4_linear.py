"""Linear layer on weights in bitsandbytes' 4-bit format, read as it is: y = x @ (table[code] * absmax).T + bias.

NF4 codes are no numbers, so every code needs a look-up. A table in memory costs 9 to 11 instructions a weight and one
in shared memory collides with itself; here the table sits in eight registers. `prmt` picks four bytes out of eight by
four 3-bit indices, which is what four codes are once their top bits are masked: two picks (codes 0 to 7, 8 to 15), one
merge by the top bits, once for the high bytes of fp16 or bf16 and once for the low ones: 21 instructions for 8 codes.
The registers are made from a zero that every lane loads, because the compiler would otherwise rebuild such constants
before each use.

A byte gives two neighbouring columns, already in the order of the matrix unit's registers. Weights are the left
operand; 64 columns, which share an absmax, are one product, and absmax scales the sum. Split along K as in
`int_linear`.

Blocks of 64 or more elements that divide K; anything else, and many tokens, go through a dense matrix. Double
quantization is undone in the kernel. Shapes as in `reference/nf4_linear.py`.
"""

from __future__ import annotations

import struct
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import checks, config
from ._dequantize import dense_pairs
from ._interpret import INTERPRET, INTERPRETED, dot, narrow
from ._library import define, ops
from ._split import sum_parts
from ._triton import tl, triton
from .reference import nf4_linear as reference
from .reference.nf4_linear import TABLES, absmax_of, dequantize

__all__ = ["launch", "nf4_linear", "nf4_linear_kernel", "of_bitsandbytes", "program", "tiles"]

DENSE_FROM = 256  # tokens from which a call dequantizes and multiplies densely, where no table says otherwise
ZERO = tl.constexpr("{ .reg .b32 t; .reg .b64 a; mov.u32 t, %laneid; mul.wide.u32 a, t, 4; add.u64 a, a, $1; "
                    "ld.global.nc.b32 $0, [a]; }")  # what the compiler must take for different in every lane


@cache
def program(kind: str, bf16: bool) -> str:
    """PTX: $4 = four bytes of codes, $5 = 0 -> $0..$3 = the pair of numbers of each byte, the first code's below."""
    values = [struct.unpack("<H", struct.pack("<f", v)[2:])[0] if bf16 else struct.unpack("<H", struct.pack("<e", v))[0]
              for v in (torch.tensor(TABLES[kind], dtype=torch.bfloat16 if bf16 else torch.float16).tolist())]
    lines = []
    for half, shift in (("h", 8), ("l", 0)):
        for part in range(4):
            word = sum((values[4 * part + i] >> shift & 255) << 8 * i for i in range(4))
            lines.append(f"add.u32 {half}{part}, $5, 0x{word:08x};")
    lines += ["and.b32 s, $4, 0x77777777;", "shl.b32 u, $4, 4;"]
    for first, tops in ((0, "0x9D8C"), (2, "0xBFAE")):  # two bytes at a time; tops: the top bit of every code, spread
        lines.append(f"prmt.b32 m, $4, u, {tops};")
        for half in "hl":
            lines += [f"prmt.b32 a, {half}0, {half}1, s;", f"prmt.b32 b, {half}2, {half}3, s;",
                      f"lop3.b32 {half}, m, b, a, 0xCA;"]
        lines += [f"prmt.b32 ${first}, l, h, 0x4051;", f"prmt.b32 ${first + 1}, l, h, 0x6273;"]
        if first == 0:
            lines.append("shr.b32 s, s, 16;")
    return "{ .reg .b32 s, u, m, a, b, h, l, h0, h1, h2, h3, l0, l1, l2, l3; " + " ".join(lines) + " }"


@triton.jit  # type: ignore[untyped-decorator]  # a kernel is no Python function
def _numbers(codes, table_ptr, zero, PROGRAM: tl.constexpr, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """uint8 (BLOCK_N, 32) -> (BLOCK_N, 64) of dtype (the interpreter: float32), table[code] in the order of columns."""
    if INTERPRET:
        first = tl.load(table_ptr + (codes >> 4).to(tl.int32))
        second = tl.load(table_ptr + (codes & 15).to(tl.int32))
        first = narrow(first, dtype).to(tl.float32)
        second = narrow(second, dtype).to(tl.float32)
    else:
        pair = tl.inline_asm_elementwise(PROGRAM, "=r,=r,=r,=r,r,r,r,r,r", [codes, zero], dtype=tl.uint32, is_pure=True,
                                         pack=4)
        first = (pair & 0xFFFF).to(tl.uint16).to(dtype, bitcast=True)
        second = (pair >> 16).to(tl.uint16).to(dtype, bitcast=True)
    return tl.join(first, second).reshape(codes.shape[0], 64)


@triton.jit  # type: ignore[untyped-decorator]  # a kernel is no Python function
def _absmax(absmax_ptr, nested_ptr, table_ptr, offset, index, mask, NESTED: tl.constexpr,  # type: ignore[no-untyped-def]
            EVEN: tl.constexpr):
    """The absmax of blocks `index` (BLOCK_N, 4); 0 where the mask is off. offset: one a row."""
    if NESTED:
        code = tl.load(nested_ptr + index, mask=mask, other=0).to(tl.int32)
        outer = tl.load(absmax_ptr + index // 256, mask=mask, other=0.0)
        return tl.where(mask, tl.load(table_ptr + code) * outer + offset[:, None], 0.0)
    elif EVEN:
        return tl.load(absmax_ptr + index)
    else:
        return tl.load(absmax_ptr + index, mask=mask, other=0.0)


@triton.jit  # type: ignore[untyped-decorator]  # a kernel is no Python function
def nf4_linear_kernel(x_ptr, q_ptr, absmax_ptr, nested_ptr, nested_table_ptr, offset_ptr, table_ptr, zero_ptr,  # type: ignore[no-untyped-def]
                      bias_ptr, y_ptr, M, N, K, stride_xm, stride_ym, stride_qn, stride_off, quads, per_part,
                      BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, BIAS: tl.constexpr, PARTS: tl.constexpr,
                      EVEN_K: tl.constexpr, PROGRAM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """One (BLOCK_M, BLOCK_N) tile of y over chunks of 256 columns; quads: absmax of a row / 4 (64 elements, EVEN_K)."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    pid_n = tl.program_id(0)
    part = tl.program_id(2)
    rn = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rm = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    rb = tl.arange(0, 32)
    rk = tl.arange(0, 64)
    r4 = tl.arange(0, 4)
    row = tl.minimum(rn, N - 1).to(tl.int64)
    first = part * per_part
    last = tl.minimum(first + per_part, tl.cdiv(K, 256))
    q = q_ptr + row[:, None] * stride_qn + (first * 128 + rb)[None, :]
    x = x_ptr + rm[:, None].to(tl.int64) * stride_xm + (first * 256 + rk)[None, :]
    alive = rm[:, None] < M
    offset = tl.load(offset_ptr + row * stride_off) if NESTED else 0.0
    zero = 0
    if not INTERPRET:
        zero = tl.inline_asm_elementwise(ZERO, "=r,l", [zero_ptr.to(tl.int64)], dtype=tl.uint32, is_pure=True, pack=1)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for chunk in tl.range(first, last):
        at = chunk * 256 + 64 * r4  # the first columns of the four products
        if BLOCKSIZE == 64 and EVEN_K:
            index = row[:, None] * (quads * 4) + (chunk * 4 + r4)[None, :]
        else:
            index = row[:, None] * (K // BLOCKSIZE) + (at // BLOCKSIZE)[None, :]
        absmax = _absmax(absmax_ptr, nested_ptr, nested_table_ptr, offset, index, (at < K)[None, :], NESTED, EVEN_K)
        even, odd = absmax.reshape(BLOCK_N, 2, 2).split()
        s0, s2 = even.split()
        s1, s3 = odd.split()
        for b in tl.static_range(4):
            if EVEN_K:
                codes = tl.load(q + b * 32, eviction_policy="evict_first")
                a = tl.load(x + b * 64, mask=alive, other=0.0)
            else:
                here = chunk * 256 + b * 64
                codes = tl.load(q + b * 32, mask=(here + 2 * rb < K)[None, :], other=0)
                a = tl.load(x + b * 64, mask=alive & (here + rk < K)[None, :], other=0.0)
            w = _numbers(codes, table_ptr, zero, PROGRAM, dtype)
            total = dot(w, a.T, tl.zeros_like(acc))
            scale = s0 if b == 0 else s1 if b == 1 else s2 if b == 2 else s3
            acc += total * scale[:, None]
        q += 128
        x += 256
    acc = acc.T
    if BIAS and PARTS == 1:
        acc += tl.load(bias_ptr + rn, mask=rn < N, other=0.0).to(tl.float32)[None, :]
    out = (part.to(tl.int64) * M + rm.to(tl.int64))[:, None] * stride_ym + rn[None, :]
    tl.store(y_ptr + out, narrow(acc, y_ptr.dtype.element_ty), mask=alive & (rn[None, :] < N))


# ---------------------------------------------------------------------------------------------------- launch
def tiles(m: int, n: int, k: int, processors: int) -> config.Config:
    """Tiles that work on any device: what a call takes where the table has nothing nearer."""
    if m > DENSE_FROM:
        return {"DENSE": 1}
    found = {"BLOCK_M": 16 if m <= 16 else 32 if m <= 32 else 64, "BLOCK_N": 128, "num_stages": 3,
             "num_warps": 4 if m <= 32 else 8}
    made = triton.cdiv(n, 128) * triton.cdiv(m, found["BLOCK_M"])
    return found | {"PARTS": max(1, min(triton.cdiv(k, 256) // 2, -(-processors // made), 16))}


@cache
def _constants(kind: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """(the table, float32 (16); zeros, int32 (32)) on a device."""
    return (torch.tensor(TABLES[kind], dtype=torch.float32, device=device),
            torch.zeros(32, dtype=torch.int32, device=device))


def launch(x: Tensor, codes: Tensor, absmax: Tensor, absmax_codes: Tensor | None, absmax_table: Tensor | None,
           offset: Tensor | None, bias: Tensor | None, kind: str, blocksize: int, rows: int, out: Tensor | None = None,
           tile: config.Config | None = None) -> Tensor:
    """Run the kernels, unchecked. out: where y goes, rows of any stride; tile: not the table's, nor the rule's."""
    M, K = x.shape
    y = torch.empty(M, rows, dtype=x.dtype, device=x.device) if out is None else out
    if M == 0 or rows == 0:
        return y
    device = x.device.index if x.is_cuda else None
    if tile is None:
        shape = config.key(rows, K, kind=kind, block=blocksize)
        tile = (config.pick("nf4_linear", shape, M, config.device_name(device))
                or tiles(M, rows, K, config.processors(device)))
    if tile.get("DENSE") or blocksize % 64 or K % blocksize:
        blocks = absmax_of(absmax, absmax_codes, absmax_table, offset)
        if x.is_cuda or INTERPRETED:
            weight = dense_pairs(codes, blocks, _constants(kind, x.device)[0], blocksize, rows, K, x.dtype)
        else:
            weight = dequantize(codes, blocks, kind, blocksize, rows, K, x.dtype)
        dense = torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
        return dense if out is None else out.copy_(dense)
    parts, chunks = tile["PARTS"], triton.cdiv(K, 256)
    target = y if parts == 1 else torch.empty(parts, M, rows, dtype=torch.float32, device=x.device)
    table, zeros = _constants(kind, x.device)
    nested = absmax_codes is not None
    own = int(offset is not None and offset.numel() > 1)  # an offset a row
    grid = (triton.cdiv(rows, tile["BLOCK_N"]), triton.cdiv(M, tile["BLOCK_M"]), parts)
    nf4_linear_kernel[grid](
        x, codes, absmax, absmax_codes if nested else absmax, absmax_table if nested else absmax,
        offset if nested else absmax, table, zeros, absmax if bias is None else bias, target, M, rows, K, x.stride(0),
        target.stride(-2), K // 2, own, K // 256, triton.cdiv(chunks, parts), BLOCKSIZE=blocksize, NESTED=nested,
        BIAS=bias is not None, PARTS=parts, EVEN_K=K % 256 == 0, PROGRAM=program(kind, x.dtype == torch.bfloat16),
        BLOCK_M=tile["BLOCK_M"], BLOCK_N=tile["BLOCK_N"], num_warps=tile["num_warps"], num_stages=tile["num_stages"])
    return y if parts == 1 else sum_parts(target, bias, y)


# ---------------------------------------------------------------------------------------------------- op
def check(x: Tensor, codes: Tensor, absmax: Tensor, absmax_codes: Tensor | None, absmax_table: Tensor | None,
          offset: Tensor | None, bias: Tensor | None, kind: str, blocksize: int, rows: int) -> None:
    """Raises ValueError when dtypes, shapes or devices do not fit together."""
    checks.one_of("kind", kind, TABLES)
    checks.activations(x, x.shape[-1])
    elements = rows * x.shape[1]
    if blocksize < 32 or blocksize % 2 or elements % blocksize or x.shape[1] % 2:
        raise ValueError(f"blocksize is {blocksize} for a weight {(rows, x.shape[1])}; expected an even one of 32 or "
                         f"more that divides the number of elements, and an even number of columns")
    if codes.dtype != torch.uint8 or codes.numel() != elements // 2 or not codes.is_contiguous():
        raise ValueError(f"codes are {codes.dtype} {tuple(codes.shape)}; expected contiguous uint8 with {elements // 2}"
                         f" elements, for a weight {(rows, x.shape[1])}")
    if codes.device != x.device:
        raise ValueError(f"codes are on {codes.device}; expected {x.device}, where x is")
    blocks = elements // blocksize
    given = [part is not None for part in (absmax_codes, absmax_table, offset)]
    if any(given) != all(given):
        raise ValueError("of absmax_codes, absmax_table and offset some are missing; expected all (double "
                         "quantization) or none")
    if absmax_codes is not None and absmax_table is not None and offset is not None:
        checks.tensor("absmax_codes", absmax_codes, torch.uint8, (blocks,), like=x)
        checks.tensor("absmax_table", absmax_table, torch.float32, (256,), like=x)
        fits = offset.numel() == 1 or offset.shape == (rows,) and x.shape[1] % blocksize == 0
        if not fits or offset.dtype != torch.float32 or offset.device != x.device or not offset.is_contiguous():
            raise ValueError(f"offset is {offset.dtype} {tuple(offset.shape)} on {offset.device}; expected one float32 "
                             f"on {x.device}, or {rows}, one a row, where blocks of {blocksize} divide {x.shape[1]}")
    checks.tensor("absmax", absmax, torch.float32, (-(-blocks // 256) if absmax_codes is not None else blocks,), like=x)
    if bias is not None:
        checks.tensor("bias", bias, (*checks.HALVES, torch.float32), (rows,), like=x)


def fake(x: Tensor, codes: Tensor, absmax: Tensor, absmax_codes: Tensor | None, absmax_table: Tensor | None,
         offset: Tensor | None, bias: Tensor | None, kind: str, blocksize: int, rows: int) -> Tensor:
    return x.new_empty(x.shape[0], rows)


define("nf4_linear(Tensor x, Tensor codes, Tensor absmax, Tensor? absmax_codes, Tensor? absmax_table, Tensor? offset, "
       "Tensor? bias, str kind, int blocksize, int rows) -> Tensor",
       check=check, cpu=reference.nf4_linear, cuda=launch, fake=fake)


def of_bitsandbytes(state: Any) -> tuple[Any, ...]:
    """(absmax, absmax_codes, absmax_table, offset) of a bitsandbytes QuantState, as `nf4_linear` takes them."""
    if state.nested:
        if state.state2.blocksize != 256:
            raise ValueError(f"absmax are quantized in blocks of {state.state2.blocksize}; expected 256")
        return state.state2.absmax, state.absmax, state.state2.code, state.offset
    return state.absmax, None, None, None


def nf4_linear(x: Tensor, codes: Tensor, state: Any, bias: Tensor | None = None) -> Tensor:
    """y (M, N) for a 4-bit weight of bitsandbytes: its codes (`weight.data`) and its `weight.quant_state`."""
    y: Tensor = ops.nf4_linear(x, codes, *of_bitsandbytes(state), bias, state.quant_type, state.blocksize,
                               state.shape[0])
    return y
