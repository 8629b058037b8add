"""Attention of one or a few new tokens over a quantized KV cache, which is read as it is stored.

    kv_attention(query, k_codes, k_scales, v_codes, v_scales, length, first, mask, scale, window, softcap, format)

At decode attention costs what it takes to read the cache, so codes are read and nothing dense is ever made of them:

    s_ij = scale (q_i . c_j) s_j            the scale of a key multiplies its score
    o_i  = sum_j (p_ij s'_j) c'_j / sum_j p_ij   the scale of a value multiplies its probability

so the tensor cores multiply codes, which float16 and bfloat16 hold exactly. At 4 bits a key is m_j + s_j c_j in a
turned space (`_kv.py`): q is turned, once, and m_j (sum of q) joins the score; the sum over values is turned back once.
The constants that `nibbles` leaves on codes are taken out of the sums: q . (1024 + c) = 1024 (sum of q) + q . c.

Split-KV (Dao et al. 2023, "Flash-Decoding"): a program takes one of `splits` segments of the keys for one key-value
head, all queries of the group and all new tokens as rows of one tile; a second kernel joins the segments. Where the
segments lie depends on `length` on the device, how many there are does not, so one CUDA graph serves every length. No
atomics: the same input gives the same bits.

The running maximum is that of s_ij + log2 s'_j, not of s_ij, so that p_ij s'_j is at most 1 whatever the values weigh,
and float16 neither overflows nor loses small ones.

Shapes: B batch, T new tokens, H key-value heads, G queries a head, D numbers a head, N room of the cache.
    query (B, H G, T, D) float16 or bfloat16; codes, scales as in kv_append.py
    length (B,) or (1,): keys that the last query may attend to; query t to length - (T - 1 - t)
    first (B,) or (1,) or None: the first key that counts (left padding)
    mask (B or 1, 1, T or 1, up to N) bool or None: True where a query may attend to a key
    window: how many keys back, its own included, 0 for all; softcap: c tanh(s / c) of scores, 0 for none
    -> (B, T, H G, D) in the type of query; 0 where nothing may be attended to
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import config
from ._interpret import dot, narrow
from ._kv import FORMATS, eights, exponent, halved, nibbles, power, turn
from ._kv_checks import check_attention
from ._library import define, ops
from ._triton import tl, triton
from .reference import kv_attention as reference

__all__ = ["attention_kernel", "join_kernel", "kv_attention", "rule", "splits_of", "tiles"]

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit  # type: ignore[untyped-decorator]
def _query(q_ptr, at, real, FORMAT: tl.constexpr, BLOCK_M: tl.constexpr, D: tl.constexpr):  # type: ignore[no-untyped-def]
    """(low half, high half, row sums, unit) of the queries (BLOCK_M, D) in float16, in units of a power of two no
    smaller than the largest of a row: bfloat16 fits whatever it holds.

    At 4 bits turned, in the order that `nibbles` gives, and the high half over 16, as its codes are 16 times too large.
    At 8 bits both halves are the whole.
    """
    i = tl.arange(0, D)
    q = tl.load(q_ptr + at[:, None] + i[None, :], mask=real[:, None], other=0.0).to(tl.float32)
    if FORMAT == 2:
        q = turn(q, BLOCK_M, D, False)
    largest = tl.max(tl.abs(q), 1)
    unit = tl.exp2(tl.ceil(tl.log2(tl.where(largest == 0.0, 1.0, largest))))
    q = halved(q / unit[:, None]).to(tl.float32)
    total = tl.sum(q, 1)
    if FORMAT == 2:
        half: tl.constexpr = D // 2
        fours: tl.constexpr = D // 8
        first, second = tl.split(tl.permute(tl.reshape(q, (BLOCK_M, 2, half)), (0, 2, 1)))
        first = tl.reshape(tl.permute(tl.reshape(first, (BLOCK_M, fours, 2, 2)), (0, 1, 3, 2)), (BLOCK_M, half))
        second = tl.reshape(tl.permute(tl.reshape(second, (BLOCK_M, fours, 2, 2)), (0, 1, 3, 2)), (BLOCK_M, half))
        low, high = halved(first), halved(second * 0.0625)
    else:
        low = halved(q)
        high = low
    return low, high, total, unit


@triton.jit  # type: ignore[untyped-decorator]
def _codes(at, here, FORMAT: tl.constexpr, EVEN: tl.constexpr):  # type: ignore[no-untyped-def]
    """A tile of codes. Rows that do not count need not be left out where they exist, and any bits of them are numbers;
    E4M3 has NaN, which no weight of 0 takes away."""
    if FORMAT == 1:
        codes = tl.load(at, mask=here[:, None], other=0.0)
    elif EVEN:
        codes = tl.load(at)
    else:
        codes = tl.load(at, mask=here[:, None], other=0)
    return codes


@triton.jit  # type: ignore[untyped-decorator]
def _values(at, here, KIND: tl.constexpr, FORMAT: tl.constexpr, EVEN: tl.constexpr):  # type: ignore[no-untyped-def]
    """A tile of codes of values, read two at a time (at: int16): a matrix product takes them across its rows, and
    single bytes laid out for that are copied to shared memory 8 bytes at a time in place of 16."""
    pairs = tl.load(at) if EVEN and FORMAT != 1 else tl.load(at, mask=here[:, None], other=0)
    return tl.interleave((pairs & 255).to(tl.int8), (pairs >> 8).to(tl.int8)).to(KIND, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def _scales(stored, FORMAT: tl.constexpr):  # type: ignore[no-untyped-def]
    """(scale, minimum) float32 of what is stored of a tile; at 4 bits both lie in one word."""
    if FORMAT == 2:
        scale = (stored << 16).to(tl.float32, bitcast=True)
        least = (stored & -65536).to(tl.float32, bitcast=True)
    else:
        scale = stored.to(tl.float32)
        least = scale
    return scale, least


@triton.jit  # type: ignore[untyped-decorator]
def attention_kernel(q_ptr, k_ptr, ks_ptr, v_ptr, vs_ptr, length_ptr, first_ptr, mask_ptr, part_ptr,  # type: ignore[no-untyped-def]
                     norm_ptr, scale, softcap, T, G, H, N, window, splits, masked, q_b, q_h, q_t, code_b, code_h,
                     code_t, scale_b, scale_h, scale_t, length_b, first_b, mask_b, mask_t, mask_n,
                     FORMAT: tl.constexpr, HAS_FIRST: tl.constexpr, MASK: tl.constexpr, HAS_WINDOW: tl.constexpr,
                     SOFTCAP: tl.constexpr, EVEN: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr,
                     BLOCK_N: tl.constexpr):
    """Program (segment, batch row and key-value head, tile of rows): sums of one segment, unnormalised, in float32.

    MASK: 0 none, 1 one row for all queries, 2 a row a query."""
    segment, pair = tl.program_id(0), tl.program_id(1)
    batch, head = (pair // H).to(tl.int64), (pair % H).to(tl.int64)
    rows = T * G
    row = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    real = row < rows
    token = row // G
    q_low, q_high, q_sum, unit = _query(q_ptr, batch * q_b + (head * G + row % G) * q_h + token * q_t, real, FORMAT,
                                        BLOCK_M, D)
    # What the constants on the codes add to a row of scores. Scores are computed in powers of two.
    rest = q_sum * 1152.0 if FORMAT == 0 else q_sum * 0.0
    if FORMAT == 2:
        rest = (tl.sum(q_low.to(tl.float32), 1) + tl.sum(q_high.to(tl.float32), 1)) * 1024.0
    none = tl.zeros((BLOCK_M, BLOCK_N), tl.float32) - rest[:, None]
    factor = unit * scale * (1.0 if SOFTCAP else LOG2E)
    q_sum = q_sum * factor
    length = tl.minimum(tl.load(length_ptr + batch * length_b).to(tl.int32), N)
    limit = length - (T - 1 - token)  # (BLOCK_M,): a row attends to keys below
    least = 0
    if HAS_FIRST:
        least = tl.maximum(tl.load(first_ptr + batch * first_b).to(tl.int32), 0)
    begin = least
    if HAS_WINDOW:
        begin = tl.maximum(begin, length - (T - 1) - window)
    begin = begin // BLOCK_N * BLOCK_N
    each = tl.cdiv(tl.cdiv(tl.maximum(length - begin, 0), BLOCK_N), splits) * BLOCK_N
    start = begin + segment * each
    stop = tl.minimum(start + each, length)

    width: tl.constexpr = D // 2 if FORMAT == 2 else D
    column = tl.arange(0, width)
    n = tl.arange(0, BLOCK_N)
    code_at = n[:, None] * code_t + column[None, :]
    pair_at = n[:, None] * (code_t // 2) + tl.arange(0, width // 2)[None, :]
    code_from = batch * code_b + head * code_h + start.to(tl.int64) * code_t
    scale_from = batch * scale_b + head * scale_h + start.to(tl.int64) * scale_t
    scale_at = n * scale_t
    k_ptr += code_from
    v_ptr += code_from
    ks_ptr += scale_from
    vs_ptr += scale_from
    if MASK > 0:
        mask_ptr += batch * mask_b + start.to(tl.int64) * mask_n
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    norm = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, width), tl.float32)
    acc_high = tl.zeros((BLOCK_M, width), tl.float32) if FORMAT == 2 else 0.0
    weight = tl.zeros((BLOCK_M,), tl.float32)  # sum of p s'
    shift = tl.zeros((BLOCK_M,), tl.float32)  # at 4 bits: sum of p m'
    here = (start + n < stop) & (start + n >= least)
    ks_next = tl.load(ks_ptr + scale_at, mask=here, other=0)
    vs_next = tl.load(vs_ptr + scale_at, mask=here, other=0)
    for at in tl.range(start, stop, BLOCK_N):
        key = at + n
        here = (key < stop) & (key >= least)
        k = _codes(k_ptr + code_at, here, FORMAT, EVEN)
        k_scale, k_least = _scales(ks_next, FORMAT)
        v_scale, v_least = _scales(vs_next, FORMAT)
        # Those of the next turn, a turn ahead and into registers: a copy of 2 or 4 bytes a key through shared memory
        # would cost more instructions than it hides.
        ks_ptr += BLOCK_N * scale_t
        vs_ptr += BLOCK_N * scale_t
        ks_next = tl.load(ks_ptr + scale_at, mask=key + BLOCK_N < stop, other=0)
        vs_next = tl.load(vs_ptr + scale_at, mask=key + BLOCK_N < stop, other=0)
        if FORMAT == 2:
            low, high = nibbles(k, BLOCK_N, width)
            s = dot(q_high, tl.trans(high), dot(q_low, tl.trans(low), none))
            s = s * factor[:, None] * k_scale[None, :] + q_sum[:, None] * k_least[None, :]
        else:
            s = dot(q_low, tl.trans(eights(k, FORMAT)), none) * factor[:, None] * k_scale[None, :]
        if SOFTCAP:
            s = softcap * LOG2E * (2.0 / (1.0 + power(s * LOG2E * -2.0 / softcap)) - 1.0)
        allowed = (key[None, :] < limit[:, None]) & here[None, :]
        if HAS_WINDOW:
            allowed &= key[None, :] >= limit[:, None] - window
        if MASK == 1:  # one for all rows: a number a key
            seen = tl.load(mask_ptr + n * mask_n, mask=here & (key < masked), other=0) != 0
            allowed &= seen[None, :]
        if MASK == 2:
            allowed &= tl.load(mask_ptr + token[:, None] * mask_t + (n * mask_n)[None, :],
                               mask=real[:, None] & (here & (key < masked))[None, :], other=0) != 0
        s = tl.where(allowed, s, float("-inf"))
        higher = tl.maximum(top, tl.max(s + exponent(tl.maximum(v_scale, 7.9e-31))[None, :], 1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        p = power(s - safe[:, None])
        fade = power(top - safe)
        norm = norm * fade + tl.sum(p, 1)
        pv = halved(p * v_scale[None, :])
        v = _values(v_ptr.to(tl.pointer_type(tl.int16)) + pair_at, here, v_ptr.dtype.element_ty, FORMAT, EVEN)
        if FORMAT != 1:
            weight = weight * fade + tl.sum(pv.to(tl.float32), 1)
        if FORMAT == 2:
            shift = shift * fade + tl.sum(p * v_least[None, :], 1)
            low, high = nibbles(v, BLOCK_N, width)
            acc = dot(pv, low, acc * fade[:, None])
            acc_high = dot(pv, high, acc_high * fade[:, None])
        else:
            acc = dot(pv, eights(v, FORMAT), acc * fade[:, None])
        top = higher
        k_ptr += BLOCK_N * code_t
        v_ptr += BLOCK_N * code_t
        if MASK > 0:
            mask_ptr += BLOCK_N * mask_n

    out = (pair.to(tl.int64) * rows + row) * splits + segment
    tl.store(norm_ptr + out * 2, top, mask=real)
    tl.store(norm_ptr + out * 2 + 1, norm, mask=real)
    if FORMAT == 2:
        # byte 4 a + 2 b + c of a row stands at column 4 a + 2 c + b of the tile
        true = column // 4 * 4 + column % 2 * 2 + column // 2 % 2
        acc = acc - (weight * 1024.0)[:, None] + shift[:, None]
        acc_high = (acc_high - (weight * 1024.0)[:, None]) * 0.0625 + shift[:, None]
        tl.store(part_ptr + out[:, None] * D + true[None, :], acc, mask=real[:, None])
        tl.store(part_ptr + out[:, None] * D + width + true[None, :], acc_high, mask=real[:, None])
    else:
        if FORMAT == 0:
            acc = acc - (weight * 1152.0)[:, None]
        tl.store(part_ptr + out[:, None] * D + column[None, :], acc, mask=real[:, None])


@triton.jit  # type: ignore[untyped-decorator]
def join_kernel(part_ptr, norm_ptr, out_ptr, T, G, H, splits,  # type: ignore[no-untyped-def]
                FORMAT: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr, CHUNK: tl.constexpr):
    """Program (row): the segments of one query joined, by their maxima; at 4 bits turned back."""
    at = tl.program_id(0).to(tl.int64)
    rows = T * G
    row = at % rows
    i = tl.arange(0, D)
    s = tl.arange(0, SPLITS)
    norm_ptr += at * splits * 2
    part_ptr += at * splits * D
    top = tl.load(norm_ptr + s * 2, mask=s < splits, other=float("-inf"))
    highest = tl.max(top, 0)
    safe = tl.where(highest == float("-inf"), 0.0, highest)
    norm = tl.load(norm_ptr + s * 2 + 1, mask=s < splits, other=0.0)
    total = tl.sum(norm * tl.exp2(top - safe), 0)
    y = tl.zeros((D,), tl.float32)
    c = tl.arange(0, CHUNK)
    for first in tl.static_range(0, SPLITS, CHUNK):
        weight = tl.exp2(tl.load(norm_ptr + (first + c) * 2, mask=first + c < splits, other=float("-inf")) - safe)
        part = tl.load(part_ptr + (first + c)[:, None] * D + i[None, :], mask=(weight > 0.0)[:, None], other=0.0)
        y += tl.sum(part * weight[:, None], 0)
    y = y / tl.where(total == 0.0, 1.0, total)
    if FORMAT == 2:
        y = tl.reshape(turn(tl.reshape(y, (1, D)), 1, D, True), (D,))
    batch, head, token, g = at // (rows * H), at // rows % H, row // G, row % G
    tl.store(out_ptr + ((batch * T + token) * H * G + head * G + g) * D + i, narrow(y, out_ptr.dtype.element_ty))


# ---------------------------------------------------------------------------------------------------- launch
def tiles(format: str, D: int, room: int, device: torch.device) -> config.Config:
    """BLOCK_N keys a turn; PROGRAMS: how many programs fill the device (two for each processor)."""
    tuned = config.pick("kv_attention", config.key(D, D, format=format), room, config.device_name(device.index))
    return tuned or rule(format, D, config.processors(device.index))


def rule(format: str, D: int, processors: int) -> config.Config:
    """Tiles where no table has an entry."""
    block = (128 if format == "int4" else 64) if D <= 128 else 32
    return {"BLOCK_N": block, "PROGRAMS": 2 * processors, "num_warps": 4, "num_stages": 3}


def splits_of(pairs: int, room: int, block: int, programs: int) -> int:
    """Segments for so many (batch row, head, tile) over a cache with room for so many tokens: enough programs to fill
    the device, none shorter than a tile, at most 128. Depends on no length, so that a CUDA graph holds for all."""
    return max(1, min(-(-programs // max(pairs, 1)), -(-room // block), 128))


def launch(query: Tensor, k_codes: Tensor, k_scales: Tensor, v_codes: Tensor, v_scales: Tensor, length: Tensor,
           first: Tensor | None, mask: Tensor | None, scale: float, window: int, softcap: float,
           format: str) -> Tensor:
    B, heads, T, D = query.shape
    H, N = k_codes.shape[1], k_codes.shape[2]
    G, device = heads // H, query.device
    out = torch.empty(B, T, heads, D, dtype=query.dtype, device=device)
    if out.numel() == 0:
        return out
    tile = tiles(format, D, N, device)
    block_m = 16 if T * G <= 16 else 32
    block_n = tile["BLOCK_N"] if block_m == 16 else min(tile["BLOCK_N"], 64)  # more rows take the registers of keys
    parts = triton.cdiv(T * G, block_m)
    splits = splits_of(B * H * parts, N, block_n, tile["PROGRAMS"])
    part = torch.empty(B * H * T * G, splits, D, dtype=torch.float32, device=device)
    norm = torch.empty(B * H * T * G, splits, 2, dtype=torch.float32, device=device)
    counts = length if first is None else first
    seen = k_codes if mask is None else mask.view(torch.uint8)
    steps = [0 if size == 1 else stride for size, stride in zip(seen.shape, seen.stride(), strict=True)]
    kind = 0 if mask is None else 1 if mask.shape[2] == 1 else 2
    if format == "int4":
        k_scales, v_scales = k_scales.view(torch.int32), v_scales.view(torch.int32)
    attention_kernel[(splits, B * H, parts)](
        query, k_codes, k_scales, v_codes, v_scales, length, counts, seen, part, norm, scale, softcap, T, G, H, N,
        window, splits, seen.shape[3], *query.stride()[:3], *k_codes.stride()[:3], *k_scales.stride()[:3],
        0 if length.shape[0] == 1 else length.stride(0), 0 if counts.shape[0] == 1 else counts.stride(0), steps[0],
        steps[2], seen.stride(3), FORMAT=FORMATS[format], HAS_FIRST=first is not None, MASK=kind,
        HAS_WINDOW=window > 0, SOFTCAP=softcap > 0, EVEN=N % block_n == 0, D=D, BLOCK_M=block_m,
        BLOCK_N=block_n, num_warps=tile["num_warps"], num_stages=tile["num_stages"])
    padded = triton.next_power_of_2(splits)
    join_kernel[(B * H * T * G,)](part, norm, out, T, G, H, splits, FORMAT=FORMATS[format], D=D, SPLITS=padded,
                                  CHUNK=min(padded, 16), num_warps=4)
    return out


def kv_attention(query: Tensor, k_codes: Tensor, k_scales: Tensor, v_codes: Tensor, v_scales: Tensor, length: Tensor,
                 first: Tensor | None = None, mask: Tensor | None = None, *, scale: float, window: int = 0,
                 softcap: float = 0.0, format: str) -> Tensor:
    """(B, T, H G, D): attention of the last T tokens over the cache. Raises ValueError for what does not fit."""
    out: Tensor = ops.kv_attention(query, k_codes, k_scales, v_codes, v_scales, length, first, mask, scale, window,
                                   softcap, format)
    return out


def _fake(query: Tensor, *arguments: object) -> Tensor:
    B, heads, T, D = query.shape
    return torch.empty(B, T, heads, D, dtype=query.dtype, device=query.device)


define("kv_attention(Tensor query, Tensor k_codes, Tensor k_scales, Tensor v_codes, Tensor v_scales, Tensor length, "
       "Tensor? first, Tensor? mask, float scale, int window, float softcap, str format) -> Tensor",
       check=check_attention, cpu=reference.kv_attention, cuda=launch, fake=_fake)
