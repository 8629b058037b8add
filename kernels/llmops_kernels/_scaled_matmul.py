"""y = (a @ w.T) scaled: 8-bit codes on both sides, int8 or E4M3, and the scales on the sum. The frame of W8A8 linears.

    int8                 y_mn = s_m s_n sum_k a_mk w_nk                        the sum in int32: exact
    fp8, row scales      the same, the sum in float32
    fp8, 128 x 128       y_mn = sum_g s_mg s_ng' sum_{k in g} a_mk w_nk        g' = n / 128

A tile of y belongs to one program, or, where there are too few tiles to fill the chip, to SPLIT programs that each
take a run of K and leave their sums in a workspace (SPLIT, M, N), which a second kernel adds up in a fixed order: no
atomics, so a result never depends on who came first.

SWAP multiplies w (as M) by a.T (as N). Hopper's warp-group instructions (IGMMA, QGMMA) want 64 rows of the first
operand but only 8 columns of the second, so a few tokens belong there; with fp8 and a first operand of 16 rows Triton
would quietly widen both to fp16. int8 has IMMA for 16 rows.

Hopper's fp8 instruction sums into 14 bits or so below the largest term. That is let happen within one BLOCK_K only
(128 to 256 products); each partial sum is then added in full float32.

Rows past the end are read as the last row, so that only the end of K needs a mask. Programs walk through the tiles in
columns of GROUP_M, which keeps both operands in the L2.

Shapes: a (M, K), w (N, K), int8 or float8_e4m3fn; sa (M, 1) or (M, K / 128), sw (1,), (N,) or (N / 128, K / 128)
float32; bias (N,) any float; y (M, N).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from . import config
from ._interpret import INTERPRET, narrow
from ._triton import tl, triton

__all__ = ["BLOCK", "CHANNEL", "Config", "TENSOR", "add_up_kernel", "fitting", "kernel", "run", "shared_bytes"]

Config = config.Config
TENSOR, CHANNEL, BLOCK = 0, 1, 2  # whose the scales of w are
SIDE = tl.constexpr(128)  # of a block
PER_TENSOR = tl.constexpr(TENSOR)
PER_BLOCK = tl.constexpr(BLOCK)


@triton.jit  # type: ignore[untyped-decorator]  # a kernel is no Python function
def _where(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):  # type: ignore[no-untyped-def]
    """The tile (m, n) of program_id(0)."""
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    stripe = GROUP_M * tl.cdiv(N, BLOCK_N)
    first = pid // stripe * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    return first + pid % stripe % height, pid % stripe // height


@triton.jit  # type: ignore[untyped-decorator]  # a kernel is no Python function
def _add_product(acc, a, w, SWAP: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """acc + a @ w.T, or its transpose. WIDTH: products that may be summed in the tensor core's own precision."""
    if acc.dtype == tl.int32:
        made = tl.dot(w, a.T, acc, out_dtype=tl.int32) if SWAP else tl.dot(a, w.T, acc, out_dtype=tl.int32)
    elif INTERPRET:
        x, v = a.to(tl.float32), w.to(tl.float32)
        made = (tl.dot(v, x.T, acc, input_precision="ieee") if SWAP else
                tl.dot(x, v.T, acc, input_precision="ieee"))
    else:
        made = (tl.dot(w, a.T, acc, max_num_imprecise_acc=WIDTH) if SWAP else
                tl.dot(a, w.T, acc, max_num_imprecise_acc=WIDTH))
    return made


