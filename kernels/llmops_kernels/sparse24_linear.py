"""2:4 weights in fp16 or bf16: y = x @ W.T + bias, of each four columns of W two kept: 0.5625 of the bytes.

    values   (N, K / 2)                  the kept numbers, in their order
    places   (N, ceil(K / 256) * 32)     uint8: four bits a group of four columns, i0 | i1 << 2, where its two stand;
                                         byte j of a chunk of 64 groups holds group j (low bits) and j + 32 (high)

Few tokens: the weight is read as stored, and each group rebuilt in registers as one 64-bit word,

    word = v0 << 16 i0 | v1 << 16 i1         dense columns 4 g to 4 g + 3 as four halves

of which half p, over all groups of a row, meets column 4 g + p of x, read as 64-bit words too: four products on the
dense tensor cores in place of one. Triton has no sparse product, so this saves bytes and no arithmetic: 5 to 6
thread-instructions a dense weight, where an H200 could issue 8.7 in the time it takes to read one.

Many tokens: cuSPARSELt's product, at up to twice the dense rate, where torch was built with it and `pack` was asked for
its layout (`prefill=True`; the kept numbers of both layouts are the same memory where cuSPARSELt keeps them in this
order, which `pack` looks at: 0.625 of the bytes). Else the weight is made dense by a kernel and multiplied by cuBLAS.

Shapes: x (M, K), y (M, N), values: one of fp16 and bf16; K a multiple of 4; bias (N,).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from . import checks, config
from ._interpret import dot, narrow
from ._library import define, ops
from ._split import sum_parts
from ._triton import tl, triton
from .int8_linear import splits
from .reference import sparse24_linear as reference
from .reference.sparse24_linear import CHUNK, places_width

__all__ = ["DENSE_FROM", "OP", "Sparse24", "as_words", "dense_kernel", "kernel", "launch", "pack", "rule",
           "sparse24_linear", "to_dense"]

OP = "sparse24_linear"
DENSE_FROM = 65  # tokens from which a dense or a sparse matrix unit is worth more than bytes; an estimate
HALF = tl.constexpr(CHUNK // 2)  # groups whose places share a chunk's low, or high, bits


class Sparse24(NamedTuple):
    """A packed weight. compressed: cuSPARSELt's layout, where `pack` was asked for it and torch has it."""

    values: Tensor
    places: Tensor
    compressed: Tensor | None = None


# ---------------------------------------------------------------------------------------------------- kernels
@triton.jit  # type: ignore[untyped-decorator]  # a kernel is no Python function
def _words(pair, places, shift: tl.constexpr):  # type: ignore[no-untyped-def]
    """int64: the four dense halves of each group, from its two numbers (int32) and its places in bits `shift` on."""
    first = ((places >> shift) & 3).to(tl.int64) * 16
    second = ((places >> (shift + 2)) & 3).to(tl.int64) * 16
    return ((pair & 0xFFFF).to(tl.int64) << first) | (((pair >> 16) & 0xFFFF).to(tl.int64) << second)


@triton.jit(do_not_specialize=["M"])  # type: ignore[untyped-decorator]  # nor compiled anew for each M
def kernel(x_ptr, v_ptr, places_ptr, bias_ptr, y_ptr, M, N, GROUPS, stride_xm, stride_v, stride_p,  # type: ignore[no-untyped-def]
           stride_ym, chunks, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTIAL: tl.constexpr, SWAP: tl.constexpr,
           BF16: tl.constexpr, BIAS: tl.constexpr):
    """A tile of y over `chunks` chunks of K; PARTIAL: program_id(2)'s share of it, into a workspace.

    x and values as int64 and int32, one a group of four columns; GROUPS, stride_xm and stride_v count those.
    """
    DTYPE: tl.constexpr = tl.bfloat16 if BF16 else tl.float16
    rn = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rm = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    rg = tl.arange(0, HALF)
    wn, xm = tl.minimum(rn, N - 1).to(tl.int64), tl.minimum(rm, M - 1).to(tl.int64)
    x_tile = x_ptr + xm[:, None] * stride_xm + rg[None, :]
    v_tile = v_ptr + wn[:, None] * stride_v + rg[None, :]
    places_tile = places_ptr + wn[:, None] * stride_p + rg[None, :]
    begin = tl.program_id(2) * chunks
    acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), tl.float32)
    for chunk in tl.range(begin, tl.minimum(begin + chunks, tl.cdiv(GROUPS, 2 * HALF))):
        places = tl.load(places_tile + chunk * HALF).to(tl.int32)
        for half in tl.static_range(2):
            group = (chunk * 2 + half) * HALF
            inside = rg[None, :] < GROUPS - group
            x = tl.load(x_tile + group, mask=inside, other=0)
            w = _words(tl.load(v_tile + group, mask=inside, other=0), places, 4 * half)
            for p in tl.static_range(4):
                xp = (x >> (16 * p)).to(tl.int16).to(DTYPE, bitcast=True)
                wp = (w >> (16 * p)).to(tl.int16).to(DTYPE, bitcast=True)
                acc = dot(wp, xp.T, acc) if SWAP else dot(xp, wp.T, acc)
    if SWAP:
        acc = acc.T
    keep = (rm[:, None] < M) & (rn[None, :] < N)
    if PARTIAL:
        row = tl.program_id(2).to(tl.int64) * M + rm[:, None]
        tl.store(y_ptr + row * N + rn[None, :], acc, mask=keep)
    else:
        if BIAS:
            acc += tl.load(bias_ptr + tl.minimum(rn, N - 1)).to(tl.float32)[None, :]
        tl.store(y_ptr + rm[:, None].to(tl.int64) * stride_ym + rn[None, :], narrow(acc, y_ptr.dtype.element_ty),
                 mask=keep)


