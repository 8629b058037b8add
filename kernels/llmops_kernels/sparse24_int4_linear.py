"""2:4 weights of four bits: y = x @ (codes * scale).T + bias at 0.375 bytes a weight, scales a row or 128 columns.

    codes    (N, K / 4)                  uint8: a group of four columns, its two numbers in the low and the high half,
                                         two's complement
    places   (N, ceil(K / 256) * 32)     as in `sparse24_linear.py`

A group is rebuilt as one 64-bit word of four halves, from halves that mean zero:

    word = Z ^ v0 << 16 i0 ^ v1 << 16 i1       Z: four times 0x6408 (fp16, 1032) or 0x4308 (bf16, 136)

The four bits of -8 to 7 turn the last four of a half from 8 into 0 to 15, so each half less 1032 (or 136) is its code,
and 0 where nothing stands. Integers go to the tensor cores as they are; the sum over 128 columns is scaled.

It saves memory more than time: rebuilding takes 6.5 to 7 thread-instructions a dense weight, and an H200 could read one
in the time of 2.9. By that arithmetic it passes 4.7e12 weights a second, 2:4 in 16 bits 3.8e12, and a dense int4 weight
(`int_linear`, 2.3 instructions) 8.6e12: that one should be the faster wherever it fits.

Shapes: x (M, K), y (M, N) fp16 or bf16; K a multiple of 4; scale (N, 1) or (N, K / 128) in x's dtype or float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from . import checks, config
from ._interpret import INTERPRET, dot, narrow
from ._library import define, ops
from ._split import sum_parts
from ._triton import tl, triton
from .int8_linear import splits
from .reference import sparse24_int4_linear as reference
from .reference.sparse24_int4_linear import GROUP
from .reference.sparse24_linear import CHUNK, places_width
from .sparse24_linear import DENSE_FROM, as_words

__all__ = ["OP", "Sparse24Int4", "dense_kernel", "kernel", "launch", "pack", "rule", "sparse24_int4_linear", "to_dense"]

OP = "sparse24_int4_linear"
HALF = tl.constexpr(CHUNK // 2)  # groups of four that share a chunk's low, or high, bits: 128 columns, one scale


class Sparse24Int4(NamedTuple):
    """A packed weight."""

    codes: Tensor
    places: Tensor
    scale: Tensor


# ---------------------------------------------------------------------------------------------------- kernels
@triton.jit  # type: ignore[untyped-decorator]  # a kernel is no Python function
def _words(codes, places, shift: tl.constexpr, BF16: tl.constexpr):  # type: ignore[no-untyped-def]
    """int64: the four halves of each group. codes, places: int32; the places in bits `shift` on."""
    first = ((places >> shift) & 3).to(tl.int64) * 16
    second = ((places >> (shift + 2)) & 3).to(tl.int64) * 16
    zeros: tl.constexpr = 0x4308430843084308 if BF16 else 0x6408640864086408
    return zeros ^ ((codes & 15).to(tl.int64) << first) ^ ((codes >> 4).to(tl.int64) << second)


@triton.jit  # type: ignore[untyped-decorator]  # a kernel is no Python function
def _column(words, p: tl.constexpr, BF16: tl.constexpr):  # type: ignore[no-untyped-def]
    """Column p of each group, as the code it holds; exact."""
    bits = (words >> (16 * p)).to(tl.int16)
    if BF16 and INTERPRET:  # its arithmetic on bf16 is wrong
        made = bits.to(tl.bfloat16, bitcast=True).to(tl.float32) - 136.0
    elif BF16:
        made = bits.to(tl.bfloat16, bitcast=True) - 136.0
    else:
        made = bits.to(tl.float16, bitcast=True) - 1032.0
    return made


@triton.jit(do_not_specialize=["M"])  # type: ignore[untyped-decorator]  # nor compiled anew for each M
def kernel(x_ptr, c_ptr, places_ptr, scale_ptr, bias_ptr, y_ptr, M, N, GROUPS, stride_xm,  # type: ignore[no-untyped-def]
           stride_c, stride_p, stride_s, chunks, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTIAL: tl.constexpr,
           BF16: tl.constexpr, ROWS: tl.constexpr, BIAS: tl.constexpr):
    """A tile of y over `chunks` chunks of K; PARTIAL: program_id(2)'s share of it, into a workspace.

    x as int64, one a group of four columns; GROUPS and stride_xm count those. ROWS: one scale a row.
    """
    DTYPE: tl.constexpr = tl.bfloat16 if BF16 else tl.float16
    rn = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rm = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    rg = tl.arange(0, HALF)
    wn, xm = tl.minimum(rn, N - 1).to(tl.int64), tl.minimum(rm, M - 1).to(tl.int64)
    x_tile = x_ptr + xm[:, None] * stride_xm + rg[None, :]
    c_tile = c_ptr + wn[:, None] * stride_c + rg[None, :]
    places_tile = places_ptr + wn[:, None] * stride_p + rg[None, :]
    scale_at = scale_ptr + wn * stride_s
    begin = tl.program_id(2) * chunks
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for chunk in tl.range(begin, tl.minimum(begin + chunks, tl.cdiv(GROUPS, 2 * HALF))):
        places = tl.load(places_tile + chunk * HALF).to(tl.int32)
        for half in tl.static_range(2):
            group = (chunk * 2 + half) * HALF
            inside = rg[None, :] < GROUPS - group
            x = tl.load(x_tile + group, mask=inside, other=0)
            w = _words(tl.load(c_tile + group, mask=inside, other=0).to(tl.int32), places, 4 * half, BF16)
            part = acc if ROWS else tl.zeros(acc.shape, tl.float32)
            for p in tl.static_range(4):
                xp = (x >> (16 * p)).to(tl.int16).to(DTYPE, bitcast=True)
                part = dot(xp, _column(w, p, BF16).to(DTYPE).T, part)
            if ROWS:
                acc = part
            else:
                there = group < GROUPS
                acc += part * tl.load(scale_at + chunk * 2 + half, mask=there, other=0.0).to(tl.float32)[None, :]
    if ROWS:
        acc *= tl.load(scale_at).to(tl.float32)[None, :]
    keep = (rm[:, None] < M) & (rn[None, :] < N)
    if PARTIAL:
        row = tl.program_id(2).to(tl.int64) * M + rm[:, None]
        tl.store(y_ptr + row * N + rn[None, :], acc, mask=keep)
    else:
        if BIAS:
            acc += tl.load(bias_ptr + tl.minimum(rn, N - 1)).to(tl.float32)[None, :]
        tl.store(y_ptr + rm[:, None].to(tl.int64) * N + rn[None, :], narrow(acc, y_ptr.dtype.element_ty), mask=keep)


@triton.jit  # type: ignore[untyped-decorator]  # a kernel is no Python function
def dense_kernel(c_ptr, places_ptr, scale_ptr, w_ptr, N, GROUPS, stride_c, stride_p, stride_s,  # type: ignore[no-untyped-def]
                 BLOCK_N: tl.constexpr, BF16: tl.constexpr, ROWS: tl.constexpr):
    """A chunk of BLOCK_N rows made dense: w (N, GROUPS) int64, a word a group."""
    DTYPE: tl.constexpr = tl.bfloat16 if BF16 else tl.float16
    rn = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
    rg = tl.arange(0, HALF)[None, :]
    places = tl.load(places_ptr + rn * stride_p + tl.program_id(1) * HALF + rg, mask=rn < N, other=0).to(tl.int32)
    for half in tl.static_range(2):
        which = tl.program_id(1) * 2 + half
        group = which * HALF + rg
        inside = (rn < N) & (group < GROUPS)
        w = _words(tl.load(c_ptr + rn * stride_c + group, mask=inside, other=0).to(tl.int32), places, 4 * half, BF16)
        here = (rn < N) & (which * HALF < GROUPS)
        scale = tl.load(scale_ptr + rn * stride_s + (0 if ROWS else which), mask=here, other=0.0).to(tl.float32)
        made = tl.zeros(w.shape, tl.int64)
        for p in tl.static_range(4):
            v = narrow(_column(w, p, BF16).to(tl.float32) * scale, DTYPE)
            made |= (v.to(tl.int16, bitcast=True).to(tl.int64) & 0xFFFF) << (16 * p)
        tl.store(w_ptr + rn * GROUPS + group, made, mask=inside)


# ---------------------------------------------------------------------------------------------------- launch
def rule(M: int, N: int, K: int, processors: int) -> config.Config:
    """Tiles for a shape that no table has."""
    return {"BLOCK_M": 16 if M <= 16 else 32, "BLOCK_N": 64, "num_warps": 4, "num_stages": 4,  # 64 x 64 spills
            "SPLIT": splits(-(-N // 64), K, 256, 2 * processors)}


def launch(x: Tensor, codes: Tensor, places: Tensor, scale: Tensor, bias: Tensor | None,
           tiles: config.Config | None = None) -> Tensor:
    """The kernel, or from DENSE_FROM tokens on a dense product; `sparse24_int4_linear` is the checked door to it."""
    M, K = x.shape
    N = codes.shape[0]
    if M == 0 or N == 0 or K == 0:
        y = torch.zeros((M, N), dtype=x.dtype, device=x.device)
        return y if bias is None else y + bias
    if M >= DENSE_FROM and tiles is None:
        return F.linear(x, to_dense(codes, places, scale, x.dtype), bias)
    y = torch.empty((M, N), dtype=x.dtype, device=x.device)
    index = x.device.index
    found = dict(tiles or config.pick(OP, config.key(N, K), M, config.device_name(index)) or rule(
        M, N, K, config.processors(index)))
    words = as_words(x)
    every = places_width(K) // (CHUNK // 2)
    chunks = -(-every // found.pop("SPLIT"))
    split = -(-every // chunks)
    to = y if split == 1 else torch.empty((split, M, N), dtype=torch.float32, device=x.device)
    offset = y if bias is None else bias
    kernel[(triton.cdiv(N, found["BLOCK_N"]), triton.cdiv(M, found["BLOCK_M"]), split)](
        words, codes, places, scale, offset, to, M, N, K // 4, words.stride(0), codes.stride(0), places.stride(0),
        scale.stride(0), chunks, PARTIAL=split > 1, BF16=x.dtype == torch.bfloat16, ROWS=scale.shape[1] == 1,
        BIAS=bias is not None, **found)
    return y if split == 1 else sum_parts(to, bias, y)


def to_dense(codes: Tensor, places: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """W (N, K) in fp16 or bf16, by a kernel where the tensors are on a GPU (or under the interpreter)."""
    N, groups = codes.shape
    made = torch.empty((N, groups), dtype=torch.int64, device=codes.device)
    if made.numel():
        dense_kernel[(triton.cdiv(N, 32), places.shape[1] // (CHUNK // 2))](
            codes, places, scale, made, N, groups, codes.stride(0), places.stride(0), scale.stride(0), BLOCK_N=32,
            BF16=dtype == torch.bfloat16, ROWS=scale.shape[1] == 1, num_warps=4)
    return made.view(dtype)


def pack(codes: Tensor, scale: Tensor) -> Sparse24Int4:
    """Signed codes (N, K) int8 of -8 to 7, two of each four zero; scale (N, 1) or (N, K / 128).

    Raises ValueError where the codes are not 2:4 (with the first place) or do not fit, or the scale's shape does not.
    """
    return Sparse24Int4(*reference.pack(codes, scale), scale.contiguous())


# ---------------------------------------------------------------------------------------------------- op
def check(x: Tensor, codes: Tensor, places: Tensor, scale: Tensor, bias: Tensor | None) -> None:
    checks.activations(x, x.shape[1] if x.dim() == 2 else -1)
    N, K = codes.shape[0] if codes.dim() == 2 else -1, x.shape[1]
    if K % 4:
        raise ValueError(f"x has {K} columns; expected a multiple of 4, since weights are 2:4")
    checks.tensor("codes", codes, torch.uint8, (None, K // 4), like=x)
    checks.tensor("places", places, torch.uint8, (N, places_width(K)), like=x)
    groups = 1 if scale.dim() == 2 and scale.shape[1] == 1 else -(-K // GROUP)
    checks.tensor("scale", scale, (x.dtype, torch.float32), (N, groups), like=x)
    if bias is not None:
        checks.tensor("bias", bias, x.dtype, (N,), like=x)


def _cpu(x: Tensor, codes: Tensor, places: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, reference.unpack(codes, places, scale, x.dtype), bias)


def _fake(x: Tensor, codes: Tensor, places: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return torch.empty((x.shape[0], codes.shape[0]), dtype=x.dtype, device=x.device)


define("sparse24_int4_linear(Tensor x, Tensor codes, Tensor places, Tensor scale, Tensor? bias) -> Tensor",
       check=check, cpu=_cpu, cuda=launch, fake=_fake)


def sparse24_int4_linear(x: Tensor, weight: Sparse24Int4, bias: Tensor | None = None) -> Tensor:
    """y (M, N) in x's dtype; weight from `pack`. Raises ValueError where dtypes, shapes or devices do not fit."""
    y: Tensor = ops.sparse24_int4_linear(x, weight.codes, weight.places, weight.scale, bias)
    return y
