"""Weight-only linear layer on 2-, 3-, 4- and 8-bit integers: y = x @ ((codes - zero) * scale).T + bias.

At a few tokens the layer costs what it takes to read its weight, so the kernel streams words of packed codes, turns
every bit field into fp16 or bf16 integers in registers (`_unpack.py`, about one instruction a weight), multiplies them
on the tensor cores and scales the sum of each group: no weight is ever rounded. The layout (`reference/int_linear.py`)
gives whole runs of neighbouring columns from one mask, and tiles that are contiguous in memory.

Which way a call goes, by its number of tokens M (the table of `config.py`, else `tiles`):

    M <= 16    16 tokens a tile, which the tensor cores take at once; split along K until the chip is full. Every part
               sums in float32 into a workspace of its own, a second kernel adds the parts in order: the result is the
               same bits every time, which atomics can't promise. Zero points of 8 bits it takes off as well, in bf16
               and in groups of 32 (`_group_sums.py`).
    to 512     tiles of 32 or 64 tokens with the operands swapped: wgmma takes its left one from registers, so unpacked
               weights never pass through shared memory. Groups of 32 and 64 then scale the weight, rounding it as the
               next way does: 64 tokens' sums are 1 to 2 multiplications a weight, the weight itself is half of one.
    above      the weight is dequantized once into a dense matrix and cuBLAS multiplies: at thousands of tokens that is
               within a tenth of dense speed, which a fused kernel has yet to beat.

Two groups of 32 in a run of 64 columns: every token stands twice in its tile, once with zeros in the columns of either
group, so one product gives both sums, and copies stay 16 bytes wide.

Groups of 32, 64, 128 columns or whole rows, symmetric or with zero points; other groups go to `int_matmul`.
Not written: a stream-K schedule for ragged shapes.

Shapes: x (M, K) fp16 or bf16, any row stride; y (M, N); words, scale, zero as `pack` lays them out; bias (N).
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks, config
from ._dequantize import dense_integers
from ._group_sums import add_up, join
from ._interpret import INTERPRETED, dot, narrow
from ._library import define, ops
from ._split import sum_parts
from ._triton import tl, triton
from ._unpack import across, field, in_order, less, points_at, programs, scales, spread, times
from .reference import int_linear as reference
from .reference.int_linear import TILE_ROWS, Packed, dequantize, layout, pack, unpack

__all__ = ["Packed", "dequantize", "int_linear", "int_linear_kernel", "launch", "pack", "tiles", "unpack"]

DENSE_FROM = 512  # tokens from which a call dequantizes and multiplies densely, where no table says otherwise


# ---------------------------------------------------------------------------------------------------- kernels
@triton.jit  # type: ignore[untyped-decorator]  # a kernel is no Python function
def int_linear_kernel(x_ptr, q_ptr, scale_ptr, zero_ptr, bias_ptr, y_ptr, sums_ptr,  # type: ignore[no-untyped-def]
                      M, N, K, stride_xm, stride_ym, chunks, per_part,
                      BITS: tl.constexpr, RUN: tl.constexpr, FIELDS: tl.constexpr, GROUPS: tl.constexpr,
                      NEAR: tl.constexpr, ZERO: tl.constexpr, BIAS: tl.constexpr, PARTS: tl.constexpr,
                      EVEN_K: tl.constexpr, PROGRAMS: tl.constexpr, SWAP: tl.constexpr, SCALED: tl.constexpr,
                      PAIRED: tl.constexpr, LATER: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                      TILE: tl.constexpr):
    """One (BLOCK_M, BLOCK_N) tile of y, over the chunks of part program_id(1) of K.

    GROUPS: scales of a row and chunk; 0: one scale a row, applied at the end. PARTS: y is (PARTS, M, N) float32.
    SCALED: weights are scaled, not sums. PAIRED: 8 bits in two parts. LATER: what the numbers multiplied here are too
    large by is taken off with the zero points, from sums of x; y is (PARTS, M, N) then, whatever PARTS.
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    PER: tl.constexpr = 8 if BITS == 3 else 16 // BITS  # fields of a word
    WORDS: tl.constexpr = 3 if BITS == 3 else FIELDS // PER  # words of a row, in runs
    SPAN: tl.constexpr = WORDS * TILE * RUN  # words of a tile
    SUMS: tl.constexpr = GROUPS > 0 and not SCALED  # a sum for each group
    SIDES: tl.constexpr = 2 if GROUPS > FIELDS else 1  # groups of a run
    FEW: tl.constexpr = FIELDS * SIDES // GROUPS if GROUPS > 0 else FIELDS  # fields of a group
    TIMES: tl.constexpr = SIDES if SUMS else 1  # how often a token stands in a tile
    MOVE: tl.constexpr = BITS == 8 and not SCALED  # scalars move along the scales, too: 8 instructions less there
    ONCE: tl.constexpr = 256 // RUN if BITS == 8 else 0  # rows that a warp copies at a time
    pid_m, pid_n = _place(M, N, BLOCK_M, BLOCK_N)
    part = tl.program_id(1)
    first = part * per_part
    last = tl.minimum(first + per_part, chunks)

    rk = tl.arange(0, RUN)
    side = tl.arange(0, TIMES * BLOCK_M) // BLOCK_M
    rm = pid_m * BLOCK_M + tl.arange(0, TIMES * BLOCK_M) % BLOCK_M
    order = spread(tl.arange(0, BLOCK_N), BLOCK_N, ONCE)
    row = pid_n * BLOCK_N  # a block lies in one tile: a scalar moves along K, offsets within it are constant
    tile = (row // TILE).to(tl.int64) * chunks + first
    q = q_ptr + tile * SPAN + (row % TILE) * (WORDS * RUN)
    inside = order[:, None] * (WORDS * RUN) + rk[None, :]
    scale = scale_ptr + tile * (GROUPS * TILE) + (row % TILE) * NEAR
    zero = zero_ptr + tile * (GROUPS * TILE) + (row % TILE) * NEAR
    x = x_ptr + rm[:, None].to(tl.int64) * stride_xm + (first * (RUN * FIELDS) + rk)[None, :]
    alive = rm[:, None] < M
    if TIMES > 1:  # a token stands once for each group of a run, with zeros in the columns of the other
        alive = alive & (side[:, None] == (rk // (RUN // 2))[None, :])
    acc = tl.zeros((BLOCK_N if SWAP else TIMES * BLOCK_M, TIMES * BLOCK_M if SWAP else BLOCK_N), tl.float32)
    if ZERO and GROUPS == 0:
        points = tl.load(zero_ptr + row + order)
        next_points = points
    for chunk in tl.range(0, last - first):  # counted from 0: two instructions less
        if BITS == 3:
            high = tl.load(q + inside + 2 * RUN, eviction_policy="evict_first")
        if not SUMS:  # with wgmma a sum of its own for every chunk: one over all of them makes ptxas wait after each
            total = tl.zeros_like(acc) if SWAP else acc
        for i in tl.static_range(FIELDS):
            if i % PER == 0:
                word = tl.load(q + inside + (i // PER) * RUN, eviction_policy="evict_first")
                if BITS != 3:
                    high = word
            a = _columns(x + i * RUN, alive, rk < K - ((first + chunk) * FIELDS + i) * RUN, EVEN_K)
            group = i * SIDES // FEW  # of the chunk; the run's first one
            if GROUPS > 0 and (SIDES > 1 or i % FEW == 0):
                at = (0 if MOVE else chunk * (GROUPS * TILE)) + group // NEAR * NEAR * TILE + group % NEAR
                if ZERO:
                    points = points_at(zero + at, BLOCK_N, ONCE, NEAR)
                    next_points = points_at(zero + at + (SIDES - 1), BLOCK_N, ONCE, NEAR)
                if SCALED:
                    factor = points_at(scale + at, BLOCK_N, ONCE, NEAR)
                    next_factor = points_at(scale + at + (SIDES - 1), BLOCK_N, ONCE, NEAR)
                elif i * SIDES // FEW % NEAR == 0:
                    s = scales(scale + at, order, NEAR)
            add = word
            if ZERO:
                add = across(less(points, i, BITS, dtype), less(next_points, i, BITS, dtype), SIDES, RUN)
            if SUMS and (SIDES > 1 or i % FEW == 0):
                total = tl.zeros_like(acc)
            for p in tl.static_range(2 if PAIRED else 1):
                w = field(word, high, add, BITS, ZERO, PAIRED, LATER, PROGRAMS, dtype,
                          i % 2 + 2 * p if BITS == 8 else i)
                if SCALED:
                    w = times(w, across(factor, next_factor, SIDES, RUN))
                total = dot(w, a.T, total) if SWAP else dot(a, w.T, total)
            if SUMS and (SIDES > 1 or i % FEW == FEW - 1):
                low, top = s[i * SIDES // FEW % NEAR], s[(i * SIDES // FEW + SIDES - 1) % NEAR]
                acc += total * _beside(low, top, side, SIDES, SWAP)
        if not SUMS:
            acc = acc + total if SWAP else total
        q += SPAN
        x += RUN * FIELDS
        if MOVE:
            scale += GROUPS * TILE
            zero += GROUPS * TILE
    if SWAP:
        acc = acc.T
    if TIMES > 1:
        acc = tl.sum(acc.reshape(TIMES, BLOCK_M, BLOCK_N), 0)
    if PAIRED and LATER:
        acc *= -0.5
    acc = in_order(acc, ONCE)
    rn = row + tl.arange(0, BLOCK_N)
    rm = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    if GROUPS == 0:
        acc *= tl.load(scale_ptr + rn).to(tl.float32)[None, :]
    if BIAS and PARTS == 1 and not LATER:
        acc += tl.load(bias_ptr + rn, mask=rn < N, other=0.0).to(tl.float32)[None, :]
    at = (part.to(tl.int64) * M + rm.to(tl.int64))[:, None] * stride_ym + rn[None, :]
    tl.store(y_ptr + at, narrow(acc, y_ptr.dtype.element_ty), mask=(rm[:, None] < M) & (rn[None, :] < N))
    if LATER:  # groups of a part, shared among its programs
        SIZE: tl.constexpr = RUN * FIELDS // GROUPS if GROUPS > 0 else RUN * FIELDS
        MANY: tl.constexpr = RUN * FIELDS // SIZE
        add_up(x_ptr, sums_ptr, M, K, stride_xm, rm, first * MANY + pid_n, tl.minimum(last * MANY, tl.cdiv(K, SIZE)),
               tl.cdiv(N, BLOCK_N), SIZE)


@triton.jit  # type: ignore[untyped-decorator]  # a kernel is no Python function
def _place(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    """(pid_m, pid_n), so that programs that are near in time share x and weights in the L2 cache."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles_m = tl.cdiv(M, BLOCK_M)
    band = 8 * tiles_n
    first_m = (tl.program_id(0) // band) * 8
    high_m = tl.minimum(tiles_m - first_m, 8)
    pid_m = first_m + (tl.program_id(0) % band) % high_m
    pid_n = (tl.program_id(0) % band) // high_m
    return pid_m, pid_n


@triton.jit  # type: ignore[untyped-decorator]  # a kernel is no Python function
def _columns(x, alive, here, EVEN_K: tl.constexpr):  # type: ignore[no-untyped-def]
    """Some columns of tokens; zeros for dead ones and beyond K."""
    if EVEN_K:
        return tl.load(x, mask=alive, other=0.0)
    else:
        return tl.load(x, mask=alive & here[None, :], other=0.0)


@triton.jit  # type: ignore[untyped-decorator]  # a kernel is no Python function
def _beside(low, top, side, SIDES: tl.constexpr, SWAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Scales of rows, shaped as what multiplies the sums: `low` for tokens of side 0, `top` for those of side 1."""
    if SIDES == 1:
        return low[:, None] if SWAP else low[None, :]
    elif SWAP:
        return tl.where(side[None, :] == 0, low[:, None], top[:, None])
    else:
        return tl.where(side[:, None] == 0, low[None, :], top[None, :])


# ---------------------------------------------------------------------------------------------------- tiles
def tiles(m: int, n: int, k: int, bits: int, group_size: int, processors: int) -> config.Config:
    """Tiles that work on any device: what a call takes where the table has nothing nearer."""
    how = layout(bits, group_size)
    if m > DENSE_FROM:
        return {"DENSE": 1}
    two = how.groups > how.fields  # groups of a run: the weights have to go left
    if m > 16:  # two programs a processor fit: one unpacks while the other's products run
        found = {"BLOCK_M": 32 if m <= 32 else 64, "BLOCK_N": 64, "SWAP": 1, "SCALED": int(group_size in (32, 64)),
                 "num_warps": 4, "num_stages": 3}
    elif how.bits == 8:
        found = {"BLOCK_M": 16, "BLOCK_N": 128, "SWAP": int(how.groups > 0), "num_warps": 4, "num_stages": 3}
    else:  # with runs of 32, two warps copy 16 bytes a thread where four would copy 8
        found = {"BLOCK_M": 16, "BLOCK_N": 64, "SWAP": int(two), "num_warps": 4 if how.run == 64 else 2,
                 "num_stages": 4}
    made = triton.cdiv(n, found["BLOCK_N"]) * triton.cdiv(m, found["BLOCK_M"])
    parts = -(-2 * processors // made) if m <= 16 else 2 * processors // made  # fill the chip; never a second wave
    return found | {"PARTS": max(1, min(triton.cdiv(k, how.chunk) // 2, parts, 16))}


def constants(bits: int, group_size: int, zero: bool, bias: bool, bf16: bool, scaled: bool, few: bool = False
              ) -> dict[str, object]:
    """What the kernel is compiled for, beside its tiles. scaled: it scales weights, not sums; few: to 16 tokens."""
    how = layout(bits, group_size)
    paired = how.bits == 8 and bf16 and few and not scaled  # at more tokens a second product costs more than additions
    later = few and how.bits == 8 and (zero and (bf16 or group_size == 32) or bf16 and group_size == 32)
    inside = zero and not later
    parts = "" if not paired else "stored" if later else "exact"
    return {"BITS": how.bits, "RUN": how.run, "FIELDS": how.fields, "GROUPS": how.groups, "NEAR": how.near,
            "ZERO": inside, "BIAS": bias, "PROGRAMS": "|".join(programs(how.bits, bf16, inside, parts)),
            "SCALED": scaled, "PAIRED": paired, "LATER": later, "TILE": TILE_ROWS}


# ---------------------------------------------------------------------------------------------------- launch
def launch(x: Tensor, words: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int,
           group_size: int, rows: int, out: Tensor | None = None, tile: config.Config | None = None) -> Tensor:
    """Run the kernels, unchecked. out: where y goes, rows of any stride; tile: not the table's, nor the rule's."""
    M, K = x.shape
    y = torch.empty(M, rows, dtype=x.dtype, device=x.device) if out is None else out
    if M == 0 or rows == 0:
        return y
    device = x.device.index if x.is_cuda else None
    if tile is None:
        shape = config.key(rows, K, bits=bits, group=group_size)
        tile = (config.pick("int_linear", shape, M, config.device_name(device))
                or tiles(M, rows, K, bits, group_size, config.processors(device)))
    if tile.get("DENSE"):
        dense = _dense(x, words, scale, zero, bias, bits, group_size, rows)
        return dense if out is None else out.copy_(dense)
    if tile.get("SCALED") and scale.dtype != x.dtype:  # a scale would be rounded, too
        tile = tile | {"SCALED": 0, "BLOCK_M": min(tile["BLOCK_M"], 32)}
    how = layout(bits, group_size)
    known = constants(bits, group_size, zero is not None, bias is not None, x.dtype == torch.bfloat16,
                      bool(tile.get("SCALED")), tile["BLOCK_M"] <= 16)
    parts, chunks, later = tile["PARTS"], words.shape[1], known["LATER"]
    whole = parts == 1 and not later
    target = y if whole else torch.empty(parts, M, rows, dtype=torch.float32, device=x.device)
    groups = triton.cdiv(K, how.chunk if group_size == -1 else group_size)
    sums = torch.empty(3, M, groups, dtype=torch.bfloat16, device=x.device) if later else target
    grid = (triton.cdiv(M, tile["BLOCK_M"]) * triton.cdiv(rows, tile["BLOCK_N"]), parts)
    int_linear_kernel[grid](
        x, words, scale, scale if zero is None else zero, scale if bias is None else bias, target, sums, M, rows, K,
        x.stride(0), target.stride(-2), chunks, triton.cdiv(chunks, parts), **known,
        PARTS=parts, EVEN_K=K % how.chunk == 0, SWAP=bool(tile.get("SWAP")), BLOCK_M=tile["BLOCK_M"],
        BLOCK_N=tile["BLOCK_N"], num_warps=tile["num_warps"], num_stages=tile["num_stages"])
    if later:
        return join(target, sums, scale, zero, 128 if known["PAIRED"] else 0, bias, y)
    return y if whole else sum_parts(target, bias, y)


def _dense(x: Tensor, words: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int,
           group_size: int, rows: int) -> Tensor:
    """The weight made dense, then cuBLAS."""
    if x.is_cuda or INTERPRETED:
        known = constants(bits, group_size, zero is not None, False, x.dtype == torch.bfloat16, True)
        weight = dense_integers(words, scale, zero, rows, x.shape[1], x.dtype, known)
    else:
        weight = dequantize(words, scale, zero, bits, group_size, rows, x.shape[1], x.dtype)
    return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


# ---------------------------------------------------------------------------------------------------- op
def check(x: Tensor, words: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int,
          group_size: int, rows: int) -> None:
    """Raises ValueError when dtypes, shapes, devices or the group size do not fit together."""
    how = layout(bits, group_size)
    checks.activations(x, x.shape[-1])
    K = x.shape[1]
    checks.group(group_size, K, reference.GROUPS)
    tall, chunks = -(-rows // 128) * 128, -(-K // how.chunk)
    checks.tensor("words", words, torch.int16, (tall // TILE_ROWS, chunks, TILE_ROWS, how.words, how.run), like=x)
    checks.tensor("scale", scale, (*checks.HALVES, torch.float32),
                  (tall // TILE_ROWS, max(1, chunks * how.groups // how.near), TILE_ROWS, how.near), like=x)
    if zero is not None:
        checks.tensor("zero", zero, torch.int16, tuple(scale.shape), like=x)
    if bias is not None:
        checks.tensor("bias", bias, (*checks.HALVES, torch.float32), (rows,), like=x)


def fake(x: Tensor, words: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int,
         group_size: int, rows: int) -> Tensor:
    return x.new_empty(x.shape[0], rows)


define("int_linear(Tensor x, Tensor words, Tensor scale, Tensor? zero, Tensor? bias, int bits, int group_size, "
       "int rows) -> Tensor", check=check, cpu=reference.int_linear, cuda=launch, fake=fake)


def int_linear(x: Tensor, weight: Packed, bias: Tensor | None = None) -> Tensor:
    """y (M, N) in x's dtype; `weight` from `pack`. Also torch.ops.llmops.int_linear, on the weight's parts."""
    if weight.columns != x.shape[-1]:
        raise ValueError(f"x is {tuple(x.shape)}; expected (M, {weight.columns})")
    y: Tensor = ops.int_linear(x, weight.words, weight.scale, weight.zero, bias, weight.bits, weight.group_size,
                               weight.rows)
    return y