@triton.jit  # type: ignore[untyped-decorator]  # a kernel is no Python function
def dense_kernel(v_ptr, places_ptr, w_ptr, N, GROUPS, stride_v, stride_p,  # type: ignore[no-untyped-def]
                 BLOCK_N: tl.constexpr):
    """A chunk of BLOCK_N rows made dense: w (N, GROUPS) int64, a word a group."""
    rn = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
    rg = tl.arange(0, HALF)[None, :]
    places = tl.load(places_ptr + rn * stride_p + tl.program_id(1) * HALF + rg, mask=rn < N, other=0).to(tl.int32)
    for half in tl.static_range(2):
        group = (tl.program_id(1) * 2 + half) * HALF + rg
        inside = (rn < N) & (group < GROUPS)
        pair = tl.load(v_ptr + rn * stride_v + group, mask=inside, other=0)
        tl.store(w_ptr + rn * GROUPS + group, _words(pair, places, 4 * half), mask=inside)


# ---------------------------------------------------------------------------------------------------- launch
def rule(M: int, N: int, K: int, processors: int) -> config.Config:
    """Tiles for a shape that no table has."""
    block_m = 16 if M <= 16 else 32 if M <= 32 else 64
    return {"BLOCK_M": block_m, "BLOCK_N": 64, "SWAP": 0, "num_warps": 4,
            "num_stages": 4 if block_m == 16 else 3, "SPLIT": splits(-(-N // 64), K, 256, 2 * processors)}


def launch(x: Tensor, values: Tensor, places: Tensor, bias: Tensor | None, compressed: Tensor | None,
           tiles: config.Config | None = None) -> Tensor:
    """The kernel, or from DENSE_FROM tokens on a matrix product; `sparse24_linear` is the checked door to it."""
    M, K = x.shape
    N = values.shape[0]
    if M == 0 or N == 0 or K == 0:
        y = torch.zeros((M, N), dtype=x.dtype, device=x.device)
        return y if bias is None else y + bias
    if M >= DENSE_FROM and tiles is None:
        return _many(x, values, places, bias, compressed)
    y = torch.empty((M, N), dtype=x.dtype, device=x.device)
    index = x.device.index
    found = dict(tiles or config.pick(OP, config.key(N, K), M, config.device_name(index)) or rule(
        M, N, K, config.processors(index)))
    words, pairs = as_words(x), values.view(torch.int32)
    every = places_width(K) // (CHUNK // 2)
    chunks = -(-every // found.pop("SPLIT"))
    split, swap = -(-every // chunks), bool(found.pop("SWAP"))
    to = y if split == 1 else torch.empty((split, M, N), dtype=torch.float32, device=x.device)
    offset = y if bias is None else bias
    kernel[(triton.cdiv(N, found["BLOCK_N"]), triton.cdiv(M, found["BLOCK_M"]), split)](
        words, pairs, places, offset, to, M, N, K // 4, words.stride(0), pairs.stride(0), places.stride(0), N, chunks,
        PARTIAL=split > 1, SWAP=swap, BF16=x.dtype == torch.bfloat16, BIAS=bias is not None, **found)
    return y if split == 1 else sum_parts(to, bias, y)


def as_words(x: Tensor) -> Tensor:
    """x as int64, a word for four columns; copied where its rows do not begin at whole words."""
    if x.stride(1) != 1 or x.stride(0) % 4 or x.data_ptr() % 8:
        x = x.clone(memory_format=torch.contiguous_format)
    return x.view(torch.int64)


def _many(x: Tensor, values: Tensor, places: Tensor, bias: Tensor | None, compressed: Tensor | None) -> Tensor:
    if compressed is None:
        return F.linear(x, to_dense(values, places), bias)
    tokens = x.shape[0]
    padded = F.pad(x, (0, 0, 0, -tokens % 8)).contiguous()  # cuSPARSELt takes multiples of 8
    y: Tensor = torch._cslt_sparse_mm(compressed, padded.t(), bias=bias, transpose_result=True)
    return y[:tokens].contiguous()


def to_dense(values: Tensor, places: Tensor) -> Tensor:
    """W (N, K), by a kernel where the tensors are on a GPU (or under the interpreter)."""
    N, groups = values.shape[0], values.shape[1] // 2
    made = torch.empty((N, groups), dtype=torch.int64, device=values.device)
    pairs = values.view(torch.int32)
    if made.numel():
        dense_kernel[(triton.cdiv(N, 32), places.shape[1] // (CHUNK // 2))](
            pairs, places, made, N, groups, pairs.stride(0), places.stride(0), BLOCK_N=32, num_warps=4)
    return made.view(values.dtype)


# ---------------------------------------------------------------------------------------------------- packing
def pack(weight: Tensor, prefill: bool = False) -> Sparse24:
    """A dense 2:4 weight (N, K) fp16 or bf16, packed on its own device.

    prefill: keep cuSPARSELt's layout beside, for many tokens. Raises ValueError where the weight is not 2:4 (with the
    first place), its dtype or K does not fit, or cuSPARSELt is asked for and missing.
    """
    values, places = reference.pack(weight)
    if not prefill:
        return Sparse24(values, places)
    if weight.device.type != "cuda" or not torch.backends.cusparselt.is_available():
        raise ValueError(f"prefill=True on {weight.device} with torch {torch.__version__}; expected a CUDA device and "
                         f"a torch built with cuSPARSELt: leave it out, and many tokens go through a dense copy")
    if weight.shape[0] % 16 or weight.shape[1] % 16:
        raise ValueError(f"prefill=True for {tuple(weight.shape)}; cuSPARSELt takes multiples of 16: leave it out")
    compressed = torch._cslt_compress(weight.contiguous())
    kept = compressed.view(-1)[:values.numel()].view(values.shape)
    return Sparse24(kept if torch.equal(kept, values) else values, places, compressed)


# ---------------------------------------------------------------------------------------------------- op
def check(x: Tensor, values: Tensor, places: Tensor, bias: Tensor | None, compressed: Tensor | None) -> None:
    checks.activations(x, x.shape[1] if x.dim() == 2 else -1)
    N, K = values.shape[0] if values.dim() == 2 else -1, x.shape[1]
    if K % 4:
        raise ValueError(f"x has {K} columns; expected a multiple of 4, since weights are 2:4")
    checks.tensor("values", values, x.dtype, (None, K // 2), like=x)
    checks.tensor("places", places, torch.uint8, (N, places_width(K)), like=x)
    if bias is not None:
        checks.tensor("bias", bias, x.dtype, (N,), like=x)
    if compressed is not None:
        checks.tensor("compressed", compressed, x.dtype, (None,) * compressed.dim(), like=x)


def _cpu(x: Tensor, values: Tensor, places: Tensor, bias: Tensor | None, compressed: Tensor | None) -> Tensor:
    return F.linear(x, reference.unpack(values, places), bias)


def _fake(x: Tensor, values: Tensor, places: Tensor, bias: Tensor | None, compressed: Tensor | None) -> Tensor:
    return torch.empty((x.shape[0], values.shape[0]), dtype=x.dtype, device=x.device)


define("sparse24_linear(Tensor x, Tensor values, Tensor places, Tensor? bias, Tensor? compressed) -> Tensor",
       check=check, cpu=_cpu, cuda=launch, fake=_fake)


def sparse24_linear(x: Tensor, weight: Sparse24, bias: Tensor | None = None) -> Tensor:
    """y (M, N) in x's dtype; weight from `pack`. Raises ValueError where dtypes, shapes or devices do not fit."""
    y: Tensor = ops.sparse24_linear(x, weight.values, weight.places, bias, weight.compressed)
    return y