@triton.jit(do_not_specialize=["M"])  # type: ignore[untyped-decorator]  # nor compiled anew for each M
def kernel(a_ptr, w_ptr, sa_ptr, sw_ptr, bias_ptr, y_ptr, M, N, K, stride_am, stride_wn,  # type: ignore[no-untyped-def]
           stride_sa, stride_sw, stride_ym, k_split,
           BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
           PARTIAL: tl.constexpr, SWAP: tl.constexpr, SCALES: tl.constexpr, BIAS: tl.constexpr, EVEN_K: tl.constexpr):
    """One tile of y, or where PARTIAL: program_id(1)'s share of it, into the workspace that y_ptr then is."""
    SUM: tl.constexpr = tl.int32 if w_ptr.dtype.element_ty == tl.int8 else tl.float32
    pm, pn = _where(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rm, rn, rk = pm * BLOCK_M + tl.arange(0, BLOCK_M), pn * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    am, wn = tl.minimum(rm, M - 1), tl.minimum(rn, N - 1)
    a_tile = a_ptr + am[:, None].to(tl.int64) * stride_am + rk[None, :]
    w_tile = w_ptr + wn[:, None].to(tl.int64) * stride_wn + rk[None, :]
    begin = tl.program_id(1) * k_split
    end = tl.minimum(begin + k_split, K)
    acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), SUM)
    for k in tl.range(begin, end, BLOCK_K):
        if EVEN_K:
            a = tl.load(a_tile + k)
            w = tl.load(w_tile + k)
        else:
            a = tl.load(a_tile + k, mask=rk[None, :] < end - k, other=0.0)
            w = tl.load(w_tile + k, mask=rk[None, :] < end - k, other=0.0)
        if SCALES == PER_BLOCK:
            both = tl.load(sa_ptr + am * stride_sa + k // SIDE)
            both *= tl.load(sw_ptr + pn * BLOCK_N // SIDE * stride_sw + k // SIDE)
            part = _add_product(tl.zeros(acc.shape, SUM), a, w, SWAP, BLOCK_K)
            acc += part * (both[None, :] if SWAP else both[:, None])
        else:
            acc = _add_product(acc, a, w, SWAP, BLOCK_K)
    if SWAP:
        acc = acc.T
    keep = (rm[:, None] < M) & (rn[None, :] < N)
    if PARTIAL:
        row = tl.program_id(1).to(tl.int64) * M + rm[:, None]
        tl.store(y_ptr + row * N + rn[None, :], acc, mask=keep)
    else:
        y = _scaled(acc, sa_ptr + am * stride_sa, sw_ptr, bias_ptr, wn, SCALES, BIAS)
        tl.store(y_ptr + rm[:, None].to(tl.int64) * stride_ym + rn[None, :], narrow(y, y_ptr.dtype.element_ty),
                 mask=keep)


@triton.jit  # type: ignore[untyped-decorator]  # a kernel is no Python function
def _scaled(acc, sa_at, sw_ptr, bias_ptr, wn, SCALES: tl.constexpr, BIAS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The sums (m, n), their scales and the bias, in float32."""
    y = acc.to(tl.float32)
    if SCALES != PER_BLOCK:
        y = y * tl.load(sa_at)[:, None]
        y = y * (tl.load(sw_ptr) if SCALES == PER_TENSOR else tl.load(sw_ptr + wn)[None, :])
    if BIAS:
        y += tl.load(bias_ptr + wn).to(tl.float32)[None, :]
    return y


@triton.jit(do_not_specialize=["M"])  # type: ignore[untyped-decorator]  # nor compiled anew for each M
def add_up_kernel(part_ptr, sa_ptr, sw_ptr, bias_ptr, y_ptr, M, N, stride_sa, stride_ym,  # type: ignore[no-untyped-def]
                  SPLIT: tl.constexpr, SCALES: tl.constexpr, BIAS: tl.constexpr, BLOCK_N: tl.constexpr):
    """y of row program_id(0) from its SPLIT partial sums, first to last."""
    m = tl.program_id(0).to(tl.int64)
    rn = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    at = part_ptr + m * N + rn
    step = tl.full((), 1, tl.int64) * M * N
    acc = tl.load(at, mask=rn < N, other=0)
    for split in tl.static_range(1, SPLIT):
        acc += tl.load(at + split * step, mask=rn < N, other=0)
    row = tl.zeros((1,), tl.int64) + m * stride_sa
    y = _scaled(acc[None, :], sa_ptr + row, sw_ptr, bias_ptr, tl.minimum(rn, N - 1), SCALES, BIAS)
    tl.store(y_ptr + m * stride_ym + rn[None, :], narrow(y, y_ptr.dtype.element_ty), mask=rn[None, :] < N)


def run(a: Tensor, sa: Tensor, w: Tensor, sw: Tensor, bias: Tensor | None, y: Tensor, scales: int, tiles: Config
        ) -> None:
    """Fill y (M, N), whose rows may have any stride, with the given tiles."""
    M, K = a.shape
    N = w.shape[0]
    tiles = dict(tiles)
    split, swap = tiles.pop("SPLIT"), bool(tiles.pop("SWAP"))
    block_m, block_n, block_k = tiles["BLOCK_M"], tiles["BLOCK_N"], tiles["BLOCK_K"]
    k_split = -(-K // block_k // split) * block_k if K else block_k
    split = max(1, -(-K // k_split))
    k_split = max(k_split, block_k)
    to = y if split == 1 else torch.empty((split, M, N), device=a.device,
                                          dtype=torch.int32 if w.dtype == torch.int8 else torch.float32)
    offset = bias if bias is not None else sw
    stride_sw = sw.stride(0) if scales == BLOCK else 0
    kernel[(triton.cdiv(M, block_m) * triton.cdiv(N, block_n), split)](
        a, w, sa, sw, offset, to, M, N, K, a.stride(0), w.stride(0), sa.stride(0), stride_sw, y.stride(0), k_split,
        PARTIAL=split > 1, SWAP=swap, SCALES=scales, BIAS=bias is not None, EVEN_K=K % block_k == 0, **tiles)
    if split > 1:
        width = 1024 if M * N > 1 << 17 else 256
        add_up_kernel[(M, triton.cdiv(N, width))](to, sa, sw, offset, y, M, N, sa.stride(0), y.stride(0), SPLIT=split,
                                                  SCALES=scales, BIAS=bias is not None, BLOCK_N=width, num_warps=4)


@cache
def shared_bytes(index: int | None) -> int:
    """Shared memory that one program may have on CUDA device `index`; an H100's for None."""
    return 227 * 1024 if index is None else int(
        torch.cuda.get_device_properties(index).shared_memory_per_block_optin)


def fitting(tiles: Config, shared_bytes: int) -> Config:
    """The same tiles with as many stages, at most their own, as the shared memory of a device holds; 2 at the least."""
    stage = (tiles["BLOCK_M"] + tiles["BLOCK_N"]) * tiles["BLOCK_K"]
    return tiles | {"num_stages": max(2, min(tiles["num_stages"], shared_bytes // stage))}
